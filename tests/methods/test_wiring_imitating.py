"""A whole turn of the methods that give guidance in one pass, against a straight-line rewrite; and their chains."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.catalogue import describe_method
from diffdistill.players.sampler import DDIM
from diffdistill.scaffold.imitating import ImitatingMethod
from diffdistill.scaffold.method import Batch, Need
from tests.scaffold.straight import (
    EDM_,
    FLOW,
    SIZE,
    TRIG,
    VP,
    WHOLE,
    Plain,
    agree_alone,
    batch_of,
    fold,
    in_double,
    modes,
    noised,
    normal,
    scatter,
    uniform,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


def batch_at(key: tuple[int, ...]) -> Batch:
    """Other classes in every step."""
    batch = batch_of(key)
    labels = (batch.cond["class_labels"] + key[1]) % 3
    return Batch(SIZE, batch.shape, {"class_labels": labels}, batch.x0, batch.device, key, total=WHOLE)


class Straight:
    """One method with its chains, line by line."""

    def __init__(self, name: str, options: dict[str, Any], plain: Plain):
        module = describe_method(name).load()
        self.name, self.plain = name, plain
        self.c: Any = module.Config(**options)
        teacher = plain.teacher(dropout=0.3)
        self.method: ImitatingMethod = module.METHOD(teacher, self.c)
        self.teacher: Any = teacher.denoiser.network
        self.network: Any = self.method.student.network
        scatter(self.network.adapters if name == "adapter_guidance" else self.network, 20)
        self.chains: list[Tensor] = []  # x_t, step, scale and label of each
        if name == "adapter_guidance":
            self.low, self.high = self.c.guidance_min, self.c.guidance_max
        else:
            self.low = self.high = self.c.guidance_scale

    def grid(self) -> Tensor:
        n, plain = self.c.trajectory_steps, self.plain
        if plain.kind == "edm":
            a, b = 30 ** (1 / 7), 0.01 ** (1 / 7)
            levels = [(a + k / (n - 1) * (b - a)) ** 7 for k in range(n)]
        elif plain.kind == "flow":  # evenly between the ends of the shifted range, then shifted
            low = 2 * 0.001 / 1.001
            rows = [1 + k / (n - 1) * (low - 1) for k in range(n)]
            levels = [2 * u / (1 + u) for u in rows]
        else:
            levels = plain.levels(n)
        return torch.tensor([plain.angle(level) for level in levels] + [0.0])

    def fresh(self, purpose: str, batch: Batch) -> list[Tensor]:
        z = normal(f"{purpose}/z", batch.key)
        first = self.grid()[0]
        scale = self.low + (self.high - self.low) * uniform(f"{purpose}/scale", batch.key)
        level = 30.0 if self.plain.kind == "edm" else {"flow": 1.0, "vp": 23.0, "trig": float(first)}[self.plain.kind]
        x_t, _ = self.plain.start(level, z)
        return [x_t, torch.zeros(SIZE, dtype=torch.int64), scale, batch.cond["class_labels"]]

    def moved(self) -> Tensor:
        """Where a guided DDIM step leads each chain."""
        x, step, scale, labels = self.chains
        grid = self.grid()
        x0, eps = self.plain.guided(self.teacher, x, grid[step], labels, scale)
        return noised(x0, grid[step + 1], eps)

    def turn(self, batch: Batch) -> Values:
        if self.name == "lora_guidance" and not self.c.trajectories:
            t = self.plain.at(uniform("student/t", batch.key))
            assert batch.x0 is not None
            x_t = noised(batch.x0, t, normal("student/eps", batch.key))
            return {"loss": self.loss(x_t, t, batch.cond["class_labels"], torch.full((SIZE,), self.high))}
        n = self.c.trajectory_steps
        with torch.no_grad():
            if not self.chains:
                self.chains = self.fresh("chains/start", batch)
                starts = torch.tensor([i * n // WHOLE for i in range(batch.key[2], batch.key[2] + SIZE)])
                for k in range(n):
                    self.chains[0] = torch.where(fold(starts) > k, self.moved(), self.chains[0])
                    self.chains[1] = torch.where(starts > k, k + 1, self.chains[1]).clamp_max(n - 1)
        x, step, scale, labels = self.chains
        loss = self.loss(x, self.grid()[step], labels, scale)
        with torch.no_grad():
            ended = step + 1 == n
            new = self.fresh("chains", batch)
            self.chains[0] = torch.where(fold(ended), new[0], self.moved())
            self.chains[1] = torch.where(ended, 0, step + 1)
            self.chains[2], self.chains[3] = torch.where(ended, new[2], scale), torch.where(ended, new[3], labels)
        return {"loss": loss}

    def loss(self, x: Tensor, t: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """Between the networks' own outputs."""
        with torch.no_grad():
            given = self.plain.output(self.teacher, x, t, class_labels=labels)
            null = self.plain.output(self.teacher, x, t, class_labels=torch.full_like(labels, 3))
            target = null + fold(scale) * (given - null)
        if self.name == "adapter_guidance":
            gap = self.adapted(x, t, labels, scale) - target
            return gap.square().mean() if self.c.loss == "l2" else gap.abs().mean()
        return (self.plain.output(self.network, x, t, class_labels=labels) - target).square().mean()

    def adapted(self, x: Tensor, t: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """The teacher's output, and (scale - 1) times what the adapter at its end adds."""
        adapters = self.network.adapters
        time = self.plain.native(t)[0]
        rates = 1e4 ** (-torch.arange(4) / 4.0)
        waves = [torch.cat([(x[:, None] * rates).cos(), (x[:, None] * rates).sin()], 1) for x in (scale, time)]
        embedding = adapters.embedding
        tokens = torch.stack([embedding.scale(waves[0]), embedding.time(waves[1]), embedding.label(labels)], 1)
        (layer,) = adapters.layers
        added = layer(torch.zeros(SIZE, 9, 1), tokens)  # (B, 1, 1)
        return self.plain.output(self.teacher, x, t, class_labels=labels) + fold(scale - 1) * added[..., None]


RANGE = {"guidance_min": 1.5, "guidance_max": 6.0, "guidance_scale": 3.0, "adapter_width": 8}
CASES: list[tuple[str, dict[str, Any], Plain]] = [
    ("adapter_guidance", {**RANGE, "trajectory_steps": 4}, VP),
    ("adapter_guidance", {**RANGE, "trajectory_steps": 8, "loss": "l1"}, EDM_),
    ("adapter_guidance", {**RANGE, "trajectory_steps": 5}, FLOW),
    ("lora_guidance", {"guidance_scale": 2.5}, VP),
    ("lora_guidance", {"guidance_scale": 0.5}, EDM_),
    ("lora_guidance", {"guidance_scale": 2.5, "trajectories": True, "trajectory_steps": 4}, TRIG),
    ("lora_guidance", {"guidance_scale": 2.5, "trajectories": True, "trajectory_steps": 8}, FLOW),
]


@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_turns_are_their_straight_lines(name: str, options: dict[str, Any], plain: Plain) -> None:
    straight = Straight(name, options, plain)
    for step in range(2, 12):
        batch = batch_at((5, step, 1))
        agree_alone(straight.method, step, batch, lambda batch=batch: straight.turn(batch))


@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_who_is_asked_who_drops_and_who_is_trained(name: str, options: dict[str, Any], plain: Plain) -> None:
    straight = Straight(name, options, plain)
    parts = {"teacher": straight.teacher.dropout}
    if name == "lora_guidance":
        parts["student"] = straight.network.dropout
    batch = batch_at((5, 1, 0))
    (turn,) = straight.method.turns(1)
    calls = modes(parts, lambda: turn.loss(batch))
    assert all(dropping == (who == "student") for who, dropping in calls)
    assert not any(p.requires_grad for p in straight.teacher.parameters())
    on_data = name == "lora_guidance" and not straight.c.trajectories
    assert straight.method.needs == (frozenset({Need.IMAGES}) if on_data else frozenset())
    assert list(straight.method.state) == ([] if on_data else ["chains"])
    assert list(straight.method.players) == ["student"]


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW, TRIG])
def test_the_sampler_is_ddim_at_the_options_steps(plain: Plain) -> None:
    """An adapted network takes the stock sampler's own levels, which its pipeline draws with."""
    sampler = Straight("lora_guidance", {"sampling_steps": 6}, plain).method.sampler()
    assert sampler.step == DDIM() and sampler.levels == pytest.approx(plain.levels(6), rel=1e-12)
    method = Straight("adapter_guidance", {"sampling_steps": 6, "trajectory_steps": 4}, plain).method
    sampler, grid = method.sampler(), Straight("adapter_guidance", {"trajectory_steps": 6}, plain).grid()
    assert sampler.step == DDIM() and sampler.denoiser is method.student
    angles = [float(method.schedule.angle(level)) for level in sampler.levels]
    assert angles == pytest.approx(grid[:-1].tolist(), rel=1e-9)


