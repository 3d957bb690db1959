"""Measures that are networks of transformers: DINOv2, VideoMAE, CLIP's image embeddings and the CLIP score."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.eval.features.measure import Measure, NetworkMeasure, network_fingerprint
from diffdistill.eval.features.preprocessing import CLIP, IMAGENET, bicubic, clip_pixels, middle, normalised


def _pretrained(key: str, cls: Any, kind: str, source: str) -> Any:
    """A network of transformers from a folder or the hub, by safetensors only, with every weight there."""
    from transformers import AutoConfig

    fetch = "" if Path(source).exists() else f"`hf download {source}` where there is a network, or "
    help_ = f"{fetch}give {key}=FOLDER of a {cls.__name__}"
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type != kind:
            raise UserError(f"weights: {key}: {source!r} holds a {config.model_type!r} network and not a {kind!r}")
        loaded = cls.from_pretrained(source, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # the hub client, transformers and safetensors raise a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"weights: {key}: {source!r} cannot be loaded ({reason}); {help_}") from error
    network, info = loaded
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise UserError(f"weights: {key}: {source!r} lacks weights, {sorted(map(str, wrong))[0]} for one; {help_}")
    return network.eval().requires_grad_(False)


def _called(source: str) -> str:
    """A hub id as it is, a folder by its last name."""
    return Path(source).name if Path(source).exists() else source


def _pooled(output: Any) -> Tensor:
    """transformers 5 wraps what transformers 4 returned."""
    return output if isinstance(output, Tensor) else output.pooler_output


def dinov2(key: str, device: torch.device, weights: str | None) -> Measure:
    """FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675) as EDM2 computes it (Karras et al. 2024, arXiv:2312.02696)."""
    from transformers import Dinov2Model

    source, side = weights or "facebook/dinov2-large", 224
    network = _pretrained(key, Dinov2Model, "dinov2", source)
    preprocessing = f"bicubic antialiased to {side} without rounding, ImageNet mean and deviation, 8 bit; class token"
    fingerprint = network_fingerprint(network, preprocessing, network.config)
    _positions(network, side // network.config.patch_size)
    network.to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        x = F.interpolate(images.to(device).float(), (side, side), mode="bicubic", antialias=True)
        return {"features": _pooled(network(normalised(x, IMAGENET)))}

    return NetworkMeasure(key, f"DINOv2 {_called(source)}, {preprocessing}", fingerprint, columns)


def _positions(network: Any, patches: int) -> None:
    """Brings the position embeddings to patches x patches as the authors' code does, with scale (patches + 0.1) / M.

    transformers leaves the 0.1 out, which shifts the grid by up to a tenth of a patch and with it FD-DINOv2.
    """
    embeddings = network.embeddings
    token, grid = embeddings.position_embeddings.split([1, embeddings.position_embeddings.shape[1] - 1], 1)
    across = math.isqrt(grid.shape[1])
    if across != patches:
        square = grid.unflatten(1, (across, across)).permute(0, 3, 1, 2)
        scale = (patches + 0.1) / across
        square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
        grid = square.permute(0, 2, 3, 1).flatten(1, 2)
    embeddings.position_embeddings = nn.Parameter(torch.cat([token, grid], 1), requires_grad=False)


def videomae(key: str, device: torch.device, weights: str | None) -> Measure:
    """Features of a Fréchet video distance: VideoMAE's (Tong et al. 2022, arXiv:2203.12602).

    They see motion, where those of I3D see frames above all (Ge et al. 2024, arXiv:2404.12391). As many frames as the
    network takes, evenly spread from the first to the last, whole ones at its size.
    """
    from transformers import VideoMAEForVideoClassification

    source = weights or "MCG-NJU/videomae-base-finetuned-kinetics"
    model = _pretrained(key, VideoMAEForVideoClassification, "videomae", source)
    side, frames = model.config.image_size, model.config.num_frames
    preprocessing = (
        f"{frames} frames evenly spread, bicubic antialiased to {side} without rounding, ImageNet mean and deviation, "
        "8 bit; mean of the last layer's tokens, normalised as its classifier reads it"
    )
    network = nn.ModuleDict({"encoder": model.videomae} | ({} if model.fc_norm is None else {"norm": model.fc_norm}))
    fingerprint = network_fingerprint(network, preprocessing, model.config)
    network.to(device)

    def columns(videos: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        if videos.ndim != 5:
            raise UserError(f"protocol: {key!r} measures videos, and these are images; name another protocol")
        chosen = torch.linspace(0, videos.shape[2] - 1, frames).round().long()
        stills = videos[:, :, chosen].transpose(1, 2).flatten(0, 1).to(device).float()
        stills = F.interpolate(stills, (side, side), mode="bicubic", antialias=True)
        clips = normalised(stills, IMAGENET).unflatten(0, (len(videos), frames))
        tokens = network["encoder"](clips).last_hidden_state
        return {"features": network["norm"](tokens.mean(1)) if "norm" in network else tokens[:, 0]}

    return NetworkMeasure(key, f"VideoMAE {_called(source)}, {preprocessing}", fingerprint, columns, takes_videos=True)


def clip(key: str, device: torch.device, weights: str | None) -> Measure:
    """CMMD's features (Jayasumana et al. 2024, arXiv:2401.09603): unit image embeddings of CLIP ViT-L/14 at 336."""
    from transformers import CLIPModel

    source = weights or "openai/clip-vit-large-patch14-336"
    model = _pretrained(key, CLIPModel, "clip", source)
    side = model.config.vision_config.image_size
    preprocessing = f"middle square, bicubic antialiased to {side}, 8 bit; unit length"
    network = nn.ModuleDict({"vision": model.vision_model, "projection": model.visual_projection})
    fingerprint = network_fingerprint(network, preprocessing, model.config)
    network.to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        square = bicubic(middle(images, min(images.shape[2:])), side, side)
        pooled = _pooled(network["vision"](pixel_values=normalised(square.to(device), CLIP)))
        return {"features": F.normalize(network["projection"](pooled), dim=1)}

    return NetworkMeasure(key, f"CLIP {_called(source)}, {preprocessing}", fingerprint, columns)


