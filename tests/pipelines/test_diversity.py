"""What is done with an exported student: started by its teacher, traced, with LoRA on top, and by stock diffusers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from diffdistill import distill, sample
from diffdistill.commands.cli import main
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, solve
from diffdistill.core.prediction import diffuse
from diffdistill.core.schedule import DiscreteVP
from diffdistill.data.encoded import encode, open_encoded, with_prompts
from diffdistill.errors import UserError
from diffdistill.eval.sample import decoded, traced
from diffdistill.exact.analytic import GaussianMixture
from diffdistill.families import FAMILIES, Prompt, load_pipeline, load_teacher
from diffdistill.families._family import example_images
from diffdistill.pictures import opaque
from diffdistill.pipelines.diversity import write_diversity
from diffdistill.pipelines.shipped.diversity_pipeline import carried, hand_off_index
from tests import tiny, tiny_a
from tests.stranger import stranger

BUILDERS, SIZES = tiny.PIPELINES, tiny.SIZES
PROMPTS = ["a red square", "two dogs"]
LATENT = [name for name, family in FAMILIES.items() if family.autoencoder is not None]

Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inference")


@pytest.fixture(scope="module")
def teachers(root: Path) -> Folders:
    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            BUILDERS[name]().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def students(root: Path, teachers: Folders) -> Folders:
    """family, kind of player, steps -> the folder of a DMD2 student."""

    def make(name: str = "stable_diffusion", kind: str = "full", steps: int = 4) -> Path:
        out, prompts = root / f"{name}-{kind}-{steps}", root / f"{name}-prompts"
        settings: dict[str, Any] = {"teacher": str(teachers(name)), "resolution": SIZES[name]}
        if not prompts.exists():
            (root / "prompts.txt").write_text("\n".join(PROMPTS))
            encode(**settings, prompts=str(root / "prompts.txt"), out=str(prompts))
        if not out.exists():
            distill(
                **settings, prompts=str(prompts), method="dmd2", update_ratio=1, student_steps=steps, lora_rank=2,
                lora="student,fake_score" if kind == "lora" else None, student_lr=1e-2, batch_size=2, steps=2,
                sample_every=0, device="cpu", out=str(out),
            )  # fmt: skip
        return out / "student"

    return make


@pytest.fixture(scope="module")
def mixed(root: Path, students: Folders) -> Folders:
    """family -> a four-step student's folder with its teacher, made by the command."""

    def make(name: str = "stable_diffusion") -> Path:
        out = root / f"{name}-diversity"
        if not out.exists():
            assert main(["diversity", str(students(name).parent), "--out", str(out), "--base-guidance", "3"]) == 0
        return out

    return make


def loaded(folder: Path, **settings: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: Any = PROMPTS[0], seed: Any = 3, **settings: Any) -> torch.Tensor:
    """Latents, unless told otherwise."""
    generator = [torch.Generator().manual_seed(s) for s in seed] if isinstance(seed, list) else None
    generator = generator or torch.Generator().manual_seed(seed)
    call = {"height": 16, "width": 16, "output_type": "latent"} | settings
    return torch.as_tensor(pipeline(prompt, generator=generator, **call).images)


FOUR = {"num_inference_steps": 4, "guidance_scale": 1.0}


# -- the base model's start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stable_diffusion", "sdxl"])
def test_without_base_steps_it_is_the_student(name: str, students: Folders, mixed: Folders) -> None:
    pipeline = loaded(mixed(name), trust_remote_code=True)
    assert torch.equal(draw(pipeline, base_steps=0), draw(loaded(students(name)), **FOUR))
    assert not torch.equal(draw(pipeline), draw(pipeline, base_steps=0))


