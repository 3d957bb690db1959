"""Options that are derived from a teacher: the right level, loss and rates for each kind, and what overrides them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffdistill import UserError, distill
from diffdistill.commands.cli import main
from diffdistill.config import DERIVED
from diffdistill.core.prediction import OUTPUTS, Output
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, Schedule
from diffdistill.methods import (
    boot,
    consistency,
    ctm,
    ctmsr,
    dmd,
    dmd2,
    flow_map,
    gdd,
    get,
    guided,
    ladd,
    lcm,
    mlcm,
    multistep_consistency,
    phased_dmd,
    progressive,
    reflow,
    sana_sprint,
    scm,
    sdxs,
    sid,
    sim,
    slim_flow,
    snap_fusion,
    tscd,
    yonos,
)
from diffdistill.players.lora import LoraSettings
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators
from diffdistill.training.derived import RULES, Derived, Situation, amplification, derive


class Network(torch.nn.Module):
    """A network of `n` parameters."""

    def __init__(self, n: int = 1_000_000):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(n, device="meta"))


def teacher_of(schedule: Schedule, output: Output, n: int = 1_000_000) -> Teacher:
    from diffdistill.core.denoiser import Denoiser

    return Teacher(Denoiser(Network(n), schedule, output), (1, 28, 28))


STOCK_DDPM = DiscreteVP.from_config({})
STABLE_DIFFUSION = DiscreteVP.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


def derived_for(teacher: Teacher, config: type, steps: int = 1000, **values: object) -> dict[str, Derived]:
    return derive(Situation(teacher, config, values, steps))


def test_the_amplification_of_noise_is_sigma_over_alpha() -> None:
    """157 at the last timestep of a stock DDPM and 17 at 750; at most 1 for v, flow and EDM networks."""
    t = STOCK_DDPM.angle(torch.tensor([999.0, 750.0]))
    epsilon = amplification(teacher_of(STOCK_DDPM, OUTPUTS["epsilon"]).denoiser, t)
    assert [round(float(a)) for a in epsilon] == [157, 17]
    for schedule, name in ((STOCK_DDPM, "v_prediction"), (LinearFlow(), "flow_prediction"), (EDM(), "edm")):
        denoiser = teacher_of(schedule, OUTPUTS[name]).denoiser
        angles = torch.linspace(schedule.t_min + 1e-3, schedule.t_max - 1e-3, 50, dtype=torch.float64)
        assert float(amplification(denoiser, angles).max()) <= 1 + 1e-9


@pytest.mark.parametrize("schedule, low, high", [(STOCK_DDPM, 350, 500), (STABLE_DIFFUSION, 399, 625)])
def test_a_matched_student_of_an_epsilon_teacher_starts_where_papers_start_it(
    schedule: DiscreteVP, low: int, high: int
) -> None:
    """The issue's 400 for a stock DDPM; DMD2's 399 and SiD's 625 of Stable Diffusion."""
    level = derived_for(teacher_of(schedule, OUTPUTS["epsilon"]), dmd2.Config)["student_level"].value
    assert low <= level <= high and level == int(level)


def test_each_kind_of_teacher_starts_at_the_same_noise() -> None:
    """In sigma/alpha at data of unit variance, from 2 to 5; an EDM teacher at its authors' sigma of 2.5."""
    for schedule, name in ((STOCK_DDPM, "v_prediction"), (LinearFlow(shift=3.0), "flow_prediction"), (EDM(), "edm")):
        teacher = teacher_of(schedule, OUTPUTS[name])
        levels = [derived_for(teacher, config)["student_level"].value for config in (dmd2.Config, sid.Config)]
        assert levels[0] == levels[1] and 2 <= float(torch.tan(schedule.angle(levels[0]))) <= 5.01
    assert levels[0] == pytest.approx(2.5, rel=1e-3)


