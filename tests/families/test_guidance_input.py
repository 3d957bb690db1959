"""Every family's network takes the guidance scale: it starts as the teacher, hears it, and folds into a stock one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser, Extra
from diffdistill.exact.stock import Case, middle
from diffdistill.players.lora import LoraNetwork, LoraSettings, lora_view
from diffdistill.players.recomputing import checkpoint_activations
from diffdistill.players.scale_input import guidance_input, plain_network, scale_inputs
from tests.families import test_families
from tests.families.test_families import LATENT

made = test_families.made

TOLD = ("stable_diffusion", "sdxl", "instruct_pix2pix")  # have an input of their own for it (test_player_kinds)
NONE = ("chroma", "krea2", "qwen_image21")  # have no layer that it could be added to
SCALES = torch.tensor([2.0, 5.0])


def shaken(student: Denoiser) -> Denoiser:
    """What the scale adds is no longer nothing."""
    for k, part in enumerate(scale_inputs(student.network)):
        draw = torch.Generator().manual_seed(k)
        with torch.no_grad():
            part.mlp[-1].weight += 0.1 * torch.randn(part.mlp[-1].weight.shape, generator=draw)
    return student


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", [name for name in LATENT if name not in TOLD + NONE])
def test_a_network_that_takes_the_scale(made: Callable[..., Case], name: str, kind: str) -> None:
    teacher = made(name).teacher
    x, t, cond = middle(made(name), 2)
    same = teacher.denoiser(x, t, cond).y
    player = teacher.player("student")
    if kind == "lora":
        player = lora_view(teacher.denoiser, LoraSettings(2))
    student = guidance_input(player, default=2.0).eval()
    assert torch.equal(student(x, t, cond, Extra(SCALES)).y, same), "it starts as the teacher"
    shaken(student)
    two, both, five = (
        student(x, t, cond, Extra(scales)).y for scales in (SCALES[:1].expand(2), SCALES, SCALES.flip(0))
    )
    assert not torch.equal(two[1], both[1]) and torch.allclose(two[0], both[0], atol=1e-5)
    assert torch.allclose(student(x, t, cond).y, two, atol=1e-5) and not torch.equal(both[0], five[0])
    assert torch.equal(teacher.denoiser(x, t, cond).y, same) or kind == "full"
    assert all(part.given is None for part in scale_inputs(student.network)), "nothing of a call stays"
    network = plain_network(student.network)
    assert not scale_inputs(network)
    base = student.network.base if isinstance(student.network, LoraNetwork) else student.network
    assert type(network) is type(base)
    plain = student.with_network(network.eval(), None)
    plain.extra_call = None
    assert torch.allclose(plain(x, t, cond).y, two, atol=1e-4)


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_its_gradient_is_the_same_with_recomputed_activations(made: Callable[..., Case], name: str) -> None:
    """Of DiT each block embeds the time anew, inside what is computed again."""
    student = shaken(guidance_input(made(name).teacher.player("student"), default=2.0)).train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    x, t, cond = middle(made(name), 2)

    def gradient() -> Tensor:
        weights = [p for p in student.parameters() if p.requires_grad]
        loss = student(x, t, cond, Extra(SCALES)).y.square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, materialize_grads=True)])

    before = gradient()
    checkpoint_activations(student.network)
    assert float((gradient() - before).norm()) <= 1e-4 * float(before.norm())
