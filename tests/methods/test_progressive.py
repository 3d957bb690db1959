"""Progressive distillation: its exact checks hold, known mistakes are caught, stages halve and resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import UserError, distill, load_student, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.progressive import verify
from diffdistill.methods.progressive import Config, Progressive
from diffdistill.players.sampler import DDIM
from diffdistill.scaffold import halving
from diffdistill.scaffold.halving import Halving, HalvingMethod
from tests.methods.short_runs import trains


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL_TARGET, REAL_LOSS = halving.two_step_target, halving.weighted_x0_loss


def one_step(teacher: Any, x_t: Any, t: Any, mid: Any, s: Any, cond: Any) -> Any:
    return teacher(x_t, t, cond).x0


def wrong_middle(teacher: Any, x_t: Any, t: Any, mid: Any, s: Any, cond: Any) -> Any:
    return REAL_TARGET(teacher, x_t, t, 0.9 * mid + 0.1 * s, s, cond)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "a target of one step": (halving, "two_step_target", one_step),
    "the wrong middle": (halving, "two_step_target", wrong_middle),
    "the weights swapped": (
        halving,
        "weighted_x0_loss",
        lambda x0, target, t, weight: REAL_LOSS(
            x0, target, t, {"truncated_snr": "snr_plus_one", "snr_plus_one": "truncated_snr"}[weight]
        ),
    ),
    "the teacher is never replaced": (HalvingMethod, "after_step", lambda self, step: self.stage.done.fill_(step + 1)),
    "the steps are never halved": (Halving, "student_steps", lambda self, step: self.start_steps // 2),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


def test_stages() -> None:
    stages = Halving(start_steps=16, final_steps=2, stage_steps=10)
    assert stages.stages == 3
    assert [stages.student_steps(k) for k in (0, 9, 10, 20, 29, 99)] == [8, 8, 4, 2, 2, 2]
    assert [k for k in range(60) if stages.starts(k)] == [10, 20]
    assert [stages.lr_factor(k) for k in (0, 5, 10, 29)] == [1.0, 0.5, 1.0, pytest.approx(0.1)]
    assert stages.lr_factor(1000) == 0
    for start, final in ((16, 3), (16, 16), (12, 1)):
        with pytest.raises(UserError, match="start_steps"):
            Halving(start, final, 10)


def options(teacher: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "progressive",
        "teacher": str(teacher),
        "data": "digits",
        "start_steps": 8,
        "final_steps": 2,
        "stage_steps": 3,
        "steps": 6,
        "batch_size": 4,
        "student_lr": 1e-3,
        "sample_every": 0,
        "device": "cpu",
    } | changes


def test_a_run_stopped_inside_either_stage_resumes_to_the_same_bits(
    tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")

    teacher = tiny_teacher("vp")
    whole = weights(distill(**options(teacher, out=str(tmp_path / "whole"))).student)
    for stop in (2, 3, 5):
        run = tmp_path / f"stopped-{stop}"
        distill(**options(teacher, out=str(run), steps=stop))
        resumed = weights(distill(resume=run, steps=6).student)
        assert all(torch.equal(whole[k], resumed[k]) for k in whole), stop


def test_the_student_says_its_steps_and_starts_each_stage_anew(
    tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    teacher = tiny_teacher("vp")
    for steps, levels in ((3, [999, 749, 499, 249]), (6, [999, 499])):
        folder = distill(**options(teacher, steps=steps, out=str(tmp_path / str(steps)))).student
        sampler, _ = load_student(folder)
        assert list(sampler.levels) == levels and sampler.step == DDIM()
    method = Progressive(load_teacher(teacher), Config(start_steps=8, stage_steps=3))
    assert [method.turns(k)[0].restart for k in range(10)] == [k in (3, 6) for k in range(10)]


def test_a_student_that_predicts_noise_is_refused_with_the_reason(tmp_path: Path) -> None:
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "eps")
    with pytest.raises(UserError, match="teacher: it predicts the noise"):
        distill(method="progressive", teacher=str(tmp_path / "eps"), data="digits", out=str(tmp_path / "run"))


@pytest.mark.parametrize("parameterization", ["edm", "flow"])
def test_it_trains_every_parameterisation(
    parameterization: str, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    trains(tmp_path, **options(tiny_teacher(parameterization), final_steps=1, steps=9))
