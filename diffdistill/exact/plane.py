"""A method trained for real on a teacher whose every quantity is known: eight modes of two classes in the plane.

The four modes of a class stand on a line, with unequal weights, and the same four on a parallel line are what its null
condition means (each class has its own here, as prompts have negative prompts). Across their lines the two are
Gaussians of one width. So guidance by any scale moves the line and changes nothing else, at every noise level: the
guided score is that of a density, and the guided ODE has a closed form. Where guidance is not of this kind, its score
is no density's and nobody can say what a student that matches it should be. The data's standard deviation is not 1.

Players begin as a small network that was fitted to the teacher. Students are judged class by class against the guided
density; those that follow trajectories also against the map itself. The same measures of the student before training
must fail. `PLANE` beside a method's checks names its trainings and says the options of each.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill.catalogue import MethodInfo, Scalar
from diffdistill.config import FitConfig, TrainConfig
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.prediction import Output, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.data.examples import ClassLabels, Example, to_device
from diffdistill.exact.analytic import GaussianMixture
from diffdistill.exact.checks import Check, equal
from diffdistill.options import build, split
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher, trainable_copy
from diffdistill.rng import generator
from diffdistill.scaffold.method import Batch, Method, Need, Pair
from diffdistill.training.assemble import lora_settings
from diffdistill.training.trainer import Trainer, accelerator_for

SPREAD, DATA_STD = 0.22, 2.0
"""A mode's width in units of the data's standard deviation, and that deviation."""

LIMITS = {"modes": 0.2, "sliced_w2": 0.09, "mean": 0.1, "scale": 0.06, "fisher": 0.05, "trajectory": 0.15}
"""For each class, in units of the data's standard deviation: of a mode's weight relative to what it should be; of the
sliced Wasserstein distance; of the distance of the means; of the standard deviation relative to what it should be; of
E |v_q - v_p|^2, whose scale is the 1 of unit-variance data; of the error of the map, root mean square."""

CPU = torch.device("cpu")
_COUNT = 4096  # of judged samples in each class


@dataclass(frozen=True)
class Line:
    """A class: modes on a line, in units of the data's standard deviation."""

    turn: float  #: the line's direction, an angle
    places: tuple[float, ...]  #: of the modes along it
    weights: tuple[float, ...]
    height: float  #: how far the line runs from the origin
    null_height: float  #: the same of its null condition

    def axes(self) -> Tensor:
        """(2, 2) the directions along the line and across it."""
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        return torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)

    def guided_height(self, scale: float) -> float:
        """Where guidance by that scale moves the line."""
        return self.null_height + scale * (self.height - self.null_height)

    def means(self, scale: float = 1.0) -> Tensor:
        """(K, 2) the modes, guided by that scale; 1 is the class and 0 its null condition."""
        places = torch.tensor(self.places, dtype=torch.float64)
        return torch.stack([places, torch.full_like(places, self.guided_height(scale))], 1) @ self.axes()

    def density(self, scale: float = 1.0, width: float = SPREAD) -> GaussianMixture:
        """The class, guided by that scale, with modes of that width."""
        return GaussianMixture(self.means(scale), width, torch.tensor(self.weights))

    def flow_map(self, x_t: Tensor, t: float, scale: float = 1.0) -> Tensor:
        """(B, 2) where the guided teacher's probability flow takes x_t (B, 2) from the angle t: exact."""
        along, across = (x_t.double() @ self.axes().T).split(1, 1)
        start, end = torch.full((len(x_t),), t, dtype=torch.float64), torch.zeros(len(x_t), dtype=torch.float64)
        places = torch.tensor(self.places, dtype=torch.float64)[:, None]
        height = torch.tensor([[self.guided_height(scale)]], dtype=torch.float64)
        modes = GaussianMixture(places, SPREAD, torch.tensor(self.weights))
        moved = [modes.flow_map(along, start, end), GaussianMixture(height, SPREAD).flow_map(across, start, end)]
        return torch.cat(moved, 1) @ self.axes()

    def shares(self) -> Tensor:
        """(K,) how much of the class is nearest to each mode."""
        places = torch.tensor(self.places, dtype=torch.float64)
        borders = (places[1:] + places[:-1]) / 2
        below = torch.special.ndtr((borders[:, None] - places) / SPREAD) @ torch.tensor(self.weights).double()
        return torch.cat([torch.zeros(1), below, torch.ones(1)]).diff()


