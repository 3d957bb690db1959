"""SwiftBrush: its exact checks hold, known mistakes are caught, and its LoRA teacher resumes with the same bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill import UserError, distill, export, load_teacher
from diffdistill.config import TrainConfig
from diffdistill.core import guidance
from diffdistill.core.losses import denoising_loss
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods import swiftbrush
from diffdistill.methods.checks.swiftbrush import verify
from diffdistill.methods.swiftbrush import Config, SwiftBrush
from diffdistill.players.teacher import Teacher, trainable
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.training.assemble import lora_settings
from tests.methods.short_runs import same_when_resumed

REAL_INJECTION, REAL_GUIDED, REAL_TURNS = swiftbrush.gradient_injection, guidance.Guided, SwiftBrush.turns
REAL_DENOISING, REAL_EXPAND = SwiftBrush.denoising, swiftbrush.expand


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(c.name.startswith("the student's gradient") for c in checks) == 6


def is_lora_teacher(denoiser: nn.Module) -> bool:
    return any(p.requires_grad for p in denoiser.parameters())


def guidance_of(which: Callable[[nn.Module], bool]) -> Callable[..., nn.Module]:
    return lambda denoiser, *rest: REAL_GUIDED(denoiser, *rest) if which(denoiser) else denoiser


def weighted_as_v(self: SwiftBrush, x: Tensor, t: Tensor, eps: Tensor, cond: Any) -> Tensor:
    x = x.detach()
    return denoising_loss(self.fake_score(swiftbrush.diffuse(x, t, eps), t, cond), x, eps)


def student_in_the_graph(self: SwiftBrush, x: Tensor, t: Tensor, eps: Tensor, cond: Any) -> Tensor:
    error = (self.fake_score(swiftbrush.diffuse(x, t, eps), t, cond).eps - eps).square().mean(1)
    return (torch.cos(t) ** 2 * error).mean()


def guided_denoising(self: SwiftBrush, *args: Any) -> Tensor:
    self.fake_score = self.guided_fake_score  # type: ignore[assignment]
    return REAL_DENOISING(self, *args)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "opposite sign": (swiftbrush, "gradient_injection", lambda x, grad: REAL_INJECTION(x, -grad)),
    "the target is not detached": (swiftbrush, "gradient_injection", lambda x, g: 0.5 * (x - (x - g)).square().mean()),
    "the student is detached": (swiftbrush, "gradient_injection", lambda x, g: REAL_INJECTION(x.detach() + 0 * x, g)),
    "the teacher alone is guided": (guidance, "Guided", guidance_of(lambda d: not is_lora_teacher(d))),
    "the LoRA teacher alone is guided": (guidance, "Guided", guidance_of(is_lora_teacher)),
    "1 + scale": (guidance, "Guided", lambda d, scale, *rest: REAL_GUIDED(d, 1 + scale, *rest)),
    "weights are not squared": (swiftbrush, "expand", lambda w, like: REAL_EXPAND(w.sqrt(), like)),
    "the LoRA teacher's loss is weighted as v": (SwiftBrush, "denoising", weighted_as_v),
    "the LoRA teacher's loss reaches the student": (SwiftBrush, "denoising", student_in_the_graph),
    "the LoRA teacher is trained guided": (SwiftBrush, "denoising", guided_denoising),
    "conditions are never dropped": (SwiftBrush, "dropped", lambda self, cond, u: cond),
    "the student moves last": (SwiftBrush, "turns", lambda self, step: REAL_TURNS(self, step)[::-1]),
    "the student moves every other step": (SwiftBrush, "turns", lambda self, step: REAL_TURNS(self, 0)[step % 2 :]),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


def batch_of(n: int) -> Batch:
    return Batch(n, (1, 8, 8), {"class_labels": torch.arange(n) % 10}, None, torch.device("cpu"), (0, 0, 0))


def with_lora(folder: Path, **options: Any) -> Teacher:
    config = TrainConfig(lora="fake_score", lora_alpha=108.0, **options)
    return replace(load_teacher(folder), lora=lora_settings(config, usual=None))


def test_the_lora_teacher_starts_as_the_teacher(tiny_teacher: Callable[[str], Path]) -> None:
    teacher = with_lora(tiny_teacher("vp"))
    method = SwiftBrush(teacher, Config(guidance_scale=3.0))
    x = torch.randn(4, 1, 8, 8)
    outcome = method.matching(x, torch.full((4,), 0.7).double(), torch.randn_like(x), batch_of(4).cond)
    assert float(outcome.shown["gap"]) == 0


def test_only_the_low_rank_weights_learn_and_as_a_few_passes(tiny_teacher: Callable[[str], Path]) -> None:
    teacher = with_lora(tiny_teacher("vp"), lora_targets="to_q, conv1")
    method = SwiftBrush(teacher, Config(guidance_scale=3.0))
    names = {name for name, p in method.fake_score.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name and ("|conv1|" in name or "|to_q|" in name) for name in names)
    assert len(trainable(method.players)["student"]) == len(list(method.student.parameters()))
    passes: list[tuple[str, int]] = []
    for name, denoiser in (("student", method.student), ("lora", method.fake_score), ("teacher", method.teacher)):
        seen = denoiser.denoiser if name == "teacher" else denoiser
        seen.register_forward_hook(lambda m, args, out, name=name: passes.append((name, len(args[0]))))
    student, lora_teacher = method.turns(0)
    student.loss(batch_of(4))
    lora_teacher.loss(batch_of(4))
    assert sorted(passes) == [("lora", 4), ("lora", 8), ("student", 4), ("teacher", 8)]


def test_times_and_dropped_conditions(tiny_teacher: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    method = SwiftBrush(with_lora(tiny_teacher("edm")), Config(label_dropout=0.1))
    seen: dict[str, tuple[Tensor, Any]] = {}
    zero = torch.zeros(())
    monkeypatch.setattr(
        method, "matching", lambda x, t, eps, cond: seen.setdefault("student", (t, cond)) and Outcome(zero)
    )
    monkeypatch.setattr(method, "denoising", lambda x, t, eps, cond: seen.setdefault("lora", (t, cond)) and zero)
    monkeypatch.setattr(method.student, "forward", lambda x, t, cond: type("P", (), {"x0": x}))
    for turn in method.turns(0):
        turn.loss(batch_of(4000))
    at = method.schedule.at_fraction(torch.tensor([0.02, 0.98, 0.01, 0.99]).double())
    (times, cond), (lora_times, lora_cond) = seen["student"], seen["lora"]
    assert at[0] <= times.min() < at[0] + 1e-3
    assert at[1] - 1e-3 < times.max() <= at[1]
    assert lora_times.min() < at[2]
    assert lora_times.max() > at[3]
    assert bool((cond["class_labels"] < 10).all())
    dropped = float((lora_cond["class_labels"] == 10).double().mean())
    assert abs(dropped - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5


def test_unconditional_teachers_need_guidance_1() -> None:
    teacher = gaussian_teacher([0.0], 1.0)
    lora_teacher = gaussian_teacher([0.0], 1.0).denoiser
    method = SwiftBrush(teacher, Config(), fake_score=lora_teacher)
    assert method.dropped({}, torch.zeros(3)) == {}
    with pytest.raises(UserError, match=r"guidance_scale: 2.0 needs a teacher that was trained with a null"):
        SwiftBrush(teacher, Config(guidance_scale=2.0), fake_score=lora_teacher)


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_it_trains_every_parameterisation(
    parameterization: str, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = distill(
        method="swiftbrush",
        teacher=str(tiny_teacher(parameterization)),
        steps=2,
        batch_size=4,
        guidance_scale=2.0,
        lora_rank=2,
        out=str(tmp_path / "run"),
        sample_every=0,
        device="cpu",
    ).student
    assert load_teacher(folder).num_classes == 10


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    shared = {
        "method": "swiftbrush", "teacher": str(tiny_teacher("vp")), "batch_size": 4, "guidance_scale": 2.0,
        "lora_rank": 2, "student_lr": 1e-3, "ema": 0.9, "sample_every": 0, "device": "cpu",
    }  # fmt: skip
    same_when_resumed(tmp_path, **shared)
    run = tmp_path / "run"
    first, last = (load_file(run / f"checkpoints/step-0000000{k}/fake_score.safetensors") for k in (2, 4))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    again = export(run, out=tmp_path / "again")
    name = "unet/diffusion_pytorch_model.safetensors"
    a, b = load_file(again / name), load_file(run / "student" / name)
    assert all(torch.equal(a[key], b[key]) for key in a)
