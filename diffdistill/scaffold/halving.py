"""The game of the methods that halve their steps: progressive distillation's stages (Salimans & Ho 2022).

arXiv:2202.00512.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import NONE, Cond, Denoiser, Extra
from diffdistill.core.guidance import require_null
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.ode import Denoise, ddim_step, inverse_ddim
from diffdistill.core.prediction import Prediction, diffuse
from diffdistill.core.schedule import student_grid, student_levels
from diffdistill.errors import UserError
from diffdistill.options import HalvingOptions
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.method import Batch, Method, Need, Outcome, Turn


@dataclass(frozen=True)
class Halving:
    """Stages of `stage_steps` training steps each; stage k trains a student of `start_steps` / 2^(k+1) steps."""

    start_steps: int
    final_steps: int
    stage_steps: int

    def __post_init__(self) -> None:
        ratio, rest = divmod(self.start_steps, self.final_steps)
        if rest or ratio < 2 or ratio & (ratio - 1):
            raise UserError(
                f"start_steps: {self.start_steps} is not final_steps ({self.final_steps}) times 2, 4, 8, ..."
            )

    @property
    def stages(self) -> int:
        """How many halvings there are."""
        return (self.start_steps // self.final_steps).bit_length() - 1

    @property
    def whole(self) -> int:
        """Training steps of all stages."""
        return self.stages * self.stage_steps

    def stage(self, step: int) -> int:
        """The stage of a training step; after `whole` steps still the last one, whose learning rate is zero then."""
        return min(step // self.stage_steps, self.stages - 1)

    def student_steps(self, step: int) -> int:
        """The sampling steps of the student that a training step trains."""
        return self.start_steps >> (self.stage(step) + 1)

    def starts(self, step: int) -> bool:
        """Whether a stage after the first begins at this step."""
        return step > 0 and step % self.stage_steps == 0 and step // self.stage_steps < self.stages

    def lr_factor(self, step: int) -> float:
        """Linear to zero within a stage, as in the authors' configuration."""
        return max(0.0, 1 - (step - self.stage(step) * self.stage_steps) / self.stage_steps)


class Stage(nn.Module):
    """The student of the stage before, and how many training steps are done: what a checkpoint needs besides."""

    done: Tensor

    def __init__(self, previous: Denoiser | None):
        super().__init__()
        self.previous = previous
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))


