"""QwenImageTransformer2DModel: Qwen-Image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.core.denoiser import Call, Cond, FeatureMap
from diffdistill.families._family import (
    ATTENTION,
    PATCHES,
    Autoencoder,
    Family,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    pack,
    plain_text,
    token_map,
    unpack,
)
from diffdistill.families._flow import decode_video, encode_video, flow_schedule
from diffdistill.players.teacher import Teacher

_WORDS = 512  #: tokens of a prompt at most, as the pipeline's own call


def _call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    # Padding under the mask changes nothing, neither attention nor positions: cutting it would read the mask.
    shapes = [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)
    output = network(pack(x), timestep=time / 1000, img_shapes=shapes, return_dict=False, **cond)[0]
    return unpack(output, x.shape[1:])


def _rescale(guided: Tensor, conditional: Tensor) -> Tensor:
    """The guided velocity as long as the conditional one in every token."""
    tokens = pack(guided)
    norms = pack(conditional).norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
    return unpack(tokens * norms, guided.shape[1:])


def qwen_teacher(name: str, network: Any, source: Source, call: Call, feature_map: FeatureMap) -> Teacher:
    """The teacher of a family whose network is Qwen-Image's."""
    config = network.config
    factor = AUTOENCODER.factor(source.config("vae"))
    size = latent_size(name, factor, 128 * factor, source.resolution, 2)
    return latent_teacher(
        name,
        network,
        source,
        (config.in_channels // 4, *size),
        flow_schedule(source.scheduler, "given", size[0] * size[1] // 4),
        call,
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=feature_map,
        rescale=_rescale,
    )


def _teacher(network: Any, source: Source) -> Teacher:
    return qwen_teacher("qwen_image", network, source, _call, token_map)


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds, mask = pipe.encode_prompt(list(prompts), max_sequence_length=_WORDS)
    if mask is None:  # all of one length
        mask = embeds.new_ones(embeds.shape[:2])
    missing = _WORDS - embeds.shape[1]
    return {
        "encoder_hidden_states": F.pad(embeds, (0, 0, 0, missing)),
        "encoder_hidden_states_mask": F.pad(mask.bool(), (0, missing)),
    }


AUTOENCODER = Autoencoder(
    lambda config: 2 ** len(config["temperal_downsample"]),
    lambda vae, images: encode_video(vae, images.unsqueeze(2)).squeeze(2),
    lambda vae, latents: decode_video(vae, latents.unsqueeze(2)).squeeze(2),
    lambda config: config["z_dim"],
    network="AutoencoderKLQwenImage",
    numbers=("latents_mean", "latents_std"),
)

FAMILY = Family(
    "qwen_image",
    "Qwen-Image",
    ("QwenImagePipeline",),
    "transformer",
    "QwenImageTransformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=AUTOENCODER,
    text=plain_text(("tokenizer", "text_encoder"), _encode, negative=" "),
    arguments=lambda steps: {"num_inference_steps": steps, "true_cfg_scale": 1.0},
    guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": " "},
    packing=PATCHES,
    flow_grid="given",
    stock_guidance="u + g (c - u), as long as c in every token; g is true_cfg_scale",
    single_file=True,
)
