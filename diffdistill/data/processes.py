"""Several processes that make one folder of shards together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from diffdistill.data.shards import Kind, make, start
from diffdistill.environment import launched, use_machine


class Processes:
    """This process among those that `torchrun` or `accelerate launch` started, or alone, and its device."""

    def __init__(self, device: str, threads: int = 0) -> None:
        self.rank, self.count, self.state = 0, 1, None
        self.device = use_machine(device, threads)
        if launched():
            own_threads = torch.get_num_threads()
            self.state = PartialState(cpu=self.device.type == "cpu", timeout=timedelta(days=7))
            torch.set_num_threads(own_threads)  # accelerate chooses its own
            self.rank, self.count = self.state.process_index, self.state.num_processes
            self.device = self.state.device

    def wait(self) -> None:
        """For all processes."""
        if self.state:
            self.state.wait_for_everyone()

    def least(self, number: int | None) -> int | None:
        """The least of the numbers that the processes have; None if none of them has one."""
        numbers = gather_object([number]) if self.state else [number]
        return min((n for n in numbers if n is not None), default=None)

    def alone(self) -> Processes:
        """This process without the others, on its device."""
        one = copy.copy(self)
        one.rank, one.count, one.state = 0, 1, None
        return one

    def start(self, kind: Kind, out: Path, settings: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
        """`data.shards.start` by the first process, which the others read; the folder's index."""
        index = start(kind, out, settings, notes) if self.rank == 0 else None
        self.wait()
        return start(kind, out, settings, notes) if index is None else index

    def make(
        self, kind: Kind, out: Path, index: dict[str, Any], batch_size: int,
        produce: Callable[[range], dict[str, Tensor]], quiet: bool = False,
    ) -> None:  # fmt: skip
        """`data.shards.make` by all processes, each its share of what is missing; all of it is there afterwards."""
        make(kind, out, index, batch_size, produce, self.rank, self.count, quiet=quiet)
        self.wait()
