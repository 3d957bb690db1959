"""A pretrained network seen in the normal form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.experts import ClassExperts, by_expert, experts_of
from diffdistill.core.prediction import Output, Prediction, expand
from diffdistill.core.rows import by_length
from diffdistill.core.schedule import Schedule

Cond = dict[str, Tensor]
"""Conditions by the network's own argument name, each (B, ...); empty when unconditional."""

Call = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
"""(network, input, time, cond) -> raw output."""

FeatureMap = Callable[[Any, Tensor, Cond], Tensor]
"""(a layer's output, x_t, cond) -> a map (B, C, h, w)."""


@dataclass(frozen=True)
class Extra:
    """A second input besides x_t, t and the conditions, for the networks that take one; None: not given."""

    scale: Tensor | None = None  #: (B,) the guidance scale that the network gives in one pass; 1 is none
    r: Tensor | None = None  #: (B,) the angles, at most t, to which the network's deterministic step leads
    gap: Tensor | None = None  #: (B,) how far t and r lie apart, as fractions of the schedule; `Denoiser` says it

    def of(self, rows: Tensor | None) -> Extra:
        """That of those rows; None: of all."""
        if self is NONE or rows is None:
            return self
        return Extra(*(None if value is None else value[rows] for value in (self.scale, self.r, self.gap)))

    def twice(self) -> Extra:
        """For a batch that is there twice, with two conditions."""
        doubled = (None if value is None else torch.cat([value, value]) for value in (self.scale, self.r, self.gap))
        return Extra(*doubled) if self is not NONE else NONE


NONE = Extra()

ExtraCall = Callable[[nn.Module, Tensor, Tensor, Cond, Extra], Tensor]
"""The same of a network that takes a second input."""


