"""Students load with stock diffusers where diffdistill is not installed, and give the same images."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdistill import UserError, distill, export, load_student, load_teacher
from diffdistill.core.schedule import student_levels
from diffdistill.families import METADATA, local_folder
from diffdistill.pipelines.schedulers import student_scheduler
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.rng import image_generators
from diffdistill.training.assemble import load_run
from tests.stranger import stranger

Teachers = Callable[[str], Path]


# What a stranger would run: stock diffusers, the model card's call, one generator an image.
STOCK = """
import sys

try:
    import diffdistill
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("diffdistill can be imported here")

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
generators = [torch.Generator().manual_seed(i) for i in range(8)]
steps = {"num_inference_steps": int(sys.argv[3])} if sys.argv[3] != "1" else {}
made = pipeline(batch_size=8, class_labels=list(range(8)), generator=generators, output_type="pt", **steps)
save_file({"images": made.images.contiguous()}, sys.argv[2])
print(len(pipeline.scheduler.timesteps))
"""


DMD2 = {"method": "dmd2", "update_ratio": 1}
PROGRESSIVE = {"method": "progressive", "data": "digits", "start_steps": 8, "stage_steps": 1}


@pytest.mark.parametrize(
    ("parameterization", "number", "options"),
    [
        ("vp", 1, DMD2),
        ("vp", 1, DMD2 | {"student_level": 399.0}),
        ("vp", 2, DMD2 | {"student_steps": 2}),
        ("vp", 4, DMD2 | {"student_steps": 4}),
        ("vp", 4, DMD2 | {"student_steps": 4, "student_level": 750.0, "fake_scores": "per_level"}),  # 751 is prime
        ("vp", 2, PROGRESSIVE | {"final_steps": 2}),
        ("vp", 4, {"method": "lcm", "data": "digits", "student_steps": 4}),  # 4 of 50 is not even
        ("vp", 1, PROGRESSIVE | {"start_steps": 4, "final_steps": 1}),
        ("edm", 1, DMD2),
        ("edm", 1, DMD2 | {"student_level": 2.5}),
        ("edm", 4, PROGRESSIVE | {"final_steps": 4}),
        ("edm", 1, PROGRESSIVE | {"start_steps": 4, "final_steps": 1}),
        ("flow", 1, DMD2),
        ("flow", 1, DMD2 | {"student_level": 0.8}),
    ],
)
def test_a_student_gives_the_same_images_in_stock_diffusers(
    parameterization: str, number: int, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    folder = distill(
        **options,
        teacher=str(tiny_teacher(parameterization)),
        steps=2,
        batch_size=4,
        student_lr=1e-3,
        ema=0.5,
        sample_every=0,
        device="cpu",
        out=str(tmp_path / "run"),
    ).student
    stock = in_stock(folder, number, tmp_path)
    sampler, student = load_student(folder)
    ours = sampler(student.shape, {"class_labels": torch.arange(8)}, image_generators(0, range(8)))
    assert float(stock.std()) > 0.05, "not all black, white or grey"
    assert torch.allclose(ours.clamp(-1, 1), stock, rtol=0, atol=1e-4)


def in_stock(folder: Path, number: int, place: Path) -> torch.Tensor:
    """The eight images of a process without diffdistill, whose call is the card's."""
    done = stranger(STOCK, folder, place / "images.safetensors", number, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(number), "the call of the card makes so many steps"
    assert number == 1 or f"num_inference_steps={number}" in (folder / "README.md").read_text()
    assert "Warning" not in done.stderr and "Expected types" not in done.stderr, done.stderr
    return load_file(place / "images.safetensors")["images"] * 2 - 1


@pytest.mark.parametrize(("parameterization", "numbers"), [("vp", (1, 2, 4, 8)), ("edm", (2,))])
def test_one_student_is_exported_in_any_number_of_steps(
    parameterization: str, numbers: tuple[int, ...], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    distill(
        method="flow_map", teacher=str(tiny_teacher(parameterization)), data="digits", steps=3, batch_size=4,
        student_lr=3e-2, ema=0.5, sample_every=0, device="cpu", out=str(run),
    )  # fmt: skip
    cond = {"class_labels": torch.arange(8)}
    for number in numbers:
        folder = export(run, student_steps=number, out=tmp_path / str(number))
        method = load_run(run)[0].method
        denoiser = method.sampler().denoiser
        levels = student_levels(denoiser.schedule, number).tolist()
        trained = Sampler(denoiser, levels, DDIM())((1, 8, 8), cond, image_generators(0, range(8))).clamp(-1, 1)
        assert torch.allclose(trained, in_stock(folder, number, tmp_path), rtol=0, atol=1e-4), number
        # In a call of another number of steps the same network would be told the wrong length of its jumps.
        another = load_student(folder)[0].denoiser
        t = torch.full((8,), 0.7, dtype=torch.float64)
        jump = denoiser(torch.ones(8, 1, 8, 8), t, cond).v - another(torch.ones(8, 1, 8, 8), t, cond).v
        assert (float(jump.abs().max()) > 1e-4) == (number != 4), "the training's own number is 4"


def test_a_student_of_its_own_steps_is_exported_in_no_others(tiny_teacher: Teachers, tmp_path: Path) -> None:
    run = tmp_path / "run"
    distill(teacher=str(tiny_teacher("vp")), steps=1, batch_size=4, sample_every=0, device="cpu", out=str(run))
    with pytest.raises(UserError, match="student_steps: this student is trained for 1 steps and no others"):
        export(run, student_steps=2)


def test_the_training_time_sampler_is_what_is_exported(tiny_teacher: Teachers, tmp_path: Path) -> None:
    """The moving average, not the raw weights, is exported; a checkpoint exports to the same weights."""
    run = tmp_path / "run"
    folder = distill(
        teacher=str(tiny_teacher("vp")), steps=3, batch_size=4, student_lr=1e-2, update_ratio=1, ema=0.9,
        sample_every=0, device="cpu", out=str(run),
    ).student  # fmt: skip
    exported = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    average = load_file(run / "checkpoints" / "step-00000003" / "average.safetensors")
    raw = load_file(run / "checkpoints" / "step-00000003" / "student.safetensors")
    assert all(torch.equal(exported[k.removeprefix("network.")], v) for k, v in average.items())
    assert not all(torch.equal(exported[k.removeprefix("network.")], v) for k, v in raw.items())
    again = export(run, out=tmp_path / "again")
    other = load_file(again / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[k], other[k]) for k in exported)
    with pytest.raises(UserError, match="step: no checkpoint at 7; there are 3"):
        export(run, step=7)


def test_an_export_replaces_nothing_but_a_student(tiny_teacher: Teachers, tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    distill(teacher=str(tiny_teacher("vp")), steps=1, batch_size=4, sample_every=0, device="cpu", out=str(run))
    mine.mkdir()
    export(run, out=mine)  # empty, and then a student
    export(run, out=mine)
    (mine / METADATA).unlink()
    with pytest.raises(UserError, match=r"out: '.*mine' exists and is not a folder with diffdistill.json"):
        export(run, out=mine)
    assert (mine / "model_index.json").is_file()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_run_of_another_teacher_is_refused(tiny_teacher: Teachers, tmp_path: Path) -> None:
    import shutil

    teacher = Path(shutil.copytree(tiny_teacher("vp"), tmp_path / "teacher"))
    run = tmp_path / "run"
    distill(teacher=str(teacher), steps=1, batch_size=4, sample_every=0, device="cpu", out=str(run))
    shutil.rmtree(teacher)
    shutil.copytree(local_folder("digits"), teacher)
    with pytest.raises(UserError, match=r"checkpoint: .*step-00000001 is of another network"):
        export(run)


def test_the_folder_says_how_it_was_made(tiny_teacher: Teachers, tmp_path: Path) -> None:
    folder = distill(
        teacher=str(tiny_teacher("vp")), steps=1, batch_size=4, sample_every=0, device="cpu", out=str(tmp_path / "run")
    ).student
    card = (folder / "README.md").read_text()
    assert "2405.14867" in card and "from_pretrained" in card and "| student_lr | 0.00063 |" in card
    meta = json.loads((folder / METADATA).read_text())
    assert meta["levels"] == [779.0] and meta["method"] == "dmd2" and meta["options"]["steps"] == 1


@pytest.mark.parametrize("kind", ["ddpm", "consistency"])
def test_an_unconditional_student_of_a_folder_that_is_not_ours(kind: str, tmp_path: Path) -> None:
    """DDPMPipeline with eps, or ConsistencyModelPipeline with its own scheduler; no classes, three channels."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    made = {
        "ddpm": lambda: diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()),
        "consistency": lambda: diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler()),
    }
    made[kind]().save_pretrained(tmp_path / "teacher")
    folder = distill(
        teacher=str(tmp_path / "teacher"),
        steps=1,
        batch_size=2,
        sample_every=0,
        device="cpu",
        out=str(tmp_path / "run"),
    ).student
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    sampler, student = load_student(folder)
    ours = sampler(student.shape, {}, image_generators(3, range(2)))
    stock = pipeline(batch_size=2, generator=image_generators(3, range(2)), output_type="pt").images * 2 - 1
    assert torch.allclose(ours.clamp(-1, 1), stock, rtol=0, atol=1e-4)


def test_levels_that_no_stock_scheduler_has_are_refused(tiny_teacher: Teachers) -> None:
    teacher, flow = (replace(load_teacher(tiny_teacher(kind)), family="another") for kind in ("vp", "flow"))
    with pytest.raises(UserError, match=r"student_level: 399.5 is not a whole timestep from 0 to 999"):
        student_scheduler(teacher, Sampler(teacher.denoiser, [399.5]))
    with pytest.raises(UserError, match="3 steps do not divide the 1000 timesteps up to the student's first"):
        student_scheduler(teacher, Sampler(teacher.denoiser, [999, 665, 332]))
    with pytest.raises(UserError, match="no stock scheduler takes 2 steps of the kind 'renoise'"):
        student_scheduler(flow, Sampler(flow.denoiser, [0.999, 0.5]))


@pytest.mark.parametrize(
    ("kind", "levels", "message"),
    [
        ("vp", [999, 665.5], "665.5 is not a whole timestep from 0 to 999"),
        ("edm", [80, 0.001], "0.001 is not a sigma from 0.002 to 80.0"),
        ("flow", [1.5, 0.5], "1.5 is not a flow time above 0, up to 1"),
    ],
)
def test_levels_that_the_schedule_has_not_are_refused(
    kind: str, levels: list[float], message: str, tiny_teacher: Teachers
) -> None:
    teacher = load_teacher(tiny_teacher(kind))
    with pytest.raises(UserError, match=f"student_level: {message}"):
        student_scheduler(teacher, Sampler(teacher.denoiser, levels))


def test_a_failed_export_leaves_the_last_one(
    tiny_teacher: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffdistill.pipelines.export as writing

    run = tmp_path / "run"
    folder = distill(
        teacher=str(tiny_teacher("vp")), steps=1, batch_size=4, sample_every=0, device="cpu", out=str(run)
    ).student
    before = (folder / "README.md").read_bytes()
    monkeypatch.setattr(writing, "write_record", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        export(run)
    assert (folder / "README.md").read_bytes() == before
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_teacher_folders_that_cannot_be_used(tiny_teacher: Teachers, tmp_path: Path) -> None:
    import shutil

    def broken(name: str) -> Path:
        return Path(shutil.copytree(tiny_teacher("vp"), tmp_path / name))

    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    for missing in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", str(weights)):
        folder = broken(missing.replace("/", "-"))
        (folder / missing).unlink()
        with pytest.raises(
            UserError,
            match=r"safetensors weights" if missing == str(weights) else f"{missing} is missing|has no {missing}",
        ):
            load_teacher(folder)

    cut = broken("cut")
    (cut / weights).write_bytes((cut / weights).read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_teacher(cut)

    lacking = broken("lacking")
    tensors = load_file(lacking / weights)
    tensors["conv_in.weight"] = torch.zeros(3, 3)
    save_file(tensors, lacking / weights)
    with pytest.raises(UserError, match="does not load as UNet2DModel"):
        load_teacher(lacking)

    strange = broken("strange")
    config = json.loads((strange / "scheduler" / "scheduler_config.json").read_text())
    config["_class_name"] = "ScoreSdeVeScheduler"
    (strange / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"'ScoreSdeVeScheduler' is not supported; supported are .*DDIMScheduler"):
        load_teacher(strange)

    other = broken("other")
    (other / "model_index.json").write_text(json.dumps({"_class_name": "MochiPipeline"}))
    known = r"'MochiPipeline' is not supported; `diffdistill families` lists those that are.*family-check"
    with pytest.raises(UserError, match=known):
        load_teacher(other)

    with pytest.raises(UserError, match="is not a folder"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(UserError, match="'someone/something' is no folder here, nor could it be had from the hub"):
        load_teacher("someone/something")


def test_the_embedded_teacher_is_small_and_says_its_recipe() -> None:
    teacher = load_teacher("digits")
    assert teacher.num_classes == 10 and teacher.shape == (1, 8, 8)
    folder = local_folder("digits")
    assert sum(p.stat().st_size for p in folder.rglob("*.safetensors")) < 4e6
    recipe = json.loads((folder / METADATA).read_text())["recipe"]
    assert recipe["data"] == "digits" and recipe["seed"] == 0
    steps = [row["steps"] for row in json.loads((folder / "eval" / "results.json").read_text())["rows"]]
    assert steps == [1, 2, 4, 8, 16, 32, 50]
    assert "diffdistill teacher " in (folder / "README.md").read_text()


def test_a_hub_id_is_downloaded_without_anything_but_safetensors(
    tiny_teacher: Teachers, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    call: dict[str, object] = {}

    def snapshot_download(name: str, **options: object) -> str:
        call.update(options, name=name)
        return str(tiny_teacher("vp"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_teacher("someone/something").source == "someone/something"
    assert call["name"] == "someone/something" and "*.bin" in call["ignore_patterns"]  # type: ignore[operator]


def test_the_null_class_must_be_the_last_label(tiny_teacher: Teachers) -> None:
    assert load_teacher(tiny_teacher("vp"), null_class=10).num_classes == 10
    with pytest.raises(UserError, match="null_class: 3 is not the last of the teacher's 11 labels"):
        load_teacher(tiny_teacher("vp"), null_class=3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prediction_type": "epsilon"}, "zero terminal SNR"),
        ({"prediction_type": "flow"}, "'flow' is not supported"),
        ({"beta_schedule": "wavy"}, "beta_schedule: 'wavy'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "flow_prediction is supported"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "'continuous' is not supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "'sample' is not EDM's"),
    ],
)
def test_scheduler_options_that_would_be_misread_are_refused(
    changes: dict[str, object], says: str, tiny_teacher: Teachers
) -> None:
    from diffdistill.families import schedule_of

    config = json.loads((tiny_teacher("vp") / "scheduler" / "scheduler_config.json").read_text())
    with pytest.raises(UserError, match=says):
        schedule_of(config | changes)
