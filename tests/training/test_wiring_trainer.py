"""The training loop against a straight-line rewrite: AdamW, rates, clipping, averages, stages, resumption."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill.config import FitConfig
from diffdistill.players.sampler import Sampler
from diffdistill.scaffold.method import Batch, Method, Optimizer, Outcome, Turn
from diffdistill.training.checkpoint import checkpoints
from diffdistill.training.trainer import Trainer, accelerator_for
from tests.scaffold.straight import draw, in_double

_double = pytest.fixture(autouse=True)(in_double)
RATES = {"a": Optimizer(0.05, (0.5, 0.8), 0.1), "b": Optimizer(0.02, (0.9, 0.999), 0.0)}
SIZE, DIM = 4, 3


def network(seed: int) -> nn.Linear:
    layer = nn.Linear(DIM, DIM)
    with torch.no_grad():
        for k, p in enumerate(layer.parameters()):
            p.copy_(torch.randn(p.shape, generator=draw(seed, k)))
    return layer


def noise(step: int, seed: int = 0, rank: int = 0) -> Tensor:
    return torch.randn(SIZE, DIM, generator=draw(seed, step, rank, "x"))


def turns_at(step: int) -> list[tuple[str, float, bool]]:
    """a moves in every second step, first, at a rate that falls; it has a new optimizer in the fourth."""
    b = ("b", 1.0, False)
    return [("a", 1 - step / 20, step == 4), b] if step % 2 == 0 else [b]


class Two(Method):
    """Each loss depends on both players, on the step's noise and on the global generator."""

    def __init__(self) -> None:
        self.players = {"a": network(1), "b": network(2)}
        self.memory = nn.Linear(1, 1, bias=False)
        self.memory.weight.data.zero_()
        self.state: dict[str, nn.Module] = {"memory": self.memory}
        self.ends: list[tuple[int, Tensor]] = []
        self.trainer: Any = None

    def optimizer(self, player: str) -> Optimizer:
        return RATES[player]

    def turns(self, step: int) -> list[Turn]:
        def loss(name: str) -> Any:
            return lambda batch: self.loss(name, batch)

        return [Turn(name, loss(name), factor, restart) for name, factor, restart in turns_at(step)]

    def sampler(self) -> Sampler:
        raise AssertionError("nothing is drawn")

    def loss(self, player: str, batch: Batch) -> Outcome:
        loss = value(self.players["a"], self.players["b"], player, batch.randn("x"), float(torch.rand(())))
        return Outcome(loss, {"twice": 2 * loss})

    def after_step(self, step: int) -> None:
        self.memory.weight.data.add_(step + 1)
        average = self.trainer.average
        self.ends.append((step, average.averages[0].clone() if average else torch.zeros(())))


def value(a: nn.Module, b: nn.Module, player: str, x: Tensor, u: float) -> Tensor:
    return (b(torch.tanh(a(x))) - (2 + u if player == "a" else -u) * x).square().mean()


