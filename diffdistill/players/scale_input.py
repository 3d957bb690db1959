"""The guidance scale as an input of a network that stays the same class."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import NONE, Cond, Denoiser, Extra
from diffdistill.core.guidance import guide, require_null
from diffdistill.core.prediction import Prediction
from diffdistill.errors import UserError
from diffdistill.options import ScaleRange, SegmentOptions
from diffdistill.players.call_inputs import Beside, CallInput, InPlace, add_part, layer_at, taking, without_inputs
from diffdistill.players.lora import LoraNetwork, merged, trained_like
from diffdistill.players.teacher import Teacher
from diffdistill.players.two_times import TIME_LAYERS, time_layers

_CLASSES = "class_embedding"
"""What diffusers' networks call their embedding of class labels."""


class ScaleFeatures(CallInput):
    """What a guidance scale adds to a layer's output (B, width): MLP(features(scale)).

    The MLP's last layer begins at zero, so that the network begins as it was for every scale. `given` (B,) are the
    scales of one call (`taking`); without them it is `default`, which is also what `plain_network` keeps.
    """

    frequencies: Tensor

    def begin(self, layer: nn.Embedding | nn.Linear, dtype: torch.dtype, default: float) -> None:
        """Makes the parts for the outputs of a layer."""
        # Periods from 3 to 100 for scales of 1 to 15. Frequencies of 1000 would turn the scale into a
        # lookup key, which generalises to no scale in between.
        frequencies = torch.exp2(torch.linspace(-4, 1, 16))
        width = layer.embedding_dim if isinstance(layer, nn.Embedding) else layer.out_features
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        like = layer.weight.to(dtype)
        self.mlp = nn.Sequential(nn.Linear(2 * len(frequencies), width), nn.SiLU(), last).to(like)
        self.register_buffer("frequencies", frequencies.to(like))
        self.register_buffer("default", torch.tensor(float(default)).to(like))

    def of_scale(self, scale: Tensor) -> Tensor:
        """(B,) -> (B, width), what the scale adds."""
        phase = scale[:, None].to(self.frequencies) * self.frequencies
        return self.mlp(torch.cat([phase.sin(), phase.cos()], 1))

    def added(self, output: Tensor) -> Tensor:
        """The layer's output (B, width), or of one row where the whole batch has one time, with what the scale adds."""
        scale = self.default.expand(len(output)) if self.given is None else self.given
        return output + self.of_scale(scale).to(output.dtype)

    def usual(self) -> Tensor:
        """(width,) what the default scale adds."""
        return self.of_scale(self.default[None])[0]


class TakesScale(InPlace, ScaleFeatures):
    """A class embedding, or the last layer of an embedding of the time, which also takes the guidance scale."""

    def __init__(self, layer: nn.Embedding | nn.Linear, default: float):
        super().__init__()
        self.layer = layer
        self.begin(layer, layer.weight.dtype, default)


class AddedScale(Beside, ScaleFeatures):
    """The same for LoRA players."""

    alone: ClassVar[bool] = False

    def __init__(self, layer: nn.Embedding | nn.Linear, default: float, name: str):
        super().__init__()
        self.begin(layer, trained_like(layer.weight).dtype, default)
        self.name = name


def scale_inputs(network: nn.Module) -> list[ScaleFeatures]:
    """The parts of a network that take the guidance scale."""
    return [module for module in network.modules() if isinstance(module, ScaleFeatures)]


class AddedProjection(nn.Module):
    """The `cond_proj` of Stable Diffusion's UNets beside one that others share, for LoRA players."""

    alone: ClassVar[bool] = False

    def __init__(self, cond_proj: nn.Linear):
        super().__init__()
        self.cond_proj = cond_proj

    def attach(self, base: Any) -> Callable[[], None]:
        """From now on the base has it, until what is returned is called."""
        table, before = base.time_embedding, base.time_embedding.cond_proj
        table.cond_proj = self.cond_proj

        def detach() -> None:
            table.cond_proj = before

        return detach

    def fold(self, plain: Any) -> None:
        """As the stock network has it."""
        plain.time_embedding.cond_proj = copy.deepcopy(self.cond_proj).cpu().requires_grad_(False)
        plain.register_to_config(time_cond_proj_dim=self.cond_proj.in_features)