@pytest.mark.parametrize("name", ["stable_diffusion", "sdxl"])
def test_the_student_starts_where_our_solver_leaves_off(
    name: str, root: Path, teachers: Folders, students: Folders, mixed: Folders
) -> None:
    """DDIM and Euler schedulers: the same rotation, in other units."""
    pipeline = loaded(mixed(name), trust_remote_code=True)
    got = pipeline.base_latents(
        PROMPTS[1], generator=torch.Generator().manual_seed(3), height=16, width=16, base_guidance=3.0
    )
    data = open_encoded(root / f"{name}-prompts")
    teacher = with_prompts(load_teacher(teachers(name), resolution=16), data)
    timesteps = pipeline.base_scheduler.timesteps.double()
    last = hand_off_index(timesteps, pipeline.scheduler.timesteps[1])
    assert abs(timesteps[last] - pipeline.scheduler.timesteps[1]) <= 25 and last == (5 if name != "sdxl" else 4)
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(3))
    schedule, cond = teacher.denoiser.schedule, data.get(torch.tensor([1])).cond
    with torch.no_grad():
        x = solve(ddim_step, guided(teacher.denoiser, 3.0), z, schedule.angle(timesteps[: last + 1]), cond)
    assert (got - x).abs().max() < 1e-4 * x.abs().max()
    # From there the student's own scheduler and network, for its last three steps.
    scheduler, x = pipeline.scheduler, got
    embeds = data.get(torch.tensor([1])).cond
    student = loaded(students(name))
    call = load_teacher(students(name), resolution=16).denoiser.call
    noise = torch.Generator().manual_seed(3)
    torch.randn(z.shape, generator=noise)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    with torch.no_grad():
        for t in scheduler.timesteps[1:]:
            y = call(student.unet, x, t.reshape(1), embeds)
            x = scheduler.step(y, t, x, generator=noise).prev_sample
    made = draw(pipeline, PROMPTS[1], base_guidance=3.0)
    assert (made - x).abs().max() < 1e-4 * x.abs().max()


@pytest.mark.parametrize(
    ("kind", "error"),
    [("DDIMScheduler", 0.02), ("EulerDiscreteScheduler", 0.02), ("HeunDiscreteScheduler", 1e-3)],
)
def test_exact_models_keep_the_teachers_law(kind: str, error: float) -> None:
    """On a mixture known exactly the hand-off lies on the teacher's flow, so an exact student ends where that does."""
    mixture = GaussianMixture([[-1.0], [1.5]], [0.3, 0.5], torch.tensor([0.4, 0.6]))
    chain = {**tiny_a.STABLE_DIFFUSION_BETAS, "timestep_spacing": "trailing"}
    unclipped = {"clip_sample": False} if kind == "DDIMScheduler" else {}
    base, student = getattr(diffusers, kind)(**chain, **unclipped), diffusers.DDIMScheduler(**chain)
    base.set_timesteps(200)
    student.set_timesteps(4)
    schedule, denoiser = DiscreteVP.from_config(dict(base.config)), mixture.denoiser()
    last = hand_off_index(base.timesteps, student.timesteps[1])
    generator = torch.Generator().manual_seed(0)
    data = mixture.sample(20_000, generator)
    z = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)

    def angle(t: Any) -> torch.Tensor:
        return schedule.angle(float(t)).expand(len(z))

    # Stable Diffusion's last timestep is not quite noise, so the law there is not that of z.
    start = diffuse(data, angle(base.timesteps[0]), z)
    x = start / base.scale_model_input(torch.ones_like(z), base.timesteps[0])
    for t in base.timesteps[:last]:
        eps = denoiser(base.scale_model_input(x, t), angle(t), {}).eps
        x = base.step(eps, t, x).prev_sample
    x = carried(x, base, base.timesteps[last], student, student.timesteps[1]).double()
    assert float(base.timesteps[last]) == float(student.timesteps[1]) == 749
    first, now, end = angle(base.timesteps[0]), angle(749), angle(0) * 0
    assert (x - mixture.flow_map(start, first, now)).abs().max() < error
    x0 = mixture.flow_map(x, now, end)
    # Where the components part, a small error becomes a large one, in few samples.
    off = (x0 - mixture.flow_map(start, first, end)).abs()
    assert off.median() < error and off.mean() < 3 * error
    exact = mixture.sample(20_000, torch.Generator().manual_seed(1))
    assert abs((x0 < 0).double().mean() - (exact < 0).double().mean()) < 0.015
    assert abs(x0.mean() - exact.mean()) < 0.03 and abs(x0.std() - exact.std()) < 0.03


