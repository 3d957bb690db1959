"""DMD2: its exact checks hold, known mistakes are caught, and it reaches a known answer end to end."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import UserError, distill, load_teacher
from diffdistill.commands.cli import main
from diffdistill.core.losses import denoising_loss
from diffdistill.core.prediction import diffuse
from diffdistill.core.times import native_uniform
from diffdistill.eval.plan import plan_of
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.dmd2 import verify
from diffdistill.methods.dmd2 import DMD2, Config
from diffdistill.players.lora import LoraSettings
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold import adversary, matching
from diffdistill.scaffold.method import Batch
from diffdistill.training.assemble import make_game
from diffdistill.training.checkpoint import load_checkpoint, load_newest
from tests.methods.short_runs import same_when_resumed, trains


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(c.name.startswith("gradient of KL") for c in checks) == 3


def opposite_sign(x: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
    grad, gap = REAL_GRADIENT(x, *args, **kw)
    return -grad, gap


def not_detached(x: Tensor, grad: Tensor) -> Tensor:
    return 0.5 * ((x - (x - grad)) ** 2).mean()


def detached(x: Tensor, grad: Tensor) -> Tensor:
    return REAL_INJECTION(x.detach() + 0 * x, grad)


def wrong_samples(fake_score: Any, x: Tensor, t: Tensor, eps: Tensor, cond: Any, kind: str) -> Tensor:
    return denoising_loss(fake_score(diffuse(x, t, eps), t, cond), x.flip(0), eps)


def with_gradients(self: DMD2, batch: Batch, player: str, cond: Any = None) -> Tensor:
    sampler = self.sampler()
    x_t, t = sampler.input_at(len(sampler.levels) - 1, batch.randn("z"), batch.cond, lambda j: batch.randn(f"z {j}"))
    return self.student(x_t, t, batch.cond).x0


def one_normaliser_for_the_batch(x: Tensor, x0: Tensor) -> Tensor:
    return (x - x0).abs().mean().detach().expand(len(x))


REAL_GRADIENT, REAL_INJECTION = matching.distribution_matching_gradient, matching.gradient_injection
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "no normaliser": (matching, "l1_normaliser", lambda x, x0: torch.ones(len(x), dtype=x.dtype)),
    "one normaliser for the batch": (matching, "l1_normaliser", one_normaliser_for_the_batch),
    "opposite sign": (matching, "distribution_matching_gradient", opposite_sign),
    "the gradient's target is not detached": (matching, "gradient_injection", not_detached),
    "the student is detached": (matching, "gradient_injection", detached),
    "the fake score is trained on the wrong samples": (matching, "fake_score_loss", wrong_samples),
    "the student moves last": (DMD2, "turns", lambda self, step: REAL_TURNS(self, step)[::-1]),
    "the ratio is ignored": (DMD2, "turns", lambda self, step: REAL_TURNS(self, 0)),
    "the discriminator's labels are swapped": (
        adversary,
        "gan_discriminator_loss",
        lambda real, fake, f=adversary.gan_discriminator_loss: f(fake, real),
    ),
    "the simulation has gradients": (DMD2, "generate", with_gradients),
    "only the first level is trained": (torch, "randint", lambda *a, **k: torch.zeros((), dtype=torch.int64)),
    "every level is judged by the first fake score": (
        DMD2,
        "_turn_of",
        lambda self, *a, f=DMD2._turn_of: (f(self, *a), setattr(self, "fake_score", self.fake_scores[0]))[0],
    ),
    "one level and one fake score get all turns": (DMD2, "_mine", lambda self, step: 0),
    "the saturating generator loss": (
        adversary,
        "gan_generator_loss",
        lambda fake: -nn.functional.softplus(fake).mean(),
    ),
}
REAL_TURNS = DMD2.turns


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


@pytest.mark.parametrize("normalise", [True, False])
def test_an_affine_student_reaches_the_gaussian(normalise: bool, reaches_the_gaussian: Callable[..., None]) -> None:
    config = Config(student_lr=5e-3, fake_score_lr=2e-2, update_ratio=3, normalise=normalise, beta1=0.0, time_low=0.1)
    reaches_the_gaussian(DMD2, config, steps=2400, ema=0.99)


def test_guidance_is_the_teachers_alone(tiny_teacher: Callable[[str], Path]) -> None:
    method = DMD2(load_teacher(tiny_teacher("vp")), Config(guidance_scale=3.0))
    seen = []
    method.fake_score.network.register_forward_hook(lambda module, args, out: seen.append(("fake", len(args[0]))))
    method.teacher.denoiser.network.register_forward_hook(
        lambda module, args, out: seen.append(("teacher", len(args[0])))
    )
    x = torch.zeros(4, 1, 8, 8)
    t = torch.full((4,), 0.7, dtype=torch.float64)
    method.matching(x, t, torch.randn_like(x), {"class_labels": torch.arange(4)})
    assert sorted(seen) == [("fake", 4), ("teacher", 8)]


def test_the_gap_begins_at_zero(tiny_teacher: Callable[[str], Path]) -> None:
    """Teacher and fake score are the same network then; dropout in one of them would show."""
    method = DMD2(load_teacher(tiny_teacher("vp")), Config())
    batch = Batch(4, (1, 8, 8), {"class_labels": torch.arange(4)}, None, torch.device("cpu"), (0, 0, 0))
    assert float(method.student_turn({}, batch).shown["gap"]) == 0


def test_the_students_gan_gradient_leaves_the_critic_alone(tiny_teacher: Callable[[str], Path]) -> None:
    method = DMD2(load_teacher(tiny_teacher("vp")), Config(gan_weight=1.0))
    only_trains("student", trainable(method.players))
    data = torch.randn(4, 1, 8, 8)
    batch = Batch(4, (1, 8, 8), {"class_labels": torch.arange(4)}, data, torch.device("cpu"), (0, 0, 0))
    method.student_turn({}, batch).shown["gan"].backward()
    assert all(p.grad is None for p in method.players["fake_score"].parameters())
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in method.student.parameters())


LAYERS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


@pytest.mark.parametrize("lora", [False, True])
def test_each_head_reads_its_own_layer_and_the_loss_is_their_mean(
    lora: bool, tiny_teacher: Callable[[str], Path]
) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    if lora:
        teacher = replace(teacher, lora={"fake_score": LoraSettings(2, None, None)})
    method = DMD2(teacher, Config(gan_weight=1.0, discriminator_depths=(0.0, 0.5, 0.8), update_ratio=1))
    player: Any = method.players["fake_score"]
    network = player["denoiser"].network
    network = network.base if lora else network
    chosen, read = [LAYERS[0], LAYERS[2], LAYERS[4]], {}
    for layer in chosen:
        network.get_submodule(layer).register_forward_hook(
            lambda module, args, out, layer=layer: read.update({layer: (out[0] if isinstance(out, tuple) else out)})
        )
    data = torch.randn(4, 1, 8, 8)
    batch = Batch(4, (1, 8, 8), {"class_labels": torch.arange(4)}, data, torch.device("cpu"), (0, 0, 0))

    def logits(x: torch.Tensor, player_name: str, eps: str) -> torch.Tensor:
        t = batch.draw(f"{player_name}/gan t", lambda n, draw: native_uniform(method.schedule, n, draw))
        player["denoiser"](diffuse(x, t, batch.randn(eps)), t, batch.cond)
        return torch.stack([head(read[layer]) for head, layer in zip(player["head"], chosen, strict=True)])

    drawn: dict[int, torch.Tensor] = {}
    turn = method.student_turn(drawn, batch)
    x = drawn[batch.first]
    expected = nn.functional.softplus(-logits(x, "student", "student/gan eps")).mean()
    assert turn.shown["gan"].item() == pytest.approx(expected.item(), rel=1e-5)
    gan = method.fake_score_turn(drawn, batch).shown["gan"]
    real = logits(data, "fake_score", "fake_score/gan eps real")
    fake = logits(x, "fake_score", "fake_score/gan eps fake")
    assert len({round(float(row.mean()), 6) for row in fake}) == 3
    expected = nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()
    assert gan.item() == pytest.approx(expected.item(), rel=1e-5)
    gan.backward()
    assert all(p.grad is not None for p in player["head"].parameters())


def test_a_training_with_heads_on_layers_resumes_to_the_same_bits_and_is_planned(
    tiny_teacher: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared: dict[str, Any] = {
        "teacher": str(tiny_teacher("vp")), "data": "digits", "batch_size": 4, "update_ratio": 1, "gan_weight": 0.1,
        "discriminator_depths": "0.2,0.5,0.8", "sample_every": 0, "device": "cpu", "lr_schedule": "constant",
    }  # fmt: skip
    distill(**shared, steps=2, out=tmp_path / "parted")
    distill(resume=tmp_path / "parted", steps=4)
    distill(**shared, steps=4, out=tmp_path / "whole")
    parted, whole = (load_newest(tmp_path / name / "checkpoints") for name in ("parted", "whole"))
    assert parted is not None and whole is not None
    heads = {name: value for name, value in whole[1]["fake_score"].items() if name.startswith("head.")}
    assert {name.split(".")[1] for name in heads} == {"0", "1", "2"}
    assert all(torch.equal(value, parted[1]["fake_score"][name]) for name, value in heads.items())
    plain = {name: value for name, value in shared.items() if name != "discriminator_depths"}
    fewer, more = (plan_of(make_game(values, weights=False)).players[2].trained for values in (plain, shared))
    assert more > fewer
    assert main(["train", "--discriminator-depths", "0.5", "--out", str(tmp_path / "no")]) == 2
    assert "there is no discriminator without a gan_weight" in capsys.readouterr().err


def test_gan_needs_data_and_matching_does_not(tiny_teacher: Callable[[str], Path], tmp_path: Path) -> None:
    shared = {"teacher": str(tiny_teacher("vp")), "steps": 1, "batch_size": 4, "sample_every": 0, "device": "cpu"}
    distill(**shared, out=str(tmp_path / "free"))
    with pytest.raises(UserError, match=r"data: dmd2 .* needs real images"):
        distill(**shared, gan_weight=0.1, out=str(tmp_path / "gan"))


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_it_trains_every_parameterisation(
    parameterization: str, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    run = {"data": "digits", "batch_size": 4, "update_ratio": 1, "gan_weight": 0.1, "sample_every": 0, "device": "cpu"}
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **run)


def test_the_matching_gradient_is_that_of_images_so_that_the_gan_weight_means_the_authors(
    tiny_teacher: Callable[[str], Path],
) -> None:
    """An EDM teacher's x is the image over data_std = 0.5; the normalised gradient has no unit."""
    method = DMD2(load_teacher(tiny_teacher("edm")), Config())
    with torch.no_grad():
        next(method.fake_score.parameters()).add_(0.1)
    x = torch.randn(4, 1, 8, 8, requires_grad=True)
    t, eps, cond = torch.full((4,), 0.7).double(), torch.randn(4, 1, 8, 8), {"class_labels": torch.arange(4)}
    (got,) = torch.autograd.grad(method.matching(x, t, eps, cond).loss, x)
    image, x_t = 0.5 * x.detach(), diffuse(x.detach(), t, eps)
    real, fake = (0.5 * network(x_t, t, cond).x0 for network in (method.teacher, method.fake_score))
    theirs = (fake - real) / (image - real).abs().mean((1, 2, 3), keepdim=True) / x.numel()  # d loss / d image
    assert torch.allclose(got, 0.5 * theirs, rtol=1e-4, atol=1e-9) and float(theirs.abs().max()) > 0