class Straight:
    """The same training by hand."""

    def __init__(self, config: FitConfig):
        self.c = config
        self.players = {"a": network(1), "b": network(2)}
        self.moments: dict[str, dict[str, Any]] = {name: {"n": 0, "m": None, "v": None} for name in "ab"}
        self.average = [p.detach().clone() for p in self.players["a"].parameters()]
        self.logs: list[dict[str, float]] = []

    def step(self, step: int, seed: int = 0, rank: int = 0) -> None:
        logs: dict[str, float] = {}
        for name, factor, restart in turns_at(step):
            if restart:
                self.moments[name] = {"n": 0, "m": None, "v": None}
            torch.manual_seed(draw(seed, step, rank, name, "global").initial_seed())
            u, x = float(torch.rand(())), noise(step, seed, rank)
            loss = value(self.players["a"], self.players["b"], name, x, u)
            params = list(self.players[name].parameters())
            grads = list(torch.autograd.grad(loss, params))
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
            logs |= {f"{name}/loss": float(loss.detach()), f"{name}/twice": 2 * float(loss.detach())}
            logs[f"{name}/grad_norm"] = norm
            if self.c.max_grad_norm:
                grads = [g * min(1, self.c.max_grad_norm / (norm + 1e-6)) for g in grads]
            self.adamw(name, params, grads, self.rate(name, step) * factor)
        self.logs.append(logs)
        if any(name == "a" for name, *_ in turns_at(step)):
            decay = min(self.c.ema, (1 + step) / (10 + step))
            own = self.players["a"].parameters()
            self.average = [decay * m + (1 - decay) * p.detach() for m, p in zip(self.average, own, strict=True)]

    def rate(self, name: str, step: int) -> float:
        warm = min(1.0, (step + 1) / self.c.warmup_steps) if self.c.warmup_steps else 1.0
        cosine = (1 + math.cos(math.pi * step / self.c.steps)) / 2 if self.c.lr_schedule == "cosine" else 1.0
        return RATES[name].lr * warm * cosine

    def adamw(self, name: str, params: list[Any], grads: list[Tensor], rate: float) -> None:
        s, (b1, b2), decay = self.moments[name], RATES[name].betas, RATES[name].weight_decay
        s["n"] += 1
        s["m"] = [(1 - b1) * g + (b1 * s["m"][i] if s["n"] > 1 else 0) for i, g in enumerate(grads)]
        s["v"] = [(1 - b2) * g * g + (b2 * s["v"][i] if s["n"] > 1 else 0) for i, g in enumerate(grads)]
        with torch.no_grad():
            for p, m, v in zip(params, s["m"], s["v"], strict=True):
                p.mul_(1 - rate * decay)
                p.sub_(rate * (m / (1 - b1 ** s["n"])) / (torch.sqrt(v / (1 - b2 ** s["n"])) + 1e-8))


def trainer_of(out: Path, seen: list[Any] | None = None, **config: Any) -> Trainer:
    fit = FitConfig(device="cpu", **{"sample_every": 0, "steps": 8, "max_grad_norm": 0.3} | config)
    method, accelerator = Two(), accelerator_for(fit, out)

    def batches(step: int) -> Batch:
        return Batch(SIZE, (DIM,), {}, None, accelerator.device, (fit.seed, step, 0))

    def sampled(step: int) -> None:
        assert seen is not None
        modes = [part.training for player in method.players.values() for part in player.modules()]
        seen.append((step, any(modes), [p.detach().clone() for p in method.players["a"].parameters()]))

    trainer = Trainer(method, batches, fit, out, accelerator, sampled if seen is not None else None)
    method.trainer = trainer
    return trainer


def close(mine: list[Any], theirs: list[Any]) -> bool:
    return all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(mine, theirs, strict=True))


