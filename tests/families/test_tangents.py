"""Every family's tangent, and what its gradient is, against double-VJP under torch's plain attention."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.jvp import jvp
from diffdistill.exact.stock import Case, middle
from diffdistill.players.lora import LoraSettings, lora_view
from diffdistill.players.recomputing import checkpoint_activations
from tests.families import test_families
from tests.families.test_families import NAMES

made = test_families.made


class Unrounded(TorchFunctionMode):
    """Casts of float32 to bfloat16 round what is passed on, and neither its tangents nor its gradients.

    Kandinsky 5 has its rotary queries and keys in bfloat16 and back. torch's derivative of that rounds too, and not the
    same numbers in forward and in reverse mode; which sums it rounds is all that is left out of the comparison here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and args[1:] == (torch.bfloat16,) and args[0].dtype is torch.float32:
            x = args[0]
            return x + (x.to(torch.bfloat16).to(x) - x).detach()
        return func(*args, **(kwargs or {}))


def layer_norm(
    input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """In plain operations: of torch's own, third derivatives are wrong."""
    dims = tuple(range(-len(shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    normed = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def double_vjp(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """J dx from reverse mode alone: the VJP is linear in its cotangent, and its derivative there is J."""
    inputs = [p.detach().requires_grad_() for p in primals]
    with sdpa_kernel(SDPBackend.MATH), mock.patch.object(functional, "layer_norm", layer_norm):
        output = function(*inputs)
        cotangent = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, inputs, cotangent, create_graph=True, materialize_grads=True)
        along = sum(((g * v.to(g)).sum() for g, v in zip(pulled, tangents, strict=True)), torch.zeros(()))
        return torch.autograd.grad(along, cotangent, create_graph=True)[0]


def problem(case: Case, denoiser: Denoiser) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    x, t, cond = middle(case, 2)

    def function(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t, cond).y

    return function, (x, t), (torch.randn_like(x), torch.ones_like(t))


def apart(a: Tensor, b: Tensor) -> float:
    assert b.isfinite().all() and b.abs().max() > 0
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("name", NAMES)
def test_the_tangent_and_its_gradient_are_those_of_double_vjp(made: Callable[..., Case], name: str) -> None:
    case = made(name)
    denoiser = case.teacher.player("student").eval()
    function, primals, tangents = problem(case, denoiser)
    with Unrounded() if name == "kandinsky5" else nullcontext():
        expected = double_vjp(function, primals, tangents)
        output, tangent = jvp(function, primals, tangents)
        assert apart(tangent, expected) < 1e-5
        with sdpa_kernel(SDPBackend.MATH):
            plain = function(*primals)
        assert apart(output, plain) < 1e-5
        weights = [p for p in denoiser.parameters() if p.requires_grad]
        cotangents = torch.randn_like(output), torch.randn_like(output)
        grads = [
            torch.cat([g.flatten() for g in torch.autograd.grad(outs, weights, cotangents, materialize_grads=True)])
            for outs in ((output, tangent), (plain, expected))
        ]
        assert apart(grads[0], grads[1]) < 1e-5
    if name == "kandinsky5":  # with what its network rounds, too
        rounded = jvp(function, primals, tangents)
        assert torch.equal(rounded[0], output)
        assert apart(rounded[1], double_vjp(function, primals, tangents)) < 1e-5


@pytest.mark.parametrize("name", ["stable_diffusion", "dit", "flux"])
def test_lora_players_have_their_own_tangent(made: Callable[..., Case], name: str) -> None:
    case = made(name)
    denoiser = lora_view(copy.deepcopy(case.teacher.denoiser), LoraSettings(2))
    for p in denoiser.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    function, primals, tangents = problem(case, denoiser)
    output, tangent = jvp(function, primals, tangents)
    assert apart(tangent, double_vjp(function, primals, tangents)) < 1e-5
    teacher, *_ = problem(case, case.teacher.denoiser)
    assert apart(tangent, jvp(teacher, primals, tangents)[1]) > 1e-2
    assert apart(output, teacher(*primals)) > 1e-2


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["stable_diffusion", "dit", "flux", "wan"])
def test_recomputed_activations_change_nothing(made: Callable[..., Case], name: str, kind: str) -> None:
    """Output, tangent and the gradients of both, with dropout; and no more is kept than the inputs of the blocks."""
    case = made(name)
    base = copy.deepcopy(case.teacher.denoiser)
    denoiser = lora_view(base, LoraSettings(2)) if kind == "lora" else case.teacher.player("student")
    for module in denoiser.network.modules() if kind == "full" else base.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    function, primals, tangents = problem(case, denoiser.train())
    weights = [p for p in denoiser.parameters() if p.requires_grad]
    for p in weights if kind == "lora" else []:
        nn.init.normal_(p, std=0.1)
    results, kept = [], []
    for _ in range(2):
        torch.manual_seed(7)
        saved: set[int] = set()

        def keep(tensor: Tensor, saved: set[int] = saved) -> Tensor:
            saved.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output, tangent = jvp(function, primals, tangents)
        cotangents = torch.cos(output.detach()), torch.sin(output.detach())
        grads = torch.autograd.grad((output, tangent), weights, cotangents, materialize_grads=True)
        results.append((output, tangent, torch.cat([g.flatten() for g in grads])))
        kept.append(len(saved))
        checkpoint_activations(denoiser.network)
    for a, b in zip(*results, strict=True):
        assert apart(a, b) < 1e-5
    assert kept[1] < 0.6 * kept[0]
