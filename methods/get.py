"""GET: One-Step Diffusion Distillation via Deep Equilibrium Models, the generative equilibrium transformer.

Geng, Pokle, Kolter 2023, arXiv:2401.08639 (code: locuslab/get 53377d3, locuslab/torchdeq for its loss).

The student is no copy of the teacher: a small transformer of its own learns, from noise-image pairs alone
(`diffdistill pairs`), what the teacher's sampler makes of noise z and a class c. Some blocks are run once, on the
patches of z, and say what is injected, u = T(z, c); a few others with tied weights are applied again and again, with u
added to the queries, keys and values of their attention,

    h_0 = 0,    h_(k+1) = f(h_k, u, c),    x_k = decode(h_k),    G(z, c) = x_n,

towards an equilibrium h* = f(h*, u, c), so that few weights make a deep network. The loss is a distance of the pair's
image, of all iterations, the later ones counting more:

    L = sum_k gamma^(n - k) d(x_k, x),    d the mean of absolute values.

Gradients go through all iterations. With a deterministic sampler the minimum is that sampler's map, for any distance.

Deviations:
- h_0 is zero, where the authors draw it from a normal distribution in each call: G is a function of z and c.
- The authors' solver may stop at the iterate of least residual; here all n iterations are made, in training and after.
- At a level whose noise is not all (EDM's sigma of 80) z is what the network reads there, within 0.01% of a normal z.
- The authors can recompute iterations in the backward pass to save memory; here all are kept.
- LPIPS is the `lpips` package's, theirs is piq's; DISTS is not here. Prompts are not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.options import EquilibriumOptions, ImageDistance, StudentOptions, option
from diffdistill.players.generators import equilibrium_student, every_iteration
from diffdistill.players.sampler import Sampler, one_step_sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Need, Outcome
from diffdistill.scaffold.solo import SoloMethod

ABOUT = About(
    paper="Geng, Pokle, Kolter 2023, arXiv:2401.08639",
    data="noise-image pairs of the teacher",
    kind="trajectory",
    needs=("pairs",),
    equations={
        "injection transformer": "players.equilibrium.EquilibriumTransformer.injected",
        "equilibrium transformer, its iterations and injection into attention": (
            "players.equilibrium.EquilibriumTransformer.step, players.equilibrium.EquilibriumTransformer.states, "
            "players.equilibrium.Block"
        ),
        "reconstruction loss, of all iterations": "GET.student_turn, GET.images, core.distances.distance",
    },
)


@dataclass(frozen=True)
class Config(StudentOptions, EquilibriumOptions, ImageDistance, student_lr=1e-4, distance="l1"):
    """GET's options; guidance scale and level are those of the pairs."""

    correction: float = option(
        0.8, "gamma: iteration k's image counts gamma^(n - k) in the loss; 0: the last one alone", at_least=0, at_most=1
    )


class GET(SoloMethod):
    """One player, a network that the teacher has no part in."""

    needs = frozenset({Need.PAIRS})

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student=student or equilibrium_student(teacher, config))

    def sampler(self) -> Sampler:
        return one_step_sampler(self.student, None)

    def images(self, z: Tensor, cond: Cond) -> Tensor:
        """(n, B, ...) x_1 .. x_n of noise z (B, ...), as the sampler reads it; a gradient passes."""
        with every_iteration(self.student.network):
            return self.student(*self.sampler().start(z), cond).x0

    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """The distance of the images of all iterations from the pairs', the later ones counting more."""
        z, x0, cond = batch.paired
        errors = torch.stack([self.image_distance(x, x0).mean() for x in self.images(z, cond)])
        weights = self.config.correction ** torch.arange(len(errors) - 1, -1, -1, device=errors.device)
        return Outcome((weights.to(errors) * errors).sum(), {"regression": errors[-1]})


METHOD = GET
