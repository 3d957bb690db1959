"""The gradients of the losses of sCM and MeanFlow against float64, torch's plain attention and double-VJP."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.exact.stock import Case, middle
from diffdistill.methods import mean_flow, scm
from diffdistill.players.lora import LoraSettings
from diffdistill.players.recomputing import checkpoint_activations
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold import tangent
from diffdistill.scaffold.tangent import Point, TangentMethod
from tests.families import test_families
from tests.families.test_tangents import apart, double_vjp

made = test_families.made
OPTIONS: dict[str, Any] = {"mode": "distillation", "derivative": "exact"}
METHODS: dict[str, Callable[[Teacher], TangentMethod]] = {
    "scm": lambda teacher: scm.SCM(teacher, scm.Config(**OPTIONS, tangent_warmup=1)),
    "mean_flow": lambda teacher: mean_flow.MeanFlow(teacher, mean_flow.Config(**OPTIONS)),
}


def method_of(case: Case, name: str, kind: str, dtype: torch.dtype) -> TangentMethod:
    """Its student is away from the teacher, and the same in every precision; its dropout is off."""
    denoiser = copy.deepcopy(case.teacher.denoiser).to(dtype)
    teacher = replace(case.teacher, denoiser=denoiser, lora={"student": LoraSettings(2)} if kind == "lora" else {})
    torch.manual_seed(1)
    method = METHODS[name](teacher)
    for k, p in enumerate(p for p in method.student.parameters() if p.requires_grad):
        draw = torch.Generator().manual_seed(k)
        with torch.no_grad():
            p += (0.1 * torch.randn(p.shape, generator=draw)).to(p)
    for module in (*method.student.modules(), *denoiser.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return method


def gradient(method: TangentMethod, case: Case, dtype: torch.dtype) -> Tensor:
    """(p,) of the loss at two points, at which the derivative is taken."""
    torch.manual_seed(0)
    x, t, cond = middle(case, 2)
    x, cond = x.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
    with torch.no_grad():
        v = method.teacher(x, t, cond).v
    loss = method.regression(10, Point(x, t, v, t / 3, cond)).loss
    weights = [p for p in method.student.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, weights, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("loss", METHODS)
@pytest.mark.parametrize("name", ["stable_diffusion", "dit", "sd3"])
def test_the_gradient_of_the_loss(
    made: Callable[..., Case], name: str, loss: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made(name)
    method = method_of(case, loss, kind, torch.float32)
    plain = gradient(method, case, torch.float32)
    checkpoint_activations(method.student.network)
    recomputed = gradient(method, case, torch.float32)

    def slow(function: Any, primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            return function(*primals).detach(), double_vjp(function, primals, tangents).detach()

    monkeypatch.setattr(tangent, "jvp", slow)
    exact = method_of(case, loss, kind, torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradient(exact, case, torch.float64)
    assert expected.dtype == torch.float64
    assert apart(plain.double(), expected) <= 1e-5
    assert apart(recomputed.double(), expected) <= 1e-5
