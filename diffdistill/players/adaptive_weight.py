"""The weight of each time that a continuous-time consistency model learns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class AdaptiveWeight(nn.Module):
    """w (B,) of the angles t (B,), 0 at the start: a linear layer on waves of ln tan(t), much as EDM2 has it."""

    def __init__(self, waves: int = 8):
        super().__init__()
        self.linear = nn.Linear(2 * waves, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) for t (B,)."""
        level = torch.log(torch.tan(t).abs()).clamp(-8, 8)
        waves = torch.arange(1, self.linear.in_features // 2 + 1, device=t.device)
        phase = level[:, None] * waves * math.pi / 16
        return self.linear(torch.cat([phase.sin(), phase.cos()], 1).to(self.linear.weight))[:, 0]
