"""The networks of a distillation: teacher, student, fake score, discriminator head, moving average."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .denoiser import Cond, Denoiser
from .lora import LoraSettings, lora_view, without_lora
from .prediction import diffuse

Module = TypeVar("Module", bound=nn.Module)


class Conditions(Protocol):
    """Encoded prompts, which a text-to-image teacher is conditioned on."""

    @property
    def null(self) -> Cond:
        """The conditions of "no prompt", (1, ...) each."""

    def draw(self, n: int, generator: torch.Generator) -> Cond:
        """Those of n prompts drawn uniformly, on the generator's device."""


@dataclass(frozen=True)
class Teacher:
    """A pretrained denoiser and what its samples look like."""

    denoiser: Denoiser
    shape: tuple[int, ...]  #: of one sample, (C, H, W) for images
    num_classes: int | None = None
    family: str = ""  #: the file of families/ that loads and exports it
    source: str = ""  #: the folder, hub id or 'digits' it came from
    scheduler: dict[str, Any] = field(default_factory=dict)  #: the config of its diffusers scheduler
    start: Denoiser | None = None  #: what players begin as copies of; None: the denoiser itself
    conditions: Conditions | None = None  #: a text-to-image teacher's prompts
    size: dict[str, Any] = field(default_factory=dict)  #: height, width, num_frames, as the stock pipeline takes them
    lora: Mapping[str, LoraSettings] = field(default_factory=dict)  #: roles that are LoRA on the teacher's own weights
    cast: set[str] = field(default_factory=set)  #: the roles that a method asked a player for

    def random_cond(self, n: int, generator: torch.Generator) -> Cond:
        """Conditions drawn uniformly over the classes or prompts; empty for an unconditional teacher."""
        if self.conditions is not None:
            return self.conditions.draw(n, generator)
        if self.num_classes is None:
            return {}
        device = generator.device
        return {"class_labels": torch.randint(self.num_classes, (n,), generator=generator, device=device)}

    def player(self, role: str) -> Denoiser:
        """A player that begins as the teacher: a trainable copy, or LoRA on the teacher's own weights (`lora`)."""
        self.cast.add(role)
        start = self.start or self.denoiser
        return lora_view(start, self.lora[role]) if role in self.lora else trainable_copy(start)


def trainable_copy(denoiser: Denoiser) -> Denoiser:
    """A full copy with its own weights, all of them trainable, in training mode; half precision becomes float32.

    A bf16 weight does not move by a learning rate's worth, nor its average by 1 - decay. The copy of a LoRA player is
    another one on the same base.
    """
    twin = copy.deepcopy(denoiser)
    twin.network = without_lora(twin.network)
    twin.requires_grad_(True).train()
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters())
    return twin.float() if half else twin


def frozen(module: Module) -> Module:
    """The module itself, with no trainable parameter and in evaluation mode."""
    return module.requires_grad_(False).eval()


def trainable(players: Mapping[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """Each player's parameters that require a gradient; a LoRA player's frozen base is not among them."""
    return {name: [p for p in module.parameters() if p.requires_grad] for name, module in players.items()}


def only_trains(player: str, parameters: Mapping[str, Iterable[nn.Parameter]]) -> None:
    """Let gradients accumulate in that player alone; they still flow through the others to their inputs.

    `parameters` is what `trainable` gave before the first call.
    """
    for name, owned in parameters.items():
        for p in owned:
            p.requires_grad_(name == player)


class DiscriminatorHead(nn.Module):
    """Logits (B,) from feature maps (B, C, H, W): strided convolutions to 1x1, then a 1x1 convolution.

    The classification head of DMD2 (Yin et al. 2024, arXiv:2405.14867, section 4.3) reads the bottleneck
    of the fake score this way: 8x8 -> 4x4 -> 1x1, with group normalisation and SiLU between.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        # At 1x1 a group of one channel would be normalised to a constant.
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= min(8, channels))

        def block(kernel: int, stride: int, padding: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, channels, kernel, stride, padding)
            return [conv, nn.GroupNorm(groups, channels), nn.SiLU()]

        layers: list[nn.Module] = []
        while size > 4:
            layers += block(4, 2, 1)
            size //= 2
        layers += block(size, size, 0)
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).flatten(1).mean(1)


class FewStepSampler:
    """How a few-step student is sampled: one denoising a level, from noise at the first level.

    After a level, `renoise` adds fresh noise up to the next one (Song et al. 2023, Algorithm 1; DMD2's
    sampler); otherwise the DDIM step goes there. A one-step student has one level, and both are the same.
    """

    def __init__(self, denoiser: Denoiser, levels: Sequence[float], *, renoise: bool = True):
        self.denoiser = denoiser
        self.levels = tuple(float(level) for level in levels)
        self.renoise = renoise

    def start(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t (B,) at the first level, for standard normal z (B, ...)."""
        t = self.denoiser.schedule.angle(self.levels[0])
        scale = self.denoiser.schedule.init_scale(float(t))
        return z * scale, t.to(z.device).expand(len(z))

    def input_at(self, k: int, z: Tensor, cond: Cond, noise: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """x_t and t (B,) that level k reads, after the levels before it; noise(j) (B, ...) is added for level j."""
        x, t = self.start(z)
        for j in range(1, k + 1):
            s = self.denoiser.schedule.angle(self.levels[j]).to(x.device).expand(len(x))
            pred = self.denoiser(x, t, cond)
            x = diffuse(pred.x0, s, noise(j)) if self.renoise else pred.at(s)
            t = s
        return x, t

    def one_step(self, z: Tensor, cond: Cond) -> Tensor:
        """x0 (B, ...) of unit variance after the first level; gradients flow."""
        x_t, t = self.start(z)
        return self.denoiser(x_t, t, cond).x0

    @torch.no_grad()
    def __call__(self, shape: Sequence[int], cond: Cond, generators: Sequence[torch.Generator]) -> Tensor:
        """Samples (B, *shape) in the data's own units; sample i draws from generators[i] alone."""
        weight = next(itertools.chain(self.denoiser.parameters(), self.denoiser.buffers()))

        def noise(j: int) -> Tensor:
            drawn = [torch.randn(tuple(shape), generator=g, device=g.device) for g in generators]
            return torch.stack(drawn).to(weight)

        x, t = self.input_at(len(self.levels) - 1, noise(0), cond, noise)
        return self.denoiser(x, t, cond).x0 * self.denoiser.schedule.data_std


def one_step_sampler(student: Denoiser, level: float | None) -> FewStepSampler:
    """The sampler of a one-step student that reads pure noise at `level`; None: at its schedule's `init_level`."""
    return FewStepSampler(student, [student.schedule.init_level if level is None else level])


class MovingAverage:
    """An exponential moving average of a module's trainable parameters, in their own precision, beside it."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages = [p.detach().clone() for p in self.parameters.values()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (0-based); the decay warms up as (1 + step)/(10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module carries the average inside the block and its own parameters after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, p in enumerate(self.parameters.values()):
            p.data, self.averages[index] = self.averages[index], p.data

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.parameters, self.averages, strict=True))

    def load(self, state: dict[str, Tensor]) -> None:
        for name, average in self.state().items():
            average.copy_(state[name])
