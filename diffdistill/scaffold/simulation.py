"""Backward simulation: a student of several steps is trained on inputs that its own sampler makes.

Yin et al. 2024, arXiv:2405.14867, section 4.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.players.sampler import Sampler
from diffdistill.rng import generator
from diffdistill.scaffold.method import Batch


def simulated_input(sampler: Sampler, batch: Batch) -> tuple[Tensor, Tensor]:
    """x_t (B, ...) and t (B,) that a level of the sampler reads, without gradients.

    The level is drawn for the step, the same in all processes.
    """
    draw = generator("cpu", *batch.key[:2], "student/level")  # without the rank
    k = int(torch.randint(len(sampler.levels), (), generator=draw))
    with torch.no_grad():
        return sampler.input_at(k, batch.randn("z"), batch.cond, lambda j: batch.randn(f"z {j}"))
