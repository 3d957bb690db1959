"""Benchmark: what the trainer costs beyond the network passes that each method does.

    python -m diffdistill.eval.benchmarks.overhead --out overhead.json

A cycle of a method's training steps is timed twice, interleaved in one process on one thread: through the trainer,
with random draws, solver steps, losses, clipping, finiteness check, moving averages and optimizers; and bare, that
is only the network passes that were recorded in a step (of the same batch sizes, with and without gradients, joined
where gradients flow from one into the next), their backward passes, the fused optimizer and one foreach average. A
product with the Jacobian is a pass of its own cost, bare as well; methods that need the derivative along a path take
it exactly here, whatever they would choose for the network.
Reported is the median ratio of a pair, and the middle half of the ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from diffdistill.catalogue import describe_method, method_names
from diffdistill.config import FitConfig, TrainConfig
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.jvp import jvp
from diffdistill.environment import environment
from diffdistill.eval.report import text_table, write_json
from diffdistill.families import new_unet2d
from diffdistill.options import build, split
from diffdistill.pipelines.schedulers import scheduler_config, teacher_scheduler
from diffdistill.players.average import MovingAverage
from diffdistill.players.discriminator import DiscriminatorHead
from diffdistill.players.teacher import Teacher, only_trains
from diffdistill.scaffold.method import Batch, Method, Need, Pair
from diffdistill.training.trainer import Trainer, accelerator_for

COLUMNS = ("game", "passes", "forward ms", "cycle ms", "bare cycle ms", "overhead", "from", "to")


class Call(NamedTuple):
    """One pass as it was recorded."""

    network: Denoiser | DiscriminatorHead
    size: int
    grad: bool
    joined: bool  #: its input needs a gradient
    layers: tuple[str, ...] = ()  #: that a discriminator reads, at the last of which it is left
    tangent: bool = False  #: a product with the Jacobian


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
        call = Call(teacher.denoiser, batch, grad=False, joined=False)
        taken = statistics.median(_timed(partial(_pass, call, [])) for _ in range(5))
        if 1000 * taken >= milliseconds:
            break
    return teacher, taken


def _pass(call: Call, before: list[Tensor]) -> list[Tensor]:
    """What the pass makes of fixed inputs; joined to what was made before where gradients flow through both.

    A head reads the first of the features made before, and its logits go to the end of what is left of them.
    """
    if isinstance(call.network, DiscriminatorHead):
        with torch.set_grad_enabled(call.grad):
            return [*before[1:], call.network(before[0])]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(call.size, 3, 16, 16, generator=generator)
    t, cond = torch.full((call.size,), 0.8, dtype=torch.float64), {"class_labels": torch.arange(call.size) % 10}
    if call.joined and before and before[0].shape[1:] == x.shape[1:]:
        x = x + 0 * before[0].repeat(-(-call.size // len(before[0])), 1, 1, 1)[: call.size]
    with torch.set_grad_enabled(call.grad):
        if call.tangent:
            network = call.network
            return list(jvp(lambda x, t: network(x, t, cond).y, (x, t), (x, torch.ones_like(t)), check=False))
        if call.layers:
            return call.network.features_of(call.layers, x, t, cond)
        return [call.network(x, t, cond).y]


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


Parameters = dict[str, list[nn.Parameter]]


def record(
    method: Method, teacher: Teacher, owned: Parameters, batch: Batch, step: int
) -> list[tuple[str, list[Call]]]:
    """The passes of each turn of a step; `owned` is what each player trains."""
    parts = (teacher.denoiser, *method.players.values(), *method.state.values())
    networks = {id(m): m for part in parts for m in part.modules() if isinstance(m, Denoiser | DiscriminatorHead)}
    calls: list[Call] = []
    reading: tuple[str, ...] = ()
    plain = Denoiser.features_of

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, Denoiser | DiscriminatorHead)
        x, layers = args[0], reading if isinstance(module, Denoiser) else ()
        tangent = forward_ad.unpack_dual(x).tangent is not None
        calls.append(Call(module, len(x), torch.is_grad_enabled(), x.requires_grad, layers, tangent))

    def features_of(self: Denoiser, layers: Sequence[str], x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        nonlocal reading
        reading = tuple(layers)
        try:
            return plain(self, layers, x_t, t, cond)
        finally:
            reading = ()

    handles = [m.register_forward_pre_hook(note) for m in networks.values()]
    Denoiser.features_of = features_of  # type: ignore[method-assign]
    turns = []
    try:
        for turn in method.turns(step):
            only_trains(turn.player, owned)
            turn.loss(batch)
            turns.append((turn.player, list(calls)))
            calls.clear()
    finally:
        Denoiser.features_of = plain  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()
    return turns


class Bare:
    """The recorded passes and the optimizers' steps with nothing else around them."""

    def __init__(self, method: Method, owned: Parameters, fit: FitConfig, turns: list[list[tuple[str, list[Call]]]]):
        self.turns = turns
        self.parameters = owned
        self.averaged = next(iter(method.players))
        only_trains(self.averaged, owned)
        self.average = MovingAverage(method.players[self.averaged], fit.ema)
        self.optimizers = {name: torch.optim.AdamW(own, lr=1e-6, fused=True) for name, own in self.parameters.items()}

    def cycle(self) -> None:
        """Every turn of one whole cycle of the method's turns, on the same calls of the networks."""
        for turns in self.turns:
            for player, calls in turns:
                self._turn(player, calls)

    def _turn(self, player: str, calls: list[Call]) -> None:
        only_trains(player, self.parameters)
        total, before = torch.zeros(()), list[Tensor]()
        for call in calls:
            before = _pass(call, before)
            for made in before[-1:] if isinstance(call.network, DiscriminatorHead) else before:
                if made.requires_grad:
                    total = total + made.sum()
        if total.requires_grad:  # a weight of losses learns without a pass
            (1e-9 * total).backward()
        self.optimizers[player].step()
        self.optimizers[player].zero_grad(set_to_none=True)
        if player == self.averaged:
            self.average.update(10**6)


