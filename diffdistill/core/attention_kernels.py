"""Triton kernels of `core.attention` for CUDA: output and tangent in one pass over the keys, and the gradients.

With S = scale q k^T + mask, P = softmax(S), O = P v and dS = scale (dq k^T + q dk^T), the tangent of O is

    (P dS) v + P dv - rowsum(P dS) O,

P dS being elementwise. Its two products and the row sum are kept beside those of the output for the largest logit that
was seen so far, as an online softmax keeps them (Milakov & Gimelshein 2018, arXiv:1805.02867), and all of them shrink
when a larger one comes. Heads are padded to a power of two and lengths to whole blocks here, by masked loads. Sums are
in float32, and float32 is multiplied as such, not as TF32.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 256
"""The widest head that is taken."""
_NO_MASK, _BOOLEAN, _ADDED = 0, 1, 2


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(B, H, L, E), (B, H, S, E), (B, H, S, V) -> output (B, H, L, V), its tangent, and log sum exp S (B, H, L).

    The tangent is None where dq, dk and dv, each None for zero, all are; `mask` is (B or 1, H or 1, L or 1, S or 1). A
    row that sees no key is zero and has the logarithm inf, at which its weights come out as zero.
    """
    inputs = [None if x is None else x.contiguous() for x in (query, key, value, dq, dk, dv)]
    q, tangents = inputs[0], inputs[3:]
    assert q is not None
    out = q.new_empty(*q.shape[:3], value.shape[3])
    tangent = None if all(x is None for x in tangents) else torch.empty_like(out)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    shape, constants = _launch(query, key, value, mask, causal)
    given = {"DQ": dq is not None, "DK": dk is not None, "DV": dv is not None, "TANGENT": tangent is not None}
    pointers = [q if x is None else x for x in (*inputs, _bytes(mask), out, tangent, lse)]
    with _on(q):
        _output[_grid(q, q.shape[2], constants["R"])](*pointers, scale, *shape, **given, **constants)
    return out, tangent, lse


