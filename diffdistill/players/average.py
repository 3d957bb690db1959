"""An exponential moving average of a player's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from diffdistill.core.divided import approach, divided_like, own_part


class MovingAverage:
    """An exponential moving average of a module's trainable parameters, in their own precision, beside it."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages = [p.detach().clone() for p in self.parameters.values()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (0-based); the decay warms up as (1 + step)/(10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        approach(self.averages, (p.detach() for p in self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self, there: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
        """The module carries the average inside the block and its own parameters after it.

        They change places inside `there()`, where both can be read.
        """
        with there():
            self._swap()
        try:
            yield
        finally:
            with there():
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # By value: the parameter of a divided network knows its share by where that lies.
        for p, average in zip(self.parameters.values(), self.averages, strict=True):
            here, there = own_part(p.detach()), own_part(average)
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters; the tensors themselves, no copies."""
        return dict(zip(self.parameters, self.averages, strict=True))

    def load(self, state: dict[str, Tensor]) -> None:
        """Copy averages from what `state` returned; KeyError for a parameter that it lacks."""
        for name, average in self.state().items():
            average.copy_(divided_like(state[name], average))
