"""DMD: One-step Diffusion with Distribution Matching Distillation.

Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park, CVPR 2024, arXiv:2311.18828. There is no code of the
authors'; that of DMD2 (tianweiy/DMD2) continues it. Formulas and settings are those of the paper's text.

The student x = G(z, c) follows the gradient of KL(q_t || p_t) between its own noised samples and the teacher's,
at all noise levels: the teacher's score minus that of a "fake score" network, which takes one step on the
student's samples for each of the student's own. That divergence is content with one mode of several, and
training with it alone drifts. So a regression loss holds the student to the teacher's deterministic sampler on
noise-image pairs that were made beforehand (`diffdistill pairs`), which keeps all modes.

Deviations: the normaliser is clamped at 1e-5. The gradient is Algorithm 2's, which leaves out the factor alpha_t of
eq. 7 and 8 (for EDM it is 1). With `normalise: false` the gradient is the exact one of the KL
divergence, which `verify` compares with its closed form. The student keeps its time input, at a fixed level.
LPIPS is the `lpips` package's, the paper has PIQ's; the default, l2, needs neither. The regression has as many
samples a step as the matching, and they are not matched too (the paper does both differently for LAION alone).
Mixed precision, which the paper has for ImageNet, is left to `mixed_precision`. The presets' batch sizes are those
of one of the paper's seven processes; "digits" is ours, and its pairs are given with --pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.distances import distance
from diffdistill.core.guidance import guided
from diffdistill.core.losses import gradient_injection
from diffdistill.core.prediction import ROWS, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.core.times import check_range, native_uniform
from diffdistill.exact.analytic import (
    AffineGenerator,
    ClassGaussians,
    GaussianMixture,
    class_gaussians_teacher,
    gaussian_teacher,
)
from diffdistill.exact.checks import (
    AffineGame,
    Check,
    affine_game,
    differs,
    equal,
    gradient,
    matching_checks,
    two_points,
)
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler, one_step_sampler
from diffdistill.players.teacher import Teacher, frozen, only_trains, trainable
from diffdistill.scaffold.matching import distribution_matching_gradient, fake_score_loss
from diffdistill.scaffold.method import Batch, Optimizer, Pair, Turn

PAPER = "Yin et al. 2023, arXiv:2311.18828"
DATA = "none; noise-image pairs of the teacher when regression_weight > 0"
EQUATIONS = {
    "one-step generator (section 3.1)": "players.FewStepSampler.one_step",
    "distribution matching gradient (eq. 7, its weight eq. 8; Algorithm 2)": "matching.distribution_matching_gradient",
    "denoising loss of the fake score (eq. 6; Algorithm 3)": "matching.fake_score_loss",
    "regression loss on noise-image pairs (eq. 9)": "DMD.regression, pairs.make_pairs",
    "guidance of the real score alone (section 3.4)": "guidance.guided",
    "training procedure (Algorithm 1)": "DMD.turns, DMD.student_turn",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "steps": 400,
        "batch_size": 64,
        "regression_weight": 1.0,
        "student_lr": 3e-4,
        "fake_score_lr": 1e-3,
        "student_level": 750,
        "lr_schedule": "cosine",
        "beta1": 0.0,
        "ema": 0.99,
    },
    "cifar10": {
        "steps": 300000,
        "batch_size": 56,
        "distance": "lpips",
        "student_lr": 5e-5,
        "fake_score_lr": 5e-5,
        "warmup_steps": 500,
    },
    "cifar10-unconditional": {
        "steps": 300000,
        "batch_size": 56,
        "distance": "lpips",
        "regression_weight": 0.5,
        "student_lr": 5e-5,
        "fake_score_lr": 5e-5,
        "warmup_steps": 500,
    },
    "imagenet64": {
        "steps": 350000,
        "batch_size": 48,
        "distance": "lpips",
        "student_lr": 2e-6,
        "fake_score_lr": 2e-6,
        "warmup_steps": 500,
    },
}
PASSES = {"digits": 5}
END_TO_END = {
    "kind": "distribution",
    "options": {"student_lr": 1e-3, "fake_score_lr": 2e-3, "beta1": 0.0, "steps": 2000},
}


@dataclass(frozen=True)
class Config:
    """DMD's options."""

    regression_weight: float = option(0.25, "weight of the regression on pairs; 0: none, and no pairs", at_least=0)
    distance: Literal["l2", "huber", "lpips"] = option(
        "l2", "the regression's; l2: mean square; huber: of the whole sample; lpips: VGG features, pip install lpips"
    )
    huber_c: float | None = option(None, "pseudo-Huber's c; default: 0.00054 sqrt(dimensions)", above=0)
    student_lr: float = option(1e-5, "AdamW's learning rate for the student", above=0)
    fake_score_lr: float = option(1e-5, "AdamW's learning rate for the fake score", above=0)
    beta1: float = option(0.9, "AdamW's first beta, for both", at_least=0, below=1)
    weight_decay: float = option(0.01, "AdamW's weight decay", at_least=0)
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the teacher (1: none), never of the fake score; that of the pairs", at_least=0
    )
    student_level: float | None = option(
        None, "the timestep or sigma at which the student reads pure noise, a pair's too; default: the noisiest",
        at_least=0,
    )  # fmt: skip
    time_low: float = option(0.02, "distribution matching draws its times uniformly from here", at_least=0, below=1)
    time_high: float = option(0.98, "... to here, as fractions of the teacher's own time", above=0, at_most=1)
    normalise: bool = option(True, "divide the gradient by mean|x - D_teacher|; false: the exact KL gradient")
    fake_score_loss: Literal["v", "epsilon"] = option("v", "v: EDM's weight; epsilon: as for SD")


