"""A network's forward derivative against two others, module by module: double VJP, and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffdistill.core.attention_choice import attention_by
from diffdistill.core.jvp import jvp
from diffdistill.errors import UserError
from diffdistill.rng import seeded

STEPS = (4e-3, 4e-4)
"""Of the differences, in units of an input of unit size; the second for a time in [0, 1] that is multiplied by 1000."""
LIMITS = {"double VJP": 1e-4, "differences": 0.05}
"""The relative error in float32 above which a tangent is wrong."""


@dataclass(frozen=True)
class ModuleTangent:
    """How far a module's tangent at its own inputs is from the others, relatively; None: that one cannot be had."""

    name: str  #: dotted, "" for the whole
    kind: str  #: its class
    double_vjp: float | None
    differences: float | None
    problem: str = ""  #: why there is no tangent

    @property
    def ok(self) -> bool:
        """Whether there is a tangent and it agrees with all that can be had."""
        errors = {"double VJP": self.double_vjp, "differences": self.differences}
        return not self.problem and all(error is None or error <= LIMITS[name] for name, error in errors.items())


def module_tangents(network: nn.Module, call: Callable[[], object], seed: int = 0) -> Iterator[ModuleTangent]:
    """The tangents of the network and of all modules in it that `call` reaches, each after those that it consists of.

    So the first that is not `ok` is where the fault lies. `call` runs the network once; each module is judged at the
    inputs of its first call, along a random direction, with the same dropout in all passes. It takes about ten passes
    for each level of modules inside modules. Weights and inputs are to be float32 or better.
    """
    names = {module: name for name, module in network.named_modules()}
    rows: list[ModuleTangent] = []
    judged: set[nn.Module] = set()
    busy = False

    def judge(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal busy
        if busy or module in judged:
            return
        judged.add(module)
        busy = True
        try:
            row = _judged(module, names[module], args, kwargs, seed + len(rows))
        finally:
            busy = False
        if row is not None:
            rows.append(row)

    with torch.no_grad(), _hooked(names, judge):
        call()
    yield from rows


@contextmanager
def _hooked(modules: Any, hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _judged(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> ModuleTangent | None:
    """None for a module without inputs or outputs that could have a tangent."""
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not places:
        return None
    primals = [leaves[i].detach() for i in places]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for place, value in zip(places, inputs, strict=True):
            filled[place] = value
        with seeded(seed, primals[0].device):
            positional, named = tree_unflatten(filled, spec)
            flat, _ = tree_flatten(module(*positional, **named))
        return tuple(part for part in flat if isinstance(part, Tensor) and part.is_floating_point())

    draw = torch.Generator().manual_seed(seed)
    tangents = [
        (torch.randn(p.shape, generator=draw) * p.square().mean().sqrt().clamp(1e-3, 1).cpu()).to(p) for p in primals
    ]
    kind = type(module).__name__
    try:
        outputs, along = jvp(function, primals, tangents)
    except UserError as error:
        return ModuleTangent(name, kind, None, None, str(error).removeprefix("derivative: "))
    if not outputs:
        return None
    gap = min(_apart(along, _difference(function, primals, tangents, step)) for step in STEPS)
    try:
        double_vjp = _apart(along, _double_vjp(function, primals, tangents))
    except RuntimeError:  # no second derivative
        return ModuleTangent(name, kind, None, gap)
    return ModuleTangent(name, kind, double_vjp, gap)


def _difference(function: Any, primals: Sequence[Tensor], tangents: Sequence[Tensor], step: float) -> list[Tensor]:
    after, before = (function(*(p + h * t for p, t in zip(primals, tangents, strict=True))) for h in (step, -step))
    return [(a - b) / (2 * step) for a, b in zip(after, before, strict=True)]


def _double_vjp(function: Any, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """The tangent by reverse mode alone: the VJP is linear in its cotangent, and its own VJP there is the product."""
    with torch.enable_grad(), attention_by("math"):
        inputs = [p.clone().requires_grad_() for p in primals]
        outputs = function(*inputs)
        reached = [output for output in outputs if output.requires_grad]
        if not reached:
            return [torch.zeros_like(output) for output in outputs]
        cotangents = [torch.zeros_like(output, requires_grad=True) for output in reached]
        pulled = torch.autograd.grad(reached, inputs, cotangents, create_graph=True, materialize_grads=True)
        linear = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g.requires_grad]
        ends, along = zip(*linear, strict=True)
        changes = iter(torch.autograd.grad(ends, cotangents, along, materialize_grads=True))
    return [next(changes) if output.requires_grad else torch.zeros_like(output) for output in outputs]


def _apart(tangent: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    gap, size = (
        sum(float(part.double().square().sum()) for part in parts) ** 0.5
        for parts in ([a - b for a, b in zip(tangent, other, strict=True)], other)
    )
    return gap / size if size else gap
