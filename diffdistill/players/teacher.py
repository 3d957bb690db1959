"""The teacher, and the players that begin as it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Call, Cond, Denoiser, call_by_keyword
from diffdistill.core.prediction import OUTPUTS, Output
from diffdistill.core.schedule import Schedule
from diffdistill.errors import UserError, first_line
from diffdistill.players.lora import LoraSettings, foreign_lora, lora_view, without_lora

Module = TypeVar("Module", bound=nn.Module)

Predicts = Literal["sample", "epsilon", "v_prediction", "flow_prediction", "edm"]
"""What a network gives, by the names of `core.prediction.OUTPUTS`."""


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
    small: Denoiser | None = None  #: what the student alone begins as, a network of another size; None: as all players
    example_cond: Cond = field(default_factory=dict)  #: (1, ...) of a text-to-image teacher, conditions of one prompt
    size: dict[str, Any] = field(default_factory=dict)  #: height, width, frames by the stock pipeline's names
    lora: Mapping[str, LoraSettings] = field(default_factory=dict)  #: roles that are LoRA on the teacher's own weights
    student: Denoiser | None = None  #: what the student begins as; None: as other players do
    levels: tuple[float, ...] = ()  #: of that student, or of the teacher where it is one: those that it is sampled at
    move: str = "renoise"  #: of such a student, the name of its step from a level to the next
    latent: bool = False  #: whether its samples are latents of an autoencoder

    @property
    def frames(self) -> int | None:
        """Frames of a video, whatever the stock pipeline calls them; None for images."""
        return self.size.get("num_frames", self.size.get("frames"))

    @classmethod
    def around(
        cls,
        network: nn.Module,
        shape: Sequence[int],
        schedule: Schedule,
        predicts: Predicts | Output,
        *,
        num_classes: int | None = None,
        null: int | Mapping[str, Tensor] | None = None,
        cond: Mapping[str, Tensor] | None = None,
        call: Call | None = None,
        feature_layer: str | None = None,
    ) -> Teacher:
        """A teacher around any network, which is used as it is: its weights are frozen and dropout is off from here on.

        The network is called as `network(x, time, **conditions)` with x (B, *shape) as the schedule scales it and time
        (B,) in the schedule's own units; it gives (B, *shape). Another way to call it is `call(network, x, time,
        conditions)`.

        Args:
            shape: of one sample, (C, H, W) for images.
            schedule: `LinearFlow`, `DiscreteVP`, `EDM` or `TrigFlow`; its `data_std` is that of the data.
            predicts: what the network gives: 'sample' (x0), 'epsilon', 'v_prediction', 'flow_prediction' (noise minus
                data), 'edm' (its F), or an `Output` of your own.
            num_classes: classes of a network that takes `class_labels` (B,).
            null: the label that means "no class", or the conditions (1, ...) that mean none, for guidance.
            cond: one example (1, ...) of the conditions of a network that takes others than class labels.
            feature_layer: the sub-module whose output (B, C, ...) a discriminator reads.

        Raises UserError for a network that cannot be called so, or that gives another shape.
        """
        if isinstance(predicts, str) and predicts not in OUTPUTS:
            raise UserError(f"predicts: {predicts!r} is not one of {', '.join(OUTPUTS)}")
        if foreign := foreign_lora(network):
            raise UserError(
                f"network: a LoRA is on it ({foreign}); put it into the weights first: fuse_lora() and "
                "unload_lora_weights() of its pipeline, or merge_and_unload() of peft"
            )
        empty = {"class_labels": torch.tensor([null])} if isinstance(null, int) else null

        def nothing(present: Cond) -> Cond:
            return present | {k: v.to(present[k]).expand_as(present[k]) for k, v in (empty or {}).items()}

        denoiser = Denoiser(
            frozen(network),
            schedule,
            OUTPUTS[predicts] if isinstance(predicts, str) else predicts,
            call=call or call_by_keyword,
            null=None if null is None else nothing,
            feature_layer=feature_layer,
        )
        # A record of the student can say a name, but neither a function nor a way to call the network.
        recorded = {"predicts": predicts} if isinstance(predicts, str) and call is None else {}
        name = type(network).__name__
        teacher = cls(denoiser, tuple(shape), num_classes, "", name, recorded, example_cond=dict(cond or {}))
        teacher.check_call()
        return teacher

    def check_call(self) -> None:
        """UserError unless the network takes two samples and gives two."""
        weight = next(itertools.chain(self.denoiser.parameters(), self.denoiser.buffers()), torch.empty(0))
        x, t = torch.zeros(2, *self.shape).to(weight), torch.ones(2, dtype=torch.float64, device=weight.device)
        cond = self.sample_cond(2)
        try:
            with torch.no_grad():
                y = self.denoiser(x, t, cond).y
        except Exception as error:  # whatever the network raises
            names = "".join(f", {name}=.." for name in cond)
            raise UserError(
                f"teacher: {self.source} cannot be called as network(x {tuple(x.shape)}, time (2,){names}): "
                f"{first_line(error)}"
            ) from error
        if y.shape != x.shape:
            raise UserError(f"teacher: {self.source} gives {tuple(y.shape)} for samples {tuple(x.shape)}")

    def sample_cond(self, n: int) -> Cond:
        """Conditions (n, ...) with the names, shapes and types that the teacher takes, on its device.

        For what depends on nothing else: class 0, or one prompt's; empty for an unconditional teacher.
        """
        device = next(itertools.chain(self.denoiser.parameters(), self.denoiser.buffers())).device
        if self.num_classes is not None:
            return {"class_labels": torch.zeros(n, dtype=torch.int64, device=device)}
        return {name: value.to(device).expand(n, *value.shape[1:]) for name, value in self.example_cond.items()}

    def player(self, role: str) -> Denoiser:
        """A player that begins as the teacher: a trainable copy, or LoRA on the teacher's own weights (`lora`).

        The student is a copy of `small` where there is one.
        """
        if role == "student" and self.small is not None:
            return trainable_copy(self.small)
        start = self.start or self.denoiser
        if role == "student" and self.student is not None:
            return trainable_copy(self.student)
        return lora_view(start, self.lora[role]) if role in self.lora else trainable_copy(start)


def trainable_copy(denoiser: Denoiser) -> Denoiser:
    """A full copy with its own weights, all of them trainable, in training mode; half precision becomes float32.

    A bf16 weight does not move by a learning rate's worth, nor its average by 1 - decay. The copy of a LoRA player is
    another one on the same base.
    """
    twin = copy.deepcopy(denoiser)
    twin.second_scale = None  # the teacher's guidance is no player's
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
