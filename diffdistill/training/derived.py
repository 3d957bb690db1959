"""Options that nobody has given, derived from the teacher, the method and the budget, each with its reason.

A preset is a whole setting, so that with one nothing is derived. The rules look at what the papers' settings have in
common. A one-step student starts where the teacher still says something of the sample: DMD2 starts Stable Diffusion at
timestep 399 and SiD at 625 of 1000, where sigma/alpha is 1.6 and 3.5; EDM networks at sigma = 2.5, where it is 5
(arXiv:2405.14867, 2406.01561, 2404.04057). Learning rates fall with the size of the network, from 1e-4 at a million
parameters over SiD's 1e-5 at 56 million to some 2e-6 at a billion.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.config import TrainConfig
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.schedule import DiscreteVP
from diffdistill.core.times import edm_karras_angle
from diffdistill.options import EDMTimes, HalvingOptions, MatchingOptions, MatchingTimes
from diffdistill.players.teacher import Teacher

STUDENT_AMPLIFICATION = 2.5  # of the network's error in x0, at the level where a matched student starts
STUDENT_NOISE = 3.0  # tan t at that level at most: noise over data, both of unit variance
FOLLOWER_AMPLIFICATION = 8.0  # a follower's first level is to be pure noise too, as the trajectories' beginning is
FOLLOWER_NOISE = 20.0
MATCHING_AMPLIFICATION = 15.0  # the noisiest level at which distributions are compared
LONG = 10_000  # training steps from which on the authors' ratio of two players pays


class Derived(NamedTuple):
    """A value and why it is that."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Situation:
    """What the rules know."""

    teacher: Teacher
    options: type  #: the method's Config
    values: Mapping[str, Any]  #: what has been given
    steps: int  #: training steps

    @property
    def denoiser(self) -> Denoiser:
        """What the student begins as."""
        return self.teacher.denoiser

    @property
    def parameters(self) -> int:
        """The number of the network's parameters."""
        return sum(p.numel() for p in self.denoiser.parameters())

    @property
    def matches(self) -> bool:
        """Whether the method matches distributions."""
        return issubclass(self.options, MatchingOptions)

    @property
    def staged(self) -> bool:
        """Whether the method has stages, with a learning rate that falls in each."""
        return issubclass(self.options, HalvingOptions)

    def given(self, name: str) -> Any:
        """The value of a method's option, or its default."""
        return self.values.get(name, next(f.default for f in dataclasses.fields(self.options) if f.name == name))


def amplification(denoiser: Denoiser, t: Tensor) -> Tensor:
    """By how much an error of the network's output counts in x0 at the angles t (n,), in units of the data's deviation.

    sigma/alpha for a network that predicts the noise, at most 1 for one that predicts v, EDM's F or x0 itself.
    """
    native = denoiser.schedule.native(t)
    a, b = denoiser.output.at(native.alpha, native.sigma, denoiser.schedule.data_std)
    a = a * denoiser.schedule.data_std
    return (torch.sin(t) / (torch.cos(t) * b - torch.sin(t) * a)).abs()


def noisiest(denoiser: Denoiser, amplified: float, noise: float) -> float:
    """The noisiest level with at most that amplification and tan t; a timestep is whole, others have three digits."""
    schedule = denoiser.schedule
    low, high = 0.0, float(schedule.init_level)

    def fits(level: float) -> bool:
        t = schedule.angle(level).clamp(schedule.t_min, schedule.t_max).reshape(1)
        return bool(amplification(denoiser, t) <= amplified) and float(torch.tan(t)) <= noise

    if fits(high):
        return high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return float(int(low)) if isinstance(schedule, DiscreteVP) else float(f"{low:.3g}")


def derive(situation: Situation) -> dict[str, Derived]:
    """Values by the names of options that were not given; those for which no rule fits keep their default."""
    names = [f.name for f in dataclasses.fields(TrainConfig)] + [f.name for f in dataclasses.fields(situation.options)]
    rules: dict[str, Derived] = {}
    for name, rule in RULES.items():
        if name in names and name not in situation.values:
            result = rule(
                dataclasses.replace(situation, values={**situation.values, **{k: v.value for k, v in rules.items()}})
            )
            if result is not None:
                rules[name] = result
    return rules


def _intervals(s: Situation) -> Derived | None:
    return (
        Derived(20, f"{s.steps} steps are few for more intervals to hand the trajectories' ends on")
        if s.steps < LONG
        else None
    )


def _batch_size(s: Situation) -> Derived | None:
    for most, size in ((400_000, 64), (100_000_000, 32), (1_500_000_000, 8)):
        if s.parameters <= most:
            return Derived(size, f"for a network of {_count(s.parameters)} parameters")
    return Derived(2, f"for a network of {_count(s.parameters)} parameters")


