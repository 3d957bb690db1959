"""LADD: the exact checks hold, known mistakes are caught, heads read the layers that are named, a student trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill, load_teacher
from diffdistill.core.prediction import diffuse
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.ladd import verify
from diffdistill.methods.ladd import LADD, Config
from diffdistill.players.teacher import Teacher, only_trains, trainable
from diffdistill.scaffold import adversary
from diffdistill.scaffold.adversary import LatentAdversary
from diffdistill.scaffold.method import Batch
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]
REAL: dict[str, Any] = {"critic": LatentAdversary.critic_loss, "student": LatentAdversary.student_loss}
REAL_READ, REAL_TURNS = LADD.read, LADD.turns


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def images_at_every_level(self: LADD, batch: Batch) -> tuple[Tensor, Tensor]:
    t = REAL_READ(self, batch)[1]
    return diffuse(batch.images, t.clamp(max=1.4), batch.randn("z").to(batch.images)), t


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the student's sign": (LatentAdversary, "student_loss", lambda self, *a: -REAL["student"](self, *a)),
    "real and generated are swapped": (
        adversary,
        "hinge_discriminator_loss",
        lambda real, fake, f=adversary.hinge_discriminator_loss: f(fake, real),
    ),
    "the logistic ones too": (
        adversary,
        "gan_discriminator_loss",
        lambda real, fake, f=adversary.gan_discriminator_loss: f(fake, real),
    ),
    "the hinge has no margin": (
        adversary,
        "hinge_discriminator_loss",
        lambda real, fake: torch.relu(-real).mean() + torch.relu(fake).mean(),
    ),
    "the saturating loss": (adversary, "gan_generator_loss", lambda d: -torch.nn.functional.softplus(d).mean()),
    "the first level reads images": (LADD, "read", images_at_every_level),
    "the share is ignored": (Batch, "uniform", lambda self, purpose: torch.ones(self.size).double()),
    "the ratio is ignored": (LADD, "turns", lambda self, step: REAL_TURNS(self, 0)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_heads_read_the_layers_at_their_depths(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    network = teacher.denoiser.network
    blocks = len(network.down_blocks) + 1 + len(network.up_blocks)
    layers = teacher.denoiser.layers_at([k / blocks + 0.01 for k in range(blocks)])
    assert layers[0] == "down_blocks.0" and "mid_block" in layers and layers[-1].startswith("up_blocks.")
    assert teacher.denoiser.layers_at([0.0, 0.01, 0.99]) == [layers[0], layers[-1]]
    x, t, cond = torch.randn(3, 1, 8, 8), torch.full((3,), 0.7).double(), {"class_labels": torch.arange(3)}
    seen: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
        )
        for name in layers
    ]
    maps = teacher.denoiser.features_of(layers, x, t, cond)
    for handle in handles:
        handle.remove()
    assert len(maps) == len(layers) and all(torch.equal(a, seen[n]) for a, n in zip(maps, layers, strict=True))
    assert torch.equal(teacher.denoiser.features(x, t, cond), seen["mid_block"])
    assert len(LADD(teacher, Config(depths=(0.2, 0.9))).adversary.heads) == 2


def test_the_students_gradient_passes_through_the_frozen_teacher(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    method = LADD(teacher, Config())
    owned = trainable(method.players)
    batch = Batch(
        4, (1, 8, 8), {"class_labels": torch.arange(4)}, torch.randn(4, 1, 8, 8), torch.device("cpu"), (0, 0, 0)
    )
    for turn in method.turns(0):
        only_trains(turn.player, owned)
        turn.loss(batch).loss.backward()
        other = "discriminator" if turn.player == "student" else "student"
        moved = {name: any(p.grad is not None and p.grad.any() for p in owned[name]) for name in owned}
        assert moved == {turn.player: True, other: False}
        method.players[turn.player].zero_grad(set_to_none=True)
    assert all(p.grad is None and not p.requires_grad for p in teacher.denoiser.parameters())


def test_refusals(tiny_teacher: Teachers, tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    teacher.denoiser.feature_layer = None
    with pytest.raises(UserError, match="depths: this teacher's network has no layer for a discriminator"):
        LADD(teacher, Config())
    run = {"teacher": str(tiny_teacher("vp")), "steps": 1, "device": "cpu", "out": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"data: ladd .* needs real images"):
        distill("ladd", **run)
    with pytest.raises(UserError, match=r"depths: .*1.2.* must be less than 1"):
        distill("ladd", data="digits", depths="0.5,1.2", **run)


RUN = {"method": "ladd", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu"}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [
        ("vp", {"student_steps": 2, "noisiest_share": 0.5, "misaligned": True}),
        ("edm", {"gan_loss": "logistic", "update_ratio": 2}),
        ("flow", {"depths": "0.5"}),
    ],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), student_lr=1e-2, **RUN)


def test_a_network_of_ones_own_has_one_layer() -> None:
    from diffdistill.core.schedule import TrigFlow
    from tests.scaffold.straight import SHAPE, Net

    teacher = Teacher.around(Net(), SHAPE, TrigFlow(), "v_prediction", num_classes=3, feature_layer="middle")
    assert teacher.denoiser.layers_at([0.1, 0.5, 0.9]) == ["middle"]
