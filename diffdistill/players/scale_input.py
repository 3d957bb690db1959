"""The guidance scale as an input of a network that stays the same class."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import NONE, Cond, Denoiser, Extra
from diffdistill.core.guidance import guide, require_null
from diffdistill.core.prediction import Prediction
from diffdistill.errors import UserError
from diffdistill.options import ScaleRange
from diffdistill.players.lora import LoraNetwork, merged, trained_like
from diffdistill.players.teacher import Teacher
from diffdistill.players.two_times import linear_at, without_second_time


class ScaleFeatures(nn.Module):
    """What a guidance scale adds to a class's row: MLP(features(scale)).

    The MLP's last layer begins at zero, so that the network begins as it was for every scale. `default` is the
    scale where none is given (`guidance_input`) and the one `plain_network` keeps.
    """

    frequencies: Tensor
    default: Tensor

    def begin(self, like: Tensor, default: float) -> None:
        """Makes the layers for rows (n, width) like these."""
        # Periods from 3 to 100 for scales of 1 to 15. Frequencies of 1000 would turn the scale into a
        # lookup key, which generalises to no scale in between.
        frequencies = torch.exp2(torch.linspace(-4, 1, 16))
        width = like.shape[1]
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(2 * len(frequencies), width), nn.SiLU(), last).to(like)
        self.register_buffer("frequencies", frequencies.to(like))
        self.register_buffer("default", torch.tensor(float(default)).to(like))

    def of_scale(self, scale: Tensor) -> Tensor:
        """(B,) -> (B, width), what the scale adds to the class's row."""
        phase = scale[:, None].to(self.frequencies) * self.frequencies
        return self.mlp(torch.cat([phase.sin(), phase.cos()], 1))


class GuidanceEmbedding(ScaleFeatures):
    """A class embedding that also takes the guidance scale: table(label) + MLP(features(scale))."""

    def __init__(self, table: nn.Embedding, default: float):
        super().__init__()
        self.table = table
        self.begin(table.weight, default)

    def forward(self, label_and_scale: Tensor) -> Tensor:
        """(B, 2) floats, the label and the guidance scale -> (B, width)."""
        label, scale = label_and_scale.unbind(1)
        return self.table(label.long()) + self.of_scale(scale)


class AddedScale(ScaleFeatures):
    """The same beside a class embedding that others share, for LoRA players; `scale` (B,) is set for one call."""

    alone: ClassVar[bool] = False

    def __init__(self, like: Tensor, default: float, name: str):
        super().__init__()
        self.begin(like, default)
        self.name = name
        self.scale: Tensor | None = None

    def attach(self, base: nn.Module) -> Callable[[], None]:
        """From now on the embedding's output has what the scale adds, until what is returned is called."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + self.of_scale(self.default[None] if self.scale is None else self.scale).to(output.dtype)

        return base.get_submodule(self.name).register_forward_hook(hook).remove

    @torch.no_grad()
    def fold(self, plain: nn.Module) -> None:
        """Into the table, at the default scale."""
        table: Any = plain.get_submodule(self.name)
        added = self.of_scale(self.default[None])
        table.to(torch.promote_types(table.weight.dtype, added.dtype)).weight += added.to(table.weight)


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
    linear = linear_at(table, "linear_1")
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


def guidance_input(denoiser: Denoiser, layer: str = "class_embedding", *, default: float = 1.0) -> Denoiser:
    """A copy that takes the guidance scale (B,) as `Extra.scale`, 1 being no guidance.

    Stable Diffusion's UNets take it as their stock pipelines give it (`take_scale`). Of others, `layer` is the
    network's embedding of class labels, which becomes a `GuidanceEmbedding`: diffusers' networks
    hand their `class_labels` to that layer untouched, so both numbers travel in that one argument. Which
    parameters are trained stays as it was; those of the new part are. A LoRA player is no copy: the new part is its
    own, beside its matrices. Where no scale is given it is `default`. Raises UserError where `layer` is not an
    embedding.
    """
    network: Any = denoiser.network.base if isinstance(denoiser.network, LoraNetwork) else denoiser.network
    if "timestep_cond" in inspect.signature(network.forward).parameters:
        return _condition_input(denoiser, default)
    table = dict(network.named_modules()).get(layer)
    if not isinstance(table, nn.Embedding):
        raise UserError(
            f"guidance_input: this teacher's network has no class embedding ({layer}) to add the guidance scale to; "
            "use a class-conditional teacher or a fixed scale"
        )
    twin = _own(denoiser)
    inner_call = denoiser.call
    if isinstance(twin.network, LoraNetwork):
        twin.network.add_input(layer, AddedScale(trained_like(table.weight), default, layer))

        def beside(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
            assert isinstance(network, LoraNetwork)
            part: Any = network.inputs[layer]
            before, part.scale = part.scale, extra.scale
            try:
                return inner_call(network, x, time, cond)
            finally:
                part.scale = before

        twin.extra_call = beside
        return twin
    twin.network.set_submodule(layer, GuidanceEmbedding(twin.network.get_submodule(layer), default))  # type: ignore[arg-type]

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        labels, scale = cond["class_labels"], extra.scale
        if scale is None:
            scale = network.get_submodule(layer).default.expand(len(labels))  # type: ignore[operator]
        # Labels are exact in float32, and would not be in half precision.
        packed = torch.stack([labels.float(), scale.float()], 1)
        return inner_call(network, x, time, cond | {"class_labels": packed})

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

    def __init__(self, teacher: Denoiser, scales: ScaleRange, what: str = "a guidance scale"):
        self.teacher = teacher
        self.guides = scales.takes_scale or scales.scale != 1
        if self.guides:
            require_null(teacher, what)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Prediction:
        """The prediction at x_t (B, ...) and the angles t (B,), each sample by its scale (B,)."""
        return guide(self.teacher, x_t, t, cond, scale) if self.guides else self.teacher(x_t, t, cond)


def plain_network(network: nn.Module) -> nn.Module:
    """The stock network that computes the same, to float rounding: for export.

    LoRA is merged into the weights, a guidance embedding at its default scale into the class table, and a second time
    at its default gap into a bias. A copy, or the network itself where it has none of them.
    """
    plain = merged(network) if isinstance(network, LoraNetwork) else without_second_time(network)
    if any(isinstance(module, GuidanceEmbedding) for module in plain.modules()):
        plain = copy.deepcopy(plain) if plain is network else plain
        for name, module in list(plain.named_modules()):
            if isinstance(module, GuidanceEmbedding):
                with torch.no_grad():
                    module.table.weight += module.of_scale(module.default[None])
                plain.set_submodule(name, module.table)
    return plain