def test_chains_begin_anew_for_other_samples() -> None:
    straight = Straight("adapter_guidance", {**RANGE, "trajectory_steps": 4}, VP)
    chains: Any = straight.method.chains

    def points(key: tuple[int, ...]) -> Tensor:
        return chains.points(batch_at(key), straight.method.teacher).x_t.clone()

    first = points((5, 1, 0))
    assert torch.equal(points((5, 2, 0)), first), "nothing moves them but a step"
    assert not torch.equal(points((5, 2, 1)), first) and int(chains.first) == 1
    assert len(chains.step) == SIZE, "of those samples alone"
    later = points((5, 2, 7))  # those after the last, as the next part of a batch
    assert torch.equal(chains.x_t[SIZE:], later) and not torch.equal(points((5, 2, 1)), later)
    state = {key: value.clone() for key, value in chains.state_dict().items()}
    assert torch.equal(points((5, 1, 0)), first), "those before the first are not held either"
    chains.load_state_dict(state)
    again = Straight("adapter_guidance", {**RANGE, "trajectory_steps": 4}, VP)
    kept: Any = again.method.chains
    kept.load_state_dict(chains.state_dict())
    assert torch.equal(kept.points(batch_at((5, 3, 7)), again.method.teacher).x_t, later)
    assert torch.equal(kept.x_t, chains.x_t)
    assert torch.equal(kept.cond["class_labels"], chains.cond["class_labels"])
    assert torch.equal(kept.scale, chains.scale) and torch.equal(kept.step, chains.step)


def test_rates_and_the_scale_are_those_of_the_options() -> None:
    rates = {"student_lr": 0.1, "beta1": 0.3, "weight_decay": 0.4}
    for name in ("adapter_guidance", "lora_guidance"):
        assert Straight(name, {**rates, "trajectory_steps": 4}, VP).method.optimizer("student") == (
            0.1,
            (0.3, 0.999),
            0.4,
        )
    straight = Straight("adapter_guidance", {**RANGE, "trajectory_steps": 4}, VP)
    assert float(straight.network.guidance_scale) == 3.0
    x, t, labels = torch.ones(SIZE, 1, 3, 3), torch.full((SIZE,), 0.7), torch.arange(SIZE) % 3
    alone = straight.method.student(x, t, {"class_labels": labels}).y
    assert torch.allclose(alone, straight.adapted(x, t, labels, torch.full((SIZE,), 3.0)), rtol=1e-9)
