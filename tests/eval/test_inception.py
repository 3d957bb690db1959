"""Our Inception-v3 against formulas, against itself without the tricks, and behind torchmetrics' FID.

`tests/inception_peers.py` compares it with pytorch-fid's and torch-fidelity's networks in their own environment.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffdistill.eval.features.inception import (
    BlockC,
    BlockE,
    Convolution,
    Inception,
    folded,
    load_inception,
    resize_clean,
    resize_tf1,
)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random weights that keep the activations' size, and normalisations that are not the identity."""
    g = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.normal_(0, (2 / part.weight[0].numel()) ** 0.5, generator=g)
        elif isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.weight.uniform_(0.5, 1.5, generator=g)
            part.running_var.uniform_(0.5, 1.5, generator=g)
            part.bias.normal_(0, 0.2, generator=g)
            part.running_mean.normal_(0, 0.2, generator=g)


@pytest.fixture(scope="module")
def network() -> Inception:
    network = Inception()
    randomise(network)
    return network


def pictures(n: int, *size: int, seed: int = 0, channels: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, *size), generator=g, dtype=torch.uint8)


@pytest.fixture(scope="module")
def features(network: Inception) -> Tensor:
    return network(pictures(4, 40, 52))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def tf1_pixel(image: np.ndarray, side: int) -> Iterator[tuple[int, int, float]]:
    """The formula of TensorFlow 1, one pixel after the other."""
    height, width = image.shape
    for row in range(side):
        for column in range(side):
            y, x = row * height / side, column * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            yield row, column, upper + (lower - upper) * (y - top)


@pytest.mark.parametrize("size", [(8, 8), (5, 13), (90, 61), (37, 37)])
def test_resize_is_tensorflows(size: tuple[int, int]) -> None:
    image = pictures(1, *size, channels=1)
    ours = resize_tf1(image.double(), 37)[0, 0]
    for row, column, expected in tf1_pixel(image[0, 0].double().numpy(), 37):
        assert abs(ours[row, column].item() - expected) < 2e-3  # positions are float32, values 0..255


def test_the_two_resizes_differ() -> None:
    image = pictures(2, 32, 32).float()
    half_pixel = F.interpolate(image, (299, 299), mode="bilinear", align_corners=False)
    assert (resize_tf1(image) - half_pixel).abs().mean() > 1
    own, theirs = Inception(), Inception("pytorch-fid")
    inputs = pictures(2, 32, 32)
    torch.testing.assert_close(own.preprocess(inputs), (resize_tf1(image) - 128) / 128)
    torch.testing.assert_close(theirs.preprocess(inputs), half_pixel / 127.5 - 1, rtol=0, atol=1e-5)