CLASSES = (
    Line(0.0, (-0.7, 0.15, 1.0, 1.85), (0.35, 0.3, 0.2, 0.15), 1.05, 0.45),
    Line(2 * math.pi / 3, (-1.85, -1.0, -0.15, 0.7), (0.15, 0.2, 0.25, 0.4), 1.05, 0.65),
)
"""Two lines that cross, together of variance one."""


def mixture() -> GaussianMixture:
    """Both classes, labels 0 and 1, and their null conditions, labels 2 and 3."""
    means = torch.cat([line.means(scale) for scale in (1.0, 0.0) for line in CLASSES])
    weights = torch.tensor([weight for _ in range(2) for line in CLASSES for weight in line.weights])
    labels = [label for label in range(2 * len(CLASSES)) for _ in CLASSES[0].places]
    return GaussianMixture(means, SPREAD, weights, labels=labels)


def _null(cond: Cond) -> Cond:
    return {"class_labels": cond["class_labels"] % len(CLASSES) + len(CLASSES)}


VELOCITY = Output(
    "velocity", lambda alpha, sigma, data_std: -sigma / data_std, lambda alpha, sigma, data_std: alpha * data_std
)
"""Of the normal form: cos(t) eps - sin(t) x0, for data of any standard deviation."""


def exact_denoiser() -> Denoiser:
    """The teacher: the exact velocity of `mixture()`."""
    return Denoiser(mixture(), TrigFlow(data_std=DATA_STD), VELOCITY, null=_null)


class PlaneNet(nn.Module):
    """The velocity as a multi-layer perceptron of x (B, 2), the angle and the label of a class or null condition."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.time_embedding = nn.Linear(16, width)
        self.class_embedding = nn.Embedding(2 * len(CLASSES), width)
        self.first = nn.Linear(2, width)
        self.layers = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """(B, 2) the velocity at x_t (B, 2), the angles t (B,) and the labels (B,)."""
        angles = t[:, None] * torch.arange(1, 9, device=t.device, dtype=t.dtype)
        features = torch.cat([torch.sin(angles), torch.cos(angles)], 1).to(x_t.dtype)
        return self.layers(self.first(x_t) + self.time_embedding(features) + self.class_embedding(class_labels))


def _as_map(features: Tensor, x_t: Tensor, cond: Cond) -> Tensor:
    return features.unflatten(1, (-1, 2, 2))


START = Path(__file__).parent / "assets" / "plane_start.safetensors"
"""The weights of `fitted_start()`, kept since fitting takes 15 seconds.

