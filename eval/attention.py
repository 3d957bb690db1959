"""Which kernels compute attention inside a block, with everything as it was after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from diffusers.models import attention_processor as processors
from diffusers.models.attention_dispatch import attention_backend
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.errors import UserError

BACKENDS = ("auto", "sdpa", "xformers", "math")

_KERNELS = [kind for name, kind in SDPBackend.__members__.items() if name != "ERROR"]

_TO_XFORMERS: dict[type, type] = {
    processors.AttnProcessor: processors.XFormersAttnProcessor,
    processors.AttnProcessor2_0: processors.XFormersAttnProcessor,
    processors.AttnAddedKVProcessor: processors.XFormersAttnAddedKVProcessor,
    processors.AttnAddedKVProcessor2_0: processors.XFormersAttnAddedKVProcessor,
    processors.JointAttnProcessor2_0: processors.XFormersJointAttnProcessor,
}
_FROM_XFORMERS: dict[type, type] = {
    processors.XFormersAttnProcessor: processors.AttnProcessor2_0,
    processors.XFormersAttnAddedKVProcessor: processors.AttnAddedKVProcessor2_0,
    processors.XFormersJointAttnProcessor: processors.JointAttnProcessor2_0,
}


@contextmanager
def attention(pipeline: Any, backend: str) -> Iterator[None]:
    """`sdpa`: torch's kernels, fused where they can be; `math`: torch's plain products; `xformers`; `auto`: sdpa.

    `pipeline` is one of diffusers or a module; nothing of it or of torch's and diffusers' settings stays changed, nor
    after an exception. Blocks can be nested, the inner one holds. With xformers an attention that it has no form of
    keeps torch's kernels: text encoders', and those of diffusers' `Attention` whose queries and keys are normalized or
    whose processor is its model's own. Raises UserError for another backend, or xformers where it cannot run.
    """
    if backend not in BACKENDS:
        raise UserError(f"attention: {backend!r} is not one of {', '.join(BACKENDS)}")
    modules = [module for part in _parts(pipeline) for module in part.modules()]
    if backend == "xformers":
        require_xformers({p.device.type for module in modules for p in module.parameters(recurse=False)})
    own = [getattr(module, "processor", None) for module in modules]
    dispatched: dict[int, Any] = {id(p): p for p in own if hasattr(p, "_attention_backend")}
    swapped = _swaps(modules, _TO_XFORMERS if backend == "xformers" else _FROM_XFORMERS)
    if backend == "xformers" and not dispatched and not swapped:
        raise UserError(f"attention: xformers has no form of any attention in {type(pipeline).__name__}; use sdpa")
    with ExitStack() as stack:
        stack.enter_context(attention_backend("xformers" if backend == "xformers" else "native"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH if backend == "math" else _KERNELS))
        for processor in dispatched.values():
            # Its own choice, if it has one, goes before the active backend.
            chosen = vars(processor).get("_attention_backend")
            if chosen is not None:
                processor._attention_backend = None
                stack.callback(setattr, processor, "_attention_backend", chosen)
        for module, processor in swapped:
            stack.callback(setattr, module, "processor", module.processor)
            module.processor = processor
        yield


def _parts(pipeline: Any) -> list[nn.Module]:
    if isinstance(pipeline, nn.Module):
        return [pipeline]
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _swaps(modules: list[nn.Module], forms: dict[type, type]) -> list[tuple[Any, Any]]:
    """Attention modules and the processors that they get."""
    pairs: list[tuple[Any, Any]] = []
    for module in modules:
        if isinstance(module, processors.Attention) and (form := forms.get(type(module.processor))) is not None:
            # diffusers' plain form for xformers leaves the norms of queries and keys out.
            if form is processors.XFormersAttnProcessor and (module.norm_q is not None or module.norm_k is not None):
                continue
            pairs.append((module, form()))
    return pairs


def require_xformers(devices: set[str]) -> None:
    """UserError where xformers cannot run on devices of these types."""
    try:
        import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError) as error:  # not there, or built for another torch
        reason = str(error).splitlines()[0]
        raise UserError(
            f"attention: xformers cannot be used ({reason}); pip install 'diffdistill[xformers]', or use sdpa"
        ) from None
    if devices != {"cuda"}:
        reason = ", ".join(sorted(devices - {"cuda"})) or "no device"
        raise UserError(f"attention: xformers runs on CUDA only, and the model is on {reason}; use sdpa")
