"""Networks, moments and averages that lie in host memory, and on the device while they are computed with (`--offload`).

What is away keeps its identity, its shape and its device: its storage there has no bytes, as FSDP does it. What is
needed is found by what is used: a module that is called, a weight that a backward pass reads, an operator's arguments.
Whatever comes makes all else of its kind go, so that one network, or one block of one, is there at a time. Only what
has changed is written back. Values are moved and never computed with, so that a training has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.divided import in_pieces
from diffdistill.core.experts import experts_of
from diffdistill.errors import UserError
from diffdistill.training.sharding import network_of

Kind = Literal["none", "optimizer", "model", "group"]


def settled(module: nn.Module, device: torch.device) -> None:
    """Moves the module there, and gives its tensors the beginnings that an allocator gives.

    A tensor that still lies in its file, as safetensors leaves it, begins anywhere, and a CPU's sums round by that: the
    same weights gave other bits under another header, or once they had been away.
    """
    for tensor in (*module.to(device).parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


class Stored:
    """Tensors that come and go together. They are away at first."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device):
        self.tensors, self.here, self._versions = list(tensors), False, list[int]()
        self.hosts: list[Tensor] = []
        for tensor in self.tensors:
            host = torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda", requires_grad=False)
            self.hosts.append(host.copy_(tensor.detach()))
            tensor.data = torch.empty_like(host, device=device, pin_memory=False)
            tensor.untyped_storage().resize_(0)
        self._places = [tensor.data for tensor in self.tensors]

    @property
    def nbytes(self) -> int:
        """What they take where they are."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def fetch(self) -> None:
        """To the device."""
        for tensor, host in zip(self.tensors, self.hosts, strict=True):
            # By storage: no version counts up, so that a graph which has saved them still takes them.
            storage = tensor.untyped_storage()
            storage.resize_(host.untyped_storage().nbytes())
            storage.copy_(host.untyped_storage(), non_blocking=True)
        self._versions = [tensor._version for tensor in self.tensors]
        self.here = True

    def release(self) -> None:
        """From the device, those that have changed there to host memory."""
        for tensor, host, version in zip(self.tensors, self.hosts, self._versions, strict=True):
            if tensor._version != version:
                host.untyped_storage().copy_(tensor.untyped_storage(), non_blocking=False)
            tensor.untyped_storage().resize_(0)
        self.here = False

    def to_host(self, there: bool) -> None:
        """The tensors are those in host memory, or (not `there`) the empty ones on the device again."""
        for tensor, data in zip(self.tensors, self.hosts if there else self._places, strict=True):
            tensor.data = data


class Offload:
    """What a training keeps in host memory: nothing, moments and averages, or networks too.

    A network that several players share is there once. In each kind but `optimizer` the parameters of `modules` that
    are in no network (LoRA's matrices, heads, learned weights) stay on the device.
    """

    def __init__(
        self,
        kind: Kind,
        modules: Iterable[nn.Module],
        device: torch.device,
        store: Callable[[Iterable[Tensor], torch.device], Stored] = Stored,
    ):
        self.kind, self.device, self.store = kind, device, store
        self.networks: list[Stored] = []
        self.states: dict[str, list[Stored]] = {}  #: moments by player, a piece for each group of its optimizer
        self.averages: list[Stored] = []
        self._of: dict[int, Stored] = {}  # by storage
        self._hosted = 0
        if kind in ("model", "group"):
            roots = {id(root): root for module in modules for root in _networks(module)}
            taken: set[int] = set()
            for root in roots.values():
                for parts in _units(root) if kind == "group" else [list(root.modules())]:
                    self._take(parts, taken)

    def _take(self, parts: Sequence[nn.Module], taken: set[int]) -> None:
        """The own tensors of these modules, but for LoRA's matrices, are stored together."""
        owned = [t for part in parts for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]
        lora = {id(t) for part in parts for name, t in part.named_parameters() if ".lora_" in f".{name}"}
        mine = list({id(t): t for t in owned if id(t) not in taken | lora}.values())
        if not mine:
            return
        taken |= {id(t) for t in mine}
        stored = self._hold(mine, self.networks)

        def come(module: nn.Module, args: object) -> None:
            if not stored.here:
                self.use([stored])

        ids = {id(t) for t in mine}
        for part in parts:
            own = (*part._parameters.values(), *part._buffers.values())
            if part is parts[0] or any(id(t) in ids for t in own):
                part.register_forward_pre_hook(come)

    def _hold(self, tensors: Iterable[Tensor], among: list[Stored]) -> Stored:
        stored = self.store(tensors, self.device)
        among.append(stored)
        self._of |= {t.untyped_storage()._cdata: stored for t in stored.tensors}
        return stored

    def hold_average(self, averages: Sequence[Tensor]) -> None:
        """These are stored from now on, unless the kind is none."""
        for piece in in_pieces(averages) if self.kind != "none" else ():
            self._hold(piece, self.averages)

    @property
    def nbytes(self) -> int:
        """What lies in host memory."""
        return sum(stored.nbytes for stored in self._all())

    def _all(self) -> Iterator[Stored]:
        yield from self.networks
        yield from self.averages
        for pieces in self.states.values():
            yield from pieces

    # -- using -------------------------------------------------------------------------------------------------

    def use(self, needed: Sequence[Stored]) -> None:
        """These are on the device, and of all others none."""
        if self._hosted or all(stored.here for stored in needed):
            return
        self.release(needed)
        for stored in needed:
            if not stored.here:
                stored.fetch()

    def release(self, but: Sequence[Stored] = ()) -> None:
        """All but those are in host memory alone."""
        for stored in self._all():
            if stored.here and stored not in but:
                stored.release()

    def holding(self, tensors: Iterable[Any]) -> list[Stored]:
        """What these are stored in, as far as they are."""
        found = (self._of.get(t.untyped_storage()._cdata) for t in tensors)
        return list({id(stored): stored for stored in found if stored is not None}.values())

    def graph(self) -> AbstractContextManager[Any]:
        """A pass inside the block may be followed by a backward pass, for which weights come once more."""
        return saved_tensors_hooks(self._packed, self._unpacked) if self.networks else nullcontext()

    def _packed(self, tensor: Tensor) -> tuple[Stored | None, Tensor]:
        return self._of.get(tensor.untyped_storage()._cdata), tensor.detach()

    def _unpacked(self, packed: tuple[Stored | None, Tensor]) -> Tensor:
        stored, tensor = packed
        if stored is not None:
            self.use([stored])
        return tensor

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside the block whatever operators read comes, without a module that is called."""
        if not self._of:
            yield
            return
        with _OnUse(self):
            yield
        for stored in self.averages:
            if stored.here:
                stored.release()

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Inside the block whatever is stored is a tensor in host memory, to be read and written there."""
        if not self._hosted:
            self.release()
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # copies from host memory may still be under way
            for stored in self._all():
                stored.to_host(True)
        self._hosted += 1
        try:
            yield
        finally:
            self._hosted -= 1
            if not self._hosted:
                for stored in self._all():
                    stored.to_host(False)

    # -- optimizers --------------------------------------------------------------------------------------------

    def groups(self, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
        """As an optimizer has them: pieces, whose moments come one after the other, or all of them in one."""
        return [list(parameters)] if self.kind == "none" else in_pieces(parameters)

    def step(self, player: str, optimizer: torch.optim.Optimizer) -> None:
        """A step of a player's optimizer, a group at a time, each with its moments."""
        if self.kind == "none":
            optimizer.step()
            return
        groups, pieces = optimizer.param_groups, self.states.setdefault(player, [])
        try:
            for k, group in enumerate(groups):
                self.use(self.holding(group["params"]))
                if k < len(pieces):
                    pieces[k].fetch()
                optimizer.param_groups = [group]
                optimizer.step()
                # Which neither torch's fused step does nor one that is no operator.
                increment_version(t for p in group["params"] for t in (p, *_moments(optimizer.state[p])))
                if k < len(pieces):
                    pieces[k].release()
                else:
                    self._store(player, optimizer, group)
        finally:
            optimizer.param_groups = groups

    def _store(self, player: str, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
        moments = [moment for p in group["params"] for moment in _moments(optimizer.state.get(p, {}))]
        self.states.setdefault(player, []).append(self.store(moments, self.device))

    def loaded(self, player: str, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is another, or has other moments, which are stored from here on."""
        self.states.pop(player, None)
        if self.kind != "none" and optimizer.state:
            for group in optimizer.param_groups:
                self._store(player, optimizer, group)


class _OnUse(TorchDispatchMode):
    """Before an operator runs, what it reads or writes comes to the device."""

    def __init__(self, offload: Offload):
        super().__init__()
        self.offload = offload

    def __torch_dispatch__(
        self, operator: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self.offload.use(self.offload.holding(read))
        result = operator(*args, **(kwargs or {}))
        pairs = zip(operator._schema.arguments, args, strict=False)
        written = [arg for spec, arg in pairs if spec.alias_info is not None and spec.alias_info.is_write]
        increment_version(leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor))  # not all operators do
        return result


def _moments(state: Mapping[str, Any]) -> list[Tensor]:
    """An optimizer's tensors of a parameter, without its count of steps."""
    return [value for value in state.values() if isinstance(value, Tensor) and value.ndim]


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    """Those in a module, each without the LoRA or the adapters on it; UserError for one that is compiled."""
    for part in module.modules():
        if isinstance(part, Denoiser):
            network = network_of(part)
            if any(type(inner).__name__ == "OptimizedModule" for inner in network.modules()):
                raise UserError("offload: a network under torch.compile cannot come and go; use none or optimizer")
            experts = experts_of(network)
            yield from [network] if experts is None else experts.children()


def _units(root: nn.Module) -> list[list[nn.Module]]:
    """The modules of a network in groups: each block, and each part that holds none, beginning with what is called.

    Blocks are the modules in a network's outermost lists. What holds blocks is in no group, since it may read its own
    tensors at any time.
    """

    def parted(module: nn.Module) -> Iterator[list[nn.Module]]:
        if not any(isinstance(part, nn.ModuleList) and len(part) for part in module.modules()):
            yield list(module.modules())
            return
        for child in module.children():
            if isinstance(module, nn.ModuleList):
                yield list(child.modules())
            elif not isinstance(child, nn.ParameterList | nn.ParameterDict):  # which nobody calls
                yield from parted(child)

    return list(parted(root))
