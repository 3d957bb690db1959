"""A student whose one pass says a policy: x0 all along the way to its next level (`core/policies.py`).

Its network is its teacher's with more output channels, which the last layer alone gives; the class stays, so that it is
a stock network with another `out_channels`. Of a LoRA player that layer is its own, beside the matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import NONE, Cond, Denoiser, Extra
from diffdistill.core.policies import Policy, policy_of, wide_channels
from diffdistill.core.prediction import Prediction, expand, x0_weights
from diffdistill.errors import UserError
from diffdistill.players.call_inputs import layer_at
from diffdistill.players.lora import LoraNetwork, trained_like

Layer = nn.Linear | nn.Conv2d

LAST = ("conv_out", "proj_out_2", "proj_out", "norm_out.linear_2")
"""What diffusers calls the last layer of a network."""
PATCHES_LAST = ("CogVideoXTransformer3DModel",)
"""Networks in whose last layer the pixels of a patch lie side by side, channel by channel."""


@dataclass(frozen=True)
class PolicySettings:
    """What a policy is made of."""

    kind: str  #: of `core.policies.KINDS`
    components: int  #: Gaussians, or nodes, or heads
    substeps: int  #: DDIM steps of the policy to where a pass leads; of heads 1, from one to the next
    passes: tuple[int, ...] = ()  #: the numbers of passes that a student of heads may take


@dataclass(frozen=True)
class PolicyPrediction(Prediction):
    """`x0` and `at` are where the policy leads from x_t; `eps` and `v` what it says at x_t itself. y is wide."""

    policy: Policy
    substeps: int

    @property
    def x0(self) -> Tensor:
        """(B, ...) the clean sample that the policy leads to."""
        return self.at(torch.zeros_like(self.t))

    @property
    def eps(self) -> Tensor:
        """(B, ...) the noise that the policy sees in x_t."""
        sin, cos = (expand(part(self.t), self.x_t) for part in (torch.sin, torch.cos))
        return (self.x_t - cos * self.policy.x0(self.x_t, self.t)) / sin

    @property
    def v(self) -> Tensor:
        """(B, ...) dx_t/dt of the policy's flow."""
        return self.policy.v(self.x_t, self.t)

    def at(self, s: Tensor) -> Tensor:
        """(B, ...) where the policy leads at the angles s (B,)."""
        return self.policy.roll(self.x_t, self.t, s.expand_as(self.t), self.substeps)


class PolicyDenoiser(Denoiser):
    """A network whose output is wide, and the student's levels, by which a pass knows where its stretch ends.

    Of heads `angles` are those of all of them, among which the levels are.
    """

    def __init__(self, plain: Denoiser, network: nn.Module, settings: PolicySettings, angles: Tensor):
        super().__init__(
            network, plain.schedule, plain.output, call=plain.call, extra_call=plain.extra_call, null=plain.null,
            feature_layer=plain.feature_layer, feature_map=plain.feature_map, rescale=plain.rescale,
            lengths=plain.lengths,
        )  # fmt: skip
        self.default_scale = plain.default_scale
        self.settings = settings
        self.angles = angles
        self.train(plain.training)

    def with_network(self, network: nn.Module, feature_layer: str | None) -> PolicyDenoiser:
        """The same view of another network."""
        twin = PolicyDenoiser(super().with_network(network, feature_layer), network, self.settings, self.angles)
        return twin.train(self.training)

    def ends(self, t: Tensor) -> Tensor:
        """(B,) the angles of the levels after t (B,); 0 after the last."""
        below = self.angles.to(t.device)[None] < t[:, None] - 1e-6
        return torch.where(below, self.angles.to(t.device), 0.0).max(1).values

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, extra: Extra = NONE) -> PolicyPrediction:
        """x_t (B, C, ...), t (B,) the angle of one of the student's levels, from where the policy leads to the next."""
        said, kind, components = super().forward(x_t, t, cond, extra), self.settings.kind, self.settings.components
        width = wide_channels(kind, components, x_t.shape[1])
        if said.y.shape != (len(x_t), width, *x_t.shape[2:]):
            raise UserError(
                f"policy: the network gives {tuple(said.y.shape)} where {width} channels were made of its last layer"
            )
        of_x, of_y = x0_weights(said.t, said.a, said.b)
        nodes = None
        if kind == "heads":
            nodes = torch.cat([self.angles, torch.zeros(1, dtype=torch.float64)]).to(x_t.device)
            of_x, of_y = (weight.to(x_t.device) for weight in weights_at(self, self.angles))
        policy = policy_of(kind, components, said.y, x_t, said.t, self.ends(said.t), of_x, of_y, nodes)
        return PolicyPrediction(x_t, said.t, said.y, said.a, said.b, policy, self.settings.substeps)