FOUR = {"student_steps": 4, "student_level": 750.0, "fake_scores": "per_level", "update_ratio": 2}


def test_the_levels_take_turns_and_each_has_its_own_fake_score(tiny_teacher: Callable[[str], Path]) -> None:
    method = DMD2(load_teacher(tiny_teacher("vp")), Config(**FOUR))  # type: ignore[arg-type]
    assert method.sampler().levels == (750, 563, 375, 187)
    critics = ["fake_score", "fake_score_2", "fake_score_3", "fake_score_4"]
    assert list(method.players) == ["student", *critics]
    turns = [[turn.player for turn in method.turns(step)] for step in range(16)]
    assert [players[-1] for players in turns] == [name for name in critics for _ in range(2)] * 2
    assert [len(players) for players in turns] == [2, 1] * 8
    times: list[float] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        times.append(float(kwargs.get("timestep", args[-1]).flatten()[0]))

    method.student.network.register_forward_pre_hook(keep, with_kwargs=True)
    batch = Batch(4, (1, 8, 8), {"class_labels": torch.arange(4)}, None, torch.device("cpu"), (0, 4, 0))
    parameters = trainable(method.players)
    for turn in method.turns(4):
        only_trains(turn.player, parameters)
        turn.loss(batch).loss.backward()
    assert times == [750, 563, 375], "the third level, and what leads to it"
    moved = {name for name, player in method.players.items() if any(p.grad is not None for p in player.parameters())}
    assert moved == {"student", "fake_score_3"}


