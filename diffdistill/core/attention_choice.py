"""Which attention networks compute inside a block, chosen where all of them meet it.

Networks call `torch.nn.functional.scaled_dot_product_attention`, those of diffusers and transformers among them. A mode
of torch's takes this call over, in this thread and inside the block alone: no network and no setting of torch changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffdistill.core.attention import attention, for_each_query, multi_head_attention
from diffdistill.errors import UserError

AttentionChoice = Literal["auto", "sdpa", "xformers", "jvp", "math"]
"""`sdpa`: torch's kernels, fused where they can be; `xformers`: its own; `jvp`: `core.attention`, in tiles, with a
forward derivative; `math`: torch's plain products of all queries by all keys. Under a Jacobian-vector product all but
`math` are `jvp`, since fused kernels have no forward derivative. `auto` is `sdpa`, where torch takes what fits a call
best: flash attention, or the kernel that it has from xformers.
"""
CHOICES: tuple[str, ...] = get_args(AttentionChoice)

_TYPES = {
    "xformers": (torch.float16, torch.bfloat16, torch.float32),
    "jvp": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
_CHOICE: ContextVar[str] = ContextVar("attention", default="auto")


@torch.compiler.assume_constant_result
def attention_choice() -> str:
    """That of the innermost block of this thread; a compiled product keeps the one that it was compiled under."""
    return _CHOICE.get()


@contextmanager
def attention_by(choice: str) -> Iterator[None]:
    """Attention is computed by `choice` inside the block, and as before after it, also after an exception.

    Blocks can be nested, the inner one holds. Where xformers has no form of a call (its own kinds of heads, CPU, double
    precision), it is torch's. Raises UserError for what is no choice.
    """
    check_choice(choice)
    token = _CHOICE.set(choice)
    try:
        with ExitStack() as stack:
            # Without a block around it torch's own needs no mode.
            if choice in _REPLACED or token.old_value in _REPLACED:
                stack.enter_context(Replaced(_REPLACED.get(choice, _TORCH)))
            yield
    finally:
        _CHOICE.reset(token)


def check_choice(choice: str) -> None:
    """UserError for what is no choice."""
    if choice not in CHOICES:
        raise UserError(f"attention: {choice!r} is not one of {', '.join(CHOICES)}")


def check_attention(choice: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """UserError for what is no choice, or cannot be had on the device in this type."""
    check_choice(choice)
    if choice in _TYPES and dtype not in _TYPES[choice]:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _TYPES[choice])
        raise UserError(f"attention: {choice} takes {kinds}, and the weights are {str(dtype)[6:]}; use sdpa")
    if choice == "xformers":
        require_xformers(device)


def require_xformers(device: torch.device) -> None:
    """UserError where xformers is not installed or has nothing for the device."""
    try:
        ops = import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError) as error:  # not there, or built for another torch
        reason = str(error).splitlines()[0]
        raise UserError(
            f"attention: xformers cannot be used ({reason}); pip install 'diffdistill[xformers]', or use sdpa"
        ) from None
    if device.type != "cuda":
        raise UserError(f"attention: xformers runs on CUDA only, and the model is on {device.type}; use sdpa")
    try:
        ops.memory_efficient_attention(*torch.zeros(3, 1, 8, 1, 64, device=device, dtype=torch.float16))
    except NotImplementedError:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"attention: this build of xformers has no kernel for {name}; use sdpa") from None


class Replaced(TorchFunctionMode):
    """Calls of torch's functions go to what replaces them, inside the block and in this thread."""

    def __init__(self, replaced: dict[Any, Callable[..., Any]]):
        super().__init__()
        self.replaced = replaced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.replaced.get(func, func)(*args, **(kwargs or {}))


def _torch(*args: Any, **kwargs: Any) -> Any:
    """Torch's own, past the blocks around this one."""
    with torch._C.DisableTorchFunction():
        return F.scaled_dot_product_attention(*args, **kwargs)


def _as_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the type that torch's own would take them in."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _math(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    # The operator itself: torch's setting of which kernels are allowed is one for all threads.
    query, key, value = _as_autocast(query, key, value)
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # which it would add
        attn_mask = query.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, -torch.inf)
    return torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _jvp(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return attention(*_as_autocast(query, key, value), *args, **kwargs)


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    q, k, v = _as_autocast(query, key, value)
    if enable_gqa and q.ndim == 4:
        k, v = (for_each_query(q, x) for x in (k, v))
    fits = q.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and q.dtype in _TYPES["xformers"]
    if fits and not (attn_mask is not None and attn_mask.requires_grad):
        ops = import_module("xformers.ops")
        bias = ops.LowerTriangularMask() if is_causal else None if attn_mask is None else _bias(attn_mask, q, k)
        try:
            heads_after = (x.transpose(1, 2) for x in (q, k, v))
            out = ops.memory_efficient_attention(*heads_after, attn_bias=bias, p=dropout_p, scale=scale)
        except NotImplementedError:  # no operator for such heads, or on this device
            return _torch(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        out = out.transpose(1, 2)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            out = out.masked_fill(~attn_mask.any(-1, keepdim=True), 0)
        return out
    return _torch(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """(B, H, L, S) to be added, in rows of a multiple of eight in memory, as xformers takes it."""
    rows, keys = query.shape[2], key.shape[2]
    bias = query.new_zeros(*query.shape[:2], rows, -(-keys // 8) * 8)[..., :keys]
    return bias.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else bias.copy_(mask)


_TORCH: dict[Any, Callable[..., Any]] = {F.scaled_dot_product_attention: _torch}
_REPLACED: dict[str, dict[Any, Callable[..., Any]]] = {
    "xformers": {F.scaled_dot_product_attention: _xformers},
    "jvp": {F.scaled_dot_product_attention: _jvp, F.multi_head_attention_forward: multi_head_attention},
    "math": {F.scaled_dot_product_attention: _math, F.multi_head_attention_forward: multi_head_attention},
}
