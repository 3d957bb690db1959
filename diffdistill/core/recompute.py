"""Gradient checkpointing that carries tangents: a part of a network whose activations the backward pass makes again.

`torch.utils.checkpoint` fails under forward-mode differentiation, and what it would keep of the tangents is as large as
what it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from diffdistill.core.attention_choice import attention_choice
from diffdistill.core.divided import is_divided
from diffdistill.core.jvp import dual, forward_derivatives
from diffdistill.errors import UserError


def recomputed(function: Callable[..., Any], args: Sequence[Any], parameters: Iterable[Tensor]) -> Any:
    """`function(*args)`, of which the graph keeps the inputs alone, for the output and for its tangent.

    `args` and the result are tensors in any nesting of tuples, lists and dicts. `parameters` are the tensors that the
    function reads besides and whose gradients are wanted. Dropout falls on the same units the second time.
    """
    leaves, spec = tree_flatten(tuple(args))
    duals = [forward_ad.unpack_dual(leaf) if _floats(leaf) else (leaf, None) for leaf in leaves]
    if not torch.is_grad_enabled() or all(tangent is None for _, tangent in duals):
        return checkpoint(function, *args, use_reentrant=False)
    trained = [p for p in parameters if p.requires_grad]
    if any(map(is_divided, trained)):  # torch gathers them where the function runs, and the gradients would be lost
        raise UserError(
            "gradient_checkpointing: networks that FSDP divides have no gradients of recomputed exact derivatives; "
            "take --derivative central"
        )
    call = _Call(function, spec, [tangent is not None for _, tangent in duals], len(trained))
    outputs = _Recomputed.apply(call, *(p for p, _ in duals), *(t for _, t in duals if t is not None), *trained)
    results = [
        dual(output, tangent) if tangent is not None else output
        for output, tangent in zip(outputs[::2], outputs[1::2], strict=True)
    ]
    return tree_unflatten(results, call.out_spec)


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class _Call:
    """The function of primals and tangents, run twice in the same circumstances."""

    def __init__(self, function: Callable[..., Any], spec: Any, moved: list[bool], trained: int):
        self.function = function
        self.spec = spec
        self.moved = moved  # which leaves have a tangent
        self.trained = trained
        self.out_spec: Any = None
        self.devices = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_initialized() else []
        self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]
        self.attention = attention_choice()  # which a backward pass in a thread of its own does not see
        self.precision = {
            kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in ("cpu", "cuda")
        }

    def outputs(self, inputs: Sequence[Any]) -> list[Any]:
        """(output, tangent or None) of each leaf of the result, one after the other, inside a dual level."""
        primals, tangents = inputs[: len(self.moved)], iter(inputs[len(self.moved) :])
        leaves = [dual(p, next(tangents)) if moves else p for p, moves in zip(primals, self.moved, strict=True)]
        with forward_ad._set_fwd_grad_enabled(True):
            flat, self.out_spec = tree_flatten(self.function(*tree_unflatten(leaves, self.spec)))
            parts = [forward_ad.unpack_dual(leaf) if _floats(leaf) else (leaf, None) for leaf in flat]
        return [value for part in parts for value in part]

    def again(self, inputs: Sequence[Any]) -> list[Any]:
        """The same once more, outside of any dual level."""
        with torch.random.fork_rng(self.devices), forward_derivatives(self.attention), forward_ad.dual_level():
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            (cpu, on), (cuda, on_cuda) = self.precision["cpu"], self.precision["cuda"]
            with torch.autocast("cpu", cpu, enabled=on), torch.autocast("cuda", cuda, enabled=on_cuda):
                return self.outputs(inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Any) -> tuple[Any, ...]:
        used = inputs[: len(inputs) - call.trained]
        ctx.call, ctx.plain = call, [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.set_materialize_grads(False)
        return tuple(call.outputs(used))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        trained = ctx.call.trained
        inputs = [
            (x.detach().requires_grad_(x.requires_grad) if place < len(ctx.plain) - trained else x)
            if isinstance(x, Tensor)
            else ctx.plain[place]
            for place, x in enumerate(ctx.saved_tensors)
        ]
        with torch.enable_grad():
            outputs = ctx.call.again(inputs[: len(inputs) - trained])
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and isinstance(output, Tensor) and output.requires_grad
        ]
        places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
        results: list[Tensor | None] = [None] * len(inputs)
        if pairs and places:
            ends, cotangents = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(ends, [inputs[i] for i in places], cotangents, allow_unused=True)
            for i, gradient in zip(places, gradients, strict=True):
                results[i] = gradient
        return None, *results