def test_a_fake_score_for_each_level_needs_levels(tiny_teacher: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="fake_scores: per_level is for several levels, and student_steps is 1"):
        DMD2(load_teacher(tiny_teacher("vp")), Config(fake_scores="per_level"))


@pytest.mark.parametrize("lora", [None, "student,fake_score"])
def test_a_resumed_run_with_a_fake_score_for_each_level_has_the_same_bits(
    lora: str | None, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    shared = FOUR | {
        "teacher": str(tiny_teacher("vp")), "data": "digits", "gan_weight": 0.1, "lora": lora, "lora_rank": 2,
        "batch_size": 4, "student_lr": 1e-3, "fake_score_lr": 1e-2, "sample_every": 0, "device": "cpu",
    }  # fmt: skip
    same_when_resumed(tmp_path, stop=7, end=12, **shared)
    last = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000012")[0]
    assert "fake_score_4.optimizer" in last
    weights = [torch.cat([v.flatten() for v in last[f"fake_score{k}"].values()]) for k in ("", "_2", "_3", "_4")]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(weights)), "each learns its own level"


def test_the_fake_score_is_drawn_along_by_the_student(tiny_teacher: Callable[[str], Path], tmp_path: Path) -> None:
    """After each of the student's steps, and after no other; with LoRA it is refused."""
    teacher = load_teacher(tiny_teacher("vp"))
    method = DMD2(teacher, Config(alignment=0.25, update_ratio=2, student_steps=2, fake_scores="per_level"))
    for value, network in enumerate((method.student, *method.fake_scores)):
        for p in network.parameters():
            p.data.fill_(4.0 * value)
    seen = []
    for step in range(5):
        method.after_step(step)
        seen.append([float(next(fake.parameters()).mean()) for fake in method.fake_scores])
    # Each has its turn for two steps, and the student moves in the first of them.
    assert seen == [[3.0, 8.0], [3.0, 8.0], [3.0, 6.0], [3.0, 6.0], [2.25, 6.0]]
    lora = replace(teacher, lora={"student": LoraSettings(2)})
    with pytest.raises(UserError, match="alignment: the mean of two LoRAs' matrices is not that of the LoRAs; use 0"):
        DMD2(lora, Config(alignment=0.03))
    run: dict[str, Any] = {"teacher": str(tiny_teacher("vp")), "batch_size": 4, "sample_every": 0, "device": "cpu"}
    same_when_resumed(tmp_path, method="dmd2", **run, alignment=0.5, update_ratio=1, student_lr=0.01)
