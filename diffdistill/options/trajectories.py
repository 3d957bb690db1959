"""Groups of options that the methods along trajectories share, beside those of `groups`.

No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffdistill.errors import UserError
from diffdistill.options.groups import (
    HeadOptions,
    ImageDistance,
    LatentAdversarialOptions,
    Options,
    StudentLevel,
    StudentLevels,
    StudentOptions,
    TeacherGuidance,
    TrajectoryOptions,
)
from diffdistill.options.values import option


@dataclass(frozen=True)
class TangentNorm(Options):
    """The derivative in sCM's target, which warms up and is normalised."""

    tangent_warmup: int = option(10000, "training steps over which the derivative's share r rises to 1; 0: none",
                                 at_least=0)  # fmt: skip
    norm: Literal["rms", "l2", "none"] = option("rms", "|g|; rms: FastGen's; l2: SANA-Sprint's; none: not normalised")
    norm_c: float = option(0.1, "c of g/(|g| + c)", above=0)

    def warm(self, step: int) -> float:
        """r, the share of the derivative, at that training step."""
        return min(1.0, step / self.tangent_warmup) if self.tangent_warmup else 1.0


@dataclass(frozen=True)
class AdaptiveWeightRate(Options):
    """A player that learns the loss's weight at each time."""

    weight_lr: float = option(1e-3, "AdamW's learning rate for the adaptive weight", above=0)


@dataclass(frozen=True)
class TangentTarget(TangentNorm):
    """sCM's times beside it."""

    time_mean: float = option(-1.0, "mean of ln sigma, for data of deviation 0.5")
    time_std: float = option(1.4, "standard deviation of ln sigma", above=0)


@dataclass(frozen=True)
class AdversarialTerm(LatentAdversarialOptions):
    """The same beside another loss of the student."""

    gan_weight: float = option(0.0, "weight of the GAN loss; 0: no discriminator", at_least=0)


@dataclass(frozen=True)
class ConditionDropout(Options):
    """A student that learns without conditions too, so that it can be guided."""

    label_dropout: float = option(
        0.2, "share of samples without a condition, of a teacher that knows none", at_least=0, at_most=1
    )


@dataclass(frozen=True)
class ElementDistance(Options):
    """How far two samples lie apart, element by element."""

    distance: Literal["huber", "l2"] = option("huber", "elementwise; huber: sqrt(d^2 + c^2) - c; l2: d^2")
    huber_c: float = option(0.001, "c of the elementwise Huber distance", above=0)


@dataclass(frozen=True)
class EquilibriumOptions(Options):
    """The size of a student that is an equilibrium transformer of its own."""

    width: int | None = option(
        None, "numbers of a token; default: by the size of the samples, 256 for 3x32x32", at_least=4
    )
    heads: int | None = option(None, "heads of each attention; default: one for 64 of the width", at_least=1)
    patch: int | None = option(
        None, "side of the patches that are tokens; default: the least with 256 of them at most", at_least=1
    )
    depth: int = option(6, "blocks of the injection transformer, which are run once", at_least=1)
    equilibrium_depth: int = option(3, "blocks of the equilibrium transformer, with tied weights", at_least=1)
    equilibrium_ratio: int = option(6, "width of their perceptrons, in widths of a token; 4 in the others", at_least=1)
    iterations: int = option(6, "n, how often the equilibrium transformer is applied", at_least=1)


@dataclass(frozen=True)
class RestorationOptions(TrajectoryOptions, student_lr=5e-5):
    """A student that reads an image of which it makes a better one."""


@dataclass(frozen=True)
class StagedOptions(TrajectoryOptions, ImageDistance):
    """A student that learns straight lines, and one step of them after that; the distance is that of images."""

    reflow_steps: int = option(50000, "training steps after which the second stage begins, if there is one", at_least=1)
    distill_steps: int = option(50000, "training steps of the second stage, which leaves one step; 0: none", at_least=0)


