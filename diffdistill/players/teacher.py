"""The teacher, and the players that begin as it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.players.lora import LoraSettings, lora_view, without_lora

Module = TypeVar("Module", bound=nn.Module)


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
    example_cond: Cond = field(default_factory=dict)  #: (1, ...) of a text-to-image teacher, conditions of one prompt
    size: dict[str, Any] = field(default_factory=dict)  #: height, width, num_frames, as the stock pipeline takes them
    lora: Mapping[str, LoraSettings] = field(default_factory=dict)  #: roles that are LoRA on the teacher's own weights

    def sample_cond(self, n: int) -> Cond:
        """Conditions (n, ...) with the names, shapes and types that the teacher takes, on its device.

        For what depends on nothing else: class 0, or one prompt's; empty for an unconditional teacher.
        """
        device = next(itertools.chain(self.denoiser.parameters(), self.denoiser.buffers())).device
        if self.num_classes is not None:
            return {"class_labels": torch.zeros(n, dtype=torch.int64, device=device)}
        return {name: value.to(device).expand(n, *value.shape[1:]) for name, value in self.example_cond.items()}

    def random_cond(self, n: int, generator: torch.Generator) -> Cond:
        """Class labels (n,) drawn uniformly; `sample_cond` of a teacher without classes."""
        if self.num_classes is None:
            return self.sample_cond(n)
        device = generator.device
        return {"class_labels": torch.randint(self.num_classes, (n,), generator=generator, device=device)}

    def player(self, role: str) -> Denoiser:
        """A player that begins as the teacher: a trainable copy, or LoRA on the teacher's own weights (`lora`)."""
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
    """The module itself, with no trainable parameter of its own and in evaluation mode.

    The matrices of LoRA players, which lie in the layers of their base, are the players'.
    """
    for name, parameter in module.named_parameters():
        if ".lora_" not in name:
            parameter.requires_grad_(False)
    return module.eval()


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
