"""A method trained for real on a teacher whose every quantity is known: eight modes in the plane.

The teacher is the exact mixture; players begin as a small network that was fitted to it. A method's file says
in END_TO_END what its student should be: the teacher's own map from noise to data ("trajectory"), or any map
with the teacher's distribution ("distribution"). The same measures of the student before training must fail.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.catalogue import MethodInfo
from diffdistill.config import FitConfig, TrainConfig
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.ode import heun_step, solve
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.data.examples import ClassLabels, Example, to_device
from diffdistill.exact.analytic import GaussianMixture
from diffdistill.exact.checks import Check, equal
from diffdistill.options import build, split
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher, trainable_copy
from diffdistill.rng import generator
from diffdistill.scaffold.method import Batch, Method, Need, Pair
from diffdistill.training.assemble import lora_settings
from diffdistill.training.trainer import Trainer, accelerator_for

MODES, CLASSES, SPREAD = 8, 2, 0.15
LIMITS = {"trajectory": 0.15, "modes": 0.35, "sliced_w2": 0.12, "fisher": 0.1}
"""Of the error relative to the data's standard deviation of 1; of a mode's
weight relative to 1/8; of the sliced Wasserstein distance; of E |v_q - v_p|^2, whose
scale is the 1 of unit-variance data."""

_ANGLES = (0.4, 0.8, 1.2, 1.5)
_COUNT = 2000


def mixture() -> GaussianMixture:
    """Eight modes on a circle, in turn of two classes, of unit variance in each direction."""
    radius = math.sqrt(2 * (1 - SPREAD**2))
    turns = 2 * math.pi * torch.arange(MODES, dtype=torch.float64) / MODES
    means = radius * torch.stack([torch.cos(turns), torch.sin(turns)], 1)
    return GaussianMixture(means, SPREAD, labels=[k % CLASSES for k in range(MODES)])


class PlaneNet(nn.Module):
    """The velocity as a multi-layer perceptron of x (B, 2), the angle and the class; the last class is none."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.time_embedding = nn.Linear(16, width)
        self.class_embedding = nn.Embedding(CLASSES + 1, width)
        self.first = nn.Linear(2, width)
        self.layers = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """(B, 2) the velocity at x_t (B, 2), the angles t (B,) and the classes (B,)."""
        angles = t[:, None] * torch.arange(1, 9, device=t.device, dtype=t.dtype)
        features = torch.cat([torch.sin(angles), torch.cos(angles)], 1).to(x_t.dtype)
        return self.layers(self.first(x_t) + self.time_embedding(features) + self.class_embedding(class_labels))


@lru_cache(maxsize=1)
def plane_teacher(steps: int = 3000) -> Teacher:
    """The exact teacher, with players that begin as a network fitted to its velocity (seed 0, 15 seconds)."""
    exact = mixture().denoiser()
    network = Denoiser(_seeded(PlaneNet), exact.schedule, OUTPUTS["v_prediction"], null=exact.null)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    mix = exact.network
    assert isinstance(mix, GaussianMixture)
    for step in range(steps):
        draw = generator("cpu", 0, step, "plane teacher")
        labels = torch.randint(CLASSES + 1, (512,), generator=draw)
        x0 = mix.sample(512, draw, labels).float()
        t = torch.rand(512, generator=draw, dtype=torch.float64) * math.pi / 2
        x_t = diffuse(x0, t, torch.randn(512, 2, generator=draw))
        cond = {"class_labels": labels}
        loss = (network(x_t, t, cond).v - exact(x_t, t, cond).v).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return Teacher(exact, (2,), CLASSES, "analytic", "mixture", start=network.requires_grad_(False))


def _seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def train_on_the_plane(
    info: MethodInfo, options: dict[str, Any], device: torch.device | None = None
) -> tuple[Method, Trainer]:
    """The method, trained with its options; the trainer's `evaluating()` puts the average in place.

    `device` is where it is trained, by default the CPU; the data are drawn on the CPU wherever that is.
    """
    device = device or torch.device("cpu")
    defaults = {"batch_size": 256, "ema": 0.99, "lr_schedule": "cosine", "max_grad_norm": 0.0, "steps": 2000}
    shared, own = split({**defaults, **info.about.defaults, **options}, TrainConfig, info.config)
    module = info.load()
    fields = {f.name for f in dataclasses.fields(FitConfig)}
    config = build(
        FitConfig, {k: v for k, v in shared.items() if k in fields} | {"sample_every": 0, "device": device.type}
    )
    teacher = replace(_teacher_on(device), lora=lora_settings(build(TrainConfig, shared), None))
    torch.manual_seed(0)
    method = module.METHOD(teacher, module.Config(**dataclasses.asdict(build(info.config, own))))
    mix = mixture()
    pairs = _pairs(mix, float(own.get("guidance_scale", 1.0))) if Need.PAIRS in method.needs else None

    def batches(step: int) -> Batch:
        key, n = (0, step, 0), config.batch_size
        cond = ClassLabels(CLASSES).draw(n, generator("cpu", *key, "condition")).cond
        x0 = (
            mix.sample(n, generator("cpu", *key, "data"), cond["class_labels"]).float()
            if Need.IMAGES in method.needs
            else None
        )
        pair = None
        if pairs is not None:
            chosen = torch.randint(len(pairs.z), (n,), generator=generator("cpu", *key, "pairs"))
            pair = Pair(pairs.z[chosen], pairs.x0[chosen], {k: v[chosen] for k, v in pairs.cond.items()})
        example = to_device(Example(x0, cond, pair), device)
        return Batch(n, (2,), example.cond, example.x0, device, key, example.pair)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(method, batches, config, Path(folder), accelerator_for(config, Path(folder)))
        for _ in range(config.steps):
            trainer.iteration()
    return method, trainer


