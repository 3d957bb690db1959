"""Exact attention with a forward derivative, in memory linear in the length of the sequence.

torch's fused kernels have no forward derivative, and its plain products (MATH) hold several matrices of all queries by
all keys. Here the queries are taken in tiles: for each, the weights P = softmax(scale q k^T + mask) are computed, used
and thrown away, in the output as in both derivatives. The results are exact but for rounding. Half precision is
computed and summed in float32.

On CUDA kernels of our own (`core.attention_kernels`) do this where triton is installed: for heads of up to 256 in half
or single precision, and for output and tangent without a graph, output and its gradient with one. All else goes by
tiles there too: gradients of tangents, torch.func's transforms, compiled functions, double precision.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

TILE = {"cpu": 2**19}
"""Elements of P that are computed at a time, by the type of the device: on a CPU what its cache holds."""
TILE_ELSEWHERE = 2**25
KERNELS_ON = {"cuda"}
"""Types of devices whose attention our kernels compute; on a CPU triton's interpreter could, for tests."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with forward and backward derivatives.

    query (..., L, E), key (..., S, E), value (..., S, V) of the same floating type -> (..., L, V). `attn_mask`
    broadcasts to (..., L, S): where it is boolean, True takes part; else it is added. A row that sees no key is zero,
    and so are its derivatives. `scale` is 1/sqrt(E) by default; with `enable_gqa` a head of keys serves several of
    queries. The output, its tangent and the gradients of both take memory linear in L and S. Dropout, and a mask that
    itself has a derivative, go by torch's plain products, in memory that grows with L S.
    """
    if dropout_p or (attn_mask is not None and _has_derivative(attn_mask)):
        return plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if enable_gqa:
        key, value = (for_each_query(query, x) for x in (key, value))
    if torch.is_autocast_enabled(query.device.type):
        kind = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    parts = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    batch = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
    query, key, value = (_four(part, batch) for part in (query, key, value))
    mask = None if attn_mask is None else _four_of_mask(attn_mask, batch)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    by = _by_kernels if _fits_kernels(query, key, value) else _Attention.apply
    out = by(query, key, value, mask, is_causal, scale)
    return out.reshape(*batch, *out.shape[-2:])


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The same by whole products, in memory that grows with L S; torch's own has a tangent, which has no gradient."""
    if enable_gqa:
        key, value = (for_each_query(query, x) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (scale * query) @ key.mT
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is None:
        return F.dropout(softmax(logits, -1), dropout_p) @ value
    boolean = attn_mask.dtype == torch.bool
    logits = logits.masked_fill(~attn_mask, -math.inf) if boolean else logits + attn_mask
    blind = (logits == -math.inf).all(-1, keepdim=True)
    weights = softmax(logits.masked_fill(blind, 0), -1).masked_fill(blind, 0)
    return F.dropout(weights, dropout_p) @ value


def for_each_query(query: Tensor, shared: Tensor) -> Tensor:
    """The heads (.., heads, S, E) of keys or values that groups of query heads share, once for each query head."""
    return shared.repeat_interleave(query.shape[-3] // shared.shape[-3], -3)


def softmax(input: Tensor, dim: int | None = None, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """torch's, whose own tangent is changed in place, and so has no gradient; halves are summed in float32."""
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), dtype) or input.dtype
    x = input.to(torch.promote_types(dtype, torch.float32)).contiguous()
    dim = -1 if dim is None else dim
    powers = (x - x.detach().amax(dim, keepdim=True)).exp()
    return (powers / powers.sum(dim, keepdim=True)).to(dtype)


def multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` by plain products, as torch computes it where the weights are to be returned.

    Its own call of scaled_dot_product_attention is out of a mode's sight. The tangent is right and has no gradient.
    """
    out, weights = F.multi_head_attention_forward(*args, **(kwargs | {"need_weights": True}))
    return out, weights if kwargs.get("need_weights", True) else None


def _has_derivative(mask: Tensor) -> bool:
    return mask.is_floating_point() and (mask.requires_grad or forward_ad.unpack_dual(mask).tangent is not None)


def _four(part: Tensor, batch: torch.Size) -> Tensor:
    """(B, H, rows, columns) of a part whose leading dimensions broadcast to `batch`."""
    heads = batch[-1] if batch else 1
    return part.expand(*batch, *part.shape[-2:]).reshape(math.prod(batch[:-1]), heads, *part.shape[-2:])


def _four_of_mask(mask: Tensor, batch: torch.Size) -> Tensor:
    """(B or 1, H or 1, L or 1, S or 1): not expanded, since the whole is as large as all weights."""
    mask = mask.reshape(*[1] * (max(len(batch), 2) + 2 - mask.ndim), *mask.shape)
    if mask.ndim > 4:
        mask = mask.expand(*batch[:-1], *mask.shape[-3:]).flatten(0, -4)
    return mask


class _Attention(torch.autograd.Function):
    """(B, H, L, E), (B, H, S, E), (B, H, S, V) -> (B, H, L, V)."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        def tile(rows: list[Any], keys: list[Any], logits: _Logits) -> tuple[list[Tensor], list[Tensor]]:
            (q,), (k, v) = rows, keys
            return [logits.weights(q, k) @ v], []

        return _over_tiles(tile, [query], [key, value], _Masking(mask, causal, scale))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.settings = inputs[4:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: None) -> Tensor | None:
        return _Tangent.apply(*ctx.saved_tensors, *ctx.settings, dq, dk, dv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        return *_gradients(grad, *ctx.saved_tensors, *ctx.settings), None, None, None


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> list[Tensor]:
    """Those of query, key and value, from that of the output."""
    masking = _Masking(mask, causal, scale)

    def tile(rows: list[Any], keys: list[Any], logits: _Logits) -> tuple[list[Tensor], list[Tensor]]:
        (q, g), (k, v) = rows, keys
        p = logits.weights(q, k)
        s = masking.scale * _centred(p, g @ v.mT)
        return [s @ k], [s.mT @ q, p.mT @ g]

    return _over_tiles(tile, [query, grad], [key, value], masking)


class _Tangent(torch.autograd.Function):
    """The derivative of the output along (dq, dk, dv), of which any may be None for zero.

    With dS = scale (dq k^T + q dk^T): dP = P (dS - rowsum(P dS)), and the tangent is dP v + P dv.
    """

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,
        dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    ) -> Tensor:  # fmt: skip
        def tile(rows: list[Any], keys: list[Any], logits: _Logits) -> tuple[list[Tensor], list[Tensor]]:
            (q, q_), (k, v, k_, v_) = rows, keys
            p = logits.weights(q, k)
            ds = _change(q, q_, k, k_, scale)
            out = [] if ds is None else [_centred(p, ds) @ v]
            out += [] if v_ is None else [p @ v_]
            return [sum(out[1:], out[0])], []

        return _over_tiles(tile, [query, dq], [key, value, dk, dv], _Masking(mask, causal, scale))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4], *inputs[6:])
        ctx.settings = inputs[4:6]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        query, key, value, mask, dq, dk, dv = ctx.saved_tensors
        masking = _Masking(mask, *ctx.settings)

        def tile(rows: list[Any], keys: list[Any], logits: _Logits) -> tuple[list[Tensor], list[Tensor]]:
            (q, q_, g), (k, v, k_, v_) = rows, keys
            p, a = logits.weights(q, k), g @ v.mT
            ds = _change(q, q_, k, k_, masking.scale)
            ds = torch.zeros_like(p) if ds is None else ds
            ds = ds - (p * ds).sum(-1, keepdim=True)
            # Of dS, and of S through P, which stands in dP twice and before dv.
            of_ds = masking.scale * _centred(p, a)
            e = ds * (a - (p * a).sum(-1, keepdim=True))
            of_s = masking.scale * _centred(p, e if v_ is None else e + g @ v_.mT)
            of_q, of_k = of_s @ k, of_s.mT @ q
            if k_ is not None:
                of_q = of_q + of_ds @ k_
            if q_ is not None:
                of_k = of_k + of_ds.mT @ q_
            of_v, of_dv = (p * ds).mT @ g, p.mT @ g
            return [of_q, of_ds @ k], [of_k, of_v, of_ds.mT @ q, of_dv]

        of_q, of_dq, of_k, of_v, of_dk, of_dv = _over_tiles(tile, [query, dq, grad], [key, value, dk, dv], masking)
        tangents = [g if x is not None else None for x, g in ((dq, of_dq), (dk, of_dk), (dv, of_dv))]
        return of_q, of_k, of_v, None, None, None, *tangents


# -- by kernels ------------------------------------------------------------------------------------------------


@cache
def _kernels() -> Any:
    """`core.attention_kernels`; None where triton cannot be used, which is said once."""
    try:
        return import_module("diffdistill.core.attention_kernels")
    except (ImportError, OSError, RuntimeError) as error:  # not there, or built for another machine
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"attention: triton cannot be used ({reason}), so torch computes attention with a forward derivative in "
            "tiles, which is as exact and slower; pip install triton",
            stacklevel=4,
        )
        return None


def _fits_kernels(*parts: Tensor) -> bool:
    """Whether our kernels take this call: where it runs, its types and sizes, and what is to be derived from it."""
    first, changes = parts[0], [forward_ad.unpack_dual(x).tangent for x in parts]
    if first.device.type not in KERNELS_ON or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    moved = [x for x in changes if x is not None]
    if moved and torch.is_grad_enabled() and any(x.requires_grad for x in (*parts, *moved)):
        return False
    if first.dtype not in (torch.float16, torch.bfloat16, torch.float32) or any(x.dtype != first.dtype for x in parts):
        return False
    if any(not x.numel() for x in parts) or (kernels := _kernels()) is None:
        return False
    return max(x.shape[-1] for x in parts) <= kernels.WIDEST


def _by_kernels(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """With a tangent where there is one in the level of forward derivatives that is open; else with a gradient."""
    pairs = [forward_ad.unpack_dual(x) for x in (query, key, value)]
    changes = [pair.tangent for pair in pairs]
    if all(change is None for change in changes):
        return _Fused.apply(query, key, value, mask, causal, scale)[0]
    with torch.no_grad():
        out, tangent, _ = _kernels().attend(*(pair.primal for pair in pairs), mask, causal, scale, *changes)
    return forward_ad.make_dual(out, tangent)


class _Fused(torch.autograd.Function):
    """(B, H, L, E), (B, H, S, E), (B, H, S, V) -> (B, H, L, V), and what its gradient needs besides."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, _, lse = _kernels().attend(query, key, value, mask, causal, scale)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.settings = inputs[4:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        *inputs, out, lse = ctx.saved_tensors
        # What is derived once more must be made of torch's operations.
        if torch.is_grad_enabled() or forward_ad.unpack_dual(grad).tangent is not None:
            return *_gradients(grad, *inputs, *ctx.settings), None, None, None
        return *_kernels().gradients(*inputs, *ctx.settings, out, lse, grad), None, None, None


# -- by tiles --------------------------------------------------------------------------------------------------


def _change(q: Tensor, q_: Tensor | None, k: Tensor, k_: Tensor | None, scale: float) -> Tensor | None:
    """The change of the logits, scale (dq k^T + q dk^T); None for zero."""
    if q_ is None and k_ is None:
        return None
    if q_ is None or k_ is None:
        return (scale * q_) @ k.mT if q_ is not None else (scale * q) @ k_.mT  # type: ignore[union-attr]
    return torch.cat([scale * q_, scale * q], -1) @ torch.cat([k, k_], -1).mT


def _centred(p: Tensor, change: Tensor) -> Tensor:
    """P (change - rowsum(P change)): what a change of the logits makes of the weights; its own transpose, too."""
    product = p * change
    return torch.addcmul(product, p, product.sum(-1, keepdim=True), value=-1)


class _Masking:
    """What all tiles have in common: mask, causality, scale."""

    def __init__(self, mask: Tensor | None, causal: bool, scale: float):
        self.mask = mask
        self.causal = causal
        self.scale = scale


class _Logits:
    """The weights of one tile of queries."""

    def __init__(self, masking: _Masking, batch: slice, heads: slice, rows: slice):
        self.masking = masking
        self.place = (batch, heads, rows)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """P (.., rows, S) of queries (.., rows, E); zero in a row that sees no key."""
        logits = (self.masking.scale * q) @ k.mT
        mask = self.masking.mask
        if mask is not None:
            for dim, part in enumerate(self.place):
                if mask.shape[dim] > 1:
                    mask = mask.narrow(dim, part.start, min(part.stop, mask.shape[dim]) - part.start)
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        if self.masking.causal:
            seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
            logits = logits.masked_fill(~seen.tril(self.place[2].start), -math.inf)
        weights = logits.softmax(-1)
        if mask is None:
            return weights
        return weights.masked_fill((logits == -math.inf).all(-1, keepdim=True), 0)


def _over_tiles(
    tile: Callable[[list[Any], list[Any], _Logits], tuple[list[Tensor], list[Tensor]]],
    by_row: Sequence[Tensor | None],
    by_key: Sequence[Tensor | None],
    masking: _Masking,
) -> list[Tensor]:
    """`tile` over all queries: its first outputs, one row for each query, side by side; its second, per key, summed.

    Inputs are (B, H, L, .) and (B, H, S, .), in float32 inside where they are in half precision, as are sums.
    Nothing is written in place, so that the derivatives have derivatives.
    """
    first, keys_like = by_row[0], by_key[0]
    assert first is not None and keys_like is not None
    (b, h, r), (n, heads, rows) = _tile_sizes(first, keys_like.shape[-2]), first.shape[:3]
    batches = []
    with torch.autocast(first.device.type, enabled=False):
        for batch in _slices(n, b):
            columns = []
            for head in _slices(heads, h):
                keys = [_wide(x, batch, head) for x in by_key]
                outs: list[list[Tensor]] = []
                sums: list[Tensor] = []
                for row in _slices(rows, r):
                    parts = [_wide(x, batch, head, row) for x in by_row]
                    out, total = tile(parts, keys, _Logits(masking, batch, head, row))
                    outs.append([x.to(first.dtype) for x in out])
                    sums = [x + y for x, y in zip(sums, total, strict=True)] if sums else total
                columns.append(_joined(outs, 2) + [x.to(first.dtype) for x in sums])
            batches.append(_joined(columns, 1))
        return _joined(batches, 0)


def _tile_sizes(query: Tensor, keys: int) -> tuple[int, int, int]:
    """Batches, heads and rows that are computed at a time: whole heads if several fit."""
    elements = TILE.get(query.device.type, TILE_ELSEWHERE)
    rows = min(query.shape[2], max(64, elements // max(keys, 1))) or 1
    heads = min(query.shape[1], max(1, elements // (rows * max(keys, 1)))) or 1
    return max(1, elements // (heads * rows * max(keys, 1))), heads, rows


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, max(length, 1), size))


def _wide(x: Tensor | None, batch: slice, head: slice, row: slice = slice(None)) -> Tensor | None:
    if x is None:
        return None
    return x[batch, head, row].to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _joined(parts: list[list[Tensor]], dim: int) -> list[Tensor]:
    """The tensors of each place, side by side along a dimension."""
    return parts[0] if len(parts) == 1 else [torch.cat(place, dim) for place in zip(*parts, strict=True)]