CONFIGS: list[dict[str, Any]] = [
    {"ema": 0.3},
    {"ema": 0.9, "warmup_steps": 5, "lr_schedule": "cosine"},
    {"warmup_steps": 3, "max_grad_norm": 0.0},
    {"ema": 0.999, "lr_schedule": "cosine", "max_grad_norm": 100.0, "seed": 7},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_training_is_its_straight_line(config: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, **config)
    straight = Straight(trainer.config)
    for step in range(8):
        logs = trainer.iteration()
        straight.step(step, trainer.config.seed)
        assert trainer.step == step + 1
        for name in "ab":
            assert close(list(trainer.method.players[name].parameters()), list(straight.players[name].parameters()))
            assert all(p.grad is None for p in trainer.method.players[name].parameters())
        assert {k: float(v) for k, v in logs.items()} == pytest.approx(straight.logs[-1], rel=1e-9)
        assert (trainer.average is not None) == ("ema" in config)
        method: Any = trainer.method
        assert method.ends[-1][0] == step
        if trainer.average is not None:
            assert close(trainer.average.averages, straight.average)
            assert close([method.ends[-1][1]], straight.average[:1]), "after_step is after the average"


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_a_resumed_training_is_the_straight_line_too(stop: int, tmp_path: Path) -> None:
    """Stopped within a stage, before one, and after a restart; its next lines of metrics count from the last one."""
    config = {"ema": 0.9, "warmup_steps": 5, "lr_schedule": "cosine", "log_every": 4}
    first = trainer_of(tmp_path, **config)
    for _ in range(stop):
        for key, number in first.iteration().items():
            total, count = first.totals.get(key, (0.0, 0))
            first.totals[key] = (total + number, count + 1)
        if first.step == 1:
            first.save()  # an older one
    if stop >= 4:
        first.totals = {}
    first.save()
    again = trainer_of(tmp_path, **config)
    with torch.no_grad():
        for p in again.method.players["a"].parameters():
            p.zero_()
    again.resume()
    assert again.step == stop
    again.fit()
    straight = Straight(again.config)
    for step in range(8):
        straight.step(step)
    for name in "ab":
        assert close(list(again.method.players[name].parameters()), list(straight.players[name].parameters()))
    assert again.average is not None and close(again.average.averages, straight.average)
    method: Any = again.method
    assert float(method.memory.weight.detach()) == sum(range(1, 9))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        span = straight.logs[line["step"] - 4 : line["step"]]
        if stop == 5 and line["step"] == 8:
            span = straight.logs[5:8]  # the line at 4 was not this trainer's to write
        for key in ("b/loss", "a/loss", "a/grad_norm"):
            values = [logs[key] for logs in span if key in logs]
            assert line[key] == pytest.approx(sum(values) / len(values), rel=1e-9), (line["step"], key)
    assert [line["step"] for line in lines] == ([8] if stop >= 4 else [4, 8])


def test_what_is_sampled_saved_and_logged_when(tmp_path: Path) -> None:
    seen: list[Any] = []
    trainer = trainer_of(tmp_path, seen, ema=0.9, sample_every=3, checkpoint_every=2, log_every=3, keep_checkpoints=9)
    straight = Straight(trainer.config)
    averages = {0: [p.clone() for p in straight.average]}
    for step in range(8):
        straight.step(step)
        averages[step + 1] = straight.average
    trainer.fit()
    assert [step for step, *_ in seen] == [0, 3, 6, 8]
    for step, training, parameters in seen:
        assert not training and close(parameters, averages[step]), step
    assert all(part.training for player in trainer.method.players.values() for part in player.modules())
    own = list(trainer.method.players["a"].parameters())
    assert close(own, list(straight.players["a"].parameters())), "the average is gone again"
    assert [int(p.name[-1]) for p in checkpoints(tmp_path / "checkpoints")] == [2, 4, 6, 8]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    for line, (begin, end) in zip(lines, ((0, 3), (3, 6), (6, 8)), strict=True):
        for key in ("a/loss", "b/twice"):
            values = [logs[key] for logs in straight.logs[begin:end] if key in logs]
            assert line[key] == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_evaluation_mode_is_taken_back_part_by_part(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ema=0.0)
    trainer.method.players["b"].eval()
    own = [p.detach().clone() for p in trainer.method.players["a"].parameters()]
    with trainer.evaluating():
        assert not trainer.method.players["a"].training
        assert close(list(trainer.method.players["a"].parameters()), own)
    assert trainer.method.players["a"].training and not trainer.method.players["b"].training
    assert trainer_of(tmp_path, ema=0.5).averaged == "a" and trainer.averaged is None


class Pair:
    """Two processes, of which this is one; the other's gradient is given, or its flag."""

    def __init__(self, accelerator: Any, other: float):
        self.accelerator, self.other, self.num_processes = accelerator, other, 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self.accelerator, name)

    def reduce(self, x: Tensor, how: str = "sum") -> Tensor:
        both = x + self.other
        return both / 2 if how == "mean" else both


