"""AGD, adapter guidance distillation: Efficient Distillation of Classifier-Free Guidance using Adapters.

Jensen & Sadat 2025, arXiv:2503.07274 (code: cristianpjensen/agd).

Classifier-free guidance takes two passes of the network a step. Here the network stays as it is, to the bit, and
small adapters on its layers, which know guidance scale, time and class, make one pass give what two gave, for
every scale in a range. They are trained at points of guided trajectories, where they will be used. The number of
sampling steps stays what it was; the adapters can be put on a student of few steps as well.

The trajectories are not stored. A batch is B chains of the guided sampler (`diffdistill/chains.py`), at staggered
steps: the guided output at their present points is the target, and it is also what moves them on. A training
step so costs one guided call and one pass of the student.

Deviations: the authors store trajectories of their 1000-step sampler and shuffle the points; here neighbouring
batches hold neighbouring points of the same chains, and the chains are DDIM's. What adapters add is multiplied
by (scale - 1), so that scale 1 is the base model to the bit. They share one embedding of scale, time and class,
whose features of the scale have periods of 2 pi and more; the authors' adapters have one each, with random
frequencies, on the base's own embeddings or on new ones. Their MLPs have ReLU and layer norm, these SiLU. The gate
of the authors' 'mlp_gate' begins at 1/2 with a random correction behind it; here its last layer begins at zero, as
that of the others. The loss compares the network's own outputs, which is eps for the authors' networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide
from diffdistill.core.prediction import ROWS, Prediction
from diffdistill.core.schedule import TrigFlow, sampling_grid
from diffdistill.errors import UserError
from diffdistill.exact.checks import Check, differs, equal, gradient, two_points
from diffdistill.options import option
from diffdistill.players.adapter_networks import AdaptedNetwork, Additive, Corrections
from diffdistill.players.guidance_adapters import adapted, new_adapters
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.chains import GuidedChains
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Jensen & Sadat 2025, arXiv:2503.07274"
DATA = "none; conditions are drawn uniformly"
EQUATIONS = {
    "guided target and loss (section 3; authors' train.py)": "AdapterGuidance.matching, guidance.guide",
    "guided trajectories (section 3; authors' sample_trajectories.py)": "chains.GuidedChains",
    "adapters: additive, cross-attention, gated MLP (authors' models/)": "adapter_networks.KINDS",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "steps": 400,
        "batch_size": 64,
        "adapter": "attention",
        "adapted_layers": "blocks",
        "adapter_width": 20,
        "guidance_min": 1.75,
        "guidance_max": 2.25,
        "guidance_scale": 2.0,
        "trajectory_steps": 20,
        "student_lr": 1e-2,
        "warmup_steps": 20,
        "lr_schedule": "cosine",
        "ema": 0.99,
    },
    "imagenet256": {
        "steps": 5000,
        "batch_size": 64,
        "adapter": "additive",
        "adapter_width": 256,
        "guidance_min": 1.0,
        "guidance_max": 6.0,
        "trajectory_steps": 1000,
        "student_lr": 1e-4,
        "warmup_steps": 500,
        "lr_schedule": "cosine",
    },
    "stable-diffusion": {
        "steps": 5000,
        "batch_size": 64,
        "adapter": "attention",
        "adapter_width": 320,
        "guidance_min": 1.0,
        "guidance_max": 12.0,
        "trajectory_steps": 999,
        "student_lr": 1e-4,
        "warmup_steps": 500,
        "lr_schedule": "cosine",
    },
}
PASSES = {"digits": 3}


@dataclass(frozen=True)
class Config:
    """AGD's options."""

    adapter: Literal["additive", "attention", "mlp_gate"] = option(
        "additive", "additive: the same at all positions, blind to x; attention, mlp_gate: of the layer's input"
    )
    adapter_width: int = option(64, "hidden width of the adapters", at_least=2)
    adapted_layers: Literal["attention", "blocks"] = option(
        "attention", "attention: the attention layers; blocks: these and the residual blocks"
    )
    guidance_min: float = option(1.0, "guidance scales are drawn uniformly from here (1: none)", at_least=0)
    guidance_max: float = option(6.0, "... to here", at_least=0)
    guidance_scale: float = option(3.0, "the scale of samples and of the export, unless told otherwise", at_least=0)
    trajectory_steps: int = option(50, "DDIM steps of the guided trajectories that are trained on", at_least=1)
    sampling_steps: int = option(20, "DDIM steps of samples and of the export, one pass each", at_least=1)
    student_lr: float = option(1e-4, "AdamW's learning rate for the adapters", above=0)
    beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    loss: Literal["l2", "l1"] = option("l2", "mean square or mean absolute error of the network's output")


