"""Figures of a training beside its losses: of samples that are always of the same noise, and of the players' rates.

They draw from generators of their own, so that a training has the same bits with and without them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffdistill.core.divided import total_norm
from diffdistill.core.losses import denoising_loss
from diffdistill.core.prediction import diffuse
from diffdistill.core.times import native_uniform
from diffdistill.rng import generator
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Method
from diffdistill.training.looks import Look

if TYPE_CHECKING:
    from diffdistill.training.trainer import Trainer

SHARE = 0.02  # of a training's passes, at most, that figures take


def usual_interval(look: Look, method: Method, batch_size: int, log_every: int) -> int:
    """The steps between two lines with figures that keep them cheap; a multiple of `log_every`."""
    matching = isinstance(method, MatchingMethod)
    taken = len(look.groups) * (len(method.sampler().levels) + 2 * matching)
    trained = (6 if matching else 3) * batch_size  # passes of a step at least: forward, and backward twice that
    return log_every * math.ceil(taken / (SHARE * trained * log_every))


class Figures:
    """(trainer) -> figures by name, at the steps that are multiples of `every`; 0: never.

    Called in evaluation mode with the average in place.
    """

    def __init__(self, look: Look, method: Method, every: int):
        self.look, self.method, self.every = look, method, every

    def due(self, step: int) -> bool:
        """Whether it is time for them."""
        return self.every > 0 and step % self.every == 0

    @torch.no_grad()
    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """The measures of a look, what the student differs by from the teacher, the fake score's lag, step sizes."""
        look, samples = self.look, self.look.drawn(self.method.sampler())
        shown, several = look.shown(samples), look.several
        figures = {f"look/{name}": value for name, value in look.measures(samples)._asdict().items()}
        figures["look/disagreement"] = float((shown - several).square().mean() / several.square().mean()) ** 0.5
        figures["look/saturated"] = float((samples != shown).float().mean())
        if isinstance(self.method, MatchingMethod):
            figures["fake_score/lag"] = lag(look, self.method, samples)
        return figures | step_sizes(trainer)


def lag(look: Look, method: MatchingMethod, samples: Tensor) -> float:
    """The fake score's denoising loss on the student's samples (n, *shape) over the teacher's there.

    At the same times and noise for both, and always; below 1 of a fake score that knows them better than the teacher.
    """
    denoiser = look.teacher.denoiser
    draw, device = generator("cpu", "lag"), next(denoiser.parameters()).device
    x = samples.to(device) / denoiser.schedule.data_std  # float32, whatever the teacher's type
    t = native_uniform(denoiser.schedule, len(x), draw).to(device)
    eps = torch.randn(x.shape, generator=draw).to(x)
    x_t = diffuse(x, t, eps)
    losses = [denoising_loss(network(x_t, t, look.cond), x, eps) for network in (method.fake_score, denoiser)]
    return float(losses[0] / losses[1].clamp_min(1e-12))


def step_sizes(trainer: Trainer) -> dict[str, float]:
    """By player, the learning rate over the root mean square of its trained weights.

    Adam moves a weight by about its rate: this is the share of itself that a typical weight moves by in a step.
    """
    with trainer.offload.on_host():
        norms = {player: float(total_norm(parameters)) for player, parameters in trainer.parameters.items()}
    sizes = {}
    for player, norm in norms.items():
        count = sum(p.numel() for p in trainer.parameters[player])
        rms = norm / max(count, 1) ** 0.5
        sizes[f"{player}/step_size"] = trainer.learning_rate(player) / max(rms, 1e-12)
    return sizes