def test_convolution_by_hand() -> None:
    layer = Convolution(3, 5, (3, 1)).double().eval()
    randomise(layer)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    bn = layer.bn
    assert isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
    padded = F.pad(x, (0, 0, 1, 1))
    summed = torch.stack([padded[:, :, i : i + 6] for i in range(3)], -1)
    convolved = torch.einsum("bchwk,ock->bohw", summed, layer.conv.weight[..., 0])
    mean, variance, weight, bias = (v.view(-1, 1, 1) for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    expected = ((convolved - mean) / (variance + 1e-3).sqrt() * weight + bias).clamp_min(0)
    torch.testing.assert_close(layer(x), expected)
    layer.fold()
    assert isinstance(layer.bn, nn.Identity)
    torch.testing.assert_close(layer(x), expected)


def test_average_pool_leaves_the_padding_out() -> None:
    block = BlockC(4, 8).eval()
    randomise(block)
    x = torch.randn(1, 4, 5, 5)
    pooled = torch.stack(
        [
            torch.stack([x[0, :, max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].mean((1, 2)) for c in range(5)], 1)
            for r in range(5)
        ],
        1,
    )
    torch.testing.assert_close(block(x)[0, -192:], block.branch_pool(pooled[None])[0], rtol=1e-4, atol=1e-5)


def test_only_the_last_block_pools_by_maximum(network: Inception) -> None:
    x = torch.rand(1, 6, 5, 5)
    for pool in ("average", "maximum"):
        block = BlockE(6, pool).eval()
        randomise(block)
        largest = block.branch_pool(F.max_pool2d(x, 3, 1, 1))
        assert torch.equal(block(x)[:, -192:], largest) == (pool == "maximum")
    assert [network.Mixed_7b.pool, network.Mixed_7c.pool] == ["average", "maximum"]


def test_shapes(network: Inception, features: Tensor) -> None:
    assert features.shape == (4, 2048) and features.isfinite().all() and features.std() > 0.1
    logits = network.logits(features)
    torch.testing.assert_close(logits, network.fc(features) - network.fc.bias, rtol=1e-4, atol=1e-4)
    assert not network.train().training and not any(p.requires_grad for p in network.parameters())
    numbers = sum(v.numel() for name, v in network.state_dict().items() if not name.endswith("num_batches_tracked"))
    assert 0 < 95_628_359 - 4 * numbers < 100_000  # the standard file's bytes


def test_grey_is_repeated(network: Inception) -> None:
    grey = pictures(2, 30, 30, channels=1)
    torch.testing.assert_close(network(grey), network(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="uint8"):
        network(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="1 or 3"):
        network(pictures(1, 8, 8, channels=4))


def test_folded_is_equal(network: Inception, features: Tensor) -> None:
    fast = folded(network)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fast.modules())
    assert any(isinstance(part, nn.BatchNorm2d) for part in network.modules())
    assert relative(fast(pictures(4, 40, 52)), features) < 1e-5


def test_loads_by_name(network: Inception, features: Tensor) -> None:
    weights = network.state_dict()
    without = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch3x3dbl_3b.bn.running_var", "fc.bias"} <= without.keys()
    images = pictures(4, 40, 52)
    assert torch.equal(load_inception(without)(images), features)
    assert not torch.equal(load_inception(weights, "pytorch-fid")(images), features)
    with pytest.raises(ValueError, match=r"fc\.bias is missing or of another shape \(1 such"):
        load_inception({name: value for name, value in without.items() if name != "fc.bias"})
    with pytest.raises(ValueError, match=r"fc\.weight"):
        load_inception({**without, "fc.weight": torch.zeros(1000, 2048)})


class Few(nn.Module):
    """Means of four groups of features, so that a few images have a covariance of full rank."""

    num_features = 4

    def __init__(self, network: Inception) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).unflatten(1, (self.num_features, -1)).mean(2)


def test_fid_behind_torchmetrics_is_scipys(network: Inception) -> None:
    """torchmetrics takes the module as it is; its FID is the formula on our folded features, by scipy in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = pictures(8, 20, 20, seed=1), pictures(8, 20, 20, seed=2) // 2
    fid = FrechetInceptionDistance(feature=Few(network))
    fid.update(real, real=True)
    fid.update(fake, real=False)
    p, q = (Few(folded(network))(part).double().numpy() for part in (real, fake))
    s, t = (np.cov(part, rowvar=False) for part in (p, q))
    root = scipy.linalg.sqrtm(s @ t).real
    expected = np.square(p.mean(0) - q.mean(0)).sum() + np.trace(s + t - 2 * root)
    assert fid.compute().item() == pytest.approx(expected, rel=1e-4)


def test_clean_resize_is_pillows_in_float() -> None:
    images = pictures(2, 40, 40, seed=3)
    expected = [
        [
            np.asarray(Image.fromarray(c.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
            for c in i
        ]
        for i in images
    ]
    resized = resize_clean(images.float(), 299)
    assert (resized - torch.from_numpy(np.array(expected))).abs().max() < 1e-2
    smaller = resize_clean(images.float(), 16)
    by_hand = [np.asarray(Image.fromarray(c.numpy().astype(np.float32)).resize((16, 16), Image.Resampling.BICUBIC))
               for c in images[0]]  # fmt: skip
    assert (smaller[0] - torch.from_numpy(np.array(by_hand))).abs().max() < 1e-2
