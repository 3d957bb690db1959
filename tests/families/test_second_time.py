"""Every family's network takes a second time: it starts as the teacher, hears r, and folds into a stock network."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser, Extra
from diffdistill.core.jvp import jvp
from diffdistill.errors import UserError
from diffdistill.exact.stock import Case, middle
from diffdistill.players.recomputing import checkpoint_activations
from diffdistill.players.scale_input import plain_network
from diffdistill.players.two_times import second_times
from diffdistill.scaffold.tangent import two_time_player
from tests.families import test_families
from tests.families.test_families import NAMES

made = test_families.made


def tangent_with_gradient(student: Denoiser, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The output, its tangent along a direction in (x, t) with r held, and the gradient of both."""
    torch.manual_seed(0)
    x, t, cond = middle(case, 2)

    def function(x: Tensor, t: Tensor) -> Tensor:
        return student(x, t, cond, Extra(r=t.detach() / 2)).y

    output, tangent = jvp(function, (x, t), (torch.randn_like(x), torch.ones_like(t)))
    weights = [p for p in student.parameters() if p.requires_grad]
    ends = (output, tangent), (torch.randn_like(output), torch.randn_like(output))
    gradients = torch.autograd.grad(ends[0], weights, ends[1], materialize_grads=True)
    return output, tangent, torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("name", NAMES)
def test_a_network_with_a_second_time(made: Callable[..., Case], name: str) -> None:
    case = made(name)
    if name in ("chroma", "krea2", "qwen_image21"):  # whose time goes through layers of their own, or the words' too
        with pytest.raises(UserError, match=r"time_input: .* has no layer to which a second time could be added"):
            two_time_player(case.teacher, 2, None)
        return
    teacher, student = case.teacher, two_time_player(case.teacher, 2, None).eval()
    x, t, cond = middle(case, 2)
    same = teacher.player("student").eval()(x, t, cond).y
    assert torch.equal(student(x, t, cond, Extra(r=t / 3)).y, same), "it starts as the teacher"
    for k, layer in enumerate(second_times(student.network)):
        with torch.no_grad():
            draw = torch.Generator().manual_seed(k)
            layer.mlp[-1].weight += 0.1 * torch.randn(layer.mlp[-1].weight.shape, generator=draw)
    heard = student(x, t, cond, Extra(r=0 * t)).y
    assert torch.equal(student(x, t, cond, Extra(r=t)).y, same), "at r = t it stays the teacher"
    # Some of the random networks hardly listen to their time.
    assert not torch.equal(heard, same)
    network = plain_network(student.network)
    assert type(network) is type(teacher.denoiser.network) and not second_times(network)
    plain = student.with_network(network, None)(x, t, cond).y
    assert torch.allclose(plain, student(x, t, cond).y, atol=1e-4)


@pytest.mark.parametrize("name", ["dit", "pixart_sigma", "sd3"])
def test_its_tangent_is_the_same_with_recomputed_activations(made: Callable[..., Case], name: str) -> None:
    """Of DiT each block embeds the times anew, inside what is computed again."""
    case = made(name)
    student = two_time_player(case.teacher, 2, None).train()
    for layer in second_times(student.network):
        torch.nn.init.normal_(layer.mlp[-1].weight, std=0.1)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = tangent_with_gradient(student, case)
    checkpoint_activations(student.network)
    for once, again in zip(before, tangent_with_gradient(student, case), strict=True):
        assert float((once - again).detach().norm()) <= 1e-4 * float(once.detach().norm())