class DMD:
    """Players: student, fake_score."""

    def __init__(
        self,
        teacher: Teacher,
        config: Config,
        *,
        student: Denoiser | None = None,
        fake_score: Denoiser | None = None,
    ):
        check_range(config.time_low, config.time_high)
        self.config = config
        self.teacher = guided(frozen(teacher.denoiser), config.guidance_scale)
        self.schedule = teacher.denoiser.schedule
        # Dropout is off for all networks (appendix B).
        self.student = (student or teacher.player("student")).eval()
        self.fake_score = (fake_score or teacher.player("fake_score")).eval()
        self.needs_data, self.needs_pairs = False, config.regression_weight > 0
        self.distance = None
        if self.needs_pairs:
            self.distance = distance(config.distance, teacher.shape, self.schedule.data_std, config.huber_c)
        self.players: dict[str, nn.Module] = {"student": self.student, "fake_score": self.fake_score}
        self.state: dict[str, nn.Module] = {}

    def optimizer(self, player: str) -> Optimizer:
        c = self.config
        return Optimizer(c.student_lr if player == "student" else c.fake_score_lr, (c.beta1, 0.999), c.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """One each; the fake score learns from the samples that the student was judged by."""
        drawn: list[Tensor] = []
        return [
            Turn("student", partial(self.student_turn, drawn)),
            Turn("fake_score", partial(self.fake_score_turn, drawn)),
        ]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        return one_step_sampler(self.student, self.config.student_level)

    def student_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """One pass for the fresh noise and the pairs' together."""
        c, z, cond = self.config, batch.randn("z"), batch.cond
        if self.needs_pairs:
            assert batch.pair is not None
            z = torch.cat([z, batch.pair.z])
            cond = {key: torch.cat([value, batch.pair.cond[key]]) for key, value in cond.items()}
        both = self.sampler().one_step(z, cond)
        x, x_ref = both[: batch.size], both[batch.size :]
        drawn.append(x.detach())
        t = native_uniform(self.schedule, batch.size, batch.generator("student/t"), c.time_low, c.time_high)
        logs = self.matching(x, t, batch.randn("student/eps"), batch.cond)
        if batch.pair is not None and self.needs_pairs:
            logs["regression"] = self.regression(x_ref, batch.pair.x0)
            logs["loss"] = logs["loss"] + c.regression_weight * logs["regression"]
        return logs

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Distribution matching of samples x (B, ...) at angles t (B,) with noise eps (B, ...)."""
        x_t = diffuse(x, t, eps)
        grad, gap = distribution_matching_gradient(
            x, x_t, t, cond, self.teacher, self.fake_score, self.config.normalise
        )
        # The normalised gradient has no unit. The authors' is that of images, data_std x, and other terms' weights
        # are relative to it.
        unit = self.schedule.data_std if self.config.normalise else 1.0
        return {"loss": unit * gradient_injection(x, grad), "gap": gap.mean()}

    def regression(self, x_ref: Tensor, y_ref: Tensor) -> Tensor:
        """The mean distance of G(z_ref) from what the teacher's sampler makes of z_ref, both (B, ...)."""
        assert self.distance is not None
        return self.distance(x_ref, y_ref).mean()

    def fake_score_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        t = native_uniform(self.schedule, batch.size, batch.generator("fake_score/t"))
        loss = self.denoising(drawn[0], t, batch.randn("fake_score/eps"), batch.cond)
        return {"loss": loss, "denoising": loss}

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return fake_score_loss(self.fake_score, x, t, eps, cond, self.config.fake_score_loss)


METHOD = DMD


def verify() -> Iterator[Check]:
    """Distribution matching, regression and guidance in closed form; what the pairs are for, by quadrature."""

    def make(parts: AffineGame, normalise: bool) -> DMD:
        return _dmd(parts, Config(normalise=normalise))

    yield from matching_checks(make)
    yield from _regression_checks()
    yield from _guidance_checks()
    yield from _mode_checks()
    method = DMD(gaussian_teacher([0.0], 1.0), Config())
    for step in (0, 1):
        same = [turn.player for turn in method.turns(step)] == ["student", "fake_score"]
        yield equal(f"order of turns at step {step}: the student, then the fake score", 1.0, float(same), 0.0)


def _dmd(parts: AffineGame, config: Config) -> DMD:
    method = DMD(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)
    only_trains("student", trainable(method.players))
    return method


def _regression_checks() -> Iterator[Check]:
    """A student m + b z on the exact pairs of N(mu, s^2), which are (z, mu + s z)."""
    mu, s = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
    m, b = torch.tensor([-0.3, 0.5]).double(), torch.tensor([0.9, 0.6]).double()
    z, _ = two_points(2)
    y, error = mu + s * z, (m - mu) + (b - s) * z
    norm = torch.sqrt(error.square().sum(1, keepdim=True) + 0.7**2)
    closed = {
        # The mean over two dimensions halves the 2 of the square's derivative; E z = 0 and E z^2 = 1.
        "l2": (((m - mu) ** 2 + (b - s) ** 2).mean(), torch.cat([m - mu, b - s])),
        "huber": ((norm - 0.7).mean(), torch.cat([(error / norm).mean(0), (z * error / norm).mean(0)])),
    }
    for kind, (value, slope) in closed.items():
        parts = affine_game(mu, s, m, b)
        affine = parts.generator
        method = _dmd(parts, Config(distance=kind, huber_c=0.7))  # type: ignore[arg-type]
        loss = method.regression(method.sampler().one_step(z, {}), y)
        yield equal(f"regression on exact pairs, {kind}", value, loss, 1e-12)
        yield equal(f"its gradient, {kind}", slope, gradient(loss, affine.mean, affine.scale), 1e-12)
        strange = method.regression(method.sampler().one_step(z, {}), y.flip(0))
        wrong = gradient(strange, affine.mean, affine.scale)
        yield differs(f"the noise of another pair is caught, {kind}", slope, wrong, 1e-6)

    batch = Batch(len(z), (2,), {}, None, torch.device("cpu"), (0, 0, 0), Pair(z, y, {}))

    def whole(weight: float, mean: Tensor, scale: Tensor) -> Tensor:
        """The gradient of all that the student's turn minimises, for one batch's noise."""
        parts = affine_game(mu, s, mean, scale)
        method = _dmd(parts, Config(normalise=False, regression_weight=weight))
        return gradient(method.student_turn([], batch)["loss"], parts.generator.mean, parts.generator.scale)

    for weight in (0.25, 0.5):
        added = whole(2 * weight, m, b) - whole(weight, m, b)
        yield equal(f"the student's turn adds that, weighted, weight {weight}", weight * closed["l2"][1], added, 1e-9)
    yield equal("both terms are zero at the optimum", 0.0, whole(0.25, mu, s), 1e-9, scale=1.0)
    # The divergence does not know the sign of b.
    yield equal("at the student mu - s z the divergence has no gradient", 0.0, whole(0.0, mu, -s), 1e-9, scale=1.0)
    mirrored = 0.25 * torch.cat([torch.zeros(2).double(), -2 * s])
    yield equal("and the pairs turn it round", mirrored, whole(0.25, mu, -s), 1e-9)


def _guidance_checks() -> Iterator[Check]:
    """Two classes and "no class", Gaussians of one variance: guided, the teacher is N(mu_0 + a (mu_c - mu_0), s^2)."""
    mu = torch.tensor([[0.7, -0.4], [-1.1, 0.6], [0.1, 0.3]]).double()  # the last row is "no class"
    s, m, b = (torch.tensor(v).double() for v in ([0.5, 1.3], [-0.3, 0.5], [0.9, 0.6]))
    z, eps = two_points(2)
    cond, t = {"class_labels": torch.ones(len(z), dtype=torch.long)}, 0.8
    angle = torch.full((len(z),), t).double()
    cos2, sin2 = torch.cos(angle[0]) ** 2, torch.sin(angle[0]) ** 2
    big_v, big_u = cos2 * s**2 + sin2, cos2 * b**2 + sin2
    for scale in (1.0, 3.0):
        teacher, affine = class_gaussians_teacher(mu, s), AffineGenerator(m, b)
        student = Denoiser(affine, teacher.denoiser.schedule, teacher.denoiser.row)
        # Were it guided, its own "no class" would show.
        fake_score = ClassGaussians(torch.stack([m, m, -m]), b).denoiser()
        config = Config(normalise=False, guidance_scale=scale)
        method = DMD(teacher, config, student=student, fake_score=fake_score)
        only_trains("student", trainable(method.players))
        x = method.sampler().one_step(z, cond)
        got = gradient(2 * method.matching(x, angle, eps, cond)["loss"], affine.mean, affine.scale)
        real = mu[2] + scale * (mu[1] - mu[2])
        exact = torch.cat([cos2 * (m - real) / big_v, cos2 * b * (1 / big_v - 1 / big_u)])
        yield equal(f"gradient with the teacher guided by {scale:g}", exact, got, 1e-9)
        if scale != 1:
            fake = -m + scale * 2 * m
            both = torch.cat([cos2 * ((m - real) / big_v - (m - fake) / big_u), exact[2:]])
            yield differs("a guided fake score is caught", both, got, 1e-6)


def _mode_checks() -> Iterator[Check]:
    """Figure 3 of the paper in one dimension: a student m + b z, a teacher with modes at -2 and 2.

    Expectations are sums over nodes. The weight of a mode is the share of the student's samples on its side.
    """
    modes = GaussianMixture([[-2.0], [2.0]], 0.4)
    nodes, weights = _gaussian_nodes(400)
    y = modes.flow_map(nodes[:, None], torch.full_like(nodes, math.pi / 2), torch.zeros_like(nodes))  # exact pairs
    # x_t depends on the first alone of two turned axes of (z, eps), and z is linear in the second.
    first, second = nodes.repeat(2), torch.tensor([-1.0, 1.0]).double().repeat_interleave(len(nodes))

    def slope(m: Tensor, b: Tensor, t: float, weight: float) -> Tensor:
        """(2,) the gradient of the student's loss, the fake score being exact."""
        affine, cos, sin = AffineGenerator(m, b), math.cos(t), math.sin(t)
        student = Denoiser(affine, TrigFlow(), ROWS["v_prediction"])
        score = affine.exact_score()
        parts = AffineGame(Teacher(modes.denoiser(), (1,)), affine, student, score, score.denoiser())
        method = _dmd(parts, Config(normalise=False, regression_weight=weight or 1.0))
        spread = torch.sqrt((cos * b) ** 2 + sin**2)
        z, eps = (cos * b * first - sin * second) / spread, (sin * first + cos * b * second) / spread
        x = _weighted(method.sampler().one_step(z[:, None], {}), weights.repeat(2) / 2)
        loss = method.matching(x, torch.full_like(z, t), eps[:, None], {})["loss"]
        if weight:
            x_ref = _weighted(method.sampler().one_step(nodes[:, None], {}), weights)
            loss = loss + weight * method.regression(x_ref, y)
        return gradient(loss, affine.mean, affine.scale)

    for t, m, b in ((0.4, 1.2, 0.5), (0.4, -0.3, 1.4), (1.0, 1.2, 0.5)):
        mean, scale = (torch.tensor([v]).double().requires_grad_() for v in (m, b))
        exact, got = gradient(_divergence(mean, scale, t), mean, scale), slope(mean, scale, t, 0.0)
        yield equal(f"gradient of KL(q_t || p_t) to two modes, t = {t}, m = {m}, b = {b}", exact, got, 1e-9)

    def settle(t: float, weight: float) -> Tensor:
        """(2,) m and b where descent from near one mode ends."""
        found = torch.tensor([1.2, 0.5]).double()
        for _ in range(200):
            found = found - 0.3 * slope(found[:1], found[1:], t, weight)
        return found

    for t, weight, other_mode, name in (
        (0.4, 0.0, 0.0, "without pairs, little noise: one mode"),
        (1.0, 0.0, 0.5, "without pairs, much noise: both modes"),
        (0.4, 0.25, 0.5, "with pairs, little noise: both modes"),
    ):
        m, b = settle(t, weight)
        lost = torch.special.ndtr(-m / b)
        yield equal(f"{name}; weight of the other one", other_mode, lost, 1e-3, scale=1.0)


def _gaussian_nodes(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (n,) of the trapezoidal rule for N(0, 1), which resolves what Hermite's nodes step over."""
    nodes = torch.linspace(-9, 9, n, dtype=torch.float64)
    weights = torch.exp(-(nodes**2) / 2)
    return nodes, weights / weights.sum()


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """x (n, d), such that the gradient of a mean over it is that of the sum with weights (n,)."""
    return x.detach() + len(x) * weights[:, None] * (x - x.detach())


def _divergence(m: Tensor, b: Tensor, t: float) -> Tensor:
    """KL(q_t || p_t) of N(m, b^2) to half N(-2, 0.4^2) and half N(2, 0.4^2), from the densities."""
    nodes, weights = _gaussian_nodes(600)
    cos, sin = math.cos(t), math.sin(t)
    spread = torch.sqrt(cos**2 * b**2 + sin**2)
    x, std = cos * m + spread * nodes, math.sqrt(cos**2 * 0.16 + sin**2)
    left, right = (-((x - cos * mean) ** 2) / (2 * std**2) for mean in (-2, 2))
    log_p = torch.logaddexp(left, right) - math.log(2 * std)
    return (weights * (-(nodes**2) / 2 - torch.log(spread) - log_p)).sum()