def scale_embedding(scale: Tensor, width: int) -> Tensor:
    """(B, width) what Stable Diffusion's pipelines tell a UNet with `time_cond_proj_dim` of a guidance scale (B,).

    Sines and cosines of 1000 w, w = scale - 1 (Luo et al. 2023, arXiv:2310.04378, section 4.2).
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=scale.device))
    phase = 1000 * (scale.float() - 1)[:, None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], 1)


def take_scale(denoiser: Denoiser, default: float, width: int) -> None:
    """From now on this UNet, which has a `time_cond_proj_dim` of that width, takes `Extra.scale` (B,), or `default`."""
    inner_call = denoiser.call

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        scale = x.new_full((len(x),), default) if extra.scale is None else extra.scale
        return inner_call(network, x, time, cond | {"timestep_cond": scale_embedding(scale, width).to(x.dtype)})

    denoiser.extra_call, denoiser.default_scale = call, default


def _condition_input(denoiser: Denoiser, default: float) -> Denoiser:
    """`guidance_input` for Stable Diffusion's UNets, as LCM has it; its projection begins at zero."""
    twin = _own(denoiser)
    lora = isinstance(twin.network, LoraNetwork)
    network: Any = twin.network.base if lora else twin.network
    table = network.time_embedding
    linear = layer_at(table, "linear_1")
    cond_proj = nn.Linear(256, linear.in_features, bias=False).to(trained_like(linear.weight))
    nn.init.zeros_(cond_proj.weight)
    if isinstance(twin.network, LoraNetwork):
        twin.network.add_input("time_embedding", AddedProjection(cond_proj))
    else:
        table.cond_proj = cond_proj
        network.register_to_config(time_cond_proj_dim=256)
    take_scale(twin, default, 256)
    return twin


def _own(denoiser: Denoiser) -> Denoiser:
    """A copy; of a LoRA player the same network, whose new input is its own."""
    if isinstance(denoiser.network, LoraNetwork):
        return denoiser.with_network(denoiser.network, denoiser.feature_layer)
    return copy.deepcopy(denoiser)


def guidance_input(denoiser: Denoiser, *, default: float = 1.0) -> Denoiser:
    """A copy that takes the guidance scale (B,) as `Extra.scale`, 1 being no guidance.

    Stable Diffusion's UNets take it as their stock pipelines give it (`take_scale`). In others it is added to the
    embedding of the class, or where there is none to that of the time. Which parameters are trained stays as it was;
    those of the new part are. A LoRA player is no copy: the new part is its own, beside its matrices. Where no scale is
    given it is `default`. Raises UserError where the network embeds neither.
    """
    lora = isinstance(denoiser.network, LoraNetwork)
    network: Any = denoiser.network.base if lora else denoiser.network
    if "time_cond_proj_dim" in getattr(network, "config", ()):
        return _condition_input(denoiser, default)
    names = [_CLASSES] if isinstance(getattr(network, _CLASSES, None), nn.Embedding) else time_layers(network)
    if not names:
        raise UserError(
            f"guidance_input: {type(network).__name__} has no layer to which the guidance scale could be added: no "
            f"{_CLASSES}, and none that embeds the time ({', '.join(TIME_LAYERS)}); use a fixed scale"
        )
    twin = _own(denoiser)
    for name in names:
        add_part(twin.network, name, TakesScale, AddedScale, default)
    inner_call = denoiser.call

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        with taking(scale_inputs(network), extra.scale):
            return inner_call(network, x, time, cond)

    twin.extra_call = call
    return twin


def scale_player(teacher: Teacher, scales: ScaleRange) -> Denoiser:
    """A student that takes the guidance scale as an input, where there is more than one."""
    student = teacher.player("student")
    return guidance_input(student, default=scales.scale) if scales.takes_scale else student


def scale_taken(scales: ScaleRange, scale: Tensor) -> Extra:
    """What a student takes of the guidance scales (B,): nothing where there is one for all."""
    return Extra(scale) if scales.takes_scale else NONE


class DrawnGuidance:
    """A teacher that is guided by the scales that are drawn; itself where 1 is the only one.

    Raises UserError where it cannot be guided, of which `what` is in need.
    """

    def __init__(self, teacher: Denoiser, scales: ScaleRange | SegmentOptions, what: str = "a guidance scale"):
        self.teacher = teacher
        self.guides = scales.guides
        if self.guides:
            require_null(teacher, what)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Prediction:
        """The prediction at x_t (B, ...) and the angles t (B,), each sample by its scale (B,)."""
        return guide(self.teacher, x_t, t, cond, scale) if self.guides else self.teacher(x_t, t, cond)


def plain_network(network: nn.Module) -> nn.Module:
    """The stock network that computes the same, to float rounding: for export.

    LoRA is merged into the weights, and what a guidance scale or a second time adds at its default into a table or a
    bias. A copy, or the network itself where it has none of them.
    """
    return without_inputs(merged(network) if isinstance(network, LoraNetwork) else network)