def weights_at(denoiser: Denoiser, t: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) and (n,) what x_t and the network's output are multiplied by in x0 at the angles t (n,)."""
    native = denoiser.schedule.native(t)
    a, b = denoiser.output.at(native.alpha, native.sigma, denoiser.schedule.data_std)
    return x0_weights(t, a * denoiser.schedule.data_std, b)


POLICIES = "PolicyScheduler"
"""The class of the scheduler in an exported student's folder, whose config says its policies."""


@contextmanager
def seen_plain(network: Any, config: Mapping[str, Any]) -> Iterator[None]:
    """Meanwhile a wide network's config has as many output channels as its teacher's, by the scheduler's config."""
    channels, wide = config["channels"], network.config.out_channels
    many = wide_channels(config["policy"], config["components"], channels)
    network.register_to_config(out_channels=wide * channels // many)
    try:
        yield
    finally:
        network.register_to_config(out_channels=wide)


def policy_denoiser(plain: Denoiser, config: Mapping[str, Any]) -> PolicyDenoiser:
    """A student as it was exported, by the scheduler's config."""
    passes = tuple(config.get("passes") or ())
    settings = PolicySettings(config["policy"], config["components"], config["substeps"], passes)
    angles = torch.tensor(config["angles"][:-1], dtype=torch.float64)
    return PolicyDenoiser(plain, plain.network, settings, angles)


class Place(NamedTuple):
    """The last layer of a network."""

    name: str
    channels: int  #: of a sample
    made: int  #: of the network's output: those, or twice as many where it learns a variance
    parts: int  #: the layer's features for each of them: more than one where a token is a patch
    packed: bool  #: whether the features of one channel lie side by side, as a pipeline packs them, or the channels do


def last_layer(network: nn.Module, channels: int) -> Place:
    """The last layer of a network that gives samples of so many channels; UserError where it cannot be made wide."""
    config: Any = getattr(network, "config", None)
    layers = {
        name.removesuffix(".base_layer"): module
        for name, module in network.named_modules()
        if isinstance(module, Layer) and ".lora_" not in f".{name}"
    }
    if config is None:  # somebody's own
        names = list(layers)[-1:]
    else:
        names = [name for name in LAST if name in layers and "out_channels" in config][:1]
        names = [name for name in names if not any(other.endswith(f"_{name}") for other in layers)]  # one of two
    last: Any = [layers[name] for name in names]
    features = [layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels for layer in last]
    taken = getattr(config, "in_channels", channels)
    packed = features == [taken] and taken > channels and taken % channels == 0
    made = channels if packed else getattr(config, "out_channels", None) or taken
    packed |= type(network).__name__ in PATCHES_LAST
    if not features or made not in (channels, 2 * channels) or features[0] % made:
        raise UserError(
            f"policy: {type(network).__name__} has no single last layer that is known, or no out_channels to make it "
            "wide by; distil this teacher by another method"
        )
    return Place(names[0], channels, made, features[0] // made, packed)


def widened(layer: Layer, place: Place, settings: PolicySettings) -> Layer:
    """The layer with the channels of a policy; each component begins as what the layer gave, and the rest at zero.

    Components are apart by a twentieth of the weights' deviation, from torch's global generator: equal ones would stay
    equal. Heads have each its own target, and begin as the layer.
    """
    c, k, q = place.channels, settings.components, place.parts
    features = q * wide_channels(settings.kind, k, c)
    weight, bias = layer.weight.detach(), layer.bias
    shape, axis = ((place.made, q), 0) if place.packed else ((q, place.made), 1)

    def tiled(values: Tensor, spread: Tensor | float) -> Tensor:
        """(features of the layer, ...) -> (features, ...)."""
        own = trained_like(values).unflatten(0, shape).narrow(axis, 0, c)
        parts = [own + spread * torch.randn(own.shape, dtype=own.dtype).to(own) for _ in range(k)]
        rest = own.new_zeros(features // q - k * c, *own.shape[:axis], *own.shape[axis + 1 :]).movedim(0, axis)
        return torch.cat([*parts, rest], axis).flatten(0, 1)

    made = copy.deepcopy(layer)
    setattr(made, "out_features" if isinstance(layer, nn.Linear) else "out_channels", features)
    spread = 0.0 if settings.kind == "heads" else 0.05 * trained_like(weight).std()
    made.weight = nn.Parameter(tiled(weight, spread))
    made.bias = None if bias is None else nn.Parameter(tiled(bias.detach(), 0.0))
    return made


def tell_channels(network: Any, channels: int) -> None:
    """The network's config, and the network itself where it keeps them, have so many output channels from now on."""
    if hasattr(network, "register_to_config"):
        network.register_to_config(out_channels=channels)
    if "out_channels" in vars(network):
        network.out_channels = channels


def out_channels(network: Any) -> int:
    """Those of its config, or 0 of a network that has none."""
    config = getattr(network, "config", None)
    return 0 if config is None else config.out_channels or config.in_channels


class WideLayer(nn.Module):
    """The wide last layer of a LoRA player, in the place of its base's while it plays (`players.lora.Input`)."""

    alone: ClassVar[bool] = False

    def __init__(self, layer: Layer, name: str, channels: tuple[int, int]):
        super().__init__()
        self.layer = layer
        self.name = name
        self.channels = channels  # of the base's output, as it is and wide

    def attach(self, base: nn.Module) -> Callable[[], None]:
        """From now on the base's output is wide, until what is returned is called."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return self.layer(args[0].to(self.layer.weight.dtype)).to(output.dtype)

        # On the layer with LoRA on it, whose matrices have no part in the output.
        remove = base.get_submodule(self.name).register_forward_hook(hook).remove
        tell_channels(base, self.channels[1])

        def detach() -> None:
            remove()
            tell_channels(base, self.channels[0])

        return detach

    def fold(self, plain: nn.Module) -> None:
        """As the stock network has it."""
        plain.set_submodule(self.name, copy.deepcopy(self.layer).cpu().requires_grad_(False))
        tell_channels(plain, self.channels[1])


def policy_player(student: Denoiser, settings: PolicySettings, channels: int, angles: Tensor) -> PolicyDenoiser:
    """The student, which begins as its teacher, as one that says policies between the angles (n,) of its levels.

    `channels` are those of a sample. UserError where the network's last layer cannot be made wide.
    """
    network: Any = student.network
    lora = isinstance(network, LoraNetwork)
    base = network.base if lora else network
    place = last_layer(base, channels)
    layer = layer_at(base, place.name)
    wide = widened(layer, place, settings).requires_grad_(True)
    own = out_channels(base)
    channels_wide = own * wide_channels(settings.kind, settings.components, channels) // place.made
    if isinstance(network, LoraNetwork):
        network.add_input(place.name, WideLayer(wide, place.name, (own, channels_wide)))
        for name, matrix in network.matrices.items():
            if name.rpartition("|")[0].replace("|", ".") == place.name:
                matrix.requires_grad_(False)
    else:
        network.set_submodule(place.name, wide)
        tell_channels(network, channels_wide)
    return PolicyDenoiser(student, network, settings, angles)