@dataclass(frozen=True)
class SegmentOptions(StudentOptions, StudentLevel, TeacherGuidance, ElementDistance, HeadOptions):
    """A student that jumps to the end of its segment of the teacher's trajectory."""

    solver_steps: int = option(
        48, "N, the teacher's DDIM steps from noise to data, of which each training sample takes one", at_least=1
    )
    guidance_spread: float = option(
        0.0, "the teacher's scales are drawn uniformly, at most so far from guidance_scale", at_least=0
    )
    gan_weight: float = option(0.0, "weight of the GAN loss at the segments' ends; 0: no discriminator", at_least=0)

    def __post_init__(self) -> None:
        if self.guidance_spread > self.guidance_scale:
            raise UserError(
                f"guidance_spread: {self.guidance_spread} leads below 0 from guidance_scale ({self.guidance_scale})"
            )
        if self.guidance_spread and self.guidance_scale_2 is not None:
            raise UserError(
                f"guidance_scale_2: {self.guidance_scale_2:g} is one number, and guidance_spread draws them; use one"
            )
        super().__post_init__()

    @property
    def guides(self) -> bool:
        """Whether the teacher is guided at all."""
        return self.guidance_spread > 0 or self.guidance_scale != 1

    def drawn(self, u: Any) -> Any:
        """The guidance scales for u, uniform in [0, 1)."""
        return self.guidance_scale + self.guidance_spread * (2 * u - 1)


@dataclass(frozen=True)
class MergingOptions(SegmentOptions, StudentLevels):
    """Segments that merge stage by stage into one; solver_steps is a multiple of each number of them."""

    student_steps: int = option(1, "sampling steps after the last stage; its training is the same for any", at_least=1)
    stages: tuple[int, ...] = option((8, 4, 2, 1), "the segments of each stage, ending with 1", at_least=1)
    stage_steps: int = option(1000, "training steps of each stage", at_least=1)
    gamma: float = option(1.0, "the share of fresh noise between sampling steps", at_least=0, at_most=1)
    reward_weight: float = option(
        0.0, "weight of a reward of the student's clean samples in the last stage; it needs a gradient", at_least=0
    )

    def __post_init__(self) -> None:
        shown = ",".join(map(str, self.stages))
        if not self.stages or self.stages[-1] != 1:
            raise UserError(f"stages: {shown or 'nothing'} do not end with 1 segment; give them as 8,4,2,1")
        for number in self.stages:
            if self.solver_steps % number:
                raise UserError(f"stages: {number} segments do not divide solver_steps ({self.solver_steps})")
        super().__post_init__()


@dataclass(frozen=True)
class ImitationOptions(StudentOptions, StudentLevels, TeacherGuidance, student_lr=1e-4):
    """A student whose passes say policies, which imitate the teacher where they lead; `student_steps` is to be said."""

    substeps: int = option(32, "the policy's steps from a level to the next", at_least=1)
    states: int = option(4, "states on the policy's path, at each of which the teacher is asked", at_least=1)
    window: int = option(
        1, "steps over which the policy's velocity is averaged; 1: it is that at the state", at_least=1
    )
    teacher_share: float = option(
        0.0, "at the training's beginning, how much of the path is the teacher's", at_least=0, at_most=1
    )
    mixing_steps: int = option(2000, "training steps in which the teacher's share falls to none", at_least=1)
    component_dropout: float = option(0.0, "the share of a policy's components that are left out", at_least=0, below=1)

    def __post_init__(self) -> None:
        if self.states > self.substeps:
            raise UserError(f"states: {self.states} is more than the {self.substeps} substeps; give that or fewer")
        super().__post_init__()


@dataclass(frozen=True)
class HalvingOptions(StudentOptions):
    """Stages, each of which halves the sampling steps."""

    start_steps: int = option(16, "teacher's DDIM steps in the first halving; final_steps times 2, 4 ..", at_least=1)
    final_steps: int = option(1, "the sampling steps of the last stage's student", at_least=1)
    stage_steps: int = option(1000, "training steps of each halving", at_least=1)
    student_lr: float = option(5e-5, "AdamW's learning rate as a stage starts; it falls linearly to zero", above=0)
    weight: Literal["truncated_snr", "snr_plus_one"] = option(
        "truncated_snr", "weight of the error in x0; truncated_snr: max(1, SNR); snr_plus_one: the error in v"
    )


@dataclass(frozen=True)
class OnePassSampling(StudentOptions):
    """A student that says in one pass what took two, and leaves the number of steps as it is."""

    sampling_steps: int = option(20, "DDIM steps of samples and of the export, one pass each", at_least=1)


@dataclass(frozen=True)
class GuidedSampling(OnePassSampling):
    """The same for guidance, along guided trajectories."""

    trajectory_steps: int = option(50, "DDIM steps of the guided trajectories that are trained on", at_least=1)