class AdapterGuidance:
    """One player: the student is the teacher's own network with adapters, which alone are trained."""

    needs_data = False
    needs_pairs = False

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        if config.guidance_min <= config.guidance_max and not (
            config.guidance_min <= config.guidance_scale <= config.guidance_max
        ):
            raise UserError(
                f"guidance_scale: {config.guidance_scale} is not in what is trained, {config.guidance_min} "
                f"(guidance_min) to {config.guidance_max} (guidance_max)"
            )
        self.config = config
        self.teacher = frozen(teacher.denoiser)
        self.schedule = teacher.denoiser.schedule
        self.chains = GuidedChains(teacher, config.trajectory_steps, config.guidance_min, config.guidance_max)
        if student is None:
            adapters = new_adapters(teacher, config.adapter, config.adapter_width, config.adapted_layers)
            student = adapted(self.teacher, adapters, config.guidance_scale)
        self.student = student
        self.players: dict[str, nn.Module] = {"student": self.student}
        self.state: dict[str, nn.Module] = {"chains": self.chains}

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(self.config.student_lr, (self.config.beta1, 0.999), self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.student_turn)]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(self.student, self.schedule.levels(self.config.sampling_steps).tolist(), renoise=False)

    def student_turn(self, batch: Batch) -> dict[str, Tensor]:
        points = self.chains.points(batch, self.teacher)
        loss, target = self.matching(*points)
        self.chains.advance(batch, target)
        return {"loss": loss}

    def matching(self, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> tuple[Tensor, Prediction]:
        """The loss of one pass against the guided two at x_t (B, ...), with scales (B,); and the guided prediction."""
        with torch.no_grad():
            target = guide(self.teacher, x_t, t, cond, scale)
        got = self.student(x_t, t, {**cond, "guidance_scale": scale})
        error = F.mse_loss if self.config.loss == "l2" else F.l1_loss
        return error(got.y, target.y), target


METHOD = AdapterGuidance


class _Classes(nn.Module):
    """The velocity of N(means[k], stds[k]^2) for each label k, of which the last means no class (T4)."""

    means: Tensor
    stds: Tensor

    def __init__(self, means: Tensor, stds: Tensor):
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        mean, std = self.means[class_labels], self.stds[class_labels]
        slope = cos * sin * (1 - std**2) / (cos**2 * std**2 + sin**2)
        return slope * (x_t - cos * mean) - sin * mean

    def teacher(self) -> Teacher:
        def null(cond: Cond) -> Cond:
            return {"class_labels": torch.full_like(cond["class_labels"], len(self.means) - 1)}

        denoiser = Denoiser(self, TrigFlow(), ROWS["v_prediction"], null=null)
        return Teacher(denoiser, (self.means.shape[1],), len(self.means) - 1)


class _Exact(nn.Module):
    """The correction of equal variances V, -(a - 1) sin(t) (mu_c - mu_none)/V, at the network's output."""

    def __init__(self, means: Tensor, std: Tensor):
        super().__init__()
        self.means, self.std = means, std

    def forward(self, scale: Tensor, time: Tensor, labels: Tensor) -> Corrections:
        cos, sin = torch.cos(time)[:, None], torch.sin(time)[:, None]
        apart = self.means[labels] - self.means[-1]
        delta = -(scale[:, None] - 1) * sin * apart / (cos**2 * self.std**2 + sin**2)
        return {"": lambda x: delta[:, None]}


def verify() -> Iterator[Check]:
    """Section 6.1's sanity items and Appendix B row 14, on Gaussians of each class (T4)."""
    means = torch.tensor([[0.7, -0.4], [-0.9, 0.3], [0.1, 0.2]]).double()
    same = torch.tensor([[0.5, 1.3]]).double().expand(3, 2)
    unequal = torch.tensor([[0.5, 1.3], [0.8, 0.6], [1.1, 0.9]]).double()
    x, _ = two_points(2)  # mean zero, variance one
    label = 1
    cond = {"class_labels": torch.full((len(x),), label)}
    for t, a in ((t, a) for t in (0.3, 0.9, 1.4) for a in (1.0, 2.5, 6.0)):
        angle, scale, name = torch.full((len(x),), t).double(), torch.full((len(x),), a).double(), f"t = {t}, a = {a}"
        cos, sin = torch.cos(angle[0]), torch.sin(angle[0])
        # eps_c - eps_none = slope x + offset; the network's v is (eps - sin x)/cos.
        var = cos**2 * unequal**2 + sin**2
        slope = sin / var[label] - sin / var[-1]
        offset = -sin * cos * (means[label] / var[label] - means[-1] / var[-1])
        wanted = (a - 1) ** 2 * (slope**2 + offset**2).mean() / cos**2
        method, out = _additive(means, unequal)
        loss, _ = method.matching(x, angle, cond, scale)
        yield equal(f"at zero init the loss is (a - 1)^2 E|eps_c - eps_u|^2, {name}", wanted, loss, 1e-12, scale=1e-2)
        off_by_one, _ = method.matching(x, angle, cond, scale + 1)
        yield differs(f"... where w = a - 1 taken for a is caught, {name}", wanted, off_by_one, 1e-6)

        with torch.no_grad():
            out.bias.copy_(offset / cos)  # the mean correction, the best that does not look at x
        loss, _ = method.matching(x, angle, cond, scale)
        left = (a - 1) ** 2 * (slope**2).mean() / cos**2
        yield equal(f"unequal variances: what the best additive adapter leaves, {name}", left, loss, 1e-12, scale=1e-2)
        yield equal(f"... which is its minimum, {name}", 0.0, gradient(loss, out.bias), 1e-12, scale=1.0)
        if a > 1:
            yield differs(f"... and not zero, {name}", 0.0, loss, 1e-3)

        method, out = _additive(means, same)
        with torch.no_grad():
            out.bias.copy_(-sin * (means[label] - means[-1]) / (cos**2 * same[0] ** 2 + sin**2))
        loss, _ = method.matching(x, angle, cond, scale)
        yield equal(f"equal variances: an additive adapter is exact, {name}", 0.0, loss, 1e-24, scale=1.0)
        slopes = gradient(loss, *_network(method).adapters.parameters())
        yield equal(f"... with gradient zero, {name}", 0.0, slopes, 1e-12, scale=1.0)
        shifted = method.student(x, angle, {**cond, "guidance_scale": scale - 1}).y
        yield differs(f"... and w given for a is caught, {name}", method.teacher(x, angle, cond).y, shifted, 1e-6)
    yield from _trajectory_checks(means, same)
    yield from _base_checks(means, unequal)


def _network(method: AdapterGuidance) -> AdaptedNetwork:
    assert isinstance(method.student.network, AdaptedNetwork)
    return method.student.network


def _additive(means: Tensor, stds: Tensor) -> tuple[AdapterGuidance, nn.Linear]:
    """The method with its own additive adapter at the network's output, and the adapter's last layer."""
    method = AdapterGuidance(_Classes(means, stds).teacher(), Config())
    return method, next(module for module in _network(method).modules() if isinstance(module, Additive)).out


def _trajectory_checks(means: Tensor, stds: Tensor) -> Iterator[Check]:
    """The sampler with exact adapters makes the guided trajectory in closed form, and so do the chains."""
    teacher = _Classes(means, stds).teacher()

    def trajectory(x: Tensor, labels: Tensor, scale: Tensor, grid: Tensor, steps: Tensor) -> Tensor:
        """The guided score is that of N(mu_none + a (mu_c - mu_none), std^2), so every DDIM step is affine."""
        mean = means[-1] + scale[:, None] * (means[labels] - means[-1])
        for k in range(int(steps.max())):
            t, s = grid[k], grid[k + 1]
            rho = torch.cos(t) * stds[0] ** 2 / (torch.cos(t) ** 2 * stds[0] ** 2 + torch.sin(t) ** 2)
            factor = torch.cos(s) * rho + torch.sin(s) * (1 - torch.cos(t) * rho) / torch.sin(t)
            moved = torch.cos(s) * mean + factor * (x - torch.cos(t) * mean)
            x = torch.where((steps > k)[:, None], moved, x)
        return x

    denoiser = adapted(teacher.denoiser, _Exact(means, stds[0]), 2.5)
    sampler = AdapterGuidance(teacher, Config(sampling_steps=7), student=denoiser).sampler()
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, scale = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([1.0, 1.5, 2.0, 3.0, 4.5, 6.0]).double()
    grid, steps = sampling_grid(TrigFlow(), 7), torch.full((6,), 7)

    def sampled(cond: Cond) -> Tensor:
        x, t = sampler.input_at(6, z, cond, lambda j: torch.full_like(z, torch.nan))  # no noise is added
        return sampler.denoiser(x, t, cond).x0

    closed = trajectory(z, labels, scale, grid, steps)
    got = sampled({"class_labels": labels, "guidance_scale": scale})
    yield equal("one pass a step with exact adapters samples the guided trajectory", closed, got, 1e-12)
    wrong = sampled({"class_labels": labels, "guidance_scale": scale - 1})
    yield differs("... and w given for a is caught", closed, wrong, 1e-6)
    default = trajectory(z, labels, torch.full_like(scale, 2.5), grid, steps)
    yield equal("... at its own scale where none is given", default, sampled({"class_labels": labels}), 1e-12)

    chains, start = GuidedChains(teacher, 5, 1.0, 4.0), torch.zeros(10, 2)
    for step in range(12):
        draw = torch.randint(2, (10,), generator=torch.Generator().manual_seed(step))
        batch = Batch(10, (2,), {"class_labels": draw}, None, torch.device("cpu"), (0, step, 0))
        points = chains.points(batch, teacher.denoiser)
        stands = (torch.arange(10) // 2 + step) % 5
        yield equal(f"chains are spread over all steps, batch {step}", stands, chains.step, 0.0)
        noise = batch.randn("chains/start/z").double()  # of the first batch; later ones show where they begin
        start = noise if step == 0 else torch.where((stands == 0)[:, None], points.x_t, start)
        closed = trajectory(start, points.cond["class_labels"], points.scale, chains.grid, stands)
        yield equal(f"chains are guided trajectories, batch {step}", closed, points.x_t, 1e-12)
        inside = (points.scale >= 1) & (points.scale <= 4) & (points.scale.diff(prepend=torch.zeros(1)) != 0)
        yield equal(f"each with a scale of its own in the range, batch {step}", 10.0, float(inside.sum()), 0.0)
        chains.advance(batch, guide(teacher.denoiser, *points))


def _base_checks(means: Tensor, stds: Tensor) -> Iterator[Check]:
    """The base model is never changed, and is what adapters at scale 1 give, whatever their weights."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, cond = torch.linspace(0.1, 1.5, 8).double(), {"class_labels": torch.arange(8) % 3}
    for kind in ("additive", "attention", "mlp_gate"):
        method = AdapterGuidance(_Classes(means, stds).teacher(), Config(adapter=kind))
        plain = method.teacher(x, t, cond).y
        scale = torch.full((8,), 4.0).double()
        started = method.student(x, t, {**cond, "guidance_scale": scale}).y
        yield equal(f"{kind}: training begins at the unguided model", plain, started, 0.0)
        with torch.no_grad():
            for p in _network(method).adapters.parameters():
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
        changed = method.student(x, t, {**cond, "guidance_scale": scale}).y
        yield differs(f"{kind}: adapters change it", plain, changed, 1e-3)
        off = method.student(x, t, {**cond, "guidance_scale": torch.ones(8).double()}).y
        yield equal(f"{kind}: at scale 1 it is the base model to the bit", plain, off, 0.0)
        yield equal(f"{kind}: and after the call the base is untouched", plain, method.teacher(x, t, cond).y, 0.0)
