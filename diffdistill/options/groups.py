"""Groups of options that methods share: one idea has one name, one text and one range.

No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

from diffdistill.errors import UserError
from diffdistill.options.values import nearest, option


class Options:
    """Base of the groups. `class Config(Group, beta1=0.0)` gives an inherited option another default."""

    def __init_subclass__(cls, **defaults: Any) -> None:
        groups = {f.name: (base, f) for base in cls.__bases__ if dataclasses.is_dataclass(base)
                  for f in dataclasses.fields(base)}  # fmt: skip
        annotations = {}
        for name, default in defaults.items():
            if name not in groups:
                raise TypeError(f"{cls.__name__}: {name} is no option of its groups; {nearest(name, groups)}")
            group, old = groups[name]
            annotations[name] = typing.get_type_hints(group)[name]
            setattr(cls, name, field(default=default, metadata=old.metadata))
        cls.__annotations__ = annotations | inspect.get_annotations(cls)

    def __post_init__(self) -> None:
        """Groups whose options depend on one another check them, or say them, here, before super().__post_init__()."""
        self.check()

    def check(self) -> None:
        """A method's own options that depend on one another are checked here; UserError where they do not fit."""


@dataclass(frozen=True)
class StudentOptions(Options):
    """A student that AdamW trains."""

    student_lr: float = option(1e-5, "AdamW's learning rate for the student", above=0)
    beta1: float = option(0.9, "AdamW's first beta, for all players", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay; 0 is Adam", at_least=0)


@dataclass(frozen=True)
class TeacherGuidance(Options):
    """A teacher that may be guided, at one scale."""

    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher; 1 is none", at_least=0)
    guidance_scale_2: float | None = option(
        None, "that of a teacher's second network, as of Wan 2.2 A14B; default: guidance_scale", at_least=0
    )


@dataclass(frozen=True)
class ScaleRange(Options):
    """Guidance scales that are drawn for each sample, and that the student takes as an input."""

    guidance_min: float = option(1.0, "the lowest guidance scale; they are drawn uniformly; 1 is none", at_least=0)
    guidance_max: float = option(
        5.0, "the highest of the guidance scales; if it is guidance_min, the student takes no scale", at_least=0
    )
    guidance_scale: float | None = option(
        None, "the guidance scale of samples and of the exported student; default: the middle of the range", at_least=0
    )

    def __post_init__(self) -> None:
        low, high = self.guidance_min, self.guidance_max
        if low > high:
            raise UserError(f"guidance_min: {low} must be at most guidance_max ({high})")
        if self.guidance_scale is None:
            object.__setattr__(self, "guidance_scale", (low + high) / 2)
        elif not low <= self.guidance_scale <= high:
            raise UserError(
                f"guidance_scale: {self.guidance_scale} is not in what is trained, {low} (guidance_min) to "
                f"{high} (guidance_max)"
            )
        super().__post_init__()

    def drawn(self, u: Any) -> Any:
        """The scales for u, uniform in [0, 1)."""
        return self.guidance_min + (self.guidance_max - self.guidance_min) * u

    @property
    def takes_scale(self) -> bool:
        """Whether the student takes the scale as an input."""
        return self.guidance_min < self.guidance_max

    @property
    def guides(self) -> bool:
        """Whether the teacher is guided at all."""
        return self.takes_scale or self.scale != 1

    @property
    def scale(self) -> float:
        """The exported student's guidance scale."""
        assert self.guidance_scale is not None
        return self.guidance_scale


@dataclass(frozen=True)
class StudentLevel(Options):
    """A student that need not start at the noisiest level."""

    student_level: float | None = option(
        None, "the timestep or sigma at which the student reads pure noise; none: the noisiest", at_least=0
    )


@dataclass(frozen=True)
class StudentLevels(StudentLevel):
    """A student of several steps, whose levels may be the user's own; a subclass has the option `student_steps`."""

    levels: tuple[float, ...] | None = option(
        None,
        "the student's own levels, descending, as 999,749,499,249: timesteps, or sigmas of EDM and flows; they say "
        "student_steps and student_level too; none: evenly spaced",
        at_least=0,
    )

    def __post_init__(self) -> None:
        if self.levels is not None:
            self._say_steps(self.levels)
        super().__post_init__()

    def _say_steps(self, levels: tuple[float, ...]) -> None:
        shown = ",".join(f"{level:g}" for level in levels)
        if not levels or any(a <= b for a, b in pairwise(levels)):
            raise UserError(f"levels: {shown or 'nothing'} do not descend; give the noisiest first, as 999,749,499,249")
        own = {f.name: f.default for f in fields(self)}["student_steps"]
        for name, value, unsaid in (("student_steps", len(levels), own), ("student_level", levels[0], None)):
            if (said := getattr(self, name)) not in (unsaid, value):
                raise UserError(f"{name}: {said:g} was given, and levels {shown} make it {value:g}; leave {name} out")
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class DerivativeOptions(Options):
    """How the student's derivative along a trajectory is computed."""

    derivative: Literal["auto", "exact", "central", "backward", "semi"] = option(
        "auto",
        "the derivative along a trajectory; exact: a Jacobian product; central, backward: differences; semi: exact in "
        "x alone; auto: exact if the teacher's agrees with its central difference within 30%, else central",
    )
    derivative_step: float = option(
        0.05, "the angle that differences step over, in radians; in bfloat16 not below 0.02", above=0, at_most=0.5
    )


@dataclass(frozen=True)
class MatchingOptions(StudentOptions, TeacherGuidance, StudentLevel):
    """A one-step student and a fake score that learns its samples."""

    fake_score_lr: float = option(1e-5, "AdamW's learning rate for the fake score", above=0)
    fake_score_loss: Literal["v", "epsilon"] = option(
        "v", "the fake score's loss; v: weighted as in EDM; epsilon: unweighted, as for Stable Diffusion"
    )
    update_ratio: int = option(1, "steps of the fake score for one of the student", at_least=1)


@dataclass(frozen=True)
class TimeRange(Options):
    """The range of noise levels at which distributions are matched."""

    time_low: float = option(
        0.02,
        "the least noise in the student's loss, as a fraction of the range of times that it is drawn from",
        at_least=0,
        below=1,
    )
    time_high: float = option(
        0.98,
        "the most noise in the student's loss, as a fraction of the range of times that it is drawn from",
        above=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        if self.time_low >= self.time_high:
            raise UserError(f"time_low: {self.time_low} must be less than time_high ({self.time_high})")
        super().__post_init__()


@dataclass(frozen=True)
class MatchingTimes(TimeRange):
    """The same, as fractions of the teacher's own times, which may be shifted."""

    time_shift: float = option(
        1.0, "s, for the times of both players: a fraction u becomes s u/(1 + (s - 1) u); above 1: more noise", above=0
    )


@dataclass(frozen=True)
class EDMTimes(TimeRange, time_low=0.0, time_high=0.8):
    """The range as fractions of EDM's grid of sigma from 0.002 to 80, where 0.8 is sigma = 24.4."""


@dataclass(frozen=True)
class NormaliserOptions(Options):
    """DMD's normaliser of the matching gradient."""

    normalise: bool = option(True, "divide each sample's loss by mean|x - D_teacher|; false: the exact divergence's")


@dataclass(frozen=True)
class SimulationOptions(StudentLevels):
    """A student of several steps, trained on inputs that its own sampler makes."""

    student_steps: int = option(
        1, "sampling steps, at evenly spaced times of the teacher's own from student_level down", at_least=1
    )
    fake_scores: Literal["shared", "per_level"] = option(
        "shared",
        "of a student of several steps; shared: one fake score, which learns the samples of all levels together; "
        "per_level: one network (or LoRA) for each level, and the levels take turns",
    )


@dataclass(frozen=True)
class AdversarialOptions(Options):
    """A discriminator head on the fake score."""

    gan_weight: float = option(0.0, "weight of the GAN loss in the student's loss; above 0 needs data", at_least=0)
    discriminator_weight: float = option(0.01, "weight of the GAN loss in the fake score's loss", at_least=0)
    discriminator_depths: tuple[float, ...] | None = option(
        None,
        "the fake score's layers that have a head each, as fractions of its depth, say 0.5,0.75,0.99; the loss is the "
        "mean over the heads; none: one head, on the bottleneck",
        at_least=0,
        below=1,
    )

    def __post_init__(self) -> None:
        if self.discriminator_depths is not None and self.gan_weight == 0:
            raise UserError(
                "discriminator_depths: there is no discriminator without a gan_weight; give one, or leave it out"
            )
        if self.discriminator_depths == ():
            raise UserError("discriminator_depths: nothing is given; give fractions of the depth, as 0.5,0.75,0.99")
        super().__post_init__()


@dataclass(frozen=True)
class PreferenceOptions(StudentOptions, StudentLevels):
    """A distilled student, the teacher here, that is tuned and keeps its steps."""

    student_steps: int | None = option(
        None, "sampling steps of the student that is tuned, evenly spaced; default: those that its folder says",
        at_least=1,
    )  # fmt: skip


@dataclass(frozen=True)
class RewardOptions(Options):
    """Samples whose matching counts by what a reward thinks of them."""

    reward_beta: float | None = option(
        None,
        "beta: the gradient of each sample's matching counts exp(reward/beta) times; needs a reward, --reward; none: "
        "all count alike",
        above=0,
    )


@dataclass(frozen=True)
class DMDOptions(MatchingOptions, MatchingTimes, NormaliserOptions, RewardOptions, weight_decay=0.01):
    """DMD's, and of what is built on it in one step."""


@dataclass(frozen=True)
class AlignmentOptions(Options):
    """A fake score that is drawn along by the student."""

    alignment: float = option(
        0.0,
        "share of the student's weights that the fake score's become after each of the student's steps (SenseFlow's "
        "IDA, 0.03 there); 0: none; it biases a fake score that is slow, so use an update_ratio of 5 or more",
        at_least=0,
        below=1,
    )


@dataclass(frozen=True)
class AnchorOptions(Options):
    """A student of several steps, whose first follows the teacher's trajectory."""

    anchor_weight: float = option(
        0.0,
        "weight of the first step's distance from the teacher's trajectory (DP-DMD, 0.05 there), for variety; above 0 "
        "that step is not matched, and all steps are deterministic; needs student_steps of 2 or more",
        at_least=0,
    )
    anchor_steps: int = option(10, "the teacher's steps to the end of the student's first", at_least=1)


@dataclass(frozen=True)
class MidpointOptions(Options):
    """A student each of whose steps has a target by way of a point inside of it."""

    midpoint_weight: float = option(
        0.0,
        "weight of a step's distance from where the teacher's step to a point inside of it, and the student's own from "
        "there, come to (SenseFlow's ISG, 0.5 or 1 there); 0: none; it costs a pass of each; it biases long steps",
        at_least=0,
    )
    midpoint_margin: float = option(
        0.02, "how far that point stays from both ends, as a fraction of the teacher's time", at_least=0, below=0.5
    )


@dataclass(frozen=True)
class DMD2Options(
    MatchingOptions,
    MatchingTimes,
    NormaliserOptions,
    SimulationOptions,
    AdversarialOptions,
    RewardOptions,
    AlignmentOptions,
    AnchorOptions,
    MidpointOptions,
    update_ratio=5,
    weight_decay=0.01,
):
    """DMD2's, and of what is built on it."""


@dataclass(frozen=True)
class SiDOptions(MatchingOptions, EDMTimes, NormaliserOptions, beta1=0.0):
    """SiD's, and of what is built on it."""


@dataclass(frozen=True)
class RatioOptions(AdversarialOptions, gan_weight=0.003):
    """An f-divergence, by the ratio r = p/q of the densities of real and generated images: the discriminator's."""

    divergence: Literal[
        "jensen_shannon",
        "forward_kl",
        "reverse_kl",
        "softened_reverse_kl",
        "squared_hellinger",
        "jeffreys",
        "chi_square",
        "neyman",
    ] = option("jensen_shannon", "the f-divergence of teacher and student; reverse_kl is DMD's, and needs no ratio")
    ratio_low: float = option(0.1, "the least r that counts; a smaller one counts as this", above=0, at_most=1)
    ratio_high: float = option(20.0, "the greatest r that counts; a greater one counts as this", at_least=1)
    ratio_bins: int = option(
        10,
        "parts of the range of noise, in each of which r is divided by its mean, which should be 1; the weights are "
        "divided by theirs, too; 0: neither",
        at_least=0,
    )
    ratio_ema: float = option(0.9, "decay of these means, moving averages over training steps", at_least=0, below=1)

    def __post_init__(self) -> None:
        for name in ("gan_weight", "discriminator_weight"):
            if getattr(self, name) == 0:
                raise UserError(
                    f"{name}: 0 leaves no discriminator to tell the ratio of the densities; give more, or train dmd2"
                )
        super().__post_init__()


@dataclass(frozen=True)
class HeadOptions(Options):
    """A discriminator of heads on layers of the frozen teacher."""

    discriminator_lr: float = option(1e-5, "AdamW's learning rate for the discriminator's heads", above=0)
    depths: tuple[float, ...] = option((0.5, 0.75, 0.99), "the layers that have a head, as fractions of the depth",
                                       at_least=0, below=1)  # fmt: skip


@dataclass(frozen=True)
class LatentAdversarialOptions(HeadOptions):
    """The same, which reads noised images."""

    gan_loss: Literal["hinge", "logistic"] = option("hinge", "hinge: LADD's and SANA-Sprint's; logistic: FastGen's")
    gan_time_mean: float = option(0.3, "mean of ln sigma of what it reads, for data of deviation 0.5")
    gan_time_std: float = option(1.0, "standard deviation of ln sigma of what it reads", above=0)
    misaligned: bool = option(False, "it also learns to refuse images under the conditions of others")


@dataclass(frozen=True)
class FakeScoreGuidance(Options):
    """A fake score that is guided, and so learns without conditions too."""

    label_dropout: float = option(
        0.1, "share of conditions that a guided fake score learns without", at_least=0, at_most=1
    )


@dataclass(frozen=True)
class TrajectoryOptions(StudentOptions, StudentLevels):
    """A student that learns trajectories."""

    student_output: Literal["teacher", "v_prediction", "sample"] = option(
        "teacher", "what the student's network gives: what the teacher's does, or v or x0 (sample)"
    )
    student_steps: int = option(1, "the student's sampling steps; its training is the same for any number", at_least=1)
    student_dropout: float | None = option(
        None, "dropout of the student's residual blocks in training; default: its network's own", at_least=0, below=1
    )


@dataclass(frozen=True)
class FollowingOptions(TrajectoryOptions):
    """A student that follows trajectories against a slow copy of itself."""

    target_ema: float = option(0.95, "decay of the target, the student's moving average", at_least=0, below=1)


@dataclass(frozen=True)
class TangentOptions(TrajectoryOptions, TeacherGuidance, DerivativeOptions):
    """A student whose target is its own derivative along the path."""

    mode: Literal["distillation", "training"] = option(
        "distillation", "the direction of the path; distillation: the teacher's; training: the data's own noise"
    )


@dataclass(frozen=True)
class ImageDistance(Options):
    """How far two images lie apart."""

    distance: Literal["huber", "l1", "l2", "lpips"] = option(
        "huber",
        "huber: pseudo-Huber of the whole sample; l1: mean of absolute values; l2: mean square; lpips: VGG features, "
        "with pip install lpips",
    )
    huber_c: float | None = option(None, "c of the pseudo-Huber distance; default: 0.00054 sqrt(dimensions)", above=0)