def test_hand_off() -> None:
    assert hand_off_index(torch.tensor([999, 949, 899, 849, 799, 749, 699]), 749) == 5
    assert hand_off_index(torch.tensor([951, 901, 851, 801, 751, 701]), 749) == 4
    assert hand_off_index(torch.tensor([999, 749, 749, 499, 499]), 749) == 2  # visited twice
    with pytest.raises(ValueError, match="too few"):
        hand_off_index(torch.tensor([999, 499]), 874)


STRANGER = """
import sys, torch
from safetensors.torch import save_file
from diffusers import DiffusionPipeline
made = {}
for folder in sys.argv[2:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    made[folder] = pipe("two dogs", generator=torch.Generator().manual_seed(3), output_type="latent").images
    pipe.save_pretrained(folder + "-again")
save_file(made, sys.argv[1])
"""


def test_a_stranger_loads_it(mixed: Folders, tmp_path: Path) -> None:
    folders = [str(mixed("stable_diffusion")), str(mixed("sdxl"))]
    done = stranger(STRANGER, tmp_path / "made", *folders)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, latents in load_file(tmp_path / "made").items():
        pipeline = loaded(Path(folder), trust_remote_code=True)
        assert (latents - draw(pipeline, "two dogs")).abs().max() < 1e-5 * latents.abs().max()
        assert pipeline.config.base_steps == 20 and pipeline.config.height == 16
        written, again = (json.loads((Path(f) / "model_index.json").read_text()) for f in (folder, folder + "-again"))
        assert again["base_unet"] == written["base_unet"] and again["scheduler"] == written["scheduler"]
    assert "trust_remote_code" in (mixed() / "README.md").read_text()


