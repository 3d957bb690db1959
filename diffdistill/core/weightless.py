"""Networks whose tensors have shapes and no values: what a call would hold in memory and compute, without doing it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten
_DEVICE = torch.ops.prim.device.default


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **named: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **named: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FLOPS: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Of torch's operators that its own counter does not know."""


def _scalar(tensor: Tensor) -> bool | float:
    """A number for one that has none: true, so that what is tested is in order, and 1."""
    return True if tensor.dtype == torch.bool else 1.0


def filled(tensor: Tensor) -> Tensor:
    """The tensor itself where it has values, zeros like it where it has none."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with the places of a mask for the mask, whose values say how many there are."""
    found: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found += index.nonzero().unbind(1) if index is not None and is_mask else [index]
    return found


class Weightless(TorchDispatchMode):
    """Inside the block, whatever is computed with a tensor without values has none either; all else is as ever.

    `bare(modules)` takes the values from modules. Then `held` is the number of bytes that the tensors made inside the
    block take now, `most` the highest it has been since `restart`, and `flops` the floating-point operations since
    then (two for a multiplication and an addition), of products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.held = self.most = self.flops = 0
        self._bytes: dict[int, int] = {}  # by storage
        self._bared: dict[int, tuple[Tensor, Any]] = {}  # what had values, and what stands for it

    def restart(self) -> int:
        """Counts anew from here; what is held now."""
        self.most, self.flops = self.held, 0
        return self.held

    def take(self, size: int) -> None:
        """So many bytes more are held, besides tensors that are made in the block; or fewer."""
        self.held += size
        self.most = max(self.most, self.held)

    def bare(self, modules: Iterable[nn.Module]) -> None:
        """The parameters and buffers of the modules have no values from here on; what they share stays shared."""
        for part in itertools.chain.from_iterable(module.modules() for module in modules):
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or isinstance(tensor, FakeTensor):
                        continue
                    if id(tensor) not in self._bared:
                        self._bared[id(tensor)] = tensor, self._without(tensor)
                    tensors[name] = self._bared[id(tensor)][1]
            for name, value in vars(part).items():  # rotary tables, which some networks keep beside their buffers
                table = value[0] if isinstance(value, list) and value else value
                if isinstance(table, Tensor) and table.is_meta and not isinstance(table, FakeTensor):
                    vars(part)[name] = tree_map_only(Tensor, self._without, value)

    def _without(self, tensor: Tensor) -> Any:
        # As on a CPU, where everything else is: kernels are chosen as there.
        fake = FakeTensor(self.fake, tensor.detach().to("meta"), torch.device("cpu"))
        self._bytes[fake.untyped_storage()._cdata] = 0  # views of it hold nothing more
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def __torch_dispatch__(
        self, operator: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator is _DEVICE and isinstance(args[0], FakeTensor):  # two thirds of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        if operator is _ATEN._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _scalar(args[0])
        bare = [isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(bare):
            return operator(*args, **kwargs)  # of schedules, say, whose values decide what is done
        if operator is _ATEN.index.Tensor:
            args = (args[0], _places(args[1]))
        if not all(bare):
            args, kwargs = tree_map_only(Tensor, self._without_values, (args, kwargs))
        with self.fake:
            result = operator(*args, **kwargs)
        count = _FLOPS.get(operator._overloadpacket) or flop_registry.get(operator._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=result))
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self._hold(leaf.untyped_storage())
        return result

    def _without_values(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes()
        self.take(storage.nbytes())
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.held -= self._bytes.pop(key)
