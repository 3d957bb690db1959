"""Attention with a forward derivative: its output, tangent and the gradients of both against plain products."""

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.core import attention as module
from diffdistill.core.attention import attention

LENGTHS = (1, 2, 7, 20, 33, 34, 77)


def plain(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """In operations whose derivatives of any order are simple."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask
    logits = logits.masked_fill(~seen, -1e30)
    powers = (logits - logits.detach().amax(-1, keepdim=True)).exp() * seen
    return powers / powers.sum(-1, keepdim=True).clamp_min(1e-300) @ value


def derivatives(
    function: Any, parts: list[Tensor], tangents: list[Tensor | None], call: dict[str, Any]
) -> list[Tensor]:
    """Output, tangent, and the gradients of a sum of both to all inputs and tangents."""
    leaves = [x.clone().requires_grad_() for x in parts]
    changes = [None if t is None else t.clone().requires_grad_() for t in tangents]
    with forward_ad.dual_level():
        duals = [x if t is None else forward_ad.make_dual(x, t) for x, t in zip(leaves, changes, strict=True)]
        output, tangent = forward_ad.unpack_dual(function(*duals, **call))
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(output.shape, generator=draw, dtype=output.dtype) for _ in range(2)]
    total = (output * weights[0]).sum() + (tangent * weights[1]).sum()
    inputs = [*leaves, *(t for t in changes if t is not None)]
    grads = torch.autograd.grad(total, inputs, materialize_grads=True)
    return [x.detach() for x in (output, tangent, *grads)]


@pytest.mark.parametrize("seed", range(60))
def test_all_derivatives_are_those_of_plain_products(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over shapes, masks, causality, scales, shared heads, missing tangents and sizes of a tile, in float64."""
    draw = Random(seed)
    torch.manual_seed(seed)
    rows, keys, width, out_width = *draw.choices(LENGTHS, k=2), draw.randint(1, 9), draw.randint(1, 9)
    gqa = draw.random() < 0.3
    batch = draw.choice([(2, 4), (1, 2)] if gqa else [(), (3,), (2, 4), (2, 2, 2)])
    shared = (*batch[:-1], batch[-1] // 2) if gqa else batch
    shapes = (*batch, rows, width), (*shared, keys, width), (*shared, keys, out_width)
    parts = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    which = draw.choice([(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
    tangents = [torch.randn_like(x) if w else None for x, w in zip(parts, which, strict=True)]
    mask_shape = (*draw.choice([batch, (1,) * len(batch), ()]), draw.choice([1, rows]), draw.choice([1, keys]))
    masks = {
        "none": None,
        "boolean": torch.rand(mask_shape) > 0.4,
        "added": torch.randn(mask_shape, dtype=torch.float64),
    }
    kind = draw.choice(list(masks))
    call = {
        "attn_mask": masks[kind],
        "is_causal": kind == "none" and draw.random() < 0.5,
        "scale": draw.choice([None, 0.7]),
        "enable_gqa": gqa,
    }
    monkeypatch.setitem(module.TILE, "cpu", draw.choice([1, 70 * keys, module.TILE["cpu"]]))
    results = [derivatives(function, parts, tangents, call) for function in (attention, plain)]
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mask", [torch.zeros(1, 2, 3, 5, dtype=torch.bool), torch.full((3, 5), -torch.inf)])
def test_a_row_that_sees_nothing_is_zero_as_torch_has_it(mask: Tensor) -> None:
    parts = [torch.randn(1, 2, n, 4) for n in (3, 5, 5)]
    call = {"attn_mask": mask, "is_causal": False, "scale": None, "enable_gqa": False}
    with sdpa_kernel(SDPBackend.MATH):
        assert not F.scaled_dot_product_attention(*parts, attn_mask=mask).any()
    assert not any(x.any() for x in derivatives(attention, parts, [torch.randn_like(x) for x in parts], call))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)])
def test_lower_precision_rounds_at_the_ends_alone(dtype: torch.dtype, limit: float) -> None:
    """One rounding of the inputs, which the reference has too, and one of the result: nothing is summed in halves."""
    torch.manual_seed(0)
    parts, tangents = ([torch.randn(1, 2, 300, 64).to(dtype) for _ in range(3)] for _ in range(2))
    call: dict[str, Any] = {"attn_mask": None, "is_causal": False, "scale": None, "enable_gqa": False}
    ours = derivatives(attention, parts, list(tangents), call)
    wide = [[x.double() for x in group] for group in (parts, tangents)]
    exact = derivatives(plain, wide[0], list(wide[1]), call)
    for a, b in zip(ours[:2], exact[:2], strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < limit / 2


def test_func_transforms_compose() -> None:
    """torch.func.jvp, and the forward derivative of a gradient."""
    torch.manual_seed(0)
    q, k, v, dq = torch.randn(4, 1, 2, 7, 4, dtype=torch.float64)

    def energy(attend: Any) -> Any:
        return lambda q: attend(q, k, v).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        torch_own = F.scaled_dot_product_attention
        expected = torch.func.jvp(lambda q: torch_own(q, k, v), (q,), (dq,))
        hessian = torch.autograd.functional.hvp(energy(torch_own), q, dq)[1]
    for a, b in zip(torch.func.jvp(lambda q: attention(q, k, v), (q,), (dq,)), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    ours = torch.func.jvp(torch.func.grad(energy(attention)), (q,), (dq,))[1]
    assert torch.allclose(ours, hessian, atol=1e-12)


def test_dropout_and_a_learned_mask_go_by_plain_products() -> None:
    q, k, v, dq = torch.randn(4, 1, 2, 7, 4)
    bias = torch.randn(7, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(attention(q, k, v, bias).sum(), bias)
    assert grad.abs().sum() > 0
    with forward_ad.dual_level():
        torch.manual_seed(3)
        out = forward_ad.unpack_dual(attention(forward_ad.make_dual(q, dq), k, v, dropout_p=0.5))
    torch.manual_seed(3)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.allclose(out.primal, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), atol=1e-6)
    assert out.tangent is not None and out.tangent.any()