def clip_score(key: str, device: torch.device, weights: str | None) -> Measure:
    """100 max(cos, 0) of image and caption; Hessel et al. 2021 (arXiv:2104.08718) scale by 2.5 and begin the caption
    with "A photo depicts", those who judge text to image (and torchmetrics) as here.
    """
    from transformers import CLIPModel, CLIPTokenizer

    source = weights or "openai/clip-vit-base-patch32"
    network = _pretrained(key, CLIPModel, "clip", source)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source)
    except Exception as error:  # as above
        raise UserError(f"weights: {key}: {source!r} has no CLIP tokenizer; `hf download {source}`") from error
    side, words = network.config.vision_config.image_size, network.config.text_config.max_position_embeddings
    preprocessing = (
        f"short side bicubic antialiased to {side}, middle square, 8 bit; captions cut at {words} tokens; "
        "100 max(cos, 0)"
    )
    vocabulary = hashlib.blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=8).hexdigest()
    fingerprint = network_fingerprint(network, f"{preprocessing} {vocabulary}", network.config)
    network.to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        if captions is None:
            raise UserError(f"measure: {key!r} compares images with captions, and there are none; leave it out")
        text = tokenizer(list(captions), padding=True, truncation=True, max_length=words, return_tensors="pt")
        pixels = normalised(clip_pixels(images, side).to(device), CLIP)
        of_images = _pooled(network.get_image_features(pixel_values=pixels))
        of_text = _pooled(
            network.get_text_features(
                input_ids=text["input_ids"].to(device), attention_mask=text["attention_mask"].to(device)
            )
        )
        return {"score": 100 * F.cosine_similarity(of_images, of_text).clamp_min(0)}

    return NetworkMeasure(key, f"CLIP {_called(source)}, {preprocessing}", fingerprint, columns, conditional=True)
