"""The training loop. It knows players and turns, and nothing of any method."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from tqdm import tqdm

from diffdistill.config import FitConfig
from diffdistill.core.divided import in_kinds, is_divided, total_norm
from diffdistill.data.progress import Pace
from diffdistill.environment import peak_memory_mb, use_machine
from diffdistill.errors import UserError
from diffdistill.players.average import MovingAverage
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.rng import seed_for
from diffdistill.scaffold.method import Batch, Method, Optimizer, Turn
from diffdistill.training.checkpoint import (
    checkpoints,
    full_disk_said,
    load_into,
    load_newest,
    load_optimizer_state,
    optimizer_state,
    remove_leftovers,
    remove_old,
    save_checkpoint,
    set_aside,
    state_tensors,
)
from diffdistill.training.figures import Figures
from diffdistill.training.inputs import PROCESSES, Allowed, allows
from diffdistill.training.judging import Judging, judged
from diffdistill.training.launchers import check_launcher, without_plugin
from diffdistill.training.metrics import MetricsFile, show, show_step
from diffdistill.training.offload import Offload, settled
from diffdistill.training.optimizers import optimizer
from diffdistill.training.sharding import divided_networks, gather_later, take_part
from diffdistill.training.stopping import Interrupted, stopping
from diffdistill.training.unread import read_batch


class NonFinite(UserError):
    """A loss or gradient is nan or infinite; no parameter was changed by it."""


class Trainer:
    """Trains a method's players on `batches(step)` and keeps the run folder `out`.

    For each turn: unfreeze that player, compute and backward in `accumulate` parts of the batch, average gradients over
    processes, clip, step.
    One value is read on the host a turn (are loss and gradient finite?), none a parameter. `beside` are networks that
    the method reads besides its own.
    """

    def __init__(
        self,
        method: Method,
        batches: Callable[[int], Batch],
        config: FitConfig,
        out: Path,
        accelerator: Accelerator,
        on_sample: Callable[[int], None] | None = None,
        beside: Iterable[nn.Module] = (),
    ):
        self.method = method
        self.batches = batches
        self.config = config
        self.out = out
        self.accelerator = accelerator
        self.on_sample = on_sample
        self.on_look: Callable[[int], None] | None = None  # which is made once the run folder is there
        self.before_save: Callable[[], None] | None = None
        self.pace = Pace(config.steps)  #: of lines in a log
        self.began = time.monotonic()  #: from where --max-hours count
        self.step, self.saved = 0, 0  #: the steps that are done, and those in the newest checkpoint
        self.judge: Judging | None = None
        self.warn: Callable[[dict[str, Any]], list[str]] | None = None  # see MetricsFile
        self.figures: Figures | None = None
        self.best: tuple[int, float] | None = None  #: the step of the best judging and its value, in the main process
        self.skipped = 0  #: updates that were left out since they were not finite
        self.totals: dict[str, tuple[Tensor | float, int]] = {}  # sums since the last line of metrics.jsonl
        self.averaged = method.exported if config.ema else None
        self._start_players([*beside, *method.players.values(), *method.state.values()])

    def _start_players(self, modules: Sequence[nn.Module]) -> None:
        self.parameters = trainable(self.method.players)
        # Before anything is moved, for which the device may be too small.
        self.offload = Offload(self.config.offload, modules, self.accelerator.device)
        for module in modules:
            settled(module, self.accelerator.device)
        self.divided = divided_networks([*self.method.players.values(), *self.method.state.values()])
        self.settings: dict[str, Optimizer] = {name: self.method.optimizer(name) for name in self.method.players}
        self.optimizers = {name: self._optimizer(name) for name in self.method.players}
        self.average: MovingAverage | None = None
        if self.averaged:
            with self.offload.on_host():
                self.average = MovingAverage(self.method.players[self.averaged], self.config.ema)
            self.offload.hold_average(self.average.averages)

    def _optimizer(self, player: str) -> torch.optim.Optimizer:
        kinds = in_kinds(self.parameters[player])
        groups = [group for kind in kinds for group in self.offload.groups(kind)]
        return optimizer(self.config.optimizer, groups, self.settings[player], self.method.players[player])

    # -- one step ----------------------------------------------------------------------------------------

    def take(self, turn: Turn, batch: Batch) -> dict[str, Tensor]:
        """One player's move, in one pass or several over parts of the batch; its losses and 'grad_norm', detached.

        None of them where the update was skipped.
        """
        only_trains(turn.player, self.parameters)
        if turn.restart:
            self.optimizers[turn.player] = self._optimizer(turn.player)
            self.offload.loaded(turn.player, self.optimizers[turn.player])
        logs: dict[str, Tensor] = {}
        for part in batch.parts(self.config.accumulate):
            for name, value in self._backward(turn, part).items():
                logs[name] = logs[name] + value if name in logs else value
        gather_later(self.divided)
        loss = logs["loss"]
        if self.accelerator.num_processes > 1:
            self._average_over_processes(turn.player)
        grads = [p.grad for p in self.parameters[turn.player] if p.grad is not None]
        norm = total_norm(grads)
        if self.anywhere(not bool(torch.isfinite(loss + norm))):
            self._skip(turn.player, f"loss {float(loss)}, gradient norm {float(norm)}")
            return {}
        if self.config.max_grad_norm:
            for kind in in_kinds(self.parameters[turn.player]):
                torch.nn.utils.clip_grads_with_norm_(kind, self.config.max_grad_norm, norm)
        moving = self.optimizers[turn.player]
        for group in moving.param_groups:
            group["lr"] = self.learning_rate(turn.player) * turn.lr_factor
        self.offload.step(turn.player, moving)
        moving.zero_grad(set_to_none=True)
        return {**logs, "grad_norm": norm}

    def _backward(self, turn: Turn, part: Batch) -> dict[str, Tensor]:
        """Add a part's share of the gradient; returns its share of what is logged."""
        # Dropout draws from the global generator; seeding it makes the masks a function of the step too.
        torch.manual_seed(seed_for(*part.key, turn.player, "global"))
        with self.accelerator.autocast(), self.offload.graph():
            outcome = turn.loss(part)
        n = self.config.accumulate
        self.accelerator.backward(outcome.loss / n)
        return {name: value.detach() / n for name, value in {"loss": outcome.loss, **outcome.shown}.items()}

    def learning_rate(self, player: str) -> float:
        """That of a player at the trainer's step."""
        c = self.config
        factor = min(1.0, (self.step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
        if c.lr_schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * self.step / c.steps))
        return self.settings[player].lr * factor

    def _average_over_processes(self, player: str) -> None:
        # One flat reduction: DistributedDataParallel does not allow for several passes a turn. A gradient that is on
        # some ranks is zero on the others; one that is on none stays away. torch has averaged those that are divided.
        whole = [p for p in self.parameters[player] if not is_divided(p)]
        if whole:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
            there = grads[0].new_tensor([p.grad is not None for p in whole])
            flat = self.accelerator.reduce(torch.cat([*(g.reshape(-1) for g in grads), there]), "mean")
            *parts, there = flat.split([*(g.numel() for g in grads), len(grads)])
            for p, grad, part, some in zip(whole, grads, parts, there.tolist(), strict=True):
                p.grad = grad.copy_(part.view_as(p)) if some else None

    def _skip(self, player: str, what: str) -> None:
        """Leave an update out and say so; NonFinite for one more than `skip_nonfinite`."""
        most = self.config.skip_nonfinite
        if self.skipped == most:
            before = f"; {most} updates were skipped before, as many as --skip-nonfinite allows" if most else ""
            raise self._non_finite(player, f"{what}; it was not updated{before}")
        self.skipped += 1
        self.optimizers[player].zero_grad(set_to_none=True)
        if self.accelerator.is_main_process:
            count = f"{self.skipped} of at most {most}"
            print(
                f"warning: step {self.step}, player {player!r}: {what}; the update is skipped ({count})",
                file=sys.stderr,
            )

    def _non_finite(self, player: str, what: str) -> NonFinite:
        kept = checkpoints(self.out / "checkpoints")
        last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet"
        return NonFinite(f"step {self.step}, player {player!r}: {what}; {last}; try a lower learning rate")

    def check_parameters(self) -> None:
        """Before anything is drawn or written with them: no player has overflowed in its last step."""
        with self.offload.on_host():
            for player, parameters in self.parameters.items():
                if not bool(torch.isfinite(total_norm(parameters))):
                    raise self._non_finite(player, "its parameters are no longer finite")

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all of them stop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def most(self, number: int) -> int:
        """The largest of the numbers that the processes have."""
        if self.accelerator.num_processes == 1:
            return number
        numbers = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device))
        return int(numbers.max())

    def iteration(self, batch: Batch | None = None) -> dict[str, Tensor]:
        """All turns of one step, the moving average and the method's after_step; logs by '<player>/<name>'."""
        batch = self.batches(self.step) if batch is None else batch
        logs: dict[str, Tensor] = {}
        moved = set()
        for turn in self.method.turns(self.step):
            taken = self.take(turn, batch)
            logs |= {f"{turn.player}/{key}": value for key, value in taken.items()}
            moved |= {turn.player} if taken else set()
        with self.offload.reading():
            if self.average and self.averaged in moved:
                self.average.update(self.step)
            self.method.after_step(self.step)
        self.step += 1
        return logs

    # -- the loop ----------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train up to config.steps.

        Raises Interrupted after a signal or `max_hours`, and Unread for data that cannot be read, once a checkpoint
        has been written.
        """
        config, writer = self.config, None
        if self.accelerator.is_main_process:
            try:  # now, and not after the first step
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"out: cannot make {str(self.out)!r} ({error.strerror}); choose another") from None
            writer = MetricsFile(self.out / "metrics.jsonl", self.step, self.warn)
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            disable=not (sys.stderr.isatty() and self.accelerator.is_main_process),
            dynamic_ncols=True,
        )
        with bar, full_disk_said(self.out), stopping(config.max_hours, self.began) as stop:
            started, since = time.perf_counter(), self.step
            if self.step == 0:
                self._sample()
                judged(self, writer)
            while self.step < config.steps:
                for key, value in self.iteration(read_batch(self)).items():
                    total, count = self.totals.get(key, (0.0, 0))
                    self.totals[key] = (total + value, count + 1)
                bar.update()
                if bar.disable and writer is not None and self.step % config.log_every and self.pace.late():
                    show_step(self.step, config.steps, (time.perf_counter() - started) / (self.step - since))
                if self.step % config.log_every == 0 or self.step == config.steps:
                    means = {k: total / count for k, (total, count) in self._totals().items()}
                    seconds = (time.perf_counter() - started) / (self.step - since)
                    self.totals = {}
                    self._log(writer, means, seconds, bar)
                if config.sample_every and self.step % config.sample_every == 0 and self.step < config.steps:
                    self._sample()
                improved = judged(self, writer)
                if self.step in (max(1, config.steps // 10), config.steps):
                    self._evaluated(self.on_look)
                last, reason = self.step == config.steps, self.most(stop.reason)
                if last or reason or improved or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self.save()
                if reason and not last:
                    raise Interrupted(self.out, self.step, config.steps, reason - 1)
        self._sample()

    def _totals(self) -> dict[str, tuple[float, int]]:
        """The sums since the last line of metrics.jsonl and their counts, averaged over processes."""
        sums = torch.tensor([float(total) for total, _ in self.totals.values()], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), "mean")
        counts = [count for _, count in self.totals.values()]
        return dict(zip(self.totals, zip(sums.tolist(), counts, strict=True), strict=True))

    def _log(self, writer: MetricsFile | None, means: dict[str, float], seconds: float, bar: tqdm) -> None:
        config = self.config
        self.accelerator.log(means, step=self.step)
        figures: dict[str, float] = {}
        if self.figures and self.figures.due(self.step):  # in all processes where networks are divided
            with self.evaluating():
                figures = self.figures(self)
        if writer is None:
            return
        if self.skipped:
            means = {**means, "skipped_updates": float(self.skipped)}
        measured = {"seconds_per_step": round(seconds, 5), "peak_memory_mb": round(peak_memory_mb(), 1)}
        means = means | figures
        writer.write({"step": self.step, **measured, **means})
        show(bar, means, self.step, config.steps, config.log_every, seconds, self.pace)

    def _sample(self) -> None:
        if self.config.sample_every:
            self._evaluated(self.on_sample)

    def _evaluated(self, show: Callable[[int], None] | None) -> None:
        """`show(step)` with the players as they are exported, in the main process or, of divided ones, in all."""
        if show is None:
            return
        self.check_parameters()
        if self.accelerator.is_main_process or self.divided:
            with self.evaluating():
                show(self.step)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The players as they are evaluated and exported: moving average in place, evaluation mode."""
        # Of every part: a method may keep one of them, and not its player, in evaluation mode.
        modes = [(part, part.training) for module in self.method.players.values() for part in module.modules()]
        for module in self.method.players.values():
            module.eval()
        try:
            if self.average:
                with self.average.applied(self.offload.on_host):
                    yield
            else:
                yield
        finally:
            gather_later(self.divided)
            for part, mode in modes:
                part.training = mode

    # -- checkpoints -------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint; only the main process does."""
        with self.offload.on_host():
            self._save()
        self.accelerator.wait_for_everyone()
        self.saved = self.step

    def _save(self) -> None:
        self.check_parameters()
        if self.before_save:
            self.before_save()
        totals = self._totals()
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, module in self.method.players.items():
            tensors[name] = module.state_dict()
            tensors[f"{name}.optimizer"] = optimizer_state(module, self.optimizers[name])
        for name, module in self.method.state.items():
            tensors[f"state.{name}"] = module.state_dict()
        if self.average:
            tensors["average"] = self.average.state()
        if self.accelerator.is_main_process:
            state = {"world_size": self.accelerator.num_processes, "totals": totals, "skipped": self.skipped}
            state["best"] = None if self.best is None else list(self.best)
            save_checkpoint(self.out / "checkpoints", self.step, tensors, state)
            best = None if self.best is None else self.best[0]
            remove_old(self.out / "checkpoints", self.config.keep_checkpoints, best)
        else:
            take_part(tensors)

    def resume(self, allow_change: Allowed = False) -> None:
        """Continue from the newest whole checkpoint of the run folder, if there is one.

        UserError if all are damaged, or if it was written by another number of processes, unless `allow_change`.
        """
        folder = self.out / "checkpoints"
        if (newest := load_newest(folder)) is None:
            return
        path, tensors, record = newest
        if record["world_size"] != self.accelerator.num_processes and not allows(allow_change, PROCESSES):
            raise UserError(
                f"resume: {path} was written by {record['world_size']} processes and this run has "
                f"{self.accelerator.num_processes}, which changes the order of the data; use as many, or "
                f"--allow-change {PROCESSES}"
            )
        self.step = self.saved = record["step"]
        self.skipped = record.get("skipped", 0)
        best = record.get("best")
        self.best = None if best is None else (best[0], best[1])
        if self.step > self.config.steps:
            raise UserError(
                f"steps: {self.config.steps} is fewer than the {self.step} that are done already; give more"
            )
        try:
            with self.offload.on_host():
                for name, module in self.method.players.items():
                    load_into(module, tensors[name], path)
                for name, module in self.method.state.items():
                    load_into(module, state_tensors(name, tensors), path)
                if self.average:
                    self.average.load(tensors["average"])
            for name, module in self.method.players.items():
                load_optimizer_state(module, self.optimizers[name], tensors[f"{name}.optimizer"])
                self.offload.loaded(name, self.optimizers[name])
        except KeyError as error:
            raise UserError(f"checkpoint: {path} is of other players ({error} is not in both)") from None
        self.totals = {key: (total, count) for key, (total, count) in record["totals"].items()}
        self.accelerator.wait_for_everyone()  # all have read it
        if self.accelerator.is_main_process:
            remove_leftovers(folder)
            set_aside(folder, self.step)


def accelerator_for(config: FitConfig, out: Path, may_divide: bool = False) -> Accelerator:
    """The accelerator of a run: device, precision, trackers; UserError for what a launcher asks and we do not do."""
    check_launcher(config, may_divide)
    device = use_machine(config.device, config.threads)
    tracker = None if config.tracker == "none" else config.tracker
    if tracker and not _installed(tracker):
        raise UserError(f"tracker: {tracker!r} is not installed; pip install 'diffdistill[tracking]'")
    if not torch.distributed.is_initialized():
        # Accelerate keeps its first settings for the whole process; a second run here may have others.
        AcceleratorState._reset_state(reset_partial_state=True)
    if config.batch_size % config.accumulate:
        fits = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
        raise UserError(
            f"accumulate: a batch of {config.batch_size} is not {config.accumulate} equal parts; use one of "
            f"{', '.join(map(str, fits))}, or another batch_size"
        )
    if config.optimizer == "muon" and config.offload != "none":
        raise UserError(f"offload: {config.offload} moves AdamW's moments, and not those of muon; use none")
    with without_plugin():
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `take` divides the loss itself
            log_with=tracker,
            project_dir=str(out / "logs"),
        )


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
