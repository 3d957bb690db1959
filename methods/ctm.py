"""CTM: Consistency Trajectory Models, Learning Probability Flow ODE Trajectory of Diffusion.

Kim et al. 2023, arXiv:2310.02279 (code: sony/ctm).

The student takes two times and learns every jump of the teacher's ODE, from x_t to x_s. In sigma's coordinates

    G(x_t, t, s) = s/t x_t + (1 - s/t) g(x_t, t, s),

which is the DDIM step of a pair (x0, eps) whose x0 is g; at s = t it is the identity, and g(x_t, t, t) is the denoiser.
n steps of the teacher's solver lead from x_t to x_u, and for s at most u both are to make one jump to x_s. They are
compared at the end, to which a slow copy G- brings both, so that a distance of images can be taken:

    loss = d(G-(G(x_t, t, s), s, 0), G-(sg G(x_u, u, s), s, 0))
           + lambda_DSM |g(x_t, t, t) - x_0|^2, weighted as EDM's + lambda_GAN (a hinge GAN on the first argument).

The gradient passes through the outer G-, whose weights stay. Each lambda makes the gradient of its term in the last
layer as long as that of the first (`adaptive`). With n = 1 and s = 0 it is a consistency model. A sampling step jumps
to sqrt(1 - gamma^2) times the next level's sigma, and noise of gamma times that sigma brings it back: none at 0.

Deviations:
- The grid ends at 0, where the authors' ends at sigma = 0.002. Outside EDM the "karras" grid spans sigma 80 to 0 (at
  data_std 0.5) or less; its first point is moved to where the student's sampler starts.
- The network sees of s the gap to t in its schedule's own time, through an embedding that is nothing at s = t.
- The GAN is that of `ladd`, on layers of the frozen teacher; theirs reads clean images with two networks trained on
  ImageNet. It moves in each step, where theirs takes turns with the student, and reads the first term's samples.
- The last layer is the last matrix that the network lists. AdamW stands for RAdam. LPIPS is the `lpips` package's VGG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.guidance import guided
from diffdistill.core.losses import denoising_loss, gradient_ratio
from diffdistill.core.ode import heun_step
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.times import edm_karras, edm_log_normal
from diffdistill.errors import UserError
from diffdistill.options import AdversarialTerm, FollowingOptions, ImageDistance, TeacherGuidance, option
from diffdistill.players.sampler import Sampler, gamma_step
from diffdistill.players.teacher import Teacher
from diffdistill.rng import generator
from diffdistill.scaffold.following import FollowingMethod, trajectory_grid
from diffdistill.scaffold.method import Batch, Outcome, Turn
from diffdistill.scaffold.tangent import jumps_by_default, two_time_player

ABOUT = About(
    paper="Kim et al. 2023, arXiv:2310.02279",
    data="real images, to place x_t where the trajectories pass, and for the terms beside",
    kind="trajectory",
    needs=("images",),
    equations={
        "G(x_t, t, s) (section 3.1)": "CTM.jump, core.prediction.Prediction.at, players.two_times.time_input",
        "soft consistency at the end (section 3.2)": "CTM.following, CTM.less_noisy, CTM.interval",
        "denoising score matching (section 3.3)": "CTM.denoising, core.losses.denoising_loss",
        "GAN (section 3.4)": "CTM.whole_loss, scaffold.adversary.LatentAdversary",
        "lambda_DSM and lambda_GAN": "core.losses.gradient_ratio",
        "gamma-sampling": "players.sampler.Gamma",
    },
)


@dataclass(frozen=True)
class Config(FollowingOptions, ImageDistance, TeacherGuidance, AdversarialTerm, target_ema=0.999):
    """The options of CTM."""

    grid: Literal["karras", "native"] = option("karras", "karras: rho 7 in sigma; native: the teacher's own steps")
    grid_points: int = option(18, "N, the points of the grid, both ends counted", at_least=2)
    solver_steps: int = option(1000, "the most steps n of the grid from t to u; n is drawn with weight n", at_least=1)
    gamma: float = option(0.0, "noise between sampling steps; 0: none; 1: all of it is fresh", at_least=0, at_most=1)
    dsm_weight: float = option(1.0, "weight of the denoising loss; 0 for a guided teacher", at_least=0)
    gan_start: int = option(0, "the training step from which the GAN counts in the student's loss", at_least=0)
    adaptive: bool = option(True, "bring both terms to the length of the first one's gradient in the last layer")


class Span(NamedTuple):
    """From t (B,) along the solver's angles (n + 1, B), of which t is the first, to u, the last; and s (B,) <= u."""

    t: Tensor
    path: Tensor
    s: Tensor


