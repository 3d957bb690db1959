"""Networks of one kind in the place of one, each for a part of the noise (Balaji et al. 2022, arXiv:2211.01324).

Or each for a part of the classes (Song et al. 2024, arXiv:2410.23274).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.rows import joined


class Experts(nn.Module):
    """`networks` are two by name: the first is for times of at least `boundary`, the second for those below.

    A call is one of the network that is chosen (`only`).
    """

    def __init__(self, networks: Mapping[str, nn.Module], boundary: float):
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.names = tuple(networks)
        self.boundary = boundary  #: in the networks' own times
        self.chosen: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the network that is chosen."""
        assert self.chosen is not None, "no network is chosen"
        return self.get_submodule(self.chosen)(*args, **kwargs)

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Inside the block that network is called."""
        before, self.chosen = self.chosen, name
        try:
            yield
        finally:
            self.chosen = before

    def layer(self, name: str) -> str:
        """That layer of the first network, by its dotted name, in the one that is chosen."""
        return f"{self.chosen}.{name.partition('.')[2]}"

    def is_first(self, time: Tensor) -> Tensor:
        """Which of the times (B,) are the first network's, as booleans (B,)."""
        return time.detach() >= self.boundary

    def rows(self, time: Tensor, cond: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Which of the samples, by their times (B,), are whose, as indices (b,)."""
        first = self.is_first(time)
        return [(name, mask.nonzero()[:, 0]) for name, mask in zip(self.names, (first, ~first), strict=True)]

    @property
    def first(self) -> Any:
        """The first network."""
        return self.get_submodule(self.names[0])

    @property
    def config(self) -> Any:
        """The first network's."""
        return self.first.config

    @property
    def _supports_gradient_checkpointing(self) -> bool:
        return all(getattr(self.get_submodule(name), "_supports_gradient_checkpointing", False) for name in self.names)

    @property
    def _keep_in_fp32_modules(self) -> list[str]:
        return getattr(self.first, "_keep_in_fp32_modules", None) or []

    @property
    def _no_split_modules(self) -> list[str]:
        return getattr(self.first, "_no_split_modules", None) or []

    def enable_gradient_checkpointing(self, call: Callable[..., Any]) -> None:
        """As diffusers' networks have it."""
        for name in self.names:
            network: Any = self.get_submodule(name)
            network.enable_gradient_checkpointing(call)


class ClassExperts(Experts):
    """Any number of networks by name, each for some of the classes.

    `parts` (n,) says for each label which network is its own, by number.
    """

    def __init__(self, networks: Mapping[str, nn.Module], parts: Sequence[int]):
        super().__init__(networks, 0.0)
        self.parts = tuple(parts)

    def layer(self, name: str) -> str:
        """That layer of one such network, in the one that is chosen."""
        return ".".join((str(self.chosen), name))

    def rows(self, time: Tensor, cond: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Which of the samples, by their labels (B,), are whose; without values, for a plan, as many are each one's."""
        labels, n = cond["class_labels"], len(self.names)
        if labels.is_meta:
            return list(zip(self.names, torch.arange(len(labels), device="meta").tensor_split(n), strict=True))
        whose = torch.tensor(self.parts, device=labels.device)[labels]
        return [(name, (whose == k).nonzero()[:, 0]) for k, name in enumerate(self.names)]


def experts_of(network: nn.Module) -> Experts | None:
    """Of a network, or a LoRA player's; None where it is one."""
    base = getattr(network, "base", network)
    return base if isinstance(base, Experts) else None


def asked(network: nn.Module, times: Iterable[float]) -> tuple[str, ...]:
    """The names of the networks that those times ask, the first always; () of a network that is one."""
    experts = experts_of(network)
    if experts is None:
        return ()
    return experts.names if any(time < experts.boundary for time in times) else experts.names[:1]


def by_expert(
    network: nn.Module,
    time: Tensor,
    cond: Mapping[str, Tensor],
    compute: Callable[[Tensor | None], list[Tensor]],
) -> list[Tensor]:
    """What `compute` gives (B, ...) of the rows that it is told, each by the network for its time (B,) or condition.

    `compute` is told None for all rows.
    """
    experts = experts_of(network)
    if experts is None or experts.chosen is not None:
        return compute(None)
    shares = [share for share in experts.rows(time, cond) if len(share[1])]
    outputs = []
    for name, rows in shares:
        with experts.only(name):
            outputs.append(compute(None if len(rows) == len(time) else rows))
    return joined(outputs, [rows for _, rows in shares])