def call_by_keyword(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """`network(x, time, **cond)`: the call of a network that takes its conditions by name and returns a tensor."""
    return network(x, time, **cond)


def scale_by_keyword(call: Call) -> ExtraCall:
    """The call of a network that takes the guidance scale as its own argument `guidance_scale`, or none."""

    def with_scale(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        return call(network, x, time, cond if extra.scale is None else cond | {"guidance_scale": extra.scale})

    return with_scale


def choose(mask: Tensor, cond: Cond, other: Cond) -> Cond:
    """The conditions (B, ...) where mask (B,) is true, and the others' elsewhere."""
    return {
        key: torch.where(mask.reshape(-1, *[1] * (value.ndim - 1)), value, other[key]) for key, value in cond.items()
    }


def _wide(time: Tensor, like: Tensor) -> Tensor:
    # A half-precision time would round the timestep 999 to 1000.
    return time.to(torch.promote_types(like.dtype, torch.float32))


def _rows(rows: Tensor | None, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Cond]:
    """Those rows of all three; None: all."""
    if rows is None:
        return x, t, cond
    return x[rows], t[rows], {name: value[rows] for name, value in cond.items()}


class _Reached(Exception):
    """Leaves a forward pass once the feature layer has been computed."""


class Denoiser(nn.Module):
    """`forward(x_t, t, cond)` is a pure function of (x_t, t): no host read, no branch on data.

    Only this class knows the network's own time, scaling and output. `null` maps conditions to the
    null conditions of classifier-free guidance; `extra_call` is there where the network takes a second input (`Extra`),
    and is used in place of `call`; `feature_layer` names the sub-module whose output a
    discriminator reads, `feature_map(output, x_t, cond)` makes a map (B, C, h, w) of it where it is none.
    `rescale(guided, conditional)` is what the family's pipeline does to a guided output; `lengths(cond)` (B,) are those
    of the prompts, of a network that takes prompts of one length in a call. All are optional.

    Of networks that are each for a part of the noise or of the classes (`Experts`), every sample goes to its own, and
    its time or label is read from the device.
    """

    network: nn.Module

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        output: Output,
        *,
        call: Call = call_by_keyword,
        extra_call: ExtraCall | None = None,
        null: Callable[[Cond], Cond] | None = None,
        feature_layer: str | None = None,
        feature_map: FeatureMap | None = None,
        rescale: Callable[[Tensor, Tensor], Tensor] | None = None,
        lengths: Callable[[Cond], Tensor] | None = None,
    ):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.output = output
        self.call = call
        self.extra_call = extra_call
        self.null = null
        self.feature_layer = feature_layer
        self.feature_map = feature_map
        self.rescale = rescale
        self.lengths = lengths
        self.default_scale: float | None = None  # of a network whose stock pipeline passes it the guidance scale
        self.second_scale: float | None = None  # of guidance for the second of two networks; None: as for the first
        self._half: dict[torch.dtype, torch.dtype | None] = {}  # by the type of the first weight

    def with_network(self, network: nn.Module, feature_layer: str | None) -> Denoiser:
        """The same view of another network."""
        twin = Denoiser(
            network,
            self.schedule,
            self.output,
            call=self.call,
            extra_call=self.extra_call,
            null=self.null,
            feature_layer=feature_layer,
            feature_map=self.feature_map,
            rescale=self.rescale,
            lengths=self.lengths,
        )
        twin.default_scale = self.default_scale
        return twin.train(self.training)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, extra: Extra = NONE) -> Prediction:
        """x_t (B, ...) of unit variance, t (B,) float64 angles; t is clamped to what the network knows."""
        t = t.clamp(self.schedule.t_min, self.schedule.t_max)
        native = self.schedule.native(t)
        a, b = self.output.at(native.alpha, native.sigma, self.schedule.data_std)
        time = _wide(native.time, x_t)
        if extra.r is not None:
            extra = replace(extra, gap=self.schedule.fraction(t) - self.schedule.fraction(extra.r))
        with self._precision(x_t.device.type):
            y = self._called(expand(native.scale, x_t) * x_t, time, cond, extra)
        return Prediction(x_t, t, y.to(x_t.dtype), a * self.schedule.data_std, b)

    def _called(self, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        def share(rows: Tensor | None) -> list[Tensor]:
            return [self._call(*_rows(rows, x, time, cond), extra.of(rows))]

        return self._in_shares(time, cond, share)[0]

    def _in_shares(self, time: Tensor, cond: Cond, compute: Callable[[Tensor | None], list[Tensor]]) -> list[Tensor]:
        """What `compute` gives of the rows that it is told, each by the network for its time, and of one length."""
        if self.lengths is None:
            return by_expert(self.network, time, cond, compute)
        lengths = self.lengths(cond)

        def of_expert(rows: Tensor | None) -> list[Tensor]:
            if rows is None:
                return by_length(lengths, compute)
            return by_length(lengths[rows], lambda some: compute(rows if some is None else rows[some]))

        return by_expert(self.network, time, cond, of_expert)

    def _call(self, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        if self.extra_call is not None:
            return self.extra_call(self.network, x, time, cond, extra)
        if extra is not NONE:
            raise ValueError(f"{type(self.network).__name__} takes no second input")
        return self.call(self.network, x, time, cond)

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        """Autocast for a network kept in half precision, where there is none: samples and LoRA are float32."""
        # A LoRA player's own weights are float32, and those of its base say what it computes in.
        base = getattr(self.network, "base", None)
        network = base if isinstance(base, nn.Module) else self.network
        first = next(network.parameters(), None)
        if first is None:
            return nullcontext()
        if first.dtype not in self._half:  # asked once: there are thousands
            # Any of them: some networks keep a few in float32.
            kinds = (weight.dtype for weight in network.parameters())
            self._half[first.dtype] = next((kind for kind in kinds if kind in (torch.float16, torch.bfloat16)), None)
        half = self._half[first.dtype]
        return nullcontext() if half is None or torch.is_autocast_enabled(device) else torch.autocast(device, half)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(B, C, ...) the output of `feature_layer`, in float32; what comes after it is not computed."""
        if self.feature_layer is None:
            raise ValueError("this denoiser has no feature_layer")
        return self.features_of([self.feature_layer], x_t, t, cond)[0]

    def features_of(self, layers: Sequence[str], x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """The same of several layers, which are named in the order in which they are computed."""
        if experts_of(self.network) is None and self.lengths is None:
            return self._features_of(layers, x_t, t, cond)

        def share(rows: Tensor | None) -> list[Tensor]:
            return self._features_of(layers, *_rows(rows, x_t, t, cond))

        return self._in_shares(self._time(x_t, t), cond, share)

    def _time(self, x_t: Tensor, t: Tensor) -> Tensor:
        return _wide(self.schedule.native(t.clamp(self.schedule.t_min, self.schedule.t_max)).time, x_t)

    def scales(self, x_t: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        """The guidance scales (B,) at the angles t (B,): `second_scale`, if there is one, where it is for the second
        of two networks to say, else those that are given."""
        experts = experts_of(self.network)
        if self.second_scale is None or experts is None:
            return scale
        return torch.where(experts.is_first(self._time(x_t, t)), scale, self.second_scale)

    def _features_of(self, layers: Sequence[str], x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        outputs: list[Any] = []

        def keep(module: nn.Module, args: object, output: Any) -> None:
            outputs.append(output)
            if len(outputs) == len(layers):
                raise _Reached

        experts = experts_of(self.network)
        names = layers if experts is None else [experts.layer(layer) for layer in layers]
        handles = [self.network.get_submodule(name).register_forward_hook(keep) for name in names]
        try:
            self(x_t, t, cond)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [self._map(output, x_t, cond) for output in outputs]

    def _map(self, output: Any, x_t: Tensor, cond: Cond) -> Tensor:
        if self.feature_map is not None:
            features = self.feature_map(output, x_t, cond)
        else:  # a UNet's way down gives what its way up takes, too
            features = output[0] if isinstance(output, tuple) else output
        return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features

    def layers_at(self, depths: Sequence[float]) -> list[str]:
        """The layers at those fractions of a network's depth, in their order and each once, for `features_of`.

        They are the blocks of a transformer that `feature_layer` is one of, or a UNet's blocks; of another network it
        is that layer alone. Empty without one.
        """
        parent, _, last = (self.feature_layer or "").rpartition(".")
        layers = [] if self.feature_layer is None else [self.feature_layer]
        network: Any = self.network.first if isinstance(self.network, ClassExperts) else self.network
        if last.isdigit():
            layers = [f"{parent}.{k}" for k, _ in enumerate(network.get_submodule(parent).children())]
        elif layers and hasattr(network, "down_blocks"):
            down, up = (len(getattr(network, name)) for name in ("down_blocks", "up_blocks"))
            layers = [*(f"down_blocks.{k}" for k in range(down)), *layers, *(f"up_blocks.{k}" for k in range(up))]
        chosen = sorted({int(depth * len(layers)) for depth in depths})
        return [layers[k] for k in chosen if k < len(layers)]