def test_gradients_are_averaged_over_processes_before_they_are_clipped(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_grad_norm=0.2)
    trainer.accelerator = Pair(trainer.accelerator, 0.6)  # type: ignore[assignment]
    trainer.anywhere = lambda flag: flag  # type: ignore[method-assign]
    # One that had a gradient in the other process alone.
    trainer.parameters["b"].append(torch.nn.Parameter(torch.zeros(DIM)))
    steps: list[list[Tensor]] = []
    player = trainer.method.players["b"]
    trainer.optimizers["b"].register_step_pre_hook(
        lambda *args: steps.append([p.grad.clone() for p in player.parameters() if p.grad is not None])
    )
    a, b = network(1), network(2)
    torch.manual_seed(draw(0, 1, 0, "b", "global").initial_seed())
    grads = torch.autograd.grad(value(a, b, "b", noise(1), float(torch.rand(()))), list(b.parameters()))
    mean = [(g + 0.6) / 2 for g in grads]
    norm = math.sqrt(sum(float(g.square().sum()) for g in mean) + DIM * 0.3**2)
    logs = trainer.take(trainer.method.turns(1)[0], trainer.batches(1))
    assert float(logs["grad_norm"]) == pytest.approx(norm, rel=1e-9) and norm > 0.2
    assert close(steps[0], [g * 0.2 / (norm + 1e-6) for g in mean])


@pytest.mark.parametrize(("own", "other"), [(False, 0.0), (True, 0.0), (False, 1.0), (True, 1.0)])
def test_one_process_that_stops_stops_all(own: bool, other: float, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.accelerator = Pair(trainer.accelerator, other)  # type: ignore[assignment]
    assert trainer.anywhere(own) == (own or other > 0)


# -- batches -----------------------------------------------------------------------------------------------------------


def order(n: int, size: int, step: int, seed: int, rank: int, world: int) -> Tensor:
    """Epochs of shuffled indices in a row, of which each process of a step takes the next batch."""
    first = (step * world + rank) * size
    row = [torch.randperm(n, generator=draw(seed, first // n + k, "data order")) for k in range(2)]
    return torch.cat(row)[first % n : first % n + size]


@pytest.fixture
def machine() -> Iterator[Any]:
    yield lambda rank, world: SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batches_are_their_straight_line(rank: int, world: int, dropout: float, machine: Any) -> None:
    from diffdistill.data.batches import batches
    from diffdistill.data.examples import Example, TensorExamples
    from diffdistill.scaffold.method import Pair as NoisePair
    from tests.scaffold.straight import CLASSES, EDM_, SHAPE

    n, size, seed = 17, 4, 3
    images, labels = torch.randn(n, *SHAPE), torch.arange(n) % CLASSES
    made, ends, theirs = torch.randn(n, *SHAPE), torch.randn(n, *SHAPE), (torch.arange(n) + 1) % CLASSES

    class Pairs:
        def __len__(self) -> int:
            return n

        def get(self, i: Tensor) -> Example:
            return Example(pair=NoisePair(made[i], ends[i], {"class_labels": theirs[i]}))

    config, data = FitConfig(batch_size=size, seed=seed), TensorExamples(images, {"class_labels": labels})
    teacher = EDM_.teacher()
    get = batches(config, teacher, data, machine(rank, world), label_dropout=dropout, pairs=Pairs())
    free = batches(config, teacher, None, machine(rank, world), label_dropout=dropout)
    for step in (0, 1, 5, 9):
        batch, key, mine = get(step), (seed, step, rank * size), slice(rank * size, (rank + 1) * size)
        assert (batch.size, batch.shape, batch.key) == (size, SHAPE, key)
        i = order(n, size, step, seed, rank, world)
        assert torch.allclose(batch.images, images[i] / 0.5, rtol=1e-12)
        drop = torch.rand(size * world, generator=draw(seed, step, 0, "label dropout"))[mine] < dropout
        assert torch.equal(batch.cond["class_labels"], torch.where(drop, CLASSES, labels[i]))
        j = order(n, size, step, draw(seed, "pairs").initial_seed(), rank, world)
        assert batch.pair is not None and torch.equal(batch.pair.z, made[j])
        assert torch.equal(batch.pair.x0, ends[j]) and torch.equal(batch.pair.cond["class_labels"], theirs[j])
        drawn = torch.randint(CLASSES, (size * world,), generator=draw(seed, step, 0, "condition"))[mine]
        alone = free(step)
        assert torch.equal(alone.cond["class_labels"], torch.where(drop, CLASSES, drawn))
        assert alone.x0 is None and alone.pair is None and alone.key == key
