"""Inception-v3 as FID and the Inception Score use it, the TensorFlow graph of 2015-12-05, without torchvision.

It differs from other Inception-v3s: average pools leave the padding out of the mean, the last block pools by
maximum, there are 1008 logits, and the network's own resize is that of TensorFlow 1. Parameters are named as in
the weights files of pytorch-fid and of torch-fidelity, which are one and the same file under two names.

- Szegedy et al. 2015 (arXiv:1512.00567): the network. Heusel et al. 2017 (arXiv:1706.08500): FID.
- Salimans et al. 2016 (arXiv:1606.03498): the Inception Score.
- Parmar et al. 2021 (arXiv:2104.11222): how much the resize changes FID.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299
WIDTH = 2048
LOGITS = 1008
Resize = Literal["tf1", "pytorch-fid", "clean"]


def resize_clean(x: Tensor, side: int = SIDE) -> Tensor:
    """Bicubic and antialiased, in float and not rounded, as clean-fid (Pillow, channel by channel)."""
    if tuple(x.shape[2:]) == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bicubic", antialias=True)


def resize_tf1(x: Tensor, side: int = SIDE) -> Tensor:
    """Bilinear as TensorFlow 1 does it: pixel i of the output lies at i * in / out of the input, (B, C, side, side).

    So the picture moves up and left by half a pixel against `F.interpolate`; no antialiasing.
    """
    for dim in (3, 2):
        # In float32, as TensorFlow computes it, whatever the dtype of x.
        at = torch.arange(side, dtype=torch.float32, device=x.device) * (x.shape[dim] / side)
        low = at.long()
        high = (low + 1).clamp_max(x.shape[dim] - 1)
        share = (at - low).to(x.dtype).view([-1 if d == dim else 1 for d in range(4)])
        before = x.index_select(dim, low)
        x = before + (x.index_select(dim, high) - before) * share
    return x


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; after `fold`, convolution with bias and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2, width // 2) if same else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Convolution, normalisation and ReLU: (B, inputs, H, W) to (B, outputs, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """The normalisation's scale and shift go into the convolution, computed in float64."""
        bn = self.bn
        assert isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        dtype = self.conv.weight.dtype
        self.conv.weight = _frozen((self.conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
        self.conv.bias = _frozen((bn.bias.double() - bn.running_mean.double() * scale).to(dtype))
        self.bn = nn.Identity()


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=False)


def _pool_average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _chain(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class BlockA(nn.Module):
    """35x35: 1x1, 5x5, two 3x3, average pool."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64, 1)
        self.branch5x5_1 = Convolution(inputs, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, 35, 35) to (B, 224 + pooled, 35, 35)."""
        five = _chain(x, self.branch5x5_1, self.branch5x5_2)
        three = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_pool_average(x))], 1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inputs, 384, 3, stride=2, same=False)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, 35, 35) to (B, 480 + inputs, 17, 17)."""
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17x17: 1x1, 7x7 in two, 7x7 in four, average pool."""

    def __init__(self, inputs: int, middle: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 192, 1)
        self.branch7x7_1 = Convolution(inputs, middle, 1)
        self.branch7x7_2 = Convolution(middle, middle, (1, 7))
        self.branch7x7_3 = Convolution(middle, 192, (7, 1))
        self.branch7x7dbl_1 = Convolution(inputs, middle, 1)
        self.branch7x7dbl_2 = Convolution(middle, middle, (7, 1))
        self.branch7x7dbl_3 = Convolution(middle, middle, (1, 7))
        self.branch7x7dbl_4 = Convolution(middle, middle, (7, 1))
        self.branch7x7dbl_5 = Convolution(middle, 192, (1, 7))
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, 17, 17) to (B, 768, 17, 17)."""
        seven = _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = _chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        double = _chain(double, self.branch7x7dbl_4, self.branch7x7dbl_5)
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_pool_average(x))], 1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(inputs, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2, same=False)
        self.branch7x7x3_1 = Convolution(inputs, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, 17, 17) to (B, 512 + inputs, 8, 8)."""
        three = _chain(x, self.branch3x3_1, self.branch3x3_2)
        seven = _chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8x8: 1x1, 3x3 side by side, 3x3 and then side by side, average pool; the last of the two pools by maximum."""

    def __init__(self, inputs: int, pool: Literal["average", "maximum"]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Convolution(inputs, 320, 1)
        self.branch3x3_1 = Convolution(inputs, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, 8, 8) to (B, 2048, 8, 8)."""
        three = self.branch3x3_1(x)
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = _pool_average(x) if self.pool == "average" else F.max_pool2d(x, 3, stride=1, padding=1)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """Images uint8 (B, 1 or 3, H, W) to the features of FID (B, 2048); grey is repeated to three channels.

    resize: "tf1", TensorFlow's own bilinear and (x - 128) / 128, as torch-fidelity, StyleGAN and EDM measure; or
    "pytorch-fid", `F.interpolate`'s bilinear (half-pixel centres) and 2 x / 255 - 1, as that package does. The two
    give different FIDs, which must not be compared. Random until `load_state_dict`; always in eval mode, frozen.
    """

    def __init__(self, resize: Resize = "tf1") -> None:
        super().__init__()
        self.resize = resize
        self.num_features = WIDTH  # torchmetrics asks for it
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, same=False)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, "average")
        self.Mixed_7c = BlockE(2048, "maximum")
        self.fc = nn.Linear(WIDTH, LOGITS)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Inception":
        """Stays in eval mode, whatever the mode."""
        return super().train(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """The network's input (B, 3, 299, 299), about [-1, 1]. Raises ValueError unless uint8 (B, 1 or 3, H, W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"want uint8 images (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
        x = images.to(self.fc.weight.dtype)
        if self.resize == "tf1":
            x = (resize_tf1(x) - 128) / 128
        elif self.resize == "clean":
            x = (resize_clean(x) - 128) / 128
        else:
            x = 2 * F.interpolate(x / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
        return x.expand(-1, 3, -1, -1)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of images uint8 (B, 1 or 3, H, W). Raises ValueError for other images."""
        x = self.preprocess(images)
        if self.Conv2d_1a_3x3.conv.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(_chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3), 3, stride=2)
        x = F.max_pool2d(_chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3), 3, stride=2)
        x = _chain(x, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a)
        x = _chain(x, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)
        return _chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c).mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """The Inception Score's logits (B, 1008) of features (B, 2048), without the bias, as all published scores."""
        return features @ self.fc.weight.T


def load_inception(weights: dict[str, Tensor], resize: Resize = "tf1") -> Inception:
    """The network with the weights of either standard file. Raises ValueError if names or shapes do not fit."""
    network = Inception(resize)
    # One of the two converters leaves the counters out, which nothing reads in eval mode.
    expected = network.state_dict()
    # One of the two converters leaves the counters out, which nothing reads in eval mode.
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    wrong = [n for n in needed if n not in weights or weights[n].shape != expected[n].shape]
    if wrong:
        raise ValueError(f"{wrong[0]} is missing or of another shape ({len(wrong)} such in all)")
    network.load_state_dict({name: weights[name] for name in needed}, strict=False)
    return network


def folded(network: Inception) -> Inception:
    """A copy for inference: batch normalisation inside the convolutions, channels last; equal to rounding errors."""
    fast = copy.deepcopy(network)
    for module in fast.modules():
        if isinstance(module, Convolution):
            module.fold()
    return fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
