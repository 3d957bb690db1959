"""What a method is: a game between players, told to the trainer turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond
from diffdistill.players.sampler import FewStepSampler
from diffdistill.rng import generator


class Pair(NamedTuple):
    """Noise and the image that the teacher's sampler makes of it (see pairs.py)."""

    z: Tensor  #: (B, ...) standard normal
    x0: Tensor  #: (B, ...) of unit variance
    cond: Cond


@dataclass(frozen=True)
class Batch:
    """One step's conditions, its data if there are any, and its randomness."""

    size: int
    shape: tuple[int, ...]  #: of one sample
    cond: Cond
    x0: Tensor | None  #: (B, *shape) real data of unit variance, or None in data-free training
    device: torch.device
    key: tuple[int, ...]  #: (seed, step, rank)
    pair: Pair | None = None  #: where the method asks for pairs

    def generator(self, purpose: str) -> torch.Generator:
        """A generator that is a function of (seed, step, rank, purpose)."""
        return generator(self.device, *self.key, purpose)

    def randn(self, purpose: str) -> Tensor:
        """(B, *shape) standard normal noise for that purpose."""
        return torch.randn(self.size, *self.shape, generator=self.generator(purpose), device=self.device)


class Optimizer(NamedTuple):
    """AdamW's settings for one player."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01


class Turn(NamedTuple):
    """One player's move. `loss` returns {"loss": scalar, and detached scalars to log}.

    `lr_factor` multiplies the learning rate of this move; `restart` gives the player a new optimizer first.
    """

    player: str
    loss: Callable[[Batch], dict[str, Tensor]]
    lr_factor: float = 1.0
    restart: bool = False


class Method(Protocol):
    """Trainable players by role, one optimizer each; the first is the one that is averaged and exported.

    Of a player, what requires a gradient when training starts is trained, and nothing else. `state` is what
    a checkpoint holds besides the players: an averaged target, the teacher of the present stage.
    `needs_data`, `needs_pairs`: whether `Batch.x0` and `Batch.pair` must be there. A method with stages may also say
    `whole`, the training steps that all of them take.
    """

    players: dict[str, nn.Module]
    state: dict[str, nn.Module]
    needs_data: bool
    needs_pairs: bool

    def optimizer(self, player: str) -> Optimizer: ...
    def turns(self, step: int) -> Sequence[Turn]: ...
    def after_step(self, step: int) -> None: ...
    def sampler(self) -> FewStepSampler: ...
