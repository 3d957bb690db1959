"""Exact checks of a method: what is expected, what was got, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One row of `diffdistill verify`.

    kind 'equal' holds when the error is at most the tolerance; 'differs', a negative test, when the error is
    greater: a known mistake must be caught.
    """

    name: str
    expected: float
    got: float
    error: float
    tolerance: float
    kind: Literal["equal", "differs"] = "equal"

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance if self.kind == "equal" else self.error > self.tolerance


def equal(name: str, expected: Tensor | float, got: Tensor | float, tolerance: float, *, scale: float = 0.0) -> Check:
    """The relative error |got - expected| / max(|expected|, scale) in the l2 norm is within the tolerance.

    `scale` is what the quantity is measured against where the expected value is zero.
    """
    return _check(name, expected, got, tolerance, scale, "equal")


def differs(name: str, expected: Tensor | float, got: Tensor | float, tolerance: float, *, scale: float = 0.0) -> Check:
    """The same comparison must fail: `got` comes from a known mistake."""
    return _check(name, expected, got, tolerance, scale, "differs")


def _check(
    name: str, expected: Tensor | float, got: Tensor | float, tolerance: float, scale: float,
    kind: Literal["equal", "differs"],
) -> Check:  # fmt: skip
    want, have = (torch.as_tensor(v, dtype=torch.float64).detach().flatten() for v in (expected, got))
    size = max(float(want.norm()), scale) or 1.0
    error = float((have - want).norm()) / size
    return Check(name, float(want.norm()), float(have.norm()), error, tolerance, kind)


def gradient(loss: Tensor, *parameters: Tensor) -> Tensor:
    """The gradients of a scalar with respect to all parameters, flattened into one vector."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes (n,) and weights (n,) with sum_i w_i f(z_i) = E f(z), z ~ N(0, 1); exact to degree 2n - 1."""
    import numpy

    nodes, weights = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(n))
    return nodes, weights / weights.sum()


def run_checks(checks: Callable[[], Iterable[Check]]) -> list[Check]:
    """All rows, computed in double precision with a fixed seed."""
    torch.manual_seed(0)
    return list(checks())
