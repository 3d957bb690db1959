"""What is exported draws in stock diffusers what the training-time sampler draws, for every kind of schedule."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffdistill.commands.export import export_student
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.policies import wide_channels
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, student_levels
from diffdistill.families import FAMILIES, load_student, schedule_of
from diffdistill.families._family import PATCHES
from diffdistill.pipelines.schedulers import scheduler_config, student_scheduler, teacher_scheduler
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.policy import PolicySettings, policy_player
from diffdistill.players.sampler import STEPS, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators
from diffdistill.training.assemble import make_game
from tests.scaffold.straight import CLASSES, SHAPE, Net, draw, in_double, nothing, scatter

_double = pytest.fixture(in_double)
N = 5
LABELS = torch.tensor([0, 2, 1, 1, 0])
BETAS = [0.02 + 0.01 * k for k in range(30)]

# The commonest settings of the teachers' own schedulers among them: clipping, thresholding, abar_0 at the end.
TEACHERS: dict[str, Any] = {
    "ddpm": lambda: diffusers.DDPMScheduler(),
    "ddpm v": lambda: diffusers.DDPMScheduler(100, prediction_type="v_prediction", clip_sample_range=0.5),
    "ddim": lambda: diffusers.DDIMScheduler(60, beta_end=0.2, set_alpha_to_one=False, prediction_type="sample"),
    "zero snr": lambda: diffusers.DDIMScheduler(
        40, beta_start=0.01, beta_end=0.3, beta_schedule="scaled_linear", rescale_betas_zero_snr=True,
        prediction_type="v_prediction", thresholding=True, steps_offset=1,
    ),
    "cosine": lambda: diffusers.DDIMScheduler(
        64, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True
    ),
    "trained betas": lambda: diffusers.DDPMScheduler(trained_betas=BETAS, prediction_type="v_prediction"),
    "sigmoid": lambda: diffusers.DDPMScheduler(50, beta_end=0.3, beta_schedule="sigmoid"),
    "cogvideox": lambda: diffusers.CogVideoXDPMScheduler(
        60, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0
    ),
    "edm": lambda: diffusers.EDMEulerScheduler(),
    "edm v": lambda: diffusers.EDMEulerScheduler(0.02, 30.0, 0.7, prediction_type="v_prediction", rho=5.0),
    "consistency": lambda: diffusers.CMStochasticIterativeScheduler(sigma_min=0.01, sigma_max=50.0, sigma_data=0.8),
    "flow": lambda: teacher_scheduler("flow"),
    "flow shifted": lambda: diffusers.DPMSolverMultistepScheduler(
        200, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}  # fmt: skip


def loud(x: Tensor, time: Tensor, class_labels: Tensor, net: Net) -> Tensor:
    """An output that a clip at 1 would change."""
    return 3 * net(x, time, class_labels=class_labels)


def teacher_of(kind: str) -> Teacher:
    scheduler = TEACHERS[kind]()
    net = Net()
    scatter(net, 3)
    config = scheduler_config(scheduler)
    schedule, row = schedule_of(config)

    def call(network: Any, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return loud(x, time, cond["class_labels"], network)

    denoiser = Denoiser(net, schedule, row, call=call, null=nothing, feature_layer="middle")
    return Teacher(denoiser, SHAPE, CLASSES, "unet2d", scheduler=config)


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_is_read_as_its_scheduler_says(kind: str) -> None:
    scheduler = TEACHERS[kind]()
    config, (schedule, _) = scheduler.config, schedule_of(scheduler_config(scheduler))
    if isinstance(schedule, DiscreteVP):
        assert torch.allclose(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod.float(), rtol=1e-3, atol=1e-6)
    elif isinstance(schedule, EDM):
        read = (schedule.sigma_min, schedule.sigma_max, schedule.data_std, schedule.rho)
        assert read == (config.sigma_min, config.sigma_max, config.sigma_data, config.rho)
    else:
        assert isinstance(schedule, LinearFlow)
        count = config.num_train_timesteps
        assert (schedule.shift, schedule.time_scale, schedule.train_timesteps) == (config.flow_shift, count, count)


def from_folder(scheduler: Any) -> Any:
    """The scheduler as a folder brings it back: by its JSON."""
    return type(scheduler).from_config(json.loads(scheduler.to_json_string()))


def stock(scheduler: Any, teacher: Teacher, z: Tensor, steps: int, seed: int, **row: Any) -> Tensor:
    """What a pipeline of stock diffusers does with a scheduler and a network."""
    scheduler = from_folder(scheduler)
    scheduler.set_timesteps(**({"num_inference_steps": steps} | row))
    x, made = z * getattr(scheduler, "init_noise_sigma", 1.0), draw(seed)
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        x_in = scaled(x, t)
        time = t.expand(len(x)).double()
        y = loud(x_in.double(), time, LABELS, teacher.denoiser.network)  # type: ignore[arg-type]
        try:
            x = scheduler.step(y, t, x, generator=made).prev_sample
        except TypeError:
            x = scheduler.step(y, t, x).prev_sample
    assert len(scheduler.timesteps) == steps
    return x


def trained(sampler: Sampler, z: Tensor, seed: int) -> Tensor:
    """What the training-time sampler draws, in the data's units."""
    made = draw(seed)
    noise = [torch.randn(z.shape, generator=made) for _ in sampler.levels]
    x, t = sampler.input_at(len(sampler.levels) - 1, z, {"class_labels": LABELS}, lambda j: noise[j - 1])
    return sampler.denoiser(x, t, {"class_labels": LABELS}).x0 * sampler.denoiser.schedule.data_std


