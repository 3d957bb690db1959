"""Tensors of which each process holds a share: the DTensors of torch's FSDP2, beside ordinary ones.

Nothing of torch.distributed is imported here before there is one, which takes a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PIECE = 2**26
"""Bytes of the weights whose moments or averages are on the device together, where these are in host memory."""


def is_divided(tensor: Any) -> bool:
    """Whether each process holds a share of the tensor."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Any) -> Tensor:
    """What this process holds: its share of a divided tensor, any other itself; a change of it is one of the tensor."""
    part: Tensor = tensor.to_local() if is_divided(tensor) else tensor
    return part


def put_together(tensor: Any) -> Tensor:
    """A divided tensor as a whole one, for which all processes must ask; any other as it is."""
    whole: Tensor = tensor.full_tensor() if is_divided(tensor) else tensor
    return whole


def divided_like(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor that every process has, divided as the other one is, if that is."""
    if not is_divided(like) or is_divided(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def in_kinds(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The divided tensors and the others, which torch's operators on lists take apart; without empty lists."""
    kinds: dict[bool, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(is_divided(tensor), []).append(tensor)
    return list(kinds.values())


def in_pieces(tensors: Iterable[Tensor]) -> list[list[Any]]:
    """The tensors in their order, in lists of at most PIECE bytes or of one tensor."""
    pieces, room = list[list[Any]](), -1
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if size > room:
            pieces.append([])
            room = PIECE
        pieces[-1].append(tensor)
        room -= size
    return pieces


def approach(tensors: Iterable[Tensor], ends: Iterable[Tensor], share: float) -> None:
    """Each tensor goes that share of the way to its end, in place; both are divided alike."""
    moving, ends = list(map(own_part, tensors)), iter(map(own_part, ends))
    for piece in in_pieces(moving):  # of what is in host memory, a piece is on the device at a time
        torch._foreach_lerp_(piece, [next(ends) for _ in piece], share)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm () of all tensors together, of divided ones over all processes, which must all ask for it."""
    tensors = list(tensors)
    shares = [own_part(tensor) for tensor in tensors if is_divided(tensor)]
    norm = torch.nn.utils.get_total_norm([tensor for tensor in tensors if not is_divided(tensor)])
    if not shares:
        return norm
    square = torch.nn.utils.get_total_norm(shares).square()
    torch.distributed.all_reduce(square)
    return (square + norm.to(square).square()).sqrt()
