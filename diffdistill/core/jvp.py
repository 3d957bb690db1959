"""Jacobian-vector products of whole networks, as they come from diffusers.

What torch's forward mode lacks is put right while a product is computed, and nowhere else: attention
(`core.attention`), norms, which fail on channels_last samples and under autocast, and compiled code, which has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from diffdistill.core.attention import attention, multi_head_attention, plain_attention, softmax
from diffdistill.core.attention_choice import Replaced, attention_choice
from diffdistill.core.prediction import expand
from diffdistill.errors import UserError, first_line
from diffdistill.rng import seeded

INSTEAD = "take --derivative central"


@torch.compiler.disable
def jvp(
    function: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor | None], check: bool = True
) -> tuple[Any, Any]:
    """`function(*primals)` and its derivative along `tangents`, of which None is zero.

    The function gives a tensor or a tuple of tensors; the result is (output, tangent) of the same kind. With gradients
    enabled both have a graph, of memory like that of two passes; under `torch.no_grad()` neither has. Autocast is off
    inside, so that the tangent is in the type of the weights. What torch.compile has compiled runs uncompiled inside:
    compiled code loses tangents without a word. Not for nested use.

    Raises UserError where a layer has no forward derivative, and, unless `check` is false, where the tangent is not
    finite; both name the module.
    """
    try:
        output, tangent = _dual(function, primals, tangents)
    except (RuntimeError, UserError) as error:
        if _is_missing(error):
            raise UserError(_missing(function, primals, tangents, error)) from error
        raise
    if check and not all(bool(part.isfinite().all()) for part in _tuple(tangent)):
        raise UserError(_not_finite(function, primals, tangents))
    return output, tangent


def _dual(function: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Any:
    """`jvp` by a dual level, which is a fifth faster than torch.func.jvp."""
    with forward_derivatives(), forward_ad.dual_level():
        output = function(*(p if t is None else dual(p, t.to(p)) for p, t in zip(primals, tangents, strict=True)))
        parts = [forward_ad.unpack_dual(part) for part in _tuple(output)]
    plain = tuple(part.primal for part in parts)
    changes = tuple(torch.zeros_like(part.primal) if part.tangent is None else part.tangent for part in parts)
    return (plain, changes) if isinstance(output, tuple) else (plain[0], changes[0])


def dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """The pair, in the level that is open; an expanded tensor, which torch refuses here, is copied."""
    expanded = any(stride == 0 and size > 1 for stride, size in zip(primal.stride(), primal.shape, strict=True))
    return forward_ad.make_dual(primal.clone() if expanded else primal, tangent)


def _tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


# -- what torch lacks -------------------------------------------------------------------------------------


@contextmanager
def forward_derivatives(choice: str | None = None) -> Iterator[None]:
    """Attention and norms have forward derivatives inside the block, in whichever network; autocast is off.

    Nothing that is compiled is used, since torch's compiled functions give tangents that are zero.
    Attention is our own, or torch's plain products where these are chosen: `choice`, by default that of
    `core.attention_choice` around the block.
    """
    by = plain_attention if (choice or attention_choice()) == "math" else attention
    replaced = Replaced({**_REPLACED, F.scaled_dot_product_attention: by})
    eager = torch.compiler.set_stance("force_eager")
    with eager, replaced, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _affine(normed: Tensor, like: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Scale and shift outside of the norm, in the type of the weights, and the result in that of the input."""
    if weight is not None:
        normed = normed * weight.reshape(shape)
    if bias is not None:
        normed = normed + bias.reshape(shape)
    return normed.to(like.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    normed = F.group_norm(_wide(input), num_groups, eps=eps)
    return _affine(normed, input, weight, bias, (1, -1, *[1] * (input.ndim - 2)))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    # As a group norm of one group: torch 2.13's layer_norm gives wrong gradients of its tangent, and of its double VJP.
    normed = F.group_norm(_wide(input).reshape(-1, math.prod(normalized_shape)), 1, eps=eps).reshape(input.shape)
    return _affine(normed, input, weight, bias, normalized_shape)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(F.rms_norm(_wide(input), normalized_shape, eps=eps), input, weight, None, normalized_shape)


_REPLACED: dict[Any, Callable[..., Any]] = {
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.softmax: softmax,
    torch.softmax: softmax,
    Tensor.softmax: softmax,
    F.multi_head_attention_forward: multi_head_attention,
}


# -- along a trajectory -----------------------------------------------------------------------------------

Derivative = Literal["exact", "central", "backward", "semi"]
"""How the derivative along a trajectory is computed."""
ALIKE = 0.3
"""The relative gap of exact derivative and central difference up to which the exact one is taken."""


def derivative(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    v: Tensor,
    kind: Derivative = "exact",
    step: float = 0.05,
    *,
    times: tuple[Tensor | float, Tensor | float] = (0.0, math.pi / 2),
    value: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """(B, ...) d/dt function(x_t, t) along dx_t/dt = v, at x (B, ...) and angles t (B,), in float32 or better.

    `exact` is the product with the Jacobian. The others are differences over `step` h in radians, along the circle
    x_{t+h} = cos(h) x + sin(h) v, which is the trajectory of one x0 and eps itself and touches the ODE's: `central`,
    (F(t+h) - F(t-h))/2h, of second order, takes two passes; `backward`, (cos(h) F(t) - F(t-h))/sin(h), of first
    order and exact on what turns with t, takes one besides F(t), which may be given as `value` (rCM, Zheng et al. 2025,
    arXiv:2510.08431). Their semi-continuous one, `semi`, is the product along x and (cos(h) F(x, t) - F(x, t-h))/sin(h)
    for the time. A step that would leave `times` ends at its bound, or is taken forwards by `backward` and `semi`.

    `seed` makes all passes drop the same units: with masks of their own the error of a difference grows like 1/h. A
    difference multiplies a channel of frequency w in the network's embedding of t by sinc(w h), which is why it can be
    nearer to the derivative of what the network has learned than its own is (`nearer_derivative`). In bfloat16
    rounding costs about 0.002/h of the result.
    """
    passes = partial(_pass, function, seed)
    if kind == "exact":
        return jvp(passes, (x, t), (v, torch.ones_like(t)))[1]
    x, v = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (x, v))
    low, high = (torch.as_tensor(bound, dtype=t.dtype, device=t.device) for bound in times)
    if kind == "central":
        after, before = torch.minimum(t + step, high), torch.maximum(t - step, low)
        change = passes(*_on_circle(x, v, t, after - t)) - passes(*_on_circle(x, v, t, before - t))
        return change / expand(after - before, change)
    h = torch.where(t - step < low, -step, step).to(t)
    earlier = _on_circle(x, v, t, -h)
    along: Tensor | float = 0.0
    if kind == "semi":
        value, along = jvp(lambda x: passes(x, t), (x,), (v,))
        earlier = x, t - h
    value = passes(x, t) if value is None else value.to(torch.promote_types(value.dtype, torch.float32))
    change = expand(h.cos(), value) * value - passes(*earlier)
    return along + change / expand(h.sin(), change)


def _pass(function: Callable[[Tensor, Tensor], Tensor], seed: int | None, x: Tensor, t: Tensor) -> Tensor:
    with nullcontext() if seed is None else seeded(seed, x.device):
        output = function(x, t)
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _on_circle(x: Tensor, v: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return expand(h.cos(), x) * x + expand(h.sin(), x) * v, t + h


@torch.no_grad()
def derivative_gap(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    v: Tensor,
    step: float = 0.05,
    *,
    times: tuple[Tensor | float, Tensor | float] = (0.0, math.pi / 2),
) -> float:
    """How far the exact derivative is from the central difference on these samples, over the size of the latter."""
    exact = derivative(function, x, t, v, "exact")
    central = derivative(function, x, t, v, "central", step, times=times)
    gap, size = float((exact - central).norm()), float(central.norm())
    return gap / size if size else gap


def nearer_derivative(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    v: Tensor,
    step: float = 0.05,
    *,
    times: tuple[Tensor | float, Tensor | float] = (0.0, math.pi / 2),
) -> Derivative:
    """`exact` where it agrees within `ALIKE` with the central difference on these samples, else `central`.

    They disagree where the network embeds 0..1000 by sines of up to one radian a unit: the training has never seen the
    derivative of these channels, and the exact product is mostly theirs.
    """
    try:
        gap = derivative_gap(function, x, t, v, step, times=times)
    except UserError:  # a layer that has no exact one
        return "central"
    return "exact" if gap <= ALIKE else "central"


# -- which module -----------------------------------------------------------------------------------------


def _is_missing(error: Exception) -> bool:
    text = str(error).lower()
    return any(part in text for part in ("forward ad", "forward mode ad", "forward-mode ad", "jvp"))


def _missing(
    function: Callable[..., Any],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    error: Exception,
) -> str:
    running: list[nn.Module] = []
    with _watching(running, lambda module, output: None):
        try:
            _dual(function, primals, tangents)
        except Exception:  # the same again, with the modules that are running
            where = _name(running)
    return f"derivative: {where} has no forward derivative ({first_line(error)}); {INSTEAD}"


def _not_finite(function: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> str:
    running: list[nn.Module] = []
    first: list[str] = []

    def look(module: nn.Module, output: Any) -> None:
        for part in output if isinstance(output, tuple | list) else [output]:
            if first or not isinstance(part, Tensor) or not part.is_floating_point():
                continue
            primal, tangent = forward_ad.unpack_dual(part)
            if not primal.isfinite().all():
                first.append(f"the output of {_name(running)} is not finite")
            elif tangent is not None and not tangent.isfinite().all():
                first.append(f"the tangent of {_name(running)} is not finite")

    with _watching(running, look):
        _dual(function, primals, tangents)
    return f"derivative: {first[0] if first else 'the tangent is not finite'}; {INSTEAD}, or float32 weights"


@contextmanager
def _watching(running: list[nn.Module], look: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """`running` holds the modules that are being called, innermost last; `look` sees each one's output."""

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        look(module, output)
        running.pop()

    handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _name(running: list[nn.Module]) -> str:
    """Of the innermost module, as the outermost that knows it calls it: "blocks.0.attn (Attention)"."""
    if not running:
        return "the function"
    module = running[-1]
    for outer in running:
        for name, inner in outer.named_modules():
            if inner is module:
                return f"{name} ({type(module).__name__})" if name else type(module).__name__
    return type(module).__name__