def same(ours: Tensor, theirs: Tensor) -> float:
    """The greatest value; above 1 a clip is seen."""
    size = ours.abs().max().item()
    assert torch.allclose(ours, theirs.double(), rtol=0, atol=2e-5 * size), (ours - theirs).abs().max().item()
    return size


def levels_of(schedule: Any, seed: int) -> list[float]:
    u = torch.rand(6, generator=draw(seed, "levels")).tolist()
    if isinstance(schedule, DiscreteVP):
        count = len(schedule.alphas_cumprod)
        usable = count - 1 - int(schedule.alphas_cumprod[-1] <= 0)
        return [float(round(1 + v * (usable - 1))) for v in u] + [1.0, float(count - 1)]
    if isinstance(schedule, EDM):
        low, high = schedule.sigma_min, schedule.sigma_max
        return [low * 1.5 * (high / low / 1.5) ** v for v in u] + [high]
    count = schedule.train_timesteps
    return [round(1 + v * (count - 2)) / count for v in u] + [1 - 1 / count]


@pytest.mark.parametrize("kind", ["ddpm", "sigmoid"])
def test_a_student_may_give_another_output_than_its_teacher(kind: str) -> None:
    teacher = teacher_of(kind)
    student = teacher.player("student")
    student.output = OUTPUTS["v_prediction"]
    for level in (teacher.denoiser.schedule.init_level, 20):
        scheduler = student_scheduler(teacher, Sampler(student, [level]))
        assert scheduler.config.prediction_type == "v_prediction"
    assert student_scheduler(teacher, Sampler(teacher.denoiser, [20])).config.prediction_type == "epsilon"


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_student_of_one_step_at_any_level(kind: str) -> None:
    teacher = teacher_of(kind)
    sizes = []
    for seed, level in enumerate(levels_of(teacher.denoiser.schedule, len(kind))):
        sampler = Sampler(teacher.denoiser, [level])
        scheduler = student_scheduler(teacher, sampler)
        z = torch.randn(N, *SHAPE, generator=draw(seed, "z"))
        sizes.append(same(trained(sampler, z, seed), stock(scheduler, teacher, z, 1, seed)))
        means_the_same(scheduler, sampler)
    assert max(sizes) > 1.2


