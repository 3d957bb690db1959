"""What a method is: a game between players, told to the trainer turn by turn."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, choose
from diffdistill.core.distances import distance
from diffdistill.core.prediction import diffuse
from diffdistill.core.schedule import check_levels, student_levels
from diffdistill.core.times import native_uniform
from diffdistill.errors import UserError
from diffdistill.options import ImageDistance, StudentOptions
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import generator


class Need(enum.Enum):
    """What a training must be given besides the teacher."""

    IMAGES = "real images"
    PAIRS = "noise-image pairs of the teacher"
    REWARD = "a reward"
    GRADIENT = "the gradient of its reward"
    LOSERS = "the worse of each pair"
    DECODER = "the autoencoder of its latents"
    TEACHER_DATA = "the conditions that its teacher sees"


class Pair(NamedTuple):
    """Noise and the image that the teacher's sampler makes of it (see data/pairs.py)."""

    z: Tensor  #: (B, ...) standard normal
    x0: Tensor  #: (B, ...) of unit variance
    cond: Cond


@dataclass(frozen=True)
class Batch:
    """Conditions, data if there are any, and randomness of the samples of a step, or of some of them.

    A step's samples are divided over processes, and in a process over passes (`parts`). What `draw` and its kin give to
    a sample depends on its index in the step, not on how they are divided.
    """

    size: int
    shape: tuple[int, ...]  #: of one sample
    cond: Cond
    x0: Tensor | None  #: (B, *shape) real data of unit variance, or None in data-free training
    device: torch.device
    key: tuple[int, ...]  #: (seed, step, index of the first of these samples in the step)
    pair: Pair | None = None  #: where the method needs pairs
    total: int | None = None  #: samples of the step in all processes; None: these are all
    losers: Tensor | None = None  #: (B, *shape) of unit variance, worse than x0, where the data are pairs
    texts: tuple[str, ...] | None = None  #: the prompts that the conditions are of, where a reward reads them
    teacher_cond: Cond | None = None  #: what the teacher sees in place of `cond`, where that is another

    @property
    def images(self) -> Tensor:
        """(B, *shape) the real data, for a method that needs them."""
        assert self.x0 is not None, "the method does not say that it needs images"
        return self.x0

    @property
    def worse(self) -> Tensor:
        """(B, *shape) the worse of each pair, for a method that needs them."""
        assert self.losers is not None, "the method does not say that it needs losers"
        return self.losers

    @property
    def seen_by_teacher(self) -> Cond:
        """The teacher's own conditions, for a method that needs them."""
        assert self.teacher_cond is not None, "the method does not say that its teacher sees other conditions"
        return self.teacher_cond

    @property
    def paired(self) -> Pair:
        """The noise-image pairs, for a method that needs them."""
        assert self.pair is not None, "the method does not say that it needs pairs"
        return self.pair

    @property
    def first(self) -> int:
        """The index of the first of these samples among those of the step."""
        return self.key[2]

    @property
    def rows(self) -> slice:
        """Where these samples lie among those of the step."""
        return slice(self.first, self.first + self.size)

    @property
    def whole(self) -> int:
        """The samples of the step in all processes."""
        return self.size if self.total is None else self.total

    def parts(self, n: int) -> list[Batch]:
        """The same samples as n batches of one size, in their order; the number of samples is a multiple of n."""
        if n == 1:
            return [self]
        return [self._part(slice(start, start + self.size // n)) for start in range(0, self.size, self.size // n)]

    def _part(self, rows: slice) -> Batch:
        """Those of the samples here."""

        def cut(cond: Cond) -> Cond:
            return {name: value[rows] for name, value in cond.items()}

        return replace(
            self,
            size=rows.stop - rows.start,
            cond=cut(self.cond),
            x0=None if self.x0 is None else self.x0[rows],
            key=(*self.key[:2], self.first + rows.start),
            pair=None if self.pair is None else Pair(self.pair.z[rows], self.pair.x0[rows], cut(self.pair.cond)),
            total=self.whole,
            losers=None if self.losers is None else self.losers[rows],
            texts=None if self.texts is None else self.texts[rows],
            teacher_cond=None if self.teacher_cond is None else cut(self.teacher_cond),
        )

    def repeated(self, n: int) -> Batch:
        """Each of the samples n times, one after the other, without its data; draws differ from copy to copy."""
        return replace(
            self,
            size=n * self.size,
            cond={name: value.repeat_interleave(n, 0) for name, value in self.cond.items()},
            x0=None,
            key=(*self.key[:2], n * self.first),
            pair=None,
            total=n * self.whole,
            losers=None,
            teacher_cond=None,
            texts=None if self.texts is None else tuple(text for text in self.texts for _ in range(n)),
        )

    def draw(self, purpose: str, of: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """(B, ...) these samples' rows of `of(n, generator)` (n, ...), which draws for all n samples of the step.

        The generator is a function of (seed, step, purpose).
        """
        return of(self.whole, generator(self.device, *self.key[:2], 0, purpose))[self.rows]

    def randn(self, purpose: str) -> Tensor:
        """(B, *shape) standard normal noise for that purpose."""
        return self.draw(purpose, lambda n, draw: torch.randn(n, *self.shape, generator=draw, device=draw.device))

    def uniform(self, purpose: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """(B,) in [0, 1) for that purpose."""
        return self.draw(purpose, lambda n, draw: torch.rand(n, generator=draw, device=draw.device, dtype=dtype))

    def integers(self, n: int, purpose: str) -> Tensor:
        """(B,) int64 from 0 to n - 1 for that purpose."""
        return self.draw(purpose, lambda size, draw: torch.randint(n, (size,), generator=draw, device=draw.device))


def some_dropped(batch: Batch, null: Callable[[Cond], Cond] | None, share: float) -> Batch:
    """The batch, with that share of its conditions replaced by `null` of them; as it is where there is none."""
    if null is None or not share:
        return batch
    return replace(batch, cond=choose(batch.uniform("student/drop") < share, null(batch.cond), batch.cond))


class Optimizer(NamedTuple):
    """AdamW's settings for one player."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Outcome:
    """What a turn minimises, and the scalars that are logged beside it."""

    loss: Tensor
    shown: Mapping[str, Tensor] = field(default_factory=dict)


class Turn(NamedTuple):
    """One player's move.

    `lr_factor` multiplies the learning rate of this move; `restart` gives the player a new optimizer first.
    """

    player: str
    loss: Callable[[Batch], Outcome]
    lr_factor: float = 1.0
    restart: bool = False


class Method(ABC):
    """Trainable players by role, one optimizer each; the trainer knows nothing else of a method.

    Of a player, what requires a gradient when training starts is trained, and nothing else. The first player is
    averaged and exported. `state` is what a checkpoint holds besides the players: an averaged target, the teacher of
    the present stage. A subclass says its options in a dataclass `Config` beside it, and overrides what is abstract
    and the defaults that are not marked final.
    """

    needs: frozenset[Need] = frozenset()
    trained_steps: Sequence[int] = range(0)  #: the numbers of sampling steps that the student may take besides its own
    sampling_steps: int | None = None  #: of the sampler, where they are not those of the options
    whole: int | None = None  #: the training steps of all stages, of a method that has stages
    shortest: int | None = None  #: the fewest training steps with which the student comes to its teacher

    def __init__(self, teacher: Teacher, config: Any):
        self.config = config
        self.schedule = teacher.denoiser.schedule
        self.players: dict[str, nn.Module] = {}
        self.state: dict[str, nn.Module] = {}
        if isinstance(config, ImageDistance):
            #: of two samples (B, ...) of unit variance, in the data's units -> (B,)
            self.image_distance = distance(config.distance, teacher.shape, self.schedule.data_std, config.huber_c)
        #: (samples x (B, ...) of unit variance, their batch) -> (B,), where it needs one: what trains it says it
        self.reward: Callable[..., Tensor] | None = None
        #: latents (B, ...) in the teacher's units -> images, with a gradient, where it needs them; the same says it
        self.decode: Callable[[Tensor], Tensor] | None = None

    @final
    def scored(self, x: Tensor, batch: Batch) -> Tensor:
        """(B,) the rewards of samples x (B, ...), with a gradient if the method needs that, else without."""
        assert self.reward is not None, "the method does not say that it needs a reward"
        return self.reward(x, batch, gradient=True) if Need.GRADIENT in self.needs else self.reward(x, batch)

    @final
    def as_images(self, x: Tensor) -> Tensor:
        """Samples x (B, ...) of unit variance in the teacher's units, and latents as images; a gradient passes."""
        samples = x * self.schedule.data_std
        if Need.DECODER not in self.needs:
            return samples
        assert self.decode is not None, "nothing has said how latents are decoded"
        return self.decode(samples)

    @final
    def uniform_times(self, batch: Batch, purpose: str = "student/t") -> Tensor:
        """(B,) angles, uniform in the schedule's own time."""
        return batch.draw(purpose, lambda n, draw: native_uniform(self.schedule, n, draw))

    @final
    def noised_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_t (B, ...), the images under noise, and the angles t (B,), uniform in the schedule's own time."""
        t = self.uniform_times(batch)
        return diffuse(batch.images, t, batch.randn("student/eps")), t

    @property
    def exported(self) -> str:
        """The role of the player that is averaged and exported."""
        return next(iter(self.players))

    def optimizer(self, player: str) -> Optimizer:
        """A player's AdamW: the student's options, with the player's own rate where there is an option NAME_lr."""
        options: StudentOptions = self.config
        rate = getattr(options, f"{player}_lr", options.student_lr)
        return Optimizer(rate, (options.beta1, 0.999), options.weight_decay)

    @abstractmethod
    def turns(self, step: int) -> Sequence[Turn]:
        """The moves of a training step, in their order."""

    def after_step(self, step: int) -> None:
        """What follows the moves of a training step."""
        return None

    @abstractmethod
    def sampler(self) -> Sampler:
        """How the student is sampled as it stands."""

    @final
    def levels_of(self, teacher: Teacher) -> tuple[float, ...]:
        """The levels of a teacher that is a student: the options', or those that its folder says.

        Raises UserError where neither says them, and for a first level that is another than the folder's.
        """
        first = self.config.student_level
        if self.config.student_steps is None and teacher.levels:
            if first not in (None, teacher.levels[0]):
                raise UserError(
                    f"student_level: the student to be tuned begins at {teacher.levels[0]:g}; give student_steps too, "
                    "or leave it out"
                )
            return teacher.levels
        if self.config.student_steps is None:
            raise UserError(
                "levels: the teacher, the student to be tuned, says no levels; give --levels, as 999,749,499,249, or "
                "--student-steps"
            )
        return tuple(self.levels_in())

    @final
    def levels_in(self, steps: int | None = None) -> list[float]:
        """So many levels (None: as the options say): those of the option `levels`, or evenly spaced from the first.

        Raises UserError for one that the schedule has not.
        """
        own = self.config
        if own.levels is not None and steps in (None, len(own.levels)):
            check_levels(self.schedule, own.levels, "levels")
            return list(own.levels)
        option = "steps" if steps else "student_steps"
        return student_levels(self.schedule, steps or own.student_steps, own.student_level, option=option).tolist()

    def in_steps(self, steps: int) -> None:
        """The sampler takes so many steps from here on, of a student that is trained for them (`trained_steps`).

        Raises UserError where it is not, or where its jumps would be longer than those that are trained.
        """
        if steps in self.trained_steps:
            self.sampling_steps = steps
            return
        trained = self.trained_steps or [len(self.sampler().levels)]
        shown = list(trained) if len(trained) <= 8 else [*trained[:3], "..", trained[-1]]
        listed = ", ".join(str(n) for n in shown)
        raise UserError(f"student_steps: this student is trained for {listed} steps and no others; leave it out")