def test_the_fake_score_learns_as_the_teacher_was_trained() -> None:
    assert derived_for(teacher_of(STOCK_DDPM, OUTPUTS["epsilon"]), dmd2.Config)["fake_score_loss"].value == "epsilon"
    assert "fake_score_loss" not in derived_for(teacher_of(LinearFlow(), OUTPUTS["flow_prediction"]), dmd2.Config)


@pytest.mark.parametrize("config", [gdd.Config, ladd.Config])
def test_where_a_gan_is_all_the_heads_keep_up_with_the_student(config: type) -> None:
    teacher = teacher_of(STOCK_DDPM, OUTPUTS["v_prediction"])
    found, matched = (derived_for(teacher, c) for c in (config, dmd2.Config))
    assert found["student_lr"].value == matched["student_lr"].value == 2e-4
    assert found["discriminator_lr"].value == 2e-3
    for other in (sana_sprint.Config, ctm.Config, dmd2.Config):
        assert "discriminator_lr" not in derived_for(teacher, other)


@pytest.mark.parametrize("config", [dmd2.Config, sid.Config, sim.Config])
def test_distributions_are_not_compared_where_the_teacher_knows_nothing(config: type) -> None:
    """The noisiest time is where sigma/alpha is 15, counted as the method counts its times; EDM keeps its own."""
    from diffdistill.core.times import edm_karras_angle

    fraction = torch.tensor([derived_for(teacher_of(STOCK_DDPM, OUTPUTS["epsilon"]), config)["time_high"].value])
    angle = STOCK_DDPM.at_fraction(fraction) if config is dmd2.Config else edm_karras_angle(STOCK_DDPM, fraction)
    assert 13 < float(torch.tan(angle)) < 15.5
    assert "time_high" not in derived_for(teacher_of(EDM(), OUTPUTS["edm"]), config)


def test_rates_fall_with_size_and_a_fake_score_keeps_up() -> None:
    small, large = (
        derived_for(teacher_of(STOCK_DDPM, OUTPUTS["epsilon"], n), dmd2.Config) for n in (1_000_000, 56_000_000)
    )
    assert 1e-4 <= small["student_lr"].value <= 3e-4  # the measurement at 1.1 million
    assert small["fake_score_lr"].value == pytest.approx(3 * small["student_lr"].value)
    assert large["student_lr"].value < small["student_lr"].value / 5
    long = derived_for(teacher_of(STOCK_DDPM, OUTPUTS["epsilon"], 56_000_000), dmd2.Config, steps=100_000)
    assert 5e-6 < long["student_lr"].value < 2e-5  # SiD's CIFAR-10 network: 1e-5
    assert "update_ratio" not in long and long["fake_score_lr"].value == long["student_lr"].value


def test_a_methods_own_defaults_count_as_if_they_were_said() -> None:
    """phased_dmd has two steps, and a fake score for each."""
    said = {"student_steps": 2, "fake_scores": "per_level"}
    for teacher in (teacher_of(STOCK_DDPM, OUTPUTS["v_prediction"]), teacher_of(EDM(), OUTPUTS["edm"])):
        plain, explicit = (derived_for(teacher, phased_dmd.Config, **values) for values in ({}, said))
        assert plain == explicit and plain["update_ratio"].value == 2
        assert "student_level" not in plain  # several steps start at pure noise
    anchored = derived_for(teacher, dmd2.Config, student_steps=3, fake_scores="per_level", anchor_weight=0.1)
    assert anchored["update_ratio"].value == 2  # the first step is matched with nothing


def test_each_of_several_fake_scores_keeps_up_with_the_student() -> None:
    """As many steps for one of the student as there are levels, at the rate of one that has one."""
    teacher = teacher_of(STOCK_DDPM, OUTPUTS["epsilon"])
    one = derived_for(teacher, dmd2.Config)
    four = derived_for(teacher, dmd2.Config, student_steps=4, fake_scores="per_level")
    assert (one["update_ratio"].value, four["update_ratio"].value) == (1, 4)
    assert four["fake_score_lr"].value == one["fake_score_lr"].value


