"""Benchmark: what the trainer costs beyond the network passes that DMD2 must do.

    python -m diffdistill.eval.overhead --out overhead.json

A DMD2 cycle (update_ratio - 1 iterations of the fake score alone and one with the student) is timed twice,
interleaved in one process on one thread: through the trainer, with random draws, losses, clipping, finiteness
check, moving average and optimizers; and bare, that is only its network passes and backward passes on fixed
inputs, and the fused optimizer and foreach average steps. Reported is the median ratio of a pair, and the middle
half of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from diffdistill.config import FitConfig
from diffdistill.environment import environment
from diffdistill.families import new_unet2d
from diffdistill.method import Batch
from diffdistill.methods.dmd2 import DMD2, Config
from diffdistill.pipelines.export import scheduler_config, teacher_scheduler
from diffdistill.players import MovingAverage, Teacher, only_trains, trainable
from diffdistill.trainer import Trainer, accelerator_for

from .report import text_table, write_json


def network(milliseconds: float, batch: int) -> tuple[Teacher, float]:
    """A class-conditional UNet of 16x16 whose forward takes about that long here; and how long it takes."""
    for width in range(16, 512, 16):
        torch.manual_seed(0)
        teacher = new_unet2d(
            (3, 16, 16),
            10,
            scheduler_config(teacher_scheduler("vp")),
            widths=(width, 2 * width),
            layers=2,
            attention=(1,),
            dropout=0.0,
        )
        taken = statistics.median(
            _timed(partial(_forward, teacher.denoiser, _inputs(batch), grad=False)) for _ in range(5)
        )
        if 1000 * taken >= milliseconds:
            break
    return teacher, taken


def _inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 16, 16, generator=generator)
    return x, torch.full((batch,), 0.8, dtype=torch.float64), {"class_labels": torch.arange(batch) % 10}


def _forward(denoiser: nn.Module, inputs: tuple, *, grad: bool) -> torch.Tensor:
    with torch.set_grad_enabled(grad):
        return denoiser(*inputs).y


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Bare:
    """The same passes and steps with nothing else around them."""

    def __init__(self, teacher: Teacher, config: Config, fit: FitConfig):
        self.method, self.fit, self.config = DMD2(teacher, config), fit, config
        self.teacher = teacher.denoiser
        self.average = MovingAverage(self.method.student, fit.ema)
        self.optimizers = {
            name: torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
            for name, module in self.method.players.items()
        }
        self.parameters = trainable(self.method.players)
        self.inputs = _inputs(fit.batch_size)

    def cycle(self) -> None:
        for step in range(self.config.update_ratio):
            if step == 0:
                self._student()
            self._fake_score(draw=step > 0)

    def _student(self) -> None:
        m, inputs = self.method, self.inputs
        only_trains("student", self.parameters)
        y = _forward(m.student, inputs, grad=True)
        _forward(self.teacher, inputs, grad=False)
        _forward(m.fake_score, inputs, grad=False)
        total = y.sum()
        if m.needs_data:
            x, t, cond = inputs
            total = total + m.head(m.fake_score.features(x + 0 * y, t, cond)).sum()
        self._step("student", total)
        self.average.update(10**6)

    def _fake_score(self, draw: bool) -> None:
        m, inputs = self.method, self.inputs
        only_trains("fake_score", self.parameters)
        if draw:
            _forward(m.student, inputs, grad=False)
        total = _forward(m.fake_score, inputs, grad=True).sum()
        if m.needs_data:
            for _ in range(2):
                total = total + m.head(m.fake_score.features(*inputs)).sum()
        self._step("fake_score", total)

    def _step(self, player: str, total: torch.Tensor) -> None:
        (1e-9 * total).backward()
        self.optimizers[player].step()
        self.optimizers[player].zero_grad(set_to_none=True)


def measure(gan: bool, milliseconds: float, batch: int, cycles: int, ratio: int) -> dict[str, object]:
    """One row: medians over interleaved cycles, through the trainer and bare."""
    teacher, forward = network(milliseconds, batch)
    config = Config(update_ratio=ratio, gan_weight=1e-3 if gan else 0.0, student_lr=1e-6, fake_score_lr=1e-6)
    fit = FitConfig(steps=10**6, batch_size=batch, ema=0.999, sample_every=0, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        accelerator = accelerator_for(fit, Path(folder))
        data = torch.randn(batch, 3, 16, 16)

        def batches(step: int) -> Batch:
            cond = {"class_labels": torch.arange(batch) % 10}
            return Batch(batch, (3, 16, 16), cond, data if gan else None, accelerator.device, (0, step, 0))

        trainer = Trainer(DMD2(teacher, config), batches, fit, Path(folder), accelerator)
        bare = Bare(teacher, config, fit)

        def through_the_trainer() -> None:
            for _ in range(ratio):
                trainer.iteration()

        through_the_trainer()
        bare.cycle()
        full, least = [], []
        for _ in range(cycles):
            full.append(_timed(through_the_trainer))
            least.append(_timed(bare.cycle))
    ratios = sorted(a / b for a, b in zip(full, least, strict=True))
    return {
        "game": "DMD2 with GAN" if gan else "DMD2",
        "forward ms": 1000 * forward,
        "cycle ms": 1000 * statistics.median(full),
        "bare cycle ms": 1000 * statistics.median(least),
        "overhead": statistics.median(ratios),
        "from": ratios[len(ratios) // 4],
        "to": ratios[-1 - len(ratios) // 4],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--milliseconds", type=float, default=50, help="of one forward pass (default: 50)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cycles", type=int, default=15, help="pairs of cycles (default: 15)")
    parser.add_argument("--update-ratio", type=int, default=5)
    parser.add_argument("--out", default="overhead.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [measure(gan, args.milliseconds, args.batch_size, args.cycles, args.update_ratio) for gan in (False, True)]
    print(text_table(rows, list(rows[0])))
    write_json({"rows": rows, "options": vars(args), "environment": environment()}, args.out)


if __name__ == "__main__":
    main()
