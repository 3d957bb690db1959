"""Networks divided over the processes by torch's FSDP2, block by block; torch gathers a block while it is computed.

Each process holds its share of the weights, gradients, averages and moments as DTensors. What stands outside of the
networks and of the discriminators' heads (a learned weight, layers that LoRA players have besides) is whole in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.divided import put_together
from diffdistill.core.experts import Experts
from diffdistill.errors import UserError
from diffdistill.players.discriminator import DiscriminatorHead


def shard(modules: Iterable[nn.Module], device: torch.device, blocks: frozenset[str] = frozenset()) -> None:
    """Divide all networks in the modules, and heads of discriminators, in place; what is divided already stays.

    Blocks are the modules in a network's lists, the layer that a discriminator reads, and those of the classes that
    diffusers says are not to be split; or those of the classes that `blocks` names. One at a time is moved to the
    device. UserError for a network that is two.
    """
    parts = [part for module in modules for part in module.modules()]
    if any(isinstance(part, Experts) for part in parts):  # processes would wait for one another's blocks
        raise UserError(
            "launcher: FSDP does not divide a network that is two, of which each process calls those for its times; "
            "leave it out, and use LoRA or --offload"
        )
    if any(isinstance(part, Denoiser) and part.lengths is not None for part in parts):
        raise UserError(
            "launcher: FSDP does not divide a network that is called once for each length of prompt, of which each "
            "process has its own; leave it out, and use LoRA or --offload"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in parts:
        if isinstance(part, Denoiser):
            network = network_of(part)
            layer = None if part.feature_layer is None else network.get_submodule(part.feature_layer)
            _shard(network, _blocks(network, layer, blocks), mesh)
        elif isinstance(part, DiscriminatorHead):
            _shard(part, [], mesh)


def network_of(denoiser: Denoiser) -> nn.Module:
    """Its network; of a LoRA player's or one with adapters that which it shares with others."""
    network: nn.Module = getattr(denoiser.network, "base", denoiser.network)
    return network


def _blocks(network: nn.Module, layer: nn.Module | None, named: frozenset[str]) -> list[nn.Module]:
    """Inner ones before those that hold them."""
    classes = named or frozenset(getattr(network, "_no_split_modules", None) or ())
    lists = [child for part in network.modules() if isinstance(part, nn.ModuleList) for child in part]
    listed = set() if named else {id(child) for child in lists if next(child.children(), None) is not None}
    return [
        part
        for part in reversed(list(network.modules()))
        if (type(part).__name__ in classes or id(part) in listed or part is layer)
        and not isinstance(part, nn.ModuleList)
        and next(part.parameters(), None) is not None
    ]


def _shard(root: nn.Module, blocks: Iterable[nn.Module], mesh: Any) -> None:
    if isinstance(root, FSDPModule):
        return
    for p in root.parameters():
        p.data = p.data.contiguous()  # of those that are channels_last
    scalars = {p for p in root.parameters() if p.ndim == 0}
    for module in (*blocks, root):
        if not isinstance(module, FSDPModule):  # a layer that is the root
            fully_shard(module, mesh=mesh, ignored_params=scalars)
            module.register_forward_hook(_closed, always_call=True)


def _closed(module: Any, args: Any, output: Any) -> None:
    # A pass that was left by an exception, once a discriminator's layer was there, is ended as any other: torch would
    # take the next one for a part of it. After a whole pass this does nothing.
    state = module._get_fsdp_state()
    if state._training_state.name == "FORWARD":
        state._post_forward(module, args, None)


def divided_networks(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    """The outermost divided modules in the modules, and of LoRA players their bases."""
    found: dict[int, FSDPModule] = {}
    for part in (part for module in modules for part in module.modules()):
        root = network_of(part) if isinstance(part, Denoiser) else part
        if isinstance(part, Denoiser | DiscriminatorHead) and isinstance(root, FSDPModule):
            found[id(root)] = root
    return list(found.values())


def gather_later(networks: Iterable[FSDPModule]) -> None:
    """None of the networks stays gathered, so that the next pass gathers what has changed since.

    torch keeps the outermost layers of a network after a pass, for a backward pass that may not come.
    """
    for network in networks:
        network.reshard()


def take_part(groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """In what another process puts together of the same groups in the same order."""
    for group in groups.values():
        for tensor in group.values():
            put_together(tensor.detach())