def test_a_student_that_follows_its_own_copy_takes_half_the_rate() -> None:
    teacher = teacher_of(STOCK_DDPM, OUTPUTS["epsilon"], 1_000_000)
    configs = (consistency.Config, scm.Config)
    copied, tangent = (derived_for(teacher, c, optimizer="adamw")["student_lr"].value for c in configs)
    assert copied == tangent / 2 and 3e-4 <= copied <= 5e-4  # 4e-4 was the best of four at 1.1 million


def test_what_lasts_a_part_of_the_authors_training_lasts_a_part_of_a_short_one() -> None:
    teacher = teacher_of(STOCK_DDPM, OUTPUTS["epsilon"])

    def spans(options: Any, steps: int = 400, **given: Any) -> dict[str, int]:
        known = ("tangent_warmup", "boundary_steps", "reflow_steps", "distill_steps", "anneal_steps", "ramp_steps",
                 "stage_steps", "consistency_steps", "matching_steps", "renew_every")  # fmt: skip
        return {k: v.value for k, v in derived_for(teacher, options, steps=steps, **given).items() if k in known}

    assert spans(scm.Config) == {"tangent_warmup": 80} and spans(sdxs.Config) == {"boundary_steps": 200}
    assert spans(slim_flow.Config) == {"reflow_steps": 200, "distill_steps": 200, "anneal_steps": 80}
    assert spans(slim_flow.Config, 401)["distill_steps"] == 201
    assert spans(slim_flow.Config, reflow_steps=300, anneal_steps=0) == {}
    assert spans(slim_flow.Config, distill_steps=0) == {"anneal_steps": 80}
    assert spans(multistep_consistency.Config) == {"anneal_steps": 200}
    assert spans(reflow.Config) == {} == spans(reflow.Config, reflow_steps=200), "it has no second stage by itself"
    assert spans(consistency.Config) == {} == spans(boot.Config) == spans(flow_map.Config)
    assert spans(consistency.Config, mode="easy") == {"stage_steps": 50}
    assert spans(consistency.Config, mode="training") == {"ramp_steps": 400}
    restored = {"ramp_steps": 400, "consistency_steps": 360, "matching_steps": 40, "renew_every": 8}
    assert spans(ctmsr.Config) == restored
    assert spans(ctmsr.Config, consistency_steps=100) == {"ramp_steps": 400, "renew_every": 8}
    assert spans(scm.Config, 100_000) == {} == spans(slim_flow.Config, 100_000)


def test_stages_share_the_steps_that_are_given() -> None:
    teacher = teacher_of(STOCK_DDPM, OUTPUTS["epsilon"])

    def stages(options: Any, steps: int = 400, **given: Any) -> dict[str, int]:
        said = derive(Situation(teacher, options, {"steps": steps, **given}, steps))
        return {k: v.value for k, v in said.items() if k in ("stage_steps", "guidance_steps")}

    assert stages(tscd.Config) == {"stage_steps": 100} == stages(progressive.Config)
    assert stages(mlcm.Config, 400, stages=(4, 1)) == {"stage_steps": 200}
    assert stages(progressive.Config, 3) == {"stage_steps": 1}
    assert stages(snap_fusion.Config, 20_000) == {"stage_steps": 10_000}
    assert stages(guided.Config, 500) == {"guidance_steps": 100, "stage_steps": 100}
    assert stages(guided.Config, 500, guidance_steps=300) == {"stage_steps": 50}
    assert stages(guided.Config, 500, start_steps=1, final_steps=1) == {"guidance_steps": 500}
    assert stages(tscd.Config, stage_steps=7) == {}
    assert "stage_steps" not in derived_for(teacher, tscd.Config, steps=1000), "the method's own stages say the steps"