class CTM(FollowingMethod[Span]):
    """The student takes the time to jump to; with a GAN the discriminator's heads are a player too."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        c = config
        own = student or two_time_player(teacher, c.student_steps, c.student_level)
        super().__init__(teacher, c, own, slow_target=True)
        if c.guidance_scale != 1 and c.dsm_weight > 0:
            raise UserError(f"dsm_weight: {c.dsm_weight} is for data that a guided teacher does not draw; use 0")
        self.teacher = guided(self.teacher, c.guidance_scale)
        self.grid = trajectory_grid(self.schedule, c.grid_points, c.grid, self.sampler().levels[0], c.student_level)
        self.grid[-1] = 0.0
        self.most = min(c.solver_steps, c.grid_points - 1)

    def sampler(self) -> Sampler:
        return Sampler(self.student, super().sampler().levels, gamma_step(self.config.gamma))

    def in_steps(self, steps: int) -> None:
        self.sampling_steps = steps
        jumps_by_default(self.student, steps, self.config.student_level)

    def interval(self, step: int, batch: Batch) -> Span:
        """n is the same for all samples and processes; t and s are uniform on what it leaves of the grid."""
        weights, draw = torch.arange(1.0, self.most + 1), generator("cpu", *batch.key[:2], "student/n")
        n, grid = 1 + int(torch.multinomial(weights, 1, generator=draw)), self.grid.to(batch.device)
        i = batch.integers(len(grid) - n, "student/t")
        j = i + n + (batch.uniform("student/s") * (len(grid) - n - i)).long()
        return Span(grid[i], torch.stack([grid[i + k] for k in range(n + 1)]), grid[j])

    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, interval: Span, cond: Cond) -> Tensor:
        for t, u in pairwise(interval.path):
            x_t = heun_step(self.teacher, x_t, t, u, cond)
        return x_t

    def jump(self, network: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """(B, ...) G(x_t, t, s); x_t itself where s = t, whatever the network says."""
        return torch.where(expand(t - s, x_t) <= 0, x_t, network(x_t, t, cond, Extra(r=s)).at(s))

    def end(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """(B, ...) by the student's jump to s, and by the slow copy's to 0."""
        return self.jump(self.target, self.jump(self.student, x_t, t, s, cond), s, torch.zeros_like(s), cond)

    def following(self, x_t: Tensor, x_r: Tensor, interval: Span, cond: Cond, seed: int = 0) -> Outcome:
        """d of the ends to which x_t and x_u, here x_r, come by way of x_s."""
        t, u, s = interval.t, interval.path[-1], interval.s
        self.x, other = self.both(seed, x_t, lambda: self.end(x_t, t, s, cond), lambda: self.end(x_r, u, s, cond))
        d = self.image_distance(self.x, other).mean()
        return Outcome(d, {"consistency": d})

    def angles(self, n: int, draw: torch.Generator) -> Tensor:
        # Half at EDM's own times, half uniform in the noisier 70% of its grid.
        low = edm_log_normal(self.schedule, n // 2, draw, -1.2, 1.2)
        return torch.cat([low, edm_karras(self.schedule, n - n // 2, draw, 0.3, 1.0)])

    def denoising(self, batch: Batch) -> Tensor:
        """EDM's loss of g(x_t, t, t) at those angles."""
        t, eps = batch.draw("student/dsm t", self.angles), batch.randn("student/dsm eps")
        pred = self.student(diffuse(batch.images, t, eps), t, batch.cond, Extra(r=t))
        return denoising_loss(pred, batch.images, eps)

    def whole_loss(self, followed: Outcome, batch: Batch) -> Outcome:
        c, loss, terms = self.config, followed.loss, dict(followed.shown)
        if c.dsm_weight:
            terms["denoising"] = self.denoising(batch)
        if c.gan_weight and batch.key[1] >= c.gan_start:
            terms["gan"] = self.adversary.student_loss(self.x, batch)
        for name, weight, least, most in (("denoising", c.dsm_weight, 0.0, 1e4), ("gan", c.gan_weight, 0.01, 10.0)):
            if name in terms:
                ratio = gradient_ratio(followed.loss, terms[name], self.student) if c.adaptive else loss.new_ones(())
                loss = loss + weight * ratio.clamp(least, most) * terms[name]
        del self.x  # and with it the graph
        return Outcome(loss, terms)

    def more_turns(self, step: int) -> Sequence[Turn]:
        """The discriminator's, on the samples of the student's turn."""
        gan = self.config.gan_weight and step >= self.config.gan_start
        return [Turn("discriminator", self.adversary.turn)] if gan else []


METHOD = CTM