def means_the_same(scheduler: Any, sampler: Sampler) -> None:
    """Read back as a teacher's, the exported configuration is the student's schedule and output."""
    own = sampler.denoiser.schedule
    schedule, row = schedule_of(scheduler_config(from_folder(scheduler)))
    t = own.angle(torch.tensor(sampler.levels, dtype=torch.float64))
    t = torch.cat([t, t * 0.7]).clamp(own.t_min, own.t_max)
    if isinstance(own, DiscreteVP):
        assert isinstance(schedule, DiscreteVP)
        theirs, whole = schedule.alphas_cumprod, own.alphas_cumprod
        assert torch.allclose(theirs.double(), whole[: len(theirs)], rtol=1e-5, atol=1e-12)
        assert len(theirs) > max(sampler.levels)
    elif isinstance(own, EDM):
        assert isinstance(schedule, EDM) and schedule.sigma_max == sampler.levels[0]
        assert (schedule.data_std, schedule.rho, schedule.unit_init, schedule.time_scale) == (
            own.data_std, own.rho, own.unit_init, own.time_scale,
        )  # fmt: skip
        assert schedule.sigma_min == (own.sigma_min if len(sampler.levels) == 1 else sampler.levels[-1])
    else:
        assert isinstance(own, LinearFlow) and isinstance(schedule, LinearFlow)
        assert (schedule.train_timesteps, schedule.time_scale) == (own.train_timesteps, own.time_scale)
        assert (schedule.native(t).time - own.native(t).time).abs().max() < 1e-9
    alpha, sigma = own.native(t).alpha, own.native(t).sigma
    rows = (row.at(alpha, sigma, own.data_std), sampler.denoiser.output.at(alpha, sigma, own.data_std))
    assert all(torch.equal(mine, other) for mine, other in zip(*rows, strict=True))
    for off in ("clip_sample", "thresholding", "clip_denoised"):
        assert not scheduler.config.get(off, False)


SEVERAL: list[tuple[str, str, int, int | None]] = [
    ("ddpm", "renoise", 4, None),
    ("ddpm", "ddim", 4, None),
    ("ddpm v", "renoise", 4, 10),
    ("ddim", "ddim", 3, None),
    ("zero snr", "renoise", 2, None),
    ("zero snr", "ddim", 8, None),
    ("cosine", "renoise", 8, None),
    ("cosine", "renoise", 3, 16),
    ("trained betas", "ddim", 5, None),
    ("trained betas", "renoise", 4, 10),
    ("sigmoid", "renoise", 5, None),
    ("edm", "ddim", 4, None),
    ("edm v", "ddim", 2, None),
    ("edm v", "ddim", 3, None),
]  # fmt: skip


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(("kind", "move", "steps", "points"), SEVERAL)
def test_a_student_of_several_steps(kind: str, move: str, steps: int, points: int | None) -> None:
    """`points`: levels among so many, as LCM chooses them."""
    teacher = teacher_of(kind)
    levels = student_levels(teacher.denoiser.schedule, points or steps)
    chosen = [levels[i * (points or steps) // steps] for i in range(steps)]
    sampler = Sampler(teacher.denoiser, [float(level) for level in chosen], STEPS[move])
    scheduler = student_scheduler(teacher, sampler)
    for seed in range(2):
        z = torch.randn(N, *SHAPE, generator=draw(seed, "z"))
        assert same(trained(sampler, z, seed), stock(scheduler, teacher, z, steps, seed)) > 1.2
    means_the_same(scheduler, sampler)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("policy", ["mixture", "nodes", "momenta"])
@pytest.mark.parametrize("kind", [*TEACHERS, "latent flow"])
def test_a_student_of_policies_at_any_levels(kind: str, policy: str) -> None:
    """By the scheduler that travels with it, which is told its levels in numbers."""
    teacher = teacher_of("flow" if kind == "latent flow" else kind)
    schedule, seed = teacher.denoiser.schedule, len(kind)
    levels = sorted({*levels_of(schedule, seed)}, reverse=True)[::2][:3]
    if kind == "latent flow":
        schedule = LinearFlow(3.0, starts_at_one=True)
        teacher.denoiser.schedule, levels = schedule, [1.0, 0.8, 0.3]
    angles = torch.stack([schedule.angle(level) for level in levels])
    student = policy_player(teacher.player("student"), PolicySettings(policy, 3, 5), SHAPE[0], angles)
    scatter(student, seed)
    sampler = Sampler(student, levels, STEPS["ddim"])
    scheduler = student_scheduler(teacher, sampler)
    z = torch.randn(N, *SHAPE, generator=draw(seed, "z"))
    alone = replace(teacher, denoiser=student)
    assert same(trained(sampler, z, seed), stock(scheduler, alone, z, 3, seed)) > 0.5
    # A channel's features side by side, as pipelines pack them.
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.1])
    y = torch.randn(2, wide_channels(policy, 3, SHAPE[0]), 4, 6)
    x = torch.randn(2, SHAPE[0], 4, 6)
    plain = scheduler.step(y, scheduler.timesteps[1], x)[0]
    packed = scheduler.step(PATCHES.pack(y), scheduler.timesteps[1], PATCHES.pack(x))[0]
    assert torch.allclose(PATCHES.unpack(packed, x.shape[1:]), plain, atol=1e-6)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("steps", [2, 1, 4])
