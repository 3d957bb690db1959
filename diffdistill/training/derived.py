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
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.config import TrainConfig
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow
from diffdistill.core.times import edm_karras_angle
from diffdistill.options import (
    DMD2Options,
    EDMTimes,
    EquilibriumOptions,
    FollowingOptions,
    HalvingOptions,
    LatentAdversarialOptions,
    MatchingOptions,
    MergingOptions,
    PreferenceOptions,
    RestorationOptions,
    StagedOptions,
    TimeRange,
    TrajectoryOptions,
)
from diffdistill.players.teacher import Teacher
from diffdistill.training.launchers import divides

# By how much an error of the teacher's output may count in x0, and noise over data (tan t), at most:
MATCHED = (2.5, 3.0)  # where a matched student starts
MATCHED_EDM = (2.5, 5.0)  # sigma 2.5 at a data_std of 0.5, as the authors'
FOLLOWING = (8.0, 20.0)  # where a follower starts, which is to look like pure noise too
COMPARED = 15.0  # where distributions are compared; Stable Diffusion's noisiest timestep is at 14.6
RELEARNS = 100_000_000  # parameters of a network that learns another output in a short training, at most
HEUN_STEPS = 8  # of a follower's teacher in a short training; as near to the trajectories as ten, with fewer to hand on
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
    values: Mapping[str, Any]  #: the options that were given
    steps: int  #: training steps

    @property
    def denoiser(self) -> Denoiser:
        """What the student begins as, with the output that it is to have."""
        denoiser, kind = self.teacher.small or self.teacher.denoiser, self.values.get("student_output", "teacher")
        if kind == "teacher":
            return denoiser
        twin = denoiser.with_network(denoiser.network, denoiser.feature_layer)
        twin.output = OUTPUTS[kind]
        return twin

    @property
    def parameters(self) -> int:
        """The number of the network's parameters, at least 100,000: rates do not grow further for smaller ones."""
        return max(100_000, sum(p.numel() for p in self.denoiser.parameters()))

    @property
    def matches(self) -> bool:
        """Whether the method matches distributions."""
        return issubclass(self.options, MatchingOptions)

    @property
    def adversarial(self) -> bool:
        """Whether a GAN is all that trains the student."""
        return issubclass(self.options, LatentAdversarialOptions) and not issubclass(self.options, TrajectoryOptions)

    @property
    def tunes(self) -> bool:
        """Whether the teacher is a student that is tuned."""
        return issubclass(self.options, PreferenceOptions)

    @property
    def staged(self) -> bool:
        """Whether the method has stages, with a learning rate that falls in each."""
        return issubclass(self.options, HalvingOptions)

    @property
    def stages(self) -> int:
        """How many the method has of `stage_steps` each."""
        if issubclass(self.options, MergingOptions):
            return len(self.given("stages"))
        return int(self.given("start_steps") // self.given("final_steps")).bit_length() - 1 if self.staged else 0

    def given(self, name: str) -> Any:
        """The value of a method's option, or its default; None where the method has no such option."""
        return self.values.get(
            name, next((f.default for f in dataclasses.fields(self.options) if f.name == name), None)
        )


def amplification(denoiser: Denoiser, t: Tensor) -> Tensor:
    """By how much an error of the network's output counts in x0 at the angles t (n,), in units of the data's deviation.

    sigma/alpha for a network that predicts the noise, at most 1 for one that predicts v, EDM's F or x0 itself.
    """
    native = denoiser.schedule.native(t)
    a, b = denoiser.output.at(native.alpha, native.sigma, denoiser.schedule.data_std)
    a = a * denoiser.schedule.data_std
    return (torch.sin(t) / (torch.cos(t) * b - torch.sin(t) * a)).abs()


def amplified_at(denoiser: Denoiser, level: float) -> float:
    """The same at a timestep or sigma."""
    schedule = denoiser.schedule
    return float(amplification(denoiser, schedule.angle(level).clamp(schedule.t_min, schedule.t_max).reshape(1)))


def noisiest(denoiser: Denoiser, amplified: float, noise: float) -> float:
    """The noisiest level with at most that amplification and tan t, as stock schedulers can start at it."""
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
    if isinstance(schedule, DiscreteVP):  # of a number of timesteps that twenty divides, as LCM's grids are
        return float(int(low + 1) // 20 * 20 - 1) if low > 40 else float(int(low))
    if isinstance(schedule, LinearFlow):
        return math.floor(low * schedule.train_timesteps) / schedule.train_timesteps
    return float(f"{low:.3g}")


def derive(situation: Situation) -> dict[str, Derived]:
    """Values by the names of options that were not given; those for which no rule fits keep their default."""
    names = {f.name for options in (TrainConfig, situation.options) for f in dataclasses.fields(options)}
    known, derived = dict(situation.values), {}
    situation = dataclasses.replace(situation, values=known)  # which grow: a rule sees the values of those before it
    for name, rule in RULES.items():
        if name in names and name not in known and (result := rule(situation)) is not None:
            known[name], derived[name] = result.value, result
    return derived


def _solver(s: Situation) -> Derived | None:
    free = all(s.values.get(name) is None for name in ("ddim_steps", "levels"))
    if s.given("solver") != "ddim" or not free or s.steps >= LONG or s.given("student_steps") > HEUN_STEPS:
        return None
    return Derived("heun", f"{HEUN_STEPS} of its steps are nearer to the trajectories than twenty of DDIM's")


def _ddim_steps(s: Situation) -> Derived | None:
    return _intervals(s, HEUN_STEPS if s.given("solver") == "heun" else 20)


def _intervals(s: Situation, points: int) -> Derived | None:
    if s.steps >= LONG:
        return None
    return Derived(points, f"{s.steps} steps are few for more intervals to hand the trajectories' ends on")


def _grid(s: Situation) -> Derived | None:
    return None if s.steps >= LONG else Derived("native", "few intervals; karras has most of them where noise is low")


def _batch_size(s: Situation) -> Derived | None:
    for most, size in ((400_000, 64), (100_000_000, 32), (1_500_000_000, 8)):
        if s.parameters <= most:
            return Derived(size, f"for a network of {_count(s.parameters)} parameters")
    return Derived(2, f"for a network of {_count(s.parameters)} parameters")


def _student_output(s: Situation) -> Derived | None:
    denoiser, schedule = s.denoiser, s.denoiser.schedule
    small = s.parameters <= RELEARNS and "student" not in s.teacher.lora
    if not (issubclass(s.options, TrajectoryOptions) and small and denoiser.output.name == "epsilon"):
        return None
    if not isinstance(schedule, DiscreteVP) or s.values.get("student_level") is not None:
        return None
    counts = amplified_at(denoiser, schedule.init_level)
    if counts <= COMPARED:
        return None
    why = f"an error of the teacher's epsilon counts {counts:.0f} times in x0 at pure noise, one of v once"
    return Derived("v_prediction", why)


def _student_level(s: Situation) -> Derived | None:
    schedule = s.denoiser.schedule
    if s.values.get("levels") is not None or s.tunes:
        return None  # which say it, or the student that is tuned
    several = s.given("student_steps") not in (None, 1)
    if getattr(schedule, "starts_at_one", False) or (several and not isinstance(schedule, DiscreteVP)):
        return None  # they start at pure noise, as their stock schedulers do
    matched = MATCHED_EDM if isinstance(schedule, EDM) else MATCHED
    level = noisiest(s.denoiser, *(matched if s.matches else FOLLOWING))
    t = schedule.angle(torch.tensor([level, schedule.init_level])).clamp(max=schedule.t_max)
    here, there = amplification(s.denoiser, t).tolist()
    if level == schedule.init_level or ((several or not s.matches) and there <= COMPARED):
        return None
    if there > COMPARED:
        counts = f"an error of the teacher's {s.denoiser.output.name} counts {here:.1f} times in x0 there"
        return Derived(level, f"{counts}, and {there:.0f} times at {schedule.init_level:g}")
    return Derived(
        level, f"noise is {math.tan(float(t[0])):.1f} times the data there; pure noise says little of images"
    )


def _rate(s: Situation, role: str) -> Derived:
    short, long = (
        (0.2, 0.075)
        if s.matches or s.adversarial or s.tunes
        else (0.4 if issubclass(s.options, FollowingOptions) else 0.8, 0.2)
    )
    factor = short if s.steps < LONG else long
    why = f"{factor}/sqrt({_count(s.parameters)} parameters) in {s.steps} steps"
    if role in s.teacher.lora:
        factor, why = 10 * factor, f"{why}, times 10 for LoRA"
    if s.values.get("optimizer") == "muon" and not s.matches:
        factor, why = 2 * factor, f"{why}, times 2 for Muon"
    return Derived(float(f"{factor / math.sqrt(s.parameters):.2g}"), why)


def _optimizer(s: Situation) -> Derived | None:
    measured = issubclass(s.options, FollowingOptions | DMD2Options | EquilibriumOptions | RestorationOptions)
    small = s.parameters <= RELEARNS and not s.teacher.lora
    if not measured or issubclass(s.options, LatentAdversarialOptions) or not small or s.steps >= LONG:
        return None
    if s.values.get("offload", "none") != "none" or divides():
        return None
    if "student_lr" in s.values:  # which was chosen for AdamW, whose first steps are five times as large
        return None
    return Derived("muon", f"{s.steps} steps are few, and a student gets further in them than with AdamW")


def _student_lr(s: Situation) -> Derived | None:
    return _rate(s, "student")


def _fake_scores(s: Situation) -> int:
    """How many fake scores take turns."""
    if s.given("fake_scores") != "per_level":
        return 1
    levels = len(s.values.get("levels") or ()) or int(s.given("student_steps"))
    if any(f.name == "matched_steps" for f in dataclasses.fields(s.options)):
        return int(s.given("matched_steps") or (levels + 1) // 2)
    return levels - bool(s.given("anchor_weight"))  # the first of which is matched with nothing then


def _fake_score_lr(s: Situation) -> Derived | None:
    if not s.matches:  # a stage beside another objective, whose rates are the authors'
        return None
    rate = _rate(s, "fake_score")
    if s.given("update_ratio") > _fake_scores(s):
        return Derived(rate.value, f"{rate.reason}; it takes {s.given('update_ratio')} steps for one of the student")
    return Derived(float(f"{3 * rate.value:.2g}"), "three times the student's, which it is to keep up with")


def _discriminator_lr(s: Situation) -> Derived | None:
    if not s.adversarial:  # beside another objective the authors' rate
        return None
    return Derived(float(f"{10 * _rate(s, 'student').value:.2g}"), "ten times the student's: small heads from nothing")


def _update_ratio(s: Situation) -> Derived | None:
    usual, taking_turns = s.given("update_ratio"), _fake_scores(s)
    if usual < taking_turns or (taking_turns > 1 and s.steps < LONG):
        return Derived(taking_turns, f"{taking_turns} fake scores take turns, and each is to keep up with the student")
    if usual == 1 or s.steps >= LONG:
        return None
    return Derived(1, f"{s.steps} steps are few; {usual} from {LONG} steps on")


def _path_length(s: Situation) -> Derived | None:
    least = 10 * s.given("path_length")
    return Derived(0, f"{s.steps} steps are few to go there and back in") if s.steps < least else None


def _record_every(s: Situation) -> Derived | None:
    if s.steps >= LONG or not s.given("path_length"):
        return None
    return Derived(max(1, s.steps // (10 * s.given("path_length"))), "a tenth of the steps to the student's samples ..")


def _track_every(s: Situation) -> Derived | None:
    if s.steps >= LONG or s.given("path_length") < 2:
        return None
    return Derived(
        max(1, 4 * s.steps // (10 * (s.given("path_length") - 1))), ".. four back, and half with the teacher"
    )


def _part_of_budget(s: Situation, option: str, share: float) -> Derived | None:
    """So many steps of a short training, where the method's own default is one of the authors' many."""
    if s.steps >= LONG or not s.given(option):
        return None
    return Derived(max(1, int(share * s.steps)), f"{share:.0%} of {s.steps} steps")


def _anneal_steps(s: Situation) -> Derived | None:
    return _part_of_budget(s, "anneal_steps", 0.2 if issubclass(s.options, StagedOptions) else 0.5)


def _ramp_steps(s: Situation) -> Derived | None:
    return _part_of_budget(s, "ramp_steps", 1.0) if s.given("mode") in ("training", None) else None


def _guidance_steps(s: Situation) -> Derived | None:
    """As many as each stage after it takes."""
    if "steps" not in s.values or not s.given("guidance_steps"):
        return None
    return Derived(max(1, s.steps // (s.stages + 1)), f"the first of {s.stages + 1} stages in {s.steps} steps")


def _stage_steps(s: Situation) -> Derived | None:
    """Without a number of steps, each stage has the method's own, and the training takes what they take."""
    if s.given("mode") == "easy":
        return _part_of_budget(s, "stage_steps", 1 / 8)
    if "steps" not in s.values or not s.stages:
        return None
    left = s.steps - (s.given("guidance_steps") or 0)
    return Derived(max(1, left // s.stages), f"{s.stages} stages in {left} steps")


def _first_stage(s: Situation, option: str, share: float, second: str) -> Derived | None:
    staged = s.given(second) and second not in s.values  # without a second stage it says nothing
    return _part_of_budget(s, option, share) if staged else None


def _second_stage(s: Situation, option: str, share: float, first: str) -> Derived | None:
    """What a derived first stage of that share leaves."""
    if s.steps >= LONG or not s.given(option) or s.given(first) != max(1, int(share * s.steps)):
        return None
    return Derived(max(1, s.steps - s.given(first)), "the rest")


def _regression_weight(s: Situation) -> Derived | None:
    if s.given("distance") != "l2":
        return None
    return Derived(0.1, "the paper's 0.25 goes with LPIPS; the mean square draws harder to blurred means")


def _beta1(s: Situation) -> Derived | None:
    return Derived(0.0, "two players follow each other") if s.matches else None


def _fake_score_loss(s: Situation) -> Derived | None:
    if s.denoiser.output.name != "epsilon":
        return None
    return Derived("epsilon", "as the teacher was trained; in v its error at the noisiest levels would outweigh all")


def _time_high(s: Situation) -> Derived | None:
    if not issubclass(s.options, TimeRange):
        return None
    usual = s.given("time_high")
    karras = issubclass(s.options, EDMTimes) and s.values.get("times") != "native"
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    schedule = s.denoiser.schedule
    t = edm_karras_angle(schedule, u) if karras else schedule.at_fraction(u)
    fits = u[amplification(s.denoiser, t.clamp(schedule.t_min, schedule.t_max)) <= COMPARED]
    if not len(fits) or float(fits[-1]) >= usual:
        return None
    return Derived(
        round(float(fits[-1]), 3),
        f"beyond it the teacher's x0 is its output times more than {COMPARED:g}",
    )


def _ema(s: Situation) -> Derived | None:
    if s.staged:
        return None
    return Derived(0.999, "its warm-up makes it a tenth of the steps so far, up to a thousand steps")


def _lr_schedule(s: Situation) -> Derived | None:
    if s.staged or s.steps >= LONG:
        return None
    return Derived("cosine", "the players settle by the end of a short budget")


def _warmup_steps(s: Situation) -> Derived | None:
    return None if s.staged else Derived(max(1, min(20, s.steps // 10)), "Adam's moments are poor at first")


RULES: dict[str, Callable[[Situation], Derived | None]] = {
    "batch_size": _batch_size,
    "student_output": _student_output,
    "student_level": _student_level,
    "solver": _solver,
    "ddim_steps": _ddim_steps,
    "grid": _grid,
    "grid_points": partial(_intervals, points=9),  # Heun's eight steps
    "time_high": _time_high,
    "fake_score_loss": _fake_score_loss,
    "update_ratio": _update_ratio,
    "tangent_warmup": partial(_part_of_budget, option="tangent_warmup", share=0.2),
    "boundary_steps": partial(_part_of_budget, option="boundary_steps", share=0.5),
    "reflow_steps": partial(_first_stage, option="reflow_steps", share=0.5, second="distill_steps"),
    "distill_steps": partial(_second_stage, option="distill_steps", share=0.5, first="reflow_steps"),
    "consistency_steps": partial(_first_stage, option="consistency_steps", share=0.9, second="matching_steps"),
    "matching_steps": partial(_second_stage, option="matching_steps", share=0.9, first="consistency_steps"),
    "renew_every": partial(_part_of_budget, option="renew_every", share=0.02),
    "anneal_steps": _anneal_steps,
    "ramp_steps": _ramp_steps,
    "guidance_steps": _guidance_steps,
    "stage_steps": _stage_steps,
    "path_length": _path_length,
    "record_every": _record_every,
    "track_every": _track_every,
    "regression_weight": _regression_weight,
    "optimizer": _optimizer,
    "student_lr": _student_lr,
    "fake_score_lr": _fake_score_lr,
    "discriminator_lr": _discriminator_lr,
    "beta1": _beta1,
    "ema": _ema,
    "lr_schedule": _lr_schedule,
    "warmup_steps": _warmup_steps,
}  # in this order


def _count(n: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)