def _student_level(s: Situation) -> Derived | None:
    if s.values.get("student_steps", 1) != 1:
        return None
    limits = (STUDENT_AMPLIFICATION, STUDENT_NOISE) if s.matches else (FOLLOWER_AMPLIFICATION, FOLLOWER_NOISE)
    level = noisiest(s.denoiser, *limits)
    schedule = s.denoiser.schedule
    if level == schedule.init_level:
        return None
    t = schedule.angle(torch.tensor([level, schedule.init_level]))
    here, there = amplification(s.denoiser, t.clamp(max=schedule.t_max)).tolist()
    if there > limits[0]:
        why = f"the teacher's x0 is its {s.denoiser.output.name} times {here:.1f} there, and times {there:.0f} at"
        return Derived(level, f"{why} {schedule.init_level:g}")
    return Derived(
        level, f"noise is {math.tan(float(t[0])):.1f} times the data there; pure noise says little of the image"
    )


def _rate(s: Situation, role: str) -> Derived:
    factor = (0.15 if s.matches else 0.6) if s.steps < LONG else (0.075 if s.matches else 0.2)
    why = f"{factor}/sqrt({_count(s.parameters)} parameters) in {s.steps} steps"
    if role in s.teacher.lora:
        factor, why = 10 * factor, f"{why}, times 10 for LoRA"
    return Derived(float(f"{factor / math.sqrt(s.parameters):.2g}"), why)


def _student_lr(s: Situation) -> Derived | None:
    return _rate(s, "student")


def _fake_score_lr(s: Situation) -> Derived | None:
    rate = _rate(s, "fake_score")
    if s.given("update_ratio") > 1:
        return Derived(rate.value, f"{rate.reason}; it takes {s.given('update_ratio')} steps for one of the student")
    return Derived(float(f"{3 * rate.value:.2g}"), "three times the student's, which it is to keep up with")


def _update_ratio(s: Situation) -> Derived | None:
    usual = s.given("update_ratio")
    if usual == 1 or s.steps >= LONG:
        return None
    return Derived(1, f"{s.steps} steps are few; {usual} from {LONG} steps on")


def _beta1(s: Situation) -> Derived | None:
    return Derived(0.0, "two players follow each other") if s.matches else None


def _fake_score_loss(s: Situation) -> Derived | None:
    if s.denoiser.output.name != "epsilon":
        return None
    return Derived("epsilon", "as the teacher was trained; in v its error at the noisiest levels would outweigh all")


def _time_high(s: Situation) -> Derived | None:
    if not issubclass(s.options, MatchingTimes):
        return None
    usual = s.given("time_high")
    karras = issubclass(s.options, EDMTimes) and s.values.get("times") != "native"
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    schedule = s.denoiser.schedule
    t = edm_karras_angle(schedule, u) if karras else schedule.at_fraction(u)
    fits = u[amplification(s.denoiser, t.clamp(schedule.t_min, schedule.t_max)) <= MATCHING_AMPLIFICATION]
    if not len(fits) or float(fits[-1]) >= usual:
        return None
    return Derived(
        round(float(fits[-1]), 3),
        f"beyond it the teacher's x0 is its output times more than {MATCHING_AMPLIFICATION:g}",
    )


def _ema(s: Situation) -> Derived | None:
    if s.staged:
        return None
    ratio = s.given("update_ratio") if s.matches else 1
    moves = s.steps / ratio
    return Derived(round(min(max(1 - 10 / moves, 0.5), 0.9999), 5), f"over a tenth of the student's {moves:.0f} moves")


def _lr_schedule(s: Situation) -> Derived | None:
    return None if s.staged else Derived("cosine", "the players settle by the end of the budget")


def _warmup_steps(s: Situation) -> Derived | None:
    return None if s.staged else Derived(min(s.steps // 20, 500), "a twentieth of the budget, at most 500")


RULES: dict[str, Callable[[Situation], Derived | None]] = {
    "batch_size": _batch_size,
    "student_level": _student_level,
    "ddim_steps": _intervals,
    "grid_points": _intervals,
    "time_high": _time_high,
    "fake_score_loss": _fake_score_loss,
    "update_ratio": _update_ratio,
    "student_lr": _student_lr,
    "fake_score_lr": _fake_score_lr,
    "beta1": _beta1,
    "ema": _ema,
    "lr_schedule": _lr_schedule,
    "warmup_steps": _warmup_steps,
}  # in this order: a rule sees the values of those before it


def _count(n: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)