def test_a_short_training_follows_few_of_heuns_steps_and_else_twenty_of_ddims() -> None:
    teacher = teacher_of(STOCK_DDPM, OUTPUTS["epsilon"])
    short = derived_for(teacher, lcm.Config)
    assert (short["solver"].value, short["ddim_steps"].value) == ("heun", 8)
    for said in ({"solver": "ddim"}, {"levels": (999.0, 499.0)}, {"student_steps": 12}):
        other = derived_for(teacher, lcm.Config, **said)
        assert "solver" not in other and other["ddim_steps"].value == 20
    assert not {"solver", "ddim_steps"} & set(derived_for(teacher, lcm.Config, ddim_steps=50))
    assert not {"solver", "ddim_steps"} & set(derived_for(teacher, lcm.Config, steps=100_000))
    assert "solver" not in derived_for(teacher, consistency.Config)


def test_a_short_training_of_a_small_student_takes_muon() -> None:
    teacher = teacher_of(STOCK_DDPM, OUTPUTS["epsilon"], 1_000_000)
    for config, faster in (
        (consistency.Config, 2),
        (lcm.Config, 2),
        (get.Config, 2),
        (ctmsr.Config, 2),
        (yonos.Config, 2),
        (dmd2.Config, 1),
    ):
        names, plain = derived_for(teacher, config), derived_for(teacher, config, optimizer="adamw")
        assert names["optimizer"].value == "muon" and "optimizer" not in plain
        assert names["student_lr"].value == pytest.approx(faster * plain["student_lr"].value, rel=0.05)
        assert "optimizer" not in derived_for(teacher, config, steps=100_000)
        assert "optimizer" not in derived_for(teacher, config, offload="model")
        assert "optimizer" not in derived_for(teacher, config, student_lr=1e-4)  # a rate that goes with AdamW
    for config in (sid.Config, dmd.Config, scm.Config, ctm.Config):  # worse with it, or not measured
        assert "optimizer" not in derived_for(teacher, config)
    assert "optimizer" not in derived_for(teacher_of(STOCK_DDPM, OUTPUTS["epsilon"], 200_000_000), consistency.Config)


def test_the_weight_of_dmds_regression_is_for_its_distance() -> None:
    teacher = teacher_of(STOCK_DDPM, OUTPUTS["epsilon"])
    assert derived_for(teacher, dmd.Config)["regression_weight"].value < dmd.Config().regression_weight
    assert "regression_weight" not in derived_for(teacher, dmd.Config, distance="lpips")


def test_a_method_of_stages_keeps_its_own_schedule() -> None:
    names = derived_for(teacher_of(STOCK_DDPM, OUTPUTS["v_prediction"]), progressive.Config)
    assert not {"lr_schedule", "warmup_steps", "ema", "student_level"} & set(names)


@pytest.mark.parametrize("config", [consistency.Config, lcm.Config, scm.Config])
def test_a_small_trajectory_student_predicts_v_where_the_noise_says_nothing_of_the_sample(config: type) -> None:
    """From pure noise then; a large network, LoRA or a student with a level of its own goes on with the noise."""
    epsilon = OUTPUTS["epsilon"]
    small = derived_for(teacher_of(STOCK_DDPM, epsilon), config)
    assert small["student_output"].value == "v_prediction" and "student_level" not in small
    large = derived_for(teacher_of(STOCK_DDPM, epsilon, 600_000_000), config)
    assert "student_output" not in large and 500 < large["student_level"].value < 750
    lora = replace(teacher_of(STOCK_DDPM, epsilon), lora={"student": LoraSettings(4, 4.0)})
    assert "student_output" not in derived_for(lora, config) and "student_level" in derived_for(lora, config)
    placed = derived_for(teacher_of(STOCK_DDPM, epsilon), config, student_level=500.0)
    assert "student_output" not in placed
    for teacher in (teacher_of(STABLE_DIFFUSION, epsilon), teacher_of(STOCK_DDPM, OUTPUTS["v_prediction"])):
        assert not {"student_output", "student_level"} & set(derived_for(teacher, config))