A change to the classes, to the network or to its fit needs them anew: `save_file(fitted_start().network.state_dict(),
START)`."""


@cache
def plane_teacher() -> Teacher:
    """The exact teacher, with players that begin as a network fitted to its velocity.

    A discriminator reads its last hidden layer.
    """
    start = _start()
    start.network.load_state_dict(load_file(START))
    return Teacher(exact_denoiser(), (2,), len(CLASSES), "analytic", "mixture", start=start.requires_grad_(False))


def _start() -> Denoiser:
    exact = exact_denoiser()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PlaneNet()
    return Denoiser(network, exact.schedule, exact.output, null=_null, feature_layer="layers.4", feature_map=_as_map)


def fitted_start(steps: int = 3000) -> Denoiser:
    """The network that players begin as, fitted anew to the teacher's velocity (seed 0)."""
    start, mix = _start(), mixture()
    optimizer = torch.optim.AdamW(start.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        draw = generator("cpu", 0, step, "plane teacher")
        labels = torch.randint(2 * len(CLASSES), (512,), generator=draw)
        x0 = mix.sample(512, draw, labels).float()
        t = torch.rand(512, generator=draw, dtype=torch.float64) * math.pi / 2
        x_t = diffuse(x0, t, torch.randn(512, 2, generator=draw))
        loss = (start(x_t, t, {"class_labels": labels}).y - mix(x_t, t, labels)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return start


def train_on_the_plane(
    info: MethodInfo,
    options: Mapping[str, Scalar],
    device: torch.device = CPU,
    watch: Callable[[int, Trainer], None] | None = None,
) -> tuple[Method, Trainer]:
    """The method, trained on the device with its options and brought to the CPU, where the data are drawn too.

    The trainer's `evaluating()` puts the average in place. `watch(step, trainer)` is called before each step.
    """
    defaults: dict[str, Scalar] = {"batch_size": 256, "ema": 0.99, "lr_schedule": "cosine", "max_grad_norm": 0.0}
    shared, own = split({**defaults, **info.about.defaults, **options}, TrainConfig, info.config)
    module = info.load()
    fields = {f.name for f in dataclasses.fields(FitConfig)}
    config = build(
        FitConfig, {k: v for k, v in shared.items() if k in fields} | {"sample_every": 0, "device": device.type}
    )
    teacher = replace(_teacher_on(device), lora=lora_settings(build(TrainConfig, shared), None))
    torch.manual_seed(config.seed)
    method = module.METHOD(teacher, module.Config(**dataclasses.asdict(build(info.config, own))))
    mix = mixture()
    pairs = _pairs(float(own.get("guidance_scale", 1.0))) if Need.PAIRS in method.needs else None

    def batches(step: int) -> Batch:
        key, n = (config.seed, step, 0), config.batch_size
        cond = ClassLabels(len(CLASSES)).draw(n, generator("cpu", *key, "condition")).cond
        x0 = None
        if Need.IMAGES in method.needs:
            x0 = mix.sample(n, generator("cpu", *key, "data"), cond["class_labels"]).float()
        pair = None
        if pairs is not None:
            chosen = torch.randint(len(pairs.z), (n,), generator=generator("cpu", *key, "pairs"))
            pair = Pair(pairs.z[chosen], pairs.x0[chosen], {k: v[chosen] for k, v in pairs.cond.items()})
        example = to_device(Example(x0, cond, pair), device)
        return Batch(n, (2,), example.cond, example.x0, device, key, example.pair)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(method, batches, config, Path(folder), accelerator_for(config, Path(folder)))
        for step in range(config.steps):
            if watch is not None:
                watch(step, trainer)
            trainer.iteration()
    return method, trainer


def _teacher_on(device: torch.device) -> Teacher:
    """The teacher of the plane, or a copy of it on another device than the CPU."""
    teacher = plane_teacher()
    if device.type == "cpu":
        return teacher
    exact, start = (copy.deepcopy(part).to(device) for part in (teacher.denoiser, teacher.start) if part is not None)
    return replace(teacher, denoiser=exact, start=start)


def _pairs(scale: float, count: int = 2048) -> Pair:
    """Noise and what the guided teacher's flow makes of it, `count` pairs of each class."""
    z = torch.randn(len(CLASSES), count, 2, generator=generator("cpu", 0, "plane pairs"))
    x0 = torch.cat([line.flow_map(noise, math.pi / 2, scale) for line, noise in zip(CLASSES, z, strict=True)])
    return Pair(z.flatten(0, 1), x0.float(), _labels(count))


def _labels(count: int) -> Cond:
    return {"class_labels": torch.arange(len(CLASSES)).repeat_interleave(count)}


# -- what a student is judged by -------------------------------------------------------------------------------------


def _noise(draws: int) -> Tensor:
    """(draws, _COUNT, 2) standard normal, spread more evenly than chance: a mode's share of it errs by 0.001."""
    u = torch.quasirandom.SobolEngine(2 * draws, scramble=True, seed=1).draw(_COUNT, dtype=torch.float64)
    return torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)).float().unflatten(1, (draws, 2)).transpose(0, 1)


def _noise_of(sampler: Sampler) -> Tensor:
    """(draws, _COUNT, 2) what a sampler reads: noise at its first level, and at each of the others if it adds any."""
    return _noise(1 if isinstance(sampler.step, DDIM) else len(sampler.levels))


@torch.no_grad()
def draw(sampler: Sampler) -> Tensor:
    """(classes, _COUNT, 2) the student's samples in units of the data's standard deviation; all read one noise."""
    both = [part.repeat(len(CLASSES), 1) for part in _noise_of(sampler)]
    cond = _labels(_COUNT)
    x, t = sampler.input_at(len(sampler.levels) - 1, both[0], cond, lambda j: both[j])
    x0 = sampler.denoiser(x, t, cond).x0 * sampler.denoiser.schedule.data_std / DATA_STD
    return x0.double().unflatten(0, (len(CLASSES), _COUNT))