def gradients(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of query, key and value, from the gradient (B, H, L, V) of the output and what `attend` gave."""
    q, k, v, g = (x.contiguous() for x in (query, key, value, grad))
    delta = (g.float() * out.float()).sum(-1)
    shape, constants = _launch(q, k, v, mask, causal)
    common = (q, k, v, g, lse, delta, q if mask is None else _bytes(mask))
    of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with _on(q):
        _of_queries[_grid(q, q.shape[2], constants["R"])](*common, of_q, scale, *shape, **constants)
        _of_keys[_grid(q, k.shape[2], constants["K"])](*common, of_k, of_v, scale, *shape, **constants)
    return of_q, of_k, of_v


def _launch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[list[int], dict[str, Any]]:
    """Sizes and the strides of the mask, as the kernels take them, and their constants."""
    kind = _NO_MASK if mask is None else _BOOLEAN if mask.dtype == torch.bool else _ADDED
    strides = [0] * 4
    if mask is not None:
        strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    widths = [max(16, triton.next_power_of_2(x.shape[3])) for x in (q, v)]
    stored = max(widths) * q.element_size()
    rows = 64 if stored <= 256 else 32 if stored <= 512 else 16
    constants = {"MASK": kind, "CAUSAL": causal, "R": rows, "K": min(rows, 32), "CE": widths[0], "CV": widths[1]}
    constants["num_stages"] = 2 if stored <= 256 else 1  # what is loaded ahead fills the shared memory
    return [q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], *strides], constants


def _grid(q: Tensor, length: int, block: int) -> tuple[int]:
    return (triton.cdiv(length, block) * q.shape[0] * q.shape[1],)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# -- the kernels -----------------------------------------------------------------------------------------------


# Triton's compiler reads the annotations too, and knows none but its own; its interpreter takes any.


@triton.jit
def _tile(
    start: tl.tensor, rows: tl.tensor, width: tl.tensor, first: tl.tensor, R: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """(R, C) from row `first` on of a matrix (rows, width), and zeros beyond it."""
    row = first + tl.arange(0, R)[:, None]
    column = tl.arange(0, C)[None, :]
    return tl.load(start + row * width + column, mask=(row < rows) & (column < width), other=0.0)


@triton.jit
def _put(
    start: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    x: tl.tensor,
    R: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """The reverse of `_tile`."""
    row = first + tl.arange(0, R)[:, None]
    column = tl.arange(0, C)[None, :]
    tl.store(start + row * width + column, x.to(start.dtype.element_ty), mask=(row < rows) & (column < width))


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _logits(
    q: tl.tensor, k: tl.tensor, scale: tl.tensor, first_row: tl.tensor, first_key: tl.tensor, rows: tl.tensor,
    keys: tl.tensor, mask: tl.tensor, mask_row: tl.tensor, mask_key: tl.tensor, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(R, K) of a block of queries and one of keys; -inf where a key is not seen or there is none."""
    row = first_row + tl.arange(0, R)[:, None]
    key = first_key + tl.arange(0, K)[None, :]
    logits = _dot(q, tl.trans(k)) * scale
    seen = (key < keys) & (row >= 0)
    if CAUSAL:
        seen = seen & (key <= row)
    if MASK > 0:
        there = mask + row.to(tl.int64) * mask_row + key.to(tl.int64) * mask_key
        entry = tl.load(there, mask=(row < rows) & (key < keys), other=0)
        if MASK == 1:
            seen = seen & (entry != 0)
        else:
            logits = logits + entry.to(tl.float32)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _output(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, dq: tl.tensor, dk: tl.tensor, dv: tl.tensor, mask: tl.tensor,
    out: tl.tensor, tangent: tl.tensor, lse: tl.tensor, scale: tl.tensor, heads: tl.tensor, rows: tl.tensor,
    keys: tl.tensor, width: tl.tensor, out_width: tl.tensor, mask_batch: tl.tensor, mask_head: tl.tensor,
    mask_row: tl.tensor, mask_key: tl.tensor, DQ: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    TANGENT: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    CE: tl.constexpr, CV: tl.constexpr,
) -> None:  # fmt: skip
    """Output, tangent and log sum exp of R queries of one head."""
    blocks = (rows + R - 1) // R
    first = (tl.program_id(0) % blocks) * R
    head = (tl.program_id(0) // blocks).to(tl.int64)
    mask += (head // heads) * mask_batch + (head % heads) * mask_head
    of_rows, of_keys, of_values = head * rows * width, head * keys * width, head * keys * out_width
    of_out = head * rows * out_width
    queries = _tile(q + of_rows, rows, width, first, R, CE)
    if DQ:
        moved = _tile(dq + of_rows, rows, width, first, R, CE)
    largest = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    drift = tl.zeros((R,), tl.float32)  # the row sum of P dS
    o = tl.zeros((R, CV), tl.float32)
    t = tl.zeros((R, CV), tl.float32)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + R)
    for at in range(0, end, K):
        block = _tile(k + of_keys, keys, width, at, K, CE)
        values = _tile(v + of_values, keys, out_width, at, K, CV)
        s = _logits(queries, block, scale, first, at, rows, keys, mask, mask_row, mask_key, MASK, CAUSAL, R, K)
        larger = tl.maximum(largest, tl.max(s, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        shrink = tl.exp(largest - base)
        p = tl.exp(s - base[:, None])
        total = total * shrink + tl.sum(p, 1)
        o = o * shrink[:, None] + _dot(p.to(values.dtype), values)
        if TANGENT:
            t = t * shrink[:, None]
            if DV:
                t += _dot(p.to(values.dtype), _tile(dv + of_values, keys, out_width, at, K, CV))
            ds = tl.zeros((R, K), tl.float32)
            if DQ:
                ds += _dot(moved, tl.trans(block))
            if DK:
                ds += _dot(queries, tl.trans(_tile(dk + of_keys, keys, width, at, K, CE)))
            change = (p * ds * scale).to(values.dtype)
            drift = drift * shrink + tl.sum(change.to(tl.float32), 1)  # as rounded, so that the two cancel
            t += _dot(change, values)
        largest = larger
    nonzero = tl.where(total == 0.0, 1.0, total)
    o = o / nonzero[:, None]
    _put(out + of_out, rows, out_width, first, o, R, CV)
    row = first + tl.arange(0, R)
    tl.store(lse + head * rows + row, tl.where(total == 0.0, float("inf"), largest + tl.log(nonzero)), mask=row < rows)
    if TANGENT:
        _put(tangent + of_out, rows, out_width, first, t / nonzero[:, None] - (drift / nonzero)[:, None] * o, R, CV)


@triton.jit
def _weights(
    s: tl.tensor,
    values: tl.tensor,
    grads: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    R: tl.constexpr,
) -> tl.tensor:
    """P, and the gradient of the logits, of a block."""
    row = first + tl.arange(0, R)
    p = tl.exp(s - tl.load(lse + row, mask=row < rows, other=float("inf"))[:, None])
    mean = tl.load(delta + row, mask=row < rows, other=0.0)
    return p, p * (_dot(grads, tl.trans(values)) - mean[:, None])


@triton.jit
def _of_queries(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, grad: tl.tensor, lse: tl.tensor, delta: tl.tensor, mask: tl.tensor,
    of_q: tl.tensor, scale: tl.tensor, heads: tl.tensor, rows: tl.tensor, keys: tl.tensor, width: tl.tensor,
    out_width: tl.tensor, mask_batch: tl.tensor, mask_head: tl.tensor, mask_row: tl.tensor, mask_key: tl.tensor,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, R: tl.constexpr, K: tl.constexpr, CE: tl.constexpr, CV: tl.constexpr,
) -> None:  # fmt: skip
    """The gradients of R queries of one head."""
    blocks = (rows + R - 1) // R
    first = (tl.program_id(0) % blocks) * R
    head = (tl.program_id(0) // blocks).to(tl.int64)
    mask += (head // heads) * mask_batch + (head % heads) * mask_head
    lse += head * rows
    delta += head * rows
    queries = _tile(q + head * rows * width, rows, width, first, R, CE)
    grads = _tile(grad + head * rows * out_width, rows, out_width, first, R, CV)
    total = tl.zeros((R, CE), tl.float32)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + R)
    for at in range(0, end, K):
        block = _tile(k + head * keys * width, keys, width, at, K, CE)
        values = _tile(v + head * keys * out_width, keys, out_width, at, K, CV)
        s = _logits(queries, block, scale, first, at, rows, keys, mask, mask_row, mask_key, MASK, CAUSAL, R, K)
        _, ds = _weights(s, values, grads, lse, delta, rows, first, R)
        total += _dot(ds.to(block.dtype), block)
    _put(of_q + head * rows * width, rows, width, first, total * scale, R, CE)


@triton.jit
def _of_keys(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, grad: tl.tensor, lse: tl.tensor, delta: tl.tensor, mask: tl.tensor,
    of_k: tl.tensor, of_v: tl.tensor, scale: tl.tensor, heads: tl.tensor, rows: tl.tensor, keys: tl.tensor,
    width: tl.tensor, out_width: tl.tensor, mask_batch: tl.tensor, mask_head: tl.tensor, mask_row: tl.tensor,
    mask_key: tl.tensor, MASK: tl.constexpr, CAUSAL: tl.constexpr, R: tl.constexpr, K: tl.constexpr, CE: tl.constexpr,
    CV: tl.constexpr,
) -> None:  # fmt: skip
    """The gradients of K keys and values of one head."""
    blocks = (keys + K - 1) // K
    first = (tl.program_id(0) % blocks) * K
    head = (tl.program_id(0) // blocks).to(tl.int64)
    mask += (head // heads) * mask_batch + (head % heads) * mask_head
    lse += head * rows
    delta += head * rows
    block = _tile(k + head * keys * width, keys, width, first, K, CE)
    values = _tile(v + head * keys * out_width, keys, out_width, first, K, CV)
    total = tl.zeros((K, CE), tl.float32)
    of_values = tl.zeros((K, CV), tl.float32)
    begin = 0
    if CAUSAL:
        begin = (first // R) * R
    for at in range(begin, rows, R):
        queries = _tile(q + head * rows * width, rows, width, at, R, CE)
        grads = _tile(grad + head * rows * out_width, rows, out_width, at, R, CV)
        s = _logits(queries, block, scale, at, first, rows, keys, mask, mask_row, mask_key, MASK, CAUSAL, R, K)
        p, ds = _weights(s, values, grads, lse, delta, rows, at, R)
        of_values += _dot(tl.trans(p.to(grads.dtype)), grads)
        total += _dot(tl.trans(ds.to(queries.dtype)), queries)
    _put(of_k + head * keys * width, keys, width, first, total * scale, K, CE)
    _put(of_v + head * keys * out_width, keys, out_width, first, of_values, K, CV)