def test_the_help_says_what_is_derived(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(RULES) == set(DERIVED)
    with pytest.raises(SystemExit):
        main(["train", "--method", "dmd2", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "AdamW's learning rate for the student (default: from the teacher; greater than 0)" in words


@pytest.fixture(scope="module")
def stock_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commonest pixel teacher: epsilon, linear betas, clip_sample; untrained."""
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("stock") / "ddpm"
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder


def test_what_was_derived_is_printed_recorded_and_overridden(
    stock_ddpm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = distill("dmd2", teacher=stock_ddpm, steps=2, batch_size=4, out=tmp_path / "run", options={"student_lr": 1e-3})
    recorded, printed = yaml.safe_load((run.folder / "config.yaml").read_text()), capsys.readouterr().out
    assert recorded["student_lr"] == 1e-3 and "student_lr:" not in printed  # an option goes first
    assert recorded["student_level"] == 439 and "student_level: 439" in printed and "157" in printed
    assert recorded["batch_size"] == 4 and recorded["fake_score_loss"] == "epsilon"
    again = distill(resume=run.folder, steps=3)
    assert yaml.safe_load((again.folder / "config.yaml").read_text()) == recorded | {"steps": 3}
    assert "student_level:" not in capsys.readouterr().out  # a resumed run goes on with what it has


def test_with_a_preset_nothing_is_derived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = distill("dmd2", preset="imagenet64", teacher="digits", steps=1, batch_size=4, out=tmp_path / "run",
                  options={"gan_weight": 0.0})  # fmt: skip
    recorded = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert recorded["student_level"] is None and recorded["beta1"] == 0.9
    assert "fake_score_lr:" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["consistency", "lcm"])
def test_a_trajectory_student_starts_at_its_level(method: str, stock_ddpm: Path, tmp_path: Path) -> None:
    """Trained, sampled and exported there: stock diffusers asks the network at that timestep alone."""
    from diffusers import DiffusionPipeline

    run = distill(method, teacher=stock_ddpm, data="digits", steps=1, batch_size=4, out=tmp_path / "run",
                  options={"student_level": 500})  # fmt: skip
    assert run.sampler().levels == (500.0,)
    pipeline = DiffusionPipeline.from_pretrained(run.student)
    pipeline.set_progress_bar_config(disable=True)
    times: list[float] = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: times.append(float(args[1])))
    pipeline(batch_size=1, output_type="np")
    assert times == [500.0]


@pytest.mark.parametrize("method", ["consistency", "lcm", "scm"])
def test_a_student_that_predicts_v_draws_the_same_images_in_stock_diffusers(
    method: str, stock_ddpm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Derived for an epsilon teacher; its scheduler says v_prediction, and a look at a tenth does not call it noise."""
    from diffusers import DiffusionPipeline

    run = distill(method, teacher=stock_ddpm, data="digits", steps=20, batch_size=4, out=tmp_path / "run")
    sampler, pipeline = run.sampler(), DiffusionPipeline.from_pretrained(run.student)
    assert pipeline.scheduler.config.prediction_type == "v_prediction" and sampler.levels == (999.0,)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=3, generator=image_generators(5, range(3)), output_type="np").images
    ours = sampler((1, 8, 8), {}, image_generators(5, range(3))).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(torch.from_numpy(drawn).permute(0, 3, 1, 2), ours, atol=1e-5, rtol=0)
    assert "look at step 2" in (said := capfd.readouterr()).out and "counts 1.0 times" in said.out
    assert "getting worse" not in said.err and "noise:" not in said.err.split("look at step 20")[0]


def test_only_a_schedule_of_timesteps_takes_another_output(tmp_path: Path) -> None:
    flow = Teacher.around(
        torch.nn.Conv2d(1, 1, 1), (1, 8, 8), LinearFlow(), "flow_prediction", call=lambda n, x, t, c: n(x)
    )
    with pytest.raises(UserError, match=r"student_output: v_prediction .* LinearFlow teacher .* leave it out"):
        distill("consistency", teacher=flow, data="digits", steps=1, out=tmp_path / "run",
                options={"student_output": "v_prediction"})  # fmt: skip