def test_what_makes_no_sense_says_so(
    teachers: Folders, students: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diversity", str(students(steps=1)), "--out", str(tmp_path / "out")]) == 2
    assert "two or more" in capsys.readouterr().err
    student = students()
    for arguments, match in [
        ((teachers("stable_diffusion"), tmp_path / "out"), "no plain student"),
        ((student, student), "choose another"),
        ((student, tmp_path / "out", teachers("sdxl")), "teacher: .* is sdxl"),
        ((student, tmp_path / "out", None, 1), "too few"),
    ]:
        with pytest.raises(UserError, match=match):
            write_diversity(*arguments)
    other = tmp_path / "other"
    shutil.copytree(teachers("stable_diffusion"), other)
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    with pytest.raises(UserError, match="noise schedule"):
        write_diversity(student, tmp_path / "out", other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_other_schedulers_of_the_base(teachers: Folders, students: Folders, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(teachers("stable_diffusion"), base)
    own = dict(loaded(base).scheduler.config)
    for kind in (
        "PNDMScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
    ):
        getattr(diffusers, kind).from_config(own).save_pretrained(base / "scheduler")
        index = json.loads((base / "model_index.json").read_text()) | {"scheduler": ["diffusers", kind]}
        (base / "model_index.json").write_text(json.dumps(index))
        pipeline = loaded(write_diversity(students(), tmp_path / "out", base), trust_remote_code=True)
        assert type(pipeline.base_scheduler).__name__ == kind
        assert draw(pipeline, PROMPTS, seed=[1, 2]).isfinite().all()
        assert pipeline.base_latents(PROMPTS[0]).std() < 2  # of unit variance, not Euler's


# -- the trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LATENT if FAMILIES[name].first_noise is None])
def test_the_trace_ends_with_the_image(name: str, teachers: Folders) -> None:
    family, pipeline = FAMILIES[name], load_pipeline(teachers(name))
    call = family.arguments(3)
    if name != "dit":
        call |= {"height": SIZES[name], "width": SIZES[name]}
    call |= {"frames" if name == "sana_video" else "num_frames": tiny.FRAMES} if family.videos else {}
    what: dict[str, Any] = {"class_labels": [1]} if name == "dit" else {"prompt": PROMPTS[0]}
    if family.reads_image:
        size = SIZES[name], SIZES[name]
        what["image"] = Prompt(size, images=example_images(1, size)).pictures[0]
        call |= load_teacher(teachers(name), resolution=SIZES[name]).size
    with traced(pipeline) as expected:
        kind = "np" if name == "dit" else "pt"
        got = pipeline(**what, **call, generator=torch.Generator().manual_seed(0), output_type=kind)
    image = torch.as_tensor(got.frames[:, 0] if family.videos else got.images).float()
    image = image.permute(0, 3, 1, 2) if name == "dit" else image
    image = opaque(image)
    columns = [decoded(pipeline, family, x0[:1], call) for x0 in expected]
    assert len(columns) == 3 and all(column.shape == image.shape for column in columns)
    assert (columns[-1] - (2 * image - 1)).abs().max() < 2e-3
    assert (columns[0] - columns[-1]).abs().max() > 0.01
    assert type(pipeline.scheduler) is getattr(diffusers, type(pipeline.scheduler).__name__)


@pytest.mark.parametrize("settings", [{"use_flow_sigmas": True, "flow_shift": 3.0}, {}])
def test_the_trace_with_other_schedulers(settings: dict[str, Any], teachers: Folders) -> None:
    """Sana's published one, whose timesteps are rounded; Stable Diffusion's, which keeps earlier outputs."""
    name = "sana" if settings else "stable_diffusion"
    family, pipeline = FAMILIES[name], load_pipeline(teachers(name))
    settings |= {"prediction_type": "flow_prediction"} if settings else {}
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **settings)
    call = {**family.arguments(5), "height": SIZES[name], "width": SIZES[name]}
    with traced(pipeline) as expected:
        image = pipeline(PROMPTS[0], **call, generator=_seeded(), output_type="pt").images
    assert (decoded(pipeline, family, expected[-1], call) - (2 * image - 1)).abs().max() < 2e-3


def test_trace_command(students: Folders, tmp_path: Path) -> None:
    """A row an image, a column a step; one step: the picture itself."""
    for steps in (1, 4):
        said = ["sample", str(students(steps=steps)), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--count", "2"]
        assert main([*said, "--out", str(tmp_path / "plain.png")]) == 0
        assert main([*said, "--trace", "--out", str(tmp_path / "trace.png")]) == 0
        plain, trace = Image.open(tmp_path / "plain.png"), Image.open(tmp_path / "trace.png")
        gap = plain.width - 32
        assert trace.size == (16 * steps + gap * (steps - 1), 32 + gap)
        for i in range(2):  # the last column
            mine = trace.crop((trace.width - 16, i * (16 + gap), trace.width, i * (16 + gap) + 16))
            theirs = plain.crop((i * (16 + gap), 0, i * (16 + gap) + 16, 16))
            both = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).int() for p in (mine, theirs)]
            assert (both[0] - both[1]).abs().max() <= 1
    with pytest.raises(UserError, match=r"trace: .* is a model of pixels"):
        sample("digits", trace=True, out=tmp_path / "x.png")


# -- what users of diffusers do next ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def control(root: Path, teachers: Folders) -> Path:
    """A LoRA of the teacher by stock peft and diffusers."""
    folder = root / "control"
    if not folder.exists():
        torch.manual_seed(1)
        pipeline = loaded(teachers("stable_diffusion"))
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        type(pipeline).save_lora_weights(folder, unet_lora_layers=layers)
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_lora_of_the_teacher_on_the_student(kind: str, teachers: Folders, students: Folders, control: Path) -> None:
    for pipeline, call in ((loaded(students(kind=kind)), FOUR), (loaded(teachers("stable_diffusion")), {})):
        before = draw(pipeline, **call)
        pipeline.load_lora_weights(control)
        changed = draw(pipeline, **call)
        pipeline.unload_lora_weights()
        assert (changed - before).abs().max() > 1e-2
        assert torch.equal(draw(pipeline, **call), before)


def test_a_lora_of_the_student_on_the_teacher(teachers: Folders, students: Folders, root: Path) -> None:
    student, teacher = loaded(students()), loaded(teachers("stable_diffusion"))
    torch.manual_seed(2)
    student.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(student.unet))
    type(student).save_lora_weights(root / "back", unet_lora_layers=layers)
    before = draw(teacher)
    teacher.load_lora_weights(root / "back")
    assert (draw(teacher) - before).abs().max() > 1e-2


