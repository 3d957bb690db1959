"""Our kernels in triton's interpreter, against float64: run by test_attention_kernels.py in a process of its own.

The interpreter is right in float32 and float16 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as draw
from torch import Tensor
from torch.autograd import forward_ad

from diffdistill.core import attention as module
from diffdistill.core import attention_kernels as kernels
from diffdistill.core.attention import attention

LENGTHS = (1, 5, 33, 34, 77)
WIDTHS = (16, 40, 64, 72, 80)
LIMITS = {torch.float32: 3e-6, torch.float16: 3e-3}
Call = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def kernels_on_the_cpu() -> Iterator[None]:
    with mock.patch.object(module, "KERNELS_ON", {"cpu"}):
        yield


def tangent(parts: list[Tensor], changes: list[Tensor | None], call: Call) -> list[Tensor]:
    with torch.no_grad(), forward_ad.dual_level():
        duals = [x if t is None else forward_ad.make_dual(x, t) for x, t in zip(parts, changes, strict=True)]
        both = forward_ad.unpack_dual(attention(*duals, **call))
        assert both.tangent is not None
        return [both.primal.clone(), both.tangent.clone()]


def gradients(parts: list[Tensor], weight: Tensor, call: Call) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in parts]
    return list(torch.autograd.grad(attention(*leaves, **call), leaves, weight.to(parts[0].dtype)))


def check(ours: list[Tensor], exact: list[Tensor], limit: float, unit: float) -> None:
    """Within `limit` of the norm, or where all cancels of what was summed, elements of the size `unit`."""
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape and a.dtype != torch.float64
        assert (a.double() - b).norm() <= limit * (b.norm() + unit * b.numel() ** 0.5)


@draw.composite
def calls(sample: draw.DrawFn) -> tuple[list[Tensor], list[Tensor | None], Tensor, Call]:
    """Inputs, their tangents, of which some are missing, the gradient of the output, and the other arguments."""
    one = sample(draw.integers(0, 2**31))
    torch.manual_seed(one)
    dtype = sample(draw.sampled_from(list(LIMITS)))
    rows, keys = (sample(draw.sampled_from(LENGTHS)) for _ in range(2))
    width, out_width = (sample(draw.sampled_from(WIDTHS)) for _ in range(2))
    shared = sample(draw.sampled_from([0, 1, 2]))  # heads of keys that 4 of queries share
    batch = (1, 4) if shared else sample(draw.sampled_from([(), (3,), (2, 2), (1, 1, 2)]))
    of_keys = (1, shared) if shared else batch
    shapes = (*batch, rows, width), (*of_keys, keys, width), (*of_keys, keys, out_width)
    parts = [torch.randn(shape).to(dtype) for shape in shapes]
    which = sample(draw.sampled_from([(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)]))
    changes = [torch.randn_like(x) if w else None for x, w in zip(parts, which, strict=True)]
    broadcast = sample(draw.sampled_from([batch, (1,) * len(batch), ()]))
    shape = (*broadcast, sample(draw.sampled_from([1, rows])), sample(draw.sampled_from([1, keys])))
    masks = {"boolean": torch.rand(shape) > 0.4, "added": torch.randn(shape).to(dtype)}
    kind = sample(draw.sampled_from(["none", "causal", "boolean", "added"]))
    call = {
        "attn_mask": masks.get(kind), "is_causal": kind == "causal",
        "scale": sample(draw.sampled_from([None, 0.1])), "enable_gqa": bool(shared),
    }  # fmt: skip
    return parts, changes, torch.randn(*batch, rows, out_width), call


# Not shrunk where one fails: in the interpreter that takes minutes.
@settings(max_examples=8, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(calls())
def test_output_tangent_and_gradients_are_those_of_float64(case: Any) -> None:
    """Float64 goes by tiles, which have a test of their own."""
    parts, changes, weight, call = case
    limit, unit = LIMITS[parts[0].dtype], parts[1].shape[-2] ** -0.5
    wide = [x.double() for x in parts]
    wide_changes = [None if x is None else x.double() for x in changes]
    mask = call["attn_mask"]
    wide_call = call | {"attn_mask": mask.double() if mask is not None and mask.is_floating_point() else mask}
    with mock.patch.object(kernels, "attend", wraps=kernels.attend) as attend:
        ours = tangent(parts, changes, call)
        assert attend.call_count == 1  # one pass for both
        check(ours, tangent(wide, wide_changes, wide_call), limit, unit)
    with mock.patch.object(kernels, "gradients", wraps=kernels.gradients) as backward:
        ours = gradients(parts, weight, call)
        assert backward.call_count == 1
        check(ours, gradients(wide, weight, wide_call), limit, 1.0)


@pytest.mark.parametrize("width", [128, 160, 256])
def test_wide_heads(width: int) -> None:
    torch.manual_seed(0)
    parts, changes = ([torch.randn(1, 1, 37, width) for _ in range(3)] for _ in range(2))
    wide = [[x.double() for x in group] for group in (parts, changes)]
    check(tangent(parts, list(changes), {}), tangent(wide[0], list(wide[1]), {}), 3e-6, 0.1)
    weight = torch.randn(1, 1, 37, width)
    check(gradients(parts, weight, {}), gradients(wide[0], weight, {}), 3e-6, 0.1)


@pytest.mark.parametrize("mask", [torch.zeros(1, 2, 3, 5, dtype=torch.bool), torch.full((3, 5), -torch.inf)])
def test_a_row_that_sees_nothing_is_zero(mask: Tensor) -> None:
    parts, changes = ([torch.randn(1, 2, n, 16) for n in (3, 5, 5)] for _ in range(2))
    results = [*tangent(parts, list(changes), {"attn_mask": mask}), *gradients(parts, parts[0], {"attn_mask": mask})]
    assert not any(x.any() for x in results)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 1, 5, 1), (1, 3, 1, 7), (3, 1, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("boolean", [False, True])
def test_masks_of_each_sample_and_head(shape: tuple[int, ...], boolean: bool) -> None:
    torch.manual_seed(0)
    parts, changes = ([torch.randn(2, 3, n, 16) for n in (5, 7, 7)] for _ in range(2))
    mask = torch.rand(shape) > 0.4 if boolean else torch.randn(shape)
    wide, call = [[x.double() for x in group] for group in (parts, changes)], {"attn_mask": mask}
    exact = call if boolean else {"attn_mask": mask.double()}
    check(tangent(parts, list(changes), call), tangent(wide[0], list(wide[1]), exact), 3e-6, 0.4)
    check(gradients(parts, parts[0], call), gradients(wide[0], wide[0][0], exact), 3e-6, 1.0)


def test_inputs_that_are_not_contiguous() -> None:
    """As networks hand them over: heads after positions in memory."""
    torch.manual_seed(0)
    parts, changes = ([torch.randn(1, 33, 2, 40).transpose(1, 2) for _ in range(3)] for _ in range(2))
    mask = torch.randn(33, 33).T
    wide = [[x.double() for x in group] for group in (parts, changes)]
    exact = tangent(wide[0], list(wide[1]), {"attn_mask": mask.double()})
    check(tangent(parts, list(changes), {"attn_mask": mask}), exact, 3e-6, 0.1)


def test_large_logits_neither_overflow_nor_vanish() -> None:
    """The largest logit comes last, far above the others."""
    torch.manual_seed(0)
    parts, changes = ([torch.randn(1, 1, 70, 16) for _ in range(3)] for _ in range(2))
    bias = torch.linspace(-3e4, 3e4, 70).expand(70, 70)
    wide = [[x.double() for x in group] for group in (parts, changes)]
    ours = tangent(parts, list(changes), {"attn_mask": bias})
    assert all(x.isfinite().all() for x in ours)
    check(ours, tangent(wide[0], list(wide[1]), {"attn_mask": bias.double()}), 3e-6, 1.0)


def test_what_is_derived_twice_is_made_of_torchs_operations() -> None:
    """The gradient of a gradient, forward over reverse, and the gradient of a tangent."""
    torch.manual_seed(0)
    q, k, v, dq = torch.randn(4, 1, 2, 7, 16)

    def twice(q: Tensor, k: Tensor, v: Tensor, dq: Tensor) -> list[Tensor]:
        q = q.clone().requires_grad_()
        (grad,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(grad, q, dq)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, dq)
            (of_dual,) = torch.autograd.grad(attention(dual, k, v).square().sum(), dual, create_graph=True)
            forward = forward_ad.unpack_dual(of_dual).tangent
            weight = forward_ad.make_dual(v, dq)
            (of_key,) = torch.autograd.grad(attention(q, k, v), q, weight)
            through = forward_ad.unpack_dual(of_key).tangent
            change = forward_ad.unpack_dual(attention(dual, k, v)).tangent
            assert forward is not None and through is not None and change is not None
        (of_tangent,) = torch.autograd.grad(change.square().sum(), q)
        return [second, forward.detach(), through.detach(), of_tangent]

    ours, exact = twice(q, k, v, dq), twice(*(x.double() for x in (q, k, v, dq)))
    check(ours, exact, 1e-5, 0.0)
