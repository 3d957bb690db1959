"""A generator that is the equilibrium of a transformer with tied weights (Geng et al. 2023, arXiv:2401.08639).

This file needs nothing of this package: an exported folder holds a copy of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a perceptron, each beside its input; what is injected is added to queries, keys and values."""

    def __init__(self, width: int, heads: int, ratio: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))

    def forward(self, h: Tensor, injected: Tensor | None) -> Tensor:
        """Tokens (B, N, width) of tokens, with (B, N or 1, 3 width) injected."""
        qkv = self.qkv(self.norms[0](h))
        if injected is not None:
            qkv = qkv + injected
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norms[1](h))


class EquilibriumTransformer(nn.Module):
    """Noise -> sample: z* = f(z*, u), where f is a few blocks and u is injected into the attention of each.

    u is what other blocks, which are run once, make of the noise's patches. f is applied `iterations` times to z = 0,
    and what it comes to is decoded, patch by patch, into G.

    Args:
        shape: of a sample, (channels, height, width), or (n,) of a vector, each number of which is a patch.
        labels: how many class labels there are; None: none is taken.
        width: of a token, a multiple of 4.
        depth: blocks that are run once.
        equilibrium_depth: blocks of f.
        heads: of each attention.
        patch: the side of a patch.
        iterations: how often f is applied.
        ratio: of a perceptron's width to a token's, in f and in the other blocks.
        of_input, of_image: what a call gives is `of_input` x + `of_image` G(x), as its sampler takes outputs.
    """

    every = False  #: whether a call gives what comes of each iteration

    def __init__(
        self, shape: Sequence[int] = (1, 8, 8), labels: int | None = None, width: int = 64, depth: int = 6,
        equilibrium_depth: int = 3, heads: int = 1, patch: int = 1, iterations: int = 6,
        ratio: Sequence[int] = (6, 4), of_input: float = 0.0, of_image: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.described: dict[str, Any] = {
            "shape": [*shape], "labels": labels, "width": width, "depth": depth,
            "equilibrium_depth": equilibrium_depth, "heads": heads, "patch": patch, "iterations": iterations,
            "ratio": [*ratio], "of_input": of_input, "of_image": of_image,
        }  # fmt: skip
        self.channels, *sides = shape if len(shape) == 3 else (1, *shape, 1)
        self.patch, self.iterations, self.weights = patch, iterations, (of_input, of_image)
        self.grid = (sides[0] // patch, sides[1] // patch)
        self.read = nn.Linear(self.channels * patch**2, width)
        self.labels = None if labels is None else nn.Embedding(labels, 3 * width)
        self.blocks = nn.ModuleList(Block(width, heads, ratio[1]) for _ in range(depth))
        self.inject = nn.Linear(width, 3 * width * equilibrium_depth, bias=False)
        self.equilibrium = nn.ModuleList(Block(width, heads, ratio[0]) for _ in range(equilibrium_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.write = nn.Linear(width, self.channels * patch**2)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        if self.labels is not None:
            nn.init.normal_(self.labels.weight, std=0.02)
        nn.init.zeros_(self.write.weight)

    def injected(self, x: Tensor, class_labels: Tensor | None) -> list[Tensor]:
        """What each block of f gets, (B, N, 3 width), of noise x (B, *shape) and labels (B,)."""
        image = x.reshape(len(x), self.channels, self.grid[0] * self.patch, self.grid[1] * self.patch)
        tokens = F.pixel_unshuffle(image, self.patch).flatten(2).transpose(1, 2)
        h = self.read(tokens)
        h = h + positions(self.grid, h.shape[-1], h.device).to(h)
        of_class = None
        if self.labels is not None:
            if class_labels is None:
                raise ValueError("class_labels: none are given, and this network has classes")
            of_class = self.labels(class_labels.reshape(-1).expand(len(x)))[:, None]
        for block in self.blocks:
            h = block(h, of_class)
        parts = self.inject(h).chunk(len(self.equilibrium), -1)
        return list(parts) if of_class is None else [part + of_class for part in parts]

    def step(self, z: Tensor, injected: Sequence[Tensor]) -> Tensor:
        """f(z, u) of tokens z (B, N, width)."""
        for block, part in zip(self.equilibrium, injected, strict=True):
            z = block(z, part)
        return z

    def states(self, injected: Sequence[Tensor]) -> list[Tensor]:
        """z after none, one .. of the iterations, each (B, N, width)."""
        states = [torch.zeros_like(injected[0][..., : injected[0].shape[-1] // 3])]
        for _ in range(self.iterations):
            states.append(self.step(states[-1], injected))
        return states

    def image(self, z: Tensor) -> Tensor:
        """G (B, channels, height, width) of tokens z (B, N, width)."""
        return F.pixel_shuffle(self.write(self.norm(z)).transpose(1, 2).unflatten(2, self.grid), self.patch)

    def forward(self, x: Tensor, time: Any = None, class_labels: Tensor | None = None) -> Tensor:
        """The output (B, *shape) of noise x (B, *shape) and labels (B,), whatever the time.

        While `every` is set, those of all iterations, (iterations, B, *shape).
        """
        states = self.states(self.injected(x, class_labels))
        of_input, of_image = self.weights
        images = torch.stack([self.image(z) for z in (states[1:] if self.every else states[-1:])])
        output = of_input * x + of_image * images.reshape(len(images), *x.shape)
        return output if self.every else output[0]


def positions(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """(rows x columns, width) sines and cosines of row and column, with periods from 2 pi to 10,000 times that.

    A quarter of the width is for each, as in MAE and DiT.
    """
    rate = torch.exp(-math.log(1e4) * torch.arange(width // 4, device=device) / (width // 4))
    row, column = (torch.arange(n, device=device)[:, None] * rate for n in grid)
    row, column = (torch.cat([phase.sin(), phase.cos()], 1) for phase in (row, column))
    both = (row[:, None].expand(-1, grid[1], -1), column[None].expand(grid[0], -1, -1))
    return torch.cat(both, -1).flatten(0, 1)