def test_both_loras_on_the_teacher_are_the_one_on_the_merged_student(
    teachers: Folders, students: Folders, control: Path
) -> None:
    folder = students(kind="lora")
    merged, base = loaded(folder), loaded(teachers("stable_diffusion"))
    alone = draw(merged, **FOUR)
    merged.load_lora_weights(control)
    expected = draw(merged, **FOUR)
    base.load_lora_weights(folder / "lora", adapter_name="student")
    base.load_lora_weights(control, adapter_name="control")
    base.scheduler = merged.scheduler
    base.set_adapters(["student", "control"])
    assert (draw(base, **FOUR) - expected).abs().max() < 1e-4
    base.set_adapters("student")
    assert (draw(base, **FOUR) - alone).abs().max() < 1e-4
    assert (expected - alone).abs().max() > 1e-2


def test_the_lora_also_serves_a_mixed_start(mixed: Folders, control: Path) -> None:
    """It goes to `unet`, the student; the base model stays as it was."""
    pipeline = loaded(mixed(), trust_remote_code=True)
    start, before = (f(pipeline) for f in (lambda p: p.base_latents(PROMPTS[0], generator=_seeded()), draw))
    pipeline.load_lora_weights(control)
    assert torch.equal(pipeline.base_latents(PROMPTS[0], generator=_seeded()), start)
    assert (draw(pipeline) - before).abs().max() > 1e-2
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), before)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_image_to_image(students: Folders) -> None:
    pipeline = StableDiffusionImg2ImgPipeline.from_pipe(loaded(students()))
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    call: dict[str, Any] = {"strength": 0.75, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
    made = pipeline(PROMPTS[0], image=image, generator=_seeded(), **call).images
    assert made.shape == image.shape and made.isfinite().all()


def test_a_list_of_generators(students: Folders) -> None:
    pipeline = loaded(students())
    together = draw(pipeline, PROMPTS, seed=[1, 2], **FOUR)
    alone = [draw(pipeline, prompt, seed=seed, **FOUR) for prompt, seed in zip(PROMPTS, [1, 2], strict=True)]
    assert (together - torch.cat(alone)).abs().max() < 1e-4 * together.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
def test_compiled(students: Folders) -> None:
    pipeline = loaded(students())
    before = draw(pipeline, **FOUR)
    pipeline.unet.compile()
    assert (draw(pipeline, **FOUR) - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs an accelerator")
def test_offloaded(students: Folders, mixed: Folders) -> None:
    for folder, call in ((students(), FOUR), (mixed(), {})):
        pipeline = loaded(folder, trust_remote_code=True)
        pipeline.enable_model_cpu_offload()
        first, again = draw(pipeline, **call).cpu(), draw(pipeline, **call).cpu()
        assert torch.equal(first, again) and first.isfinite().all()
        assert next(pipeline.unet.parameters()).device.type == "cpu"
