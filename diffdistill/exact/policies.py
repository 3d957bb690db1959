"""What the exact checks of students whose passes say policies share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.exact.checks import Check, at_half_the_angle, differs, equal, gradient
from diffdistill.players.policy import PolicyDenoiser, PolicySettings
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.policies import ImitationMethod, PolicyMethod

TOP = math.pi / 2


def batch_at(step: int = 0, size: int = 40) -> Batch:
    """What a training step reads in the plane."""
    return Batch(size, (2,), {}, None, torch.device("cpu"), (0, step, 0))


def noise() -> Tensor:
    """(40, 2) the noise of step 0, in double precision."""
    return batch_at().randn("z").double()


def known_student(plain: Denoiser, kind: str, components: int, config: Any) -> PolicyDenoiser:
    """The student around a network that is known in closed form, at even angles; `config` is the method's."""
    angles = TOP * (1 - torch.arange(config.student_steps).double() / config.student_steps)
    return PolicyDenoiser(plain, plain.network, PolicySettings(kind, components, config.substeps), angles)


def loss_at(game: PolicyMethod, step: int = 0) -> Tensor:
    """The student's loss in a training step."""
    return game.student_turn(step, batch_at(step)).loss


def imitation_checks(make: Callable[..., ImitationMethod], what: str, slope: float) -> Iterator[Check]:
    """At the exact policies of `make(**options)` there is no loss, and no gradient beyond `slope`, whoever leads.

    The noise is in single precision.
    """
    for step in (0, 1, 5):
        for leads in (0.0, 1.0):
            game = make(teacher_share=leads, mixing_steps=10)
            name = f"step {step}, {'the teacher leads' if leads else 'the policy leads'}"
            loss = loss_at(game, step)
            yield equal(f"the loss of exact {what}, {name}", 0.0, loss, 1e-11, scale=1.0)
            got = gradient(loss, *game.student.network.parameters())
            yield equal(f"... and its gradient, {name}", 0.0, got, slope, scale=1.0)
    yield elsewhere_check(make())


def elsewhere_check(game: PolicyMethod) -> Check:
    """A teacher that is asked at another level has a loss where there is none."""
    other: Any = at_half_the_angle(game.teacher)
    game.teacher = other
    return differs("a teacher asked at another level is caught", 0.0, loss_at(game), 1e-3, scale=1.0)
