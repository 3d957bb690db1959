"""`core.attention_choice` for networks and pipelines of diffusers, whose own ways of choosing give way meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.models import attention_processor as processors
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from torch import nn

from diffdistill.core.attention_choice import attention_by, check_attention, check_choice

_FROM_XFORMERS: dict[type, type] = {
    processors.XFormersAttnProcessor: processors.AttnProcessor2_0,
    processors.XFormersAttnAddedKVProcessor: processors.AttnAddedKVProcessor2_0,
    processors.XFormersJointAttnProcessor: processors.JointAttnProcessor2_0,
}


@contextmanager
def attention_of(model: Any, choice: str) -> Iterator[None]:
    """Attention is computed by `choice` (`core.attention_choice.CHOICES`) inside the block, whoever calls for it.

    `model` is a pipeline or a module. What it has of its own, set by diffusers' `set_attention_backend`,
    `enable_xformers_memory_efficient_attention` or DIFFUSERS_ATTN_BACKEND, stands back inside and is as it was after,
    also after an exception. Raises UserError for another choice, or one that the model's device or type lacks.
    """
    check_choice(choice)
    modules = [module for part in _parts(model) for module in part.modules()]
    weights = (p for module in modules for p in module.parameters(recurse=False) if p.is_floating_point())
    if (weight := next(weights, None)) is not None:
        check_attention(choice, weight.device, weight.dtype)
    with ExitStack() as stack:
        if _AttentionBackendRegistry.get_active_backend()[0] != AttentionBackendName.NATIVE:
            stack.enter_context(attention_backend("native"))
        for module in modules:
            processor: Any = getattr(module, "processor", None)
            # Its own backend, if it has one, goes before the active one.
            if hasattr(processor, "__dict__") and vars(processor).get("_attention_backend") is not None:
                stack.callback(setattr, processor, "_attention_backend", processor._attention_backend)
                processor._attention_backend = None
            if (plain := _FROM_XFORMERS.get(type(processor))) is not None:
                stack.callback(setattr, module, "processor", processor)
                module.processor = plain()
        stack.enter_context(attention_by(choice))
        yield


def _parts(model: Any) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    return [part for part in model.components.values() if isinstance(part, nn.Module)]