def _teacher_on(device: torch.device) -> Teacher:
    """The teacher of the plane, or a copy of it on another device than the CPU."""
    teacher = plane_teacher()
    if device.type == "cpu":
        return teacher
    exact, start = (copy.deepcopy(part).to(device) for part in (teacher.denoiser, teacher.start) if part is not None)
    return replace(teacher, denoiser=exact, start=start)


def _noise() -> tuple[Tensor, dict[str, Tensor]]:
    draw = generator("cpu", 0, "plane evaluation")
    return torch.randn(_COUNT, 2, generator=draw), {"class_labels": torch.arange(_COUNT) % CLASSES}


def _pairs(mix: GaussianMixture, scale: float) -> Pair:
    draw = generator("cpu", 0, "plane pairs")
    z, cond = torch.randn(4096, 2, generator=draw), {"class_labels": torch.arange(4096) % CLASSES}
    return Pair(z, _map(mix, z, math.pi / 2, cond, scale).float(), cond)


@torch.no_grad()
def _map(mix: GaussianMixture, x: Tensor, t: float, cond: dict[str, Tensor], scale: float) -> Tensor:
    """(B, 2) the teacher's probability-flow ODE from the angle t to 0, guided."""
    grid = torch.linspace(t, 0, 201, dtype=torch.float64)
    return solve(heun_step, guided(mix.denoiser(), scale), x.double(), grid, cond)


@torch.no_grad()
def _draw(sampler: Sampler) -> Tensor:
    z, cond = _noise()
    draw = generator("cpu", 0, "plane renoise")
    device = next(itertools.chain(sampler.denoiser.parameters(), sampler.denoiser.buffers())).device
    cond = {name: value.to(device) for name, value in cond.items()}

    def renoise(j: int) -> Tensor:
        return torch.randn(_COUNT, 2, generator=draw).to(device)

    x, t = sampler.input_at(len(sampler.levels) - 1, z.to(device), cond, renoise)
    return sampler.denoiser(x, t, cond).x0.cpu()


def measures(sampler: Sampler, kind: str, scale: float = 1.0) -> dict[str, float]:
    """What the student's samples are judged by, each 0 for a perfect student and infinitely many samples."""
    mix, x = mixture(), _draw(sampler)
    z, cond = _noise()
    if kind == "trajectory":
        x_t, t = sampler.start(z)
        return {"trajectory": float((x - _map(mix, x_t, float(t[0]), cond, scale)).square().mean().sqrt())}
    x = x.double()
    nearest = torch.cdist(x, mix.means).argmin(1)
    weights = torch.bincount(nearest, minlength=MODES) / len(x)
    exact = mix.sample(_COUNT, generator("cpu", 0, "plane samples"), cond["class_labels"])
    turns = math.pi * torch.arange(64, dtype=torch.float64) / 64
    directions = torch.stack([torch.cos(turns), torch.sin(turns)])
    apart = (x @ directions).sort(0).values - (exact @ directions).sort(0).values
    distances = {"modes": float((MODES * weights - 1).abs().max()), "sliced_w2": float(apart.square().mean().sqrt())}
    return distances | {f"fisher at t = {a}": _fisher_gap(mix, x, a) for a in _ANGLES}


def _fisher_gap(mix: GaussianMixture, x: Tensor, angle: float) -> float:
    """E_q |v_q - v_p|^2 at an angle, which is tan(t)^2 times the Fisher divergence (0.004 for exact samples).

    q is the distribution of samples 500.. with a little smoothing; it is judged where samples ..500 are noised to.
    """
    t = torch.full((500,), angle, dtype=torch.float64)
    x_t = diffuse(x[:500], t, torch.randn(500, 2, generator=generator("cpu", 0, "fisher", str(angle)), dtype=x.dtype))
    others = GaussianMixture(x[500:], SPREAD / 2)
    return float((others(x_t, t) - mix(x_t, t)).square().sum(1).mean())


def checks(info: MethodInfo, device: torch.device | None = None) -> Iterator[Check]:
    """The end-to-end rows of a method that says what its student should be; it is trained on `device`."""
    assert info.plane is not None
    kind, options = info.about.kind, dict(info.plane)
    scale = options.get("guidance_scale", 1.0)
    assert isinstance(scale, int | float)
    method, trainer = train_on_the_plane(info, options, device)
    with trainer.evaluating():
        after = measures(method.sampler(), kind, scale)
    start = plane_teacher().start
    assert start is not None
    sampler = method.sampler()
    before = measures(Sampler(trainable_copy(start).eval(), sampler.levels, sampler.step), kind, scale)
    for name, value in after.items():
        limit = LIMITS[name.split()[0]]
        yield equal(f"end to end, {trainer.step} steps on eight modes: {name}", 0.0, value, limit, scale=1.0)
    worst = max(value / LIMITS[name.split()[0]] for name, value in before.items())
    yield Check("before training the worst of these is beyond its limit (ratio)", 1.0, worst, worst, 1.0, "differs")