@pytest.mark.parametrize("kind", [*TEACHERS, "latent flow"])
def test_a_student_of_heads_in_any_number_of_passes(kind: str, steps: int) -> None:
    """By one scheduler, whatever the number of passes that the student was saved with."""
    teacher = teacher_of("flow" if kind == "latent flow" else kind)
    if kind == "latent flow":
        teacher.denoiser.schedule = LinearFlow(3.0, starts_at_one=True)
    levels = student_levels(teacher.denoiser.schedule, 4)
    angles = teacher.denoiser.schedule.angle(levels)
    student = policy_player(teacher.player("student"), PolicySettings("heads", 4, 1, (2, 1, 4)), SHAPE[0], angles)
    scatter(student, len(kind))
    scheduler = student_scheduler(teacher, Sampler(student, levels.tolist()[::2], STEPS["ddim"]))
    assert scheduler.config["passes"] == [2, 1, 4]
    sampler, alone = Sampler(student, levels.tolist()[:: 4 // steps], STEPS["ddim"]), replace(teacher, denoiser=student)
    z = torch.randn(N, *SHAPE, generator=draw(steps, "z"))
    assert same(trained(sampler, z, 0), stock(scheduler, alone, z, steps, 0)) > 0.5
    y, x = torch.randn(2, 4 * SHAPE[0], 4, 6), torch.randn(2, SHAPE[0], 4, 6)
    plain = scheduler.step(y, scheduler.timesteps[0], x)[0]
    packed = scheduler.step(PATCHES.pack(y), scheduler.timesteps[0], PATCHES.pack(x))[0]
    assert torch.allclose(PATCHES.unpack(packed, x.shape[1:]), plain, atol=1e-6)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("kind", ["ddpm", "ddpm v"])
def test_even_steps_begin_inside_the_chain(kind: str, steps: int) -> None:
    """84 timesteps of 100 or more: a stock scheduler of so many takes them, in whatever pipeline."""
    teacher = replace(teacher_of(kind), family="dit")
    levels = student_levels(teacher.denoiser.schedule, steps, 83).tolist()
    sampler = Sampler(teacher.denoiser, levels, STEPS["ddim"])
    scheduler = student_scheduler(teacher, sampler)
    assert type(scheduler) is diffusers.DDIMScheduler
    z = torch.randn(N, *SHAPE, generator=draw(steps, "z"))
    assert same(trained(sampler, z, 0), stock(scheduler, teacher, z, steps, 0)) > 1.2
    means_the_same(scheduler, sampler)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("move", ["renoise", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_student_that_starts_at_pure_noise(family: str, steps: int, move: str, shift: float) -> None:
    """Latent pipelines of flow matching: SD3's lets its scheduler take its own row of levels, Flux's hands it one."""
    net = Net()
    scatter(net, 3)
    config = scheduler_config(diffusers.FlowMatchEulerDiscreteScheduler(500, shift))
    schedule, row = schedule_of(config)
    grid = FAMILIES[family].flow_grid
    own = LinearFlow(shift, time_scale=500, train_timesteps=500, grid=grid, starts_at_one=True)
    assert (schedule.t_max, row.name) == (own.t_max, "flow_prediction")
    denoiser = Denoiser(net, own, row, call=lambda n, x, t, cond: loud(x, t, cond["class_labels"], n), null=nothing)  # type: ignore[arg-type]
    teacher = Teacher(denoiser, SHAPE, CLASSES, family, scheduler=config)
    sampler = Sampler(denoiser, student_levels(own, steps).tolist(), STEPS[move])
    scheduler = student_scheduler(teacher, sampler)
    z = torch.randn(N, *SHAPE, generator=draw(0, "z"))
    handed = {"sigmas": [1 - k / steps for k in range(steps)]} if grid == "given" else {}
    assert same(trained(sampler, z, 1), stock(scheduler, teacher, z, steps, 1, **handed)) > 1.2
    assert (scheduler.config["num_train_timesteps"], scheduler.config["use_dynamic_shifting"]) == (500, False)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("kind", ["flow", "flow shifted"])
def test_a_flow_with_adapters_takes_the_teachers_own_steps(kind: str) -> None:
    teacher = teacher_of(kind)
    schedule = teacher.denoiser.schedule
    adapted = teacher.denoiser.with_network(AdaptedNetwork(teacher.denoiser.network, torch.nn.Identity(), 2.0), None)
    sampler = Sampler(adapted, schedule.levels(6).tolist(), STEPS["ddim"])
    scheduler = student_scheduler(teacher, sampler)
    z = torch.randn(N, *SHAPE, generator=draw(0, "z"))
    plain = Sampler(teacher.denoiser, sampler.levels, STEPS["ddim"])
    assert same(trained(plain, z, 1), stock(scheduler, teacher, z, 6, 1)) > 1.2


# -- folders -----------------------------------------------------------------------------------------------------------


def pixel_folder(kind: str, folder: Path) -> Path:
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, dropout=0.1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
        num_class_embeds=11,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, TEACHERS[kind]()).save_pretrained(folder)
    return folder


DMD2, LCM = {"method": "dmd2"}, {"method": "lcm", "ddim_steps": 8}
FOLDERS: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", DMD2 | {"student_level": 400}),
    ("ddpm v", DMD2 | {"student_steps": 4}),
    ("zero snr", {"method": "progressive", "start_steps": 4, "final_steps": 2}),
    ("cosine", LCM | {"student_steps": 3, "guidance_max": 3.0, "guidance_scale": 2.0}),
    ("trained betas", {"method": "sid", "student_level": 11}),
    ("edm", DMD2 | {"student_level": 2.5}),
    ("edm v", {"method": "multistep_consistency", "segments": 3}),
    ("consistency", {"method": "diff_instruct", "student_level": 5.0}),
    ("flow", DMD2 | {"student_level": 0.8}),
    ("flow shifted", {"method": "sim"}),
    ("flow", {"method": "lora_guidance", "sampling_steps": 1, "lora": ""}),
]


@pytest.mark.parametrize(("kind", "options"), FOLDERS)
def test_an_exported_folder_draws_what_the_method_draws(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The folder in stock diffusers, and read back by the package, against the sampler of the training itself."""
    folder = pixel_folder(kind, tmp_path / "teacher")
    game = make_game({"teacher": str(folder), "null_class": 10, "device": "cpu", "steps": 1, **options})
    sampler = game.method.sampler()
    player = game.method.players[game.method.exported].eval()
    scatter(player, 9, 0.05)
    exported = export_student(game, tmp_path / "student", 0)
    labels = torch.tensor([3, 1, 4, 9])
    ours = sampler((1, 8, 8), {"class_labels": labels}, image_generators(2, range(4)))
    assert float(ours.std()) > 0.05
    pipeline = diffusers.DiffusionPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"batch_size": 4, "class_labels": labels.tolist(), "output_type": "pt"}
    if len(sampler.levels) > 1:
        call["num_inference_steps"] = len(sampler.levels)
    theirs = pipeline(generator=image_generators(2, range(4)), **call).images * 2 - 1
    assert float(theirs.std()) > 0.05
    assert torch.allclose(ours.clamp(-1, 1), theirs, rtol=0, atol=1e-4)
    again, student = load_student(exported)
    assert (again.levels, again.step, student.num_classes) == (sampler.levels, sampler.step, 10)
    read = again((1, 8, 8), {"class_labels": labels}, image_generators(2, range(4)))
    assert torch.allclose(read, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


def test_every_kind_of_pixel_scheduler_is_here(tiny_teacher: Callable[[str], Path]) -> None:
    kinds = {type(teacher_of(kind).denoiser.schedule) for kind in TEACHERS}
    assert kinds == {DiscreteVP, EDM, LinearFlow}
    for name in ("vp", "edm", "flow"):
        config = json.loads((tiny_teacher(name) / "scheduler" / "scheduler_config.json").read_text())
        assert type(schedule_of(config)[0]) in kinds
