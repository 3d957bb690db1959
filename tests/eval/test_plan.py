"""A plan is what the training then takes: bytes by kind, passes, the cards that it fits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from torch import nn

import diffdistill
from diffdistill.catalogue import describe_method
from diffdistill.commands.cli import main
from diffdistill.eval.budget import passes_per_step
from diffdistill.eval.plan import GIB, Plan, Player, plan_of, plans
from diffdistill.families import load_teacher
from diffdistill.training.assemble import make_game
from tests.families.test_families import BUILDERS, SIZES


@pytest.fixture
def tiny(tiny_teacher: Callable[[str], Path]) -> dict[str, Any]:
    """Options of DMD2 with a small teacher."""
    return {"method": "dmd2", "teacher": str(tiny_teacher("vp")), "update_ratio": 1, "batch_size": 2, "ema": 0.9}


def size_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_each_player_takes_what_its_tensors_take(tiny: dict[str, Any]) -> None:
    plan = diffdistill.plan(
        "dmd2", teacher=tiny["teacher"], options={"update_ratio": 1}, batch_size=2, ema=0.9, optimizer="adamw"
    )
    size = size_of(load_teacher(tiny["teacher"]).denoiser)
    teacher, student, fake = plan.players
    assert [p.name for p in plan.players] == ["teacher", "student", "fake_score"]
    assert (teacher.weights, student.weights, fake.weights) == (size, size, size)
    assert (teacher.optimizer, student.optimizer, fake.optimizer) == (0, 2 * size, 2 * size)
    assert (student.average, fake.average, student.gradients) == (size, 0, size)
    assert plan.kept == 8 * size and plan.turn == "student"
    assert plan.peak == plan.kept + student.gradients + student.activations
    assert (plan.passes, plan.passes_with_backward) == passes_per_step(make_game(tiny))


def test_memory_and_operations_grow_with_the_batch_and_less_memory_with_checkpoints(tiny: dict[str, Any]) -> None:
    def of(**values: Any) -> tuple[float, float]:
        plan = plan_of(make_game(tiny | values, weights=False))
        return plan.players[1].activations, plan.flops

    (held, flops), (twice, more) = of(batch_size=128), of(batch_size=256)
    assert twice == pytest.approx(2 * held, rel=0.1) and more == pytest.approx(2 * flops, rel=0.1)
    in_parts, same = of(batch_size=256, accumulate=4)
    assert in_parts < 0.4 * twice and same == pytest.approx(more, rel=0.05)
    checkpointed, again = of(batch_size=256, gradient_checkpointing=True)
    assert checkpointed < 0.6 * twice and more < again < 1.5 * more


def test_lora_players_count_their_base_once(tiny: dict[str, Any]) -> None:
    plan = plan_of(
        make_game(tiny | {"lora": "student,fake_score", "lora_rank": 2, "lora_targets": "all"}, weights=False)
    )
    teacher, student, fake = plan.players
    assert student.weights < 0.2 * teacher.weights and student.optimizer == 2 * 4 * student.trained
    assert fake.trained == student.trained


def test_what_is_offloaded_is_in_host_memory(tiny: dict[str, Any]) -> None:
    """Networks are one size here, and there is room for whole ones in a piece of moments."""
    plan, *others = (plan_of(make_game(tiny | {"offload": kind}, weights=False))
                     for kind in ("none", "optimizer", "model", "group"))  # fmt: skip
    size = plan.players[0].weights
    moments, model, group = others
    student = plan.players[1].activations
    assert (plan.host, plan.kept) == (0, 8 * size)
    assert (moments.host, moments.kept) == (5 * size, 3 * size)
    assert moments.peak == 3 * size + max(size + student, 3 * size)
    assert (model.host, model.kept) == (8 * size, 0)
    assert model.peak == max(2 * size + student, 4 * size)  # a pass, and the step
    assert group.kept < 0.01 * size and group.peak <= model.peak and group.host + group.kept == 8 * size
    large = tiny | {"batch_size": 256}
    peaks = [plan_of(make_game(large | {"offload": kind}, weights=False)).peak for kind in ("none", "model", "group")]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scm", "ladd"])
def test_a_methods_own_turns_are_counted(name: str, tiny: dict[str, Any]) -> None:
    preset = describe_method(name).presets["digits"].options
    values = dict(preset) | {"method": name, "batch_size": 2, "teacher": tiny["teacher"]}
    plan = plan_of(make_game(values, weights=False))
    passes, whole = passes_per_step(make_game(values))
    assert plan.passes == pytest.approx(passes, rel=0.05) and plan.passes_with_backward == pytest.approx(
        whole, rel=0.05
    )
    assert plan.flops > 0 and all(p.activations > 0 for p in plan.players if p.trained > 1000)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "stable_diffusion",
            "flux",
            "flux_kontext",
            "wan",
            "wan_i2v",
            "qwen_image",
            "qwen_image_edit",
            "qwen_image_edit_plus",
            "z_image",
        ),
        *("lumina2", "cogvideox", "qwen_image21", "kandinsky5", "qwen_image_edit_plus"),
    ],
)
def test_configs_alone_are_enough_and_prompts_are_not_needed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BUILDERS[name]().save_pretrained(tmp_path / "whole")
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        file.unlink()
    options = ["--batch-size", "2", "--resolution", str(SIZES[name])]
    assert main(["plan", "--method", "consistency", "--teacher", str(tmp_path / "whole"), *options]) == 0
    shown = capsys.readouterr().out
    assert "in the turn of student" in shown and "16 GiB  fits (" in shown


def plan_with(peak: float) -> Plan:
    return Plan((Player("student", 1, 1, 4),), "student", 4, int(peak * GIB), 4, 8, 3e12, 100, 8)


def test_a_card_needs_room_for_fragments_and_cuda_itself() -> None:
    assert plan_with(14.1).fits(16) and not plan_with(14.3).fits(16) and plan_with(70).fits(80)


def test_hours_are_those_of_the_rate() -> None:
    plan = plan_with(1)
    assert plan.hours() is None and plan.samples == 800
    assert plan.hours(tflops=1) == pytest.approx(300 / 3600) and plan.hours(seconds_per_step=36) == pytest.approx(1)


@pytest.mark.slow
def test_switches_are_tried_until_the_smallest_card_has_the_memory(tmp_path: Path) -> None:
    network = diffusers.UNet2DModel(
        sample_size=128, in_channels=1, out_channels=1, block_out_channels=(32, 32), norm_num_groups=8,
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "large")
    options = {"method": "consistency", "teacher": str(tmp_path / "large"), "batch_size": 512}
    found = list(plans(options)[1])
    assert [list(more) for more, _ in found][:2] == [[], ["gradient_checkpointing"]]
    peaks = [plan.peak for _, plan in found]
    assert peaks == sorted(peaks, reverse=True) and found[-1][1].fits(16) and not found[-2][1].fits(16)


def test_the_command_prints_hours_and_writes_json(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    options = ["--method", "dmd2", "--teacher", tiny["teacher"], "--batch-size", "2", "--steps", "720"]
    assert main(["plan", *options, "--seconds-per-step", "5", "--json", str(out)]) == 0
    assert "720 steps: 1440 samples" in (shown := capsys.readouterr().out) and "1 hours" in shown
    assert json.loads(out.read_text())["plans"][0]["samples"] == 1440
    assert main(["plan", "--teacher", tiny["teacher"], "--tflops", "0"]) == 2
    assert "tflops" in capsys.readouterr().err
    assert main(["plan", "--teacher", tiny["teacher"], "--threads", "x"]) == 2
    assert "threads" in capsys.readouterr().err


@pytest.mark.slow
def test_a_size_that_the_network_does_not_take_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BUILDERS["wan"]().save_pretrained(tmp_path / "wan")
    assert main(["plan", "--method", "consistency", "--teacher", str(tmp_path / "wan"), "--resolution", "480"]) == 2
    assert "teacher: a training step" in (error := capsys.readouterr().err) and "resolution" in error