def measures(sampler: Sampler, scale: float = 1.0, *, trajectory: bool = False) -> dict[str, float]:
    """What the student's samples are judged by, each 0 for a perfect student of the teacher guided by `scale`.

    `trajectory`: also the error of the map from noise to data, of a sampler that adds no noise on the way.
    """
    found: dict[str, float] = {}
    for label, (line, x) in enumerate(zip(CLASSES, draw(sampler), strict=True)):
        by_name = distribution_measures(line, x, scale)
        if trajectory and len(noise := _noise_of(sampler)) == 1:
            x_t, t = sampler.start(noise[0])
            by_name["trajectory"] = float((x - line.flow_map(x_t, float(t[0]), scale)).square().mean().sqrt())
        found |= {f"{name}, class {label}": value for name, value in by_name.items()}
    return found


@cache
def _exact_samples(line: Line, scale: float) -> Tensor:
    """(_COUNT, 2) of the class, guided by `scale`: what students are compared with."""
    return line.flow_map(_noise(2)[1], math.pi / 2, scale)


def distribution_measures(line: Line, x: Tensor, scale: float = 1.0) -> dict[str, float]:
    """Samples x (_COUNT, 2) against the class, guided by `scale`."""
    exact = _exact_samples(line, scale)
    nearest = torch.cdist(x, line.means(scale)).argmin(1)
    shares = torch.bincount(nearest, minlength=len(line.places)) / len(x)
    turns = math.pi * torch.arange(64, dtype=torch.float64) / 64
    directions = torch.stack([torch.cos(turns), torch.sin(turns)])
    apart = (x @ directions).sort(0).values - (exact @ directions).sort(0).values
    std, exact_std = ((part - part.mean(0)).square().mean().sqrt() for part in (x, exact))
    found = {
        "modes": float((shares / line.shares() - 1).abs().max()),
        "sliced_w2": float(apart.square().mean().sqrt()),
        "mean": float((x.mean(0) - exact.mean(0)).norm()),
        "scale": float((std / exact_std - 1).abs()),
    }
    return found | {f"fisher at t = {angle}": _fisher_gap(line, x, angle, scale) for angle in (0.4, 0.8, 1.2, 1.5)}


def _fisher_gap(line: Line, x: Tensor, angle: float, scale: float) -> float:
    """E_q |v_q - v_p|^2 at an angle, which is tan(t)^2 times the Fisher divergence (0.002 for exact samples).

    q is the distribution of 1024 samples, each widened by a kernel, and p is the class widened alike; they are compared
    where 256 other samples are noised to.
    """
    kernel, others, judged = SPREAD / 2, x[-1024:], x[:256]
    noise = torch.randn(2, *judged.shape, generator=generator("cpu", 0, "fisher", str(angle)), dtype=x.dtype)
    t = torch.full((len(judged),), angle, dtype=torch.float64)
    x_t = diffuse(judged + kernel * noise[0], t, noise[1])
    p = line.density(scale, math.hypot(SPREAD, kernel))
    return float((GaussianMixture(others, kernel)(x_t, t) - p(x_t, t)).square().sum(1).mean())


def limit_of(measure: str) -> float:
    """The limit of a measure by its name, "fisher at t = 0.4, class 0" say."""
    return LIMITS[measure.split(",")[0].split()[0]]


def checks(info: MethodInfo, device: torch.device = CPU) -> Iterator[Check]:
    """The end-to-end rows of a method that names its trainings in the plane; it is trained on `device`."""
    for name, options in (info.plane or {}).items():
        yield from training_checks(info, name, dict(options), device)


def training_checks(
    info: MethodInfo, name: str, options: dict[str, Any], device: torch.device = CPU
) -> Iterator[Check]:
    """The rows of one training."""
    scale, trajectory = float(options.get("guidance_scale", 1.0)), info.about.kind != "distribution"
    method, trainer = train_on_the_plane(info, options, device)
    with trainer.evaluating():
        method.sampler().denoiser.to(CPU)
        after = measures(method.sampler(), scale, trajectory=trajectory)
    start, sampler = plane_teacher().start, method.sampler()
    assert start is not None
    untrained = Sampler(trainable_copy(start).eval(), sampler.levels, sampler.step)
    before = measures(untrained, scale, trajectory=trajectory)
    for what, value in after.items():
        yield equal(f"{name}, {trainer.step} steps in the plane: {what}", 0.0, value, limit_of(what), scale=1.0)
    worst = max(value / limit_of(what) for what, value in before.items())
    yield Check(f"{name}: before training one of these is beyond its limit (ratio)", 1.0, worst, worst, 1.0, "differs")
