"""Score distillation as a loss on a renderer of one's own: a scene, an image, strokes, whatever has a gradient.

What is trained is no network from noise to data but the parameters of x = render(parameters, view).

- SDS (Poole et al. 2022, arXiv:2209.14988), without a fake score: x is pushed along w(t) (eps_teacher(x_t) - eps). In
  the mean over eps that is the gradient of the KL divergence of N(cos(t) x, sin(t)^2) from the teacher's density at t,
  so it seeks one point, never a sample.
- VSD (Wang et al. 2023, arXiv:2305.16213, ProlificDreamer): along w(t) (eps_teacher(x_t) - eps_fake(x_t, view)), where
  a fake score learns the distribution of the renderings. Several sets of parameters, particles, then stay apart.

w(t) = sin(t)^2 in the normal form, the authors' sigma^2 for variance-preserving schedules. Guidance is the teacher's
alone. Deviations: the fake score predicts what the teacher does, where theirs is another model, of v; the view is
embedded beside the time by a layer that begins at zero, so that the fake score begins as the teacher.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.experts import Experts
from diffdistill.core.guidance import guided
from diffdistill.core.losses import denoising_loss, gradient_injection
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.times import native_uniform
from diffdistill.errors import UserError
from diffdistill.players.call_inputs import Beside, CallInput, InPlace, add_part, taking
from diffdistill.players.lora import LoraNetwork, lora, trained_like
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.players.two_times import TIME_LAYERS, time_layers
from diffdistill.rng import generator


class ViewFeatures(CallInput):
    """What a view (B, numbers) adds to an embedding of the time (B, width); nothing to begin with, or without one."""

    def begin(self, like: Tensor, numbers: int) -> None:
        """Makes the layers, for an embedding whose width, type and device are those of `like` (width, ...)."""
        width = len(like)
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(numbers, width), nn.SiLU(), last).to(like.device, trained_like(like).dtype)

    def added(self, output: Tensor) -> Tensor:
        """The embedding with what the view adds."""
        if self.given is None:
            return output
        like = next(self.mlp.parameters())
        return output + self.mlp(self.given.to(like)).to(output.dtype)


class TakesView(InPlace, ViewFeatures):
    """The last layer of an embedding of the time, which also takes the view."""

    def __init__(self, layer: nn.Linear, numbers: int):
        super().__init__()
        self.layer = layer
        self.begin(layer.weight, numbers)


class AddedView(Beside, ViewFeatures):
    """The same for a LoRA player."""

    alone: ClassVar[bool] = False

    def __init__(self, layer: nn.Linear, numbers: int, name: str):
        super().__init__()
        self.begin(layer.weight, numbers)
        self.name = name


def view_input(denoiser: Denoiser, numbers: int) -> list[ViewFeatures]:
    """The parts by which the denoiser takes a view of so many numbers from here on; UserError where it has no place."""
    network: Any = denoiser.network
    base = network.base if isinstance(network, LoraNetwork) else network
    if isinstance(base, Experts):  # each of which is called with some of the rows
        raise UserError("view_numbers: the teacher's network is two, each for a part of the noise; leave the view out")
    names = time_layers(base)
    if not names:
        raise UserError(
            f"view_numbers: {type(base).__name__} has no layer that embeds the time ({', '.join(TIME_LAYERS)}), to "
            "which a view could be added; leave the view out"
        )
    return [add_part(network, name, TakesView, AddedView, numbers) for name in names]


class ScoreDistillation:
    """The loss of renderings under a teacher, and the fake score that follows them.

        distillation = ScoreDistillation(teacher, guidance_scale=7.5)
        for step in range(steps):
            x = render(parameters, view)                    # (B, *teacher.shape), with a gradient
            distillation.loss(x, cond, view).backward()     # moves nothing of its own
            optimizer.step(); optimizer.zero_grad()
            distillation.learn(x, cond, view)               # a step of the fake score

    Args:
        teacher: of `load_teacher` or `Teacher.around`; its weights are frozen from here on.
        guidance_scale: classifier-free guidance of the teacher; 1 is none.
        guidance_scale_2: that of the second of its two networks; default: the same.
        fake_score: 'lora' on the teacher's own weights, 'full', a copy of it, or 'none', which is SDS.
        rank: of the LoRA.
        lr: AdamW's learning rate for the fake score.
        time_low: the least noise at which x is judged, a fraction of the teacher's own time.
        time_high: the greatest.
        view_numbers: of a view, by which the fake score tells views apart; 0: it is told none.
        view_dropout: the share of views that it is not told.
        seed: of all noise, together with the number of calls.

    Raises UserError for a teacher that cannot be guided, or has no layer for LoRA or views.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        guidance_scale: float = 1.0,
        guidance_scale_2: float | None = None,
        fake_score: Literal["lora", "full", "none"] = "lora",
        rank: int = 16,
        lr: float = 1e-4,
        time_low: float = 0.02,
        time_high: float = 0.98,
        view_numbers: int = 0,
        view_dropout: float = 0.1,
        seed: int = 0,
    ):
        if fake_score not in ("lora", "full", "none"):
            raise UserError(f"fake_score: {fake_score!r} is not one of lora, full, none")
        if not 0 <= time_low < time_high <= 1:
            raise UserError(f"time_low: {time_low} to time_high {time_high} must be fractions that rise, from 0 to 1")
        self.plain = frozen(teacher.denoiser)
        self.schedule, self.shape = self.plain.schedule, teacher.shape
        self.teacher = guided(self.plain, guidance_scale, second=guidance_scale_2)
        self.span, self.seed, self.view_dropout = (time_low, time_high), seed, view_dropout
        self.fake_score: Denoiser | None = None
        self.views: list[ViewFeatures] = []
        self.steps = {"scene": 0, "fake_score": 0}
        if fake_score == "none":
            return
        self.fake_score = lora(self.plain, rank) if fake_score == "lora" else teacher.player("fake_score")
        self.views = view_input(self.fake_score, view_numbers) if view_numbers else []
        self.fake_score.train()
        trained = [p for p in self.fake_score.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr)

    def _scaled(self, x: Tensor) -> Tensor:
        """x (B, *shape) of unit variance; UserError for another shape."""
        if x.shape[1:] != torch.Size(self.shape):
            raise UserError(f"x: {tuple(x.shape)} is no batch of samples of the shape {tuple(self.shape)}")
        return x / self.schedule.data_std

    def _drawn(self, player: str, x: Tensor) -> tuple[Tensor, Tensor, torch.Generator]:
        """Angles t (B,) and noise (B, ...) of this call, and a generator for the rest."""
        draw = generator(x.device, self.seed, self.steps[player], 0, f"{player}/noise")
        self.steps[player] += 1
        low, high = self.span if player == "scene" else (0.0, 1.0)
        t = native_uniform(self.schedule, len(x), draw, low, high)
        return t, torch.randn(x.shape, generator=draw, device=x.device, dtype=x.dtype), draw

    def gradient(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond, view: Tensor | None = None) -> Tensor:
        """(B, ...) what x (B, ...) of unit variance is pushed along, at the angles t (B,) and the noise eps (B, ...).

        sin(t)^2 (eps_teacher - eps_fake), or (eps_teacher - eps) without a fake score; no network is in the graph.
        """
        with torch.no_grad():
            x_t = diffuse(x, t, eps)
            theirs = self.teacher(x_t, t, cond).eps
            own = eps if self.fake_score is None else self._fake(x_t, t, cond, view).eps
            return expand(torch.sin(t) ** 2, x) * (theirs - own)

    def _fake(self, x_t: Tensor, t: Tensor, cond: Cond, view: Tensor | None) -> Any:
        assert self.fake_score is not None
        with taking(self.views, view):
            return self.fake_score(x_t, t, cond)

    def loss(self, x: Tensor, cond: Cond | None = None, view: Tensor | None = None) -> Tensor:
        """A scalar whose gradient pushes the renderings x (B, *shape), in the teacher's own units.

        `cond` are the teacher's conditions, each (B, ...); `view` (B, view_numbers) is what the fake score is told.
        The number itself says nothing: it is half of the mean square of the push.
        """
        x = self._scaled(x)
        t, eps, _ = self._drawn("scene", x)
        return gradient_injection(x, self.gradient(x, t, eps, cond or {}, view))

    def learn(self, x: Tensor, cond: Cond | None = None, view: Tensor | None = None) -> float:
        """One step of the fake score on renderings x (B, *shape); gives its denoising loss, of v. SDS has none: 0."""
        if self.fake_score is None:
            return 0.0
        x = self._scaled(x.detach())
        t, eps, draw = self._drawn("fake_score", x)
        if view is not None:
            kept = torch.rand(len(x), generator=draw, device=x.device) >= self.view_dropout
            view = view * kept.to(view)[:, None]
        loss = denoising_loss(self._fake(diffuse(x, t, eps), t, cond or {}, view), x, eps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())