def measure(
    game: str, name: str, options: dict[str, Any], milliseconds: float, batch: int, cycles: int, steps: int
) -> dict[str, object]:
    """One row: medians over interleaved cycles of `steps` training steps, through the trainer and bare."""
    teacher, forward = network(milliseconds, batch)
    info = describe_method(name)
    _, own = split(options, TrainConfig, info.config)
    module = info.load()
    method: Method = module.METHOD(teacher, module.Config(**dataclasses.asdict(build(info.config, own))))
    fit = FitConfig(steps=10**6, batch_size=batch, ema=0.999, sample_every=0, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        accelerator = accelerator_for(fit, Path(folder))
        data, cond = torch.randn(batch, 3, 16, 16), {"class_labels": torch.arange(batch) % 10}
        pair = Pair(torch.randn(batch, 3, 16, 16), data, cond) if Need.PAIRS in method.needs else None

        def batches(step: int) -> Batch:
            x0 = data if Need.IMAGES in method.needs else None
            return Batch(batch, (3, 16, 16), cond, x0, accelerator.device, (0, step, 0), pair)

        trainer = Trainer(method, batches, fit, Path(folder), accelerator)
        trainer.iteration()  # the first may hold what is done once
        recorded = [record(method, teacher, trainer.parameters, batches(k), k) for k in range(steps)]
        bare = Bare(method, trainer.parameters, fit, recorded)

        def through_the_trainer() -> None:
            trainer.step = 0
            for _ in range(steps):
                trainer.iteration()

        through_the_trainer()
        bare.cycle()
        full, least = [], []
        for _ in range(cycles):
            full.append(_timed(through_the_trainer))
            least.append(_timed(bare.cycle))
    passes = [call for turns in recorded for _, calls in turns for call in calls]
    ratios = sorted(a / b for a, b in zip(full, least, strict=True))
    return {
        "game": game,
        "passes": sum(call.size for call in passes if isinstance(call.network, Denoiser)) / batch / steps,
        "forward ms": 1000 * forward,
        "cycle ms": 1000 * statistics.median(full),
        "bare cycle ms": 1000 * statistics.median(least),
        "overhead": statistics.median(ratios),
        "from": ratios[len(ratios) // 4],
        "to": ratios[-1 - len(ratios) // 4],
    }


def games(names: Sequence[str]) -> list[tuple[str, str, dict[str, Any], int]]:
    """(label, method, options, training steps of a cycle): each method as on the digits, DMD2 in its paper's ratio."""
    cases: list[tuple[str, str, dict[str, Any], int]] = []
    for name in names:
        info = describe_method(name)
        preset = dict(info.presets["digits"].options)
        for level in ("student_level", "student_lr", "fake_score_lr"):
            preset.pop(level, None)
        if name == "dmd2":
            cases.append(("dmd2, 5 to 1", name, preset | {"update_ratio": 5}, 5))
            cases.append(("dmd2 with GAN, 5 to 1", name, preset | {"update_ratio": 5, "gan_weight": 1e-3}, 5))
        else:
            exact = {"derivative": "exact"} if hasattr(info.config, "derivative") else {}
            cases.append((f"{name}, exact JVP" if exact else name, name, preset | exact, 2))
    return cases


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: measure each method, print the overheads, write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--methods", default=",".join(method_names()), help="names of methods, separated by commas (default: all)"
    )
    parser.add_argument("--milliseconds", type=float, default=50, help="milliseconds of one forward pass (default: 50)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a step (default: 8)")
    parser.add_argument("--cycles", type=int, default=11, help="pairs of cycles (default: 11)")
    parser.add_argument("--out", "--json", default="overhead.json", help="a file for the rows (default: overhead.json)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for game, name, options, steps in games(args.methods.split(",")):
        rows.append(measure(game, name, options, args.milliseconds, args.batch_size, args.cycles, steps))
        print(f"{game}: {rows[-1]['overhead']:.3f}", flush=True)
    print(text_table(rows, COLUMNS))
    write_json({"rows": rows, "columns": COLUMNS, "options": vars(args), "environment": environment()}, args.out)


if __name__ == "__main__":
    main()