class HalvingMethod(Method):
    """One player, the student, without dropout; its former self is the teacher of the next stage.

    A method may train `first_steps` steps of its own (`first_turn`) before the halvings. With start_steps equal to
    final_steps there are no halvings after them.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.IMAGES})  # type: ignore[misc]
    stream: ClassVar[str] = "student/"  # of the halvings' randomness
    guides: ClassVar[str | None] = None  # the method's name where it needs a null condition

    def __init__(
        self, teacher: Teacher, config: HalvingOptions, student: Denoiser | None = None, *, first_steps: int = 0
    ):
        if self.guides is not None:
            require_null(teacher.denoiser, self.guides)
        if teacher.denoiser.output.name == "epsilon":
            raise UserError(
                "teacher: it predicts the noise, which says nothing of the image at the noisiest step of a few; "
                "give one that predicts v, x0 or a flow velocity to a method that halves its steps"
            )
        super().__init__(teacher, config)
        student = student or teacher.player("student")
        self.teacher = frozen(teacher.denoiser)
        self.first_steps = first_steps
        self.halving: Halving | None = None
        if config.start_steps != config.final_steps or not first_steps:
            self.halving = Halving(config.start_steps, config.final_steps, config.stage_steps)
            self.whole = first_steps + self.halving.whole
        self.student = student.eval()
        self.grid = student_grid(self.schedule, config.start_steps, option="start_steps")
        self.stage = Stage(frozen(copy.deepcopy(student)) if self.halving else None)
        self.players = {"student": self.student}
        self.state = {"stage": self.stage}

    # -- what a method says --------------------------------------------------------------------------------

    @abstractmethod
    def teacher_of(self, stage: int) -> Denoise:
        """Whose two steps the student of that halving makes in one; after the first it may be `self.previous`."""

    def first_turn(self, batch: Batch) -> Outcome:
        """What is trained before the halvings."""
        raise AssertionError("a method with first_steps says what they are")

    def extra(self, batch: Batch) -> Extra:
        """A second input that both networks of a halving take."""
        return NONE

    def step_loss(self, teacher: Denoise, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, batch: Batch) -> Outcome:
        """What a student's step from t to s is taught, at x_t (B, ...); `halve` alone unless a method says more."""
        return self.halve(teacher, x_t, t, mid, s, batch.cond, self.extra(batch))

    # -- the game --------------------------------------------------------------------------------------------

    @property
    def previous(self) -> Denoiser:
        """The student of the stage before."""
        assert self.stage.previous is not None
        return self.stage.previous

    @final
    def turns(self, step: int) -> Sequence[Turn]:
        """One turn of the student; a stage begins with a new optimizer, and its learning rate falls to zero."""
        k = step - self.first_steps
        if self.halving is None:
            return [Turn("student", self.first_turn)]
        if k < 0:
            return [Turn("student", self.first_turn, 1 - step / self.first_steps)]
        return [Turn("student", partial(self.halving_turn, k), self.halving.lr_factor(k), self._starts(step))]

    def _starts(self, step: int) -> bool:
        """Whether a stage after the first begins at this training step."""
        k = step - self.first_steps
        return self.halving is not None and (self.halving.starts(k) or (k == 0 and step > 0))

    @final
    def after_step(self, step: int) -> None:
        """The student becomes the teacher of a stage that begins."""
        self.stage.done.fill_(step + 1)
        if self._starts(step + 1):
            self.previous.load_state_dict(self.student.state_dict())

    @final
    def sampler(self) -> Sampler:
        """DDIM with the steps of the student as it stands; before training, with those it will have.

        A student of the first steps takes any number, here those of the first halving.
        """
        steps, done = self.config.final_steps, int(self.stage.done)
        if self.halving is not None and done:
            steps = self.halving.student_steps(max(done - 1 - self.first_steps, 0))
        levels = student_levels(self.schedule, self.config.start_steps)[:: self.config.start_steps // steps]
        return Sampler(self.student, levels.tolist(), DDIM())

    @final
    def halving_turn(self, k: int, batch: Batch) -> Outcome:
        """The loss of a training step of the halvings, the k-th of all of them."""
        assert self.halving is not None
        steps = self.halving.student_steps(k)
        stride = self.config.start_steps // steps
        i = stride * batch.integers(steps, f"{self.stream}i")
        grid = self.grid.to(i.device)
        t, mid, s = grid[i], grid[i + stride // 2], grid[i + stride]
        x_t = diffuse(batch.images, t, batch.randn(f"{self.stream}eps"))
        return self.step_loss(self.teacher_of(self.halving.stage(k)), x_t, t, mid, s, batch)

    @final
    def halve(
        self,
        teacher: Callable[..., Prediction],
        x_t: Tensor,
        t: Tensor,
        mid: Tensor,
        s: Tensor,
        cond: Cond,
        extra: Extra = NONE,
    ) -> Outcome:
        """One student step from t to s for two of the teacher's over mid, at x_t (B, ...); angles (B,)."""
        both = teacher if extra is NONE else partial(teacher, extra=extra)
        target = two_step_target(both, x_t, t, mid, s, cond)
        loss = weighted_x0_loss(self.student(x_t, t, cond, extra).x0, target, t, self.config.weight)
        return Outcome(loss, {"x0_error": loss})


def two_step_target(teacher: Denoise, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """(B, ...) the x0 whose one DDIM step from t to s lands where two teacher steps land (Algorithm 2).

    No gradient passes.
    """
    with torch.no_grad():
        x_s = ddim_step(teacher, ddim_step(teacher, x_t, t, mid, cond), mid, s, cond)
        return inverse_ddim(x_s, x_t, t, s)


def weighted_x0_loss(x0: Tensor, target: Tensor, t: Tensor, weight: str) -> Tensor:
    """The mean of w(t) |x0 - target|^2, w = max(1, SNR) ('truncated_snr') or SNR + 1 ('snr_plus_one'), section 4."""
    snr = torch.tan(t) ** -2
    w = {"truncated_snr": snr.clamp_min(1), "snr_plus_one": 1 + snr}[weight]
    return (w.to(x0) * per_sample_mean((x0 - target.to(x0)).square())).mean()
