"""The optimizers of players."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.scaffold.method import Optimizer


def optimizer(
    kind: str, groups: Sequence[Sequence[Tensor]], settings: Optimizer, player: nn.Module
) -> torch.optim.Optimizer:
    """A player's optimizer over groups of its parameters.

    `adamw`: torch's AdamW; `adamw8bit`: that of bitsandbytes, UserError if it is not there; `muon`: torch's Muon for
    matrices, AdamW for the rest.
    """
    parameters = [{"params": list(group)} for group in groups]
    shared: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if kind == "adamw8bit":
        made: torch.optim.Optimizer = _eight_bit()(parameters, **shared)
        return made
    if kind == "muon":
        tables = {id(part.weight) for part in player.modules() if isinstance(part, nn.Embedding)}
        return Muon(parameters, tables, **shared)
    # fused: one kernel over all parameters, 3.6 ms against 13 ms for the loop on a mid-size network
    return torch.optim.AdamW(parameters, **shared, fused=True)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for matrices and kernels of convolutions, AdamW for biases, norms and embeddings.

    A kernel (out, in, h, w) is the matrix (out, in h w). An update is the nearest orthogonal matrix to the momentum, at
    the size of AdamW's (0.2 sqrt(max(out, in h w)); Liu et al. 2025, arXiv:2502.16982, eq. 4), so that rates and weight
    decay mean what they do for AdamW. Matrices with fewer than four rows or columns, as of a network's first and last
    layers, are AdamW's.
    """

    def __init__(self, parameters: list[dict[str, Any]], tables: Container[int], **settings: Any):
        super().__init__(parameters, **settings, fused=True)
        kernels = [p for group in parameters for p in group["params"] if id(p) not in tables and _is_matrix(p)]
        self._matrices = [(p, nn.Parameter(_matrix(p.detach()))) for p in kernels]
        self._muon = None
        if kernels:
            matrices, decay = [matrix for _, matrix in self._matrices], settings["weight_decay"]
            self._muon = torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Both optimizers' step."""
        if self._muon is not None:
            self._muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            for p, matrix in self._matrices:
                matrix.data = _matrix(p)  # again each time: a parameter may lie elsewhere by now
                matrix.grad = None if p.grad is None else _matrix(p.grad)
                self._muon.state[matrix] = self.state[p]  # where a checkpoint looks for it
                p.grad = None  # for AdamW there is nothing to do
            self._muon.step()
        super().step()


def _is_matrix(p: Tensor) -> bool:
    return p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 4


def _matrix(p: Tensor) -> Tensor:
    """A view of a kernel (out, ...) as (out, rest), also where its channels lie last."""
    lies = p if p.is_contiguous() else p.movedim(1, -1)
    return lies.view(len(p), -1)


def _eight_bit() -> Any:
    """The class of AdamW with moments in 8 bits; UserError where its package is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        needs = "needs the package bitsandbytes; pip install 'diffdistill[eight_bit]', or use adamw"
        raise UserError(f"optimizer: adamw8bit {needs}") from None
    return AdamW8bit
