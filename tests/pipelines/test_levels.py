"""Levels that no stock scheduler has in a row: the folder's own pipeline hands them over, and draws the same images."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import distill, load_student
from diffdistill.core.schedule import student_levels
from diffdistill.pipelines.schedulers import student_rows, student_scheduler
from diffdistill.pipelines.shipped.student_pipeline import LevelScheduler
from diffdistill.players.sampler import Sampler, step_named
from diffdistill.training.assemble import load_run
from tests.pipelines.test_exported_schedulers import LABELS, SHAPE, N, from_folder, loud, same, teacher_of, trained
from tests.scaffold.straight import draw, in_double
from tests.stranger import stranger

_double = pytest.fixture(in_double)
STEPS: list[tuple[str, str, float | None]] = [
    ("flow", "renoise", None),
    ("flow", "ddim", 0.7),
    ("flow", "gamma 0.3", None),
    ("flow shifted", "renoise", None),
    ("flow shifted", "gamma 0.6", 0.9),
    ("edm", "renoise", None),
    ("edm", "gamma 0.3", 7.5),
    ("edm v", "gamma 0.6", None),
    ("consistency", "renoise", None),
    ("consistency", "ddim", 12.5),
    ("consistency", "gamma 0.5", None),
    ("ddpm v", "ddim", 82),
    ("zero snr", "gamma 0.4", None),
]


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(("kind", "move", "start"), STEPS)
def test_the_rows_are_the_training_time_sampler(kind: str, move: str, start: float | None) -> None:
    teacher, step = teacher_of(kind), step_named(move)
    assert step is not None
    for steps in (2, 3, 4):
        levels = student_levels(teacher.denoiser.schedule, steps, start).tolist()
        sampler = Sampler(teacher.denoiser, levels, step)
        rows = student_rows(teacher, sampler)
        assert rows is not None and [row[0] for row in rows] == levels
        scheduler: Any = LevelScheduler(from_folder(student_scheduler(teacher, sampler)), rows)
        z, made = torch.randn(N, *SHAPE, generator=draw(steps, "z")), draw(steps)
        x = z * scheduler.init_noise_sigma
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            time = t.expand(N).double()
            y = loud(scheduler.scale_model_input(x, t).double(), time, LABELS, teacher.denoiser.network)  # type: ignore[arg-type]
            x = scheduler.step(y, t, x, generator=made).prev_sample
        assert len(scheduler.timesteps) == steps
        same(trained(sampler, z, steps), x)


def test_where_a_stock_scheduler_has_the_levels_it_takes_them() -> None:
    for kind, move, steps in (("ddpm", "ddim", 4), ("ddpm", "renoise", 4), ("edm", "ddim", 3), ("flow", "ddim", 1)):
        teacher, step = teacher_of(kind), step_named(move)
        assert step is not None
        levels = student_levels(teacher.denoiser.schedule, steps).tolist()
        assert student_rows(teacher, Sampler(teacher.denoiser, levels, step)) is None, (kind, move)


# Nothing of ours. The plain folder says what it needs; with its code the images are the student's.
STRANGER = """
import json, sys, torch
from safetensors.torch import save_file
from diffusers import DiffusionPipeline
out, jobs = json.loads(sys.argv[1])
images, pipes = {}, {}
for name, (folder, steps) in jobs.items():
    try:
        DiffusionPipeline.from_pretrained(folder)
        sys.exit(name + " loads plainly")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    pipes[name] = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
for name, (folder, steps) in jobs.items():
    pipe = pipes[name]
    pipe.set_progress_bar_config(disable=True)
    def draw(pipe, **more):
        each = [torch.Generator().manual_seed(i) for i in range(3)]
        return pipe(batch_size=3, class_labels=[1, 2, 3], generator=each, output_type="pt", **more).images
    images[name] = draw(pipe)
    assert type(pipe.scheduler).__module__.startswith("diffusers."), type(pipe.scheduler)
    for n in steps:
        images[name + "/" + str(n)] = draw(pipe, num_inference_steps=n)
    try:
        draw(pipe, num_inference_steps=77)
        sys.exit(name + " takes 77 steps")
    except ValueError as error:
        assert "num_inference_steps: 77 is none that this student takes" in str(error), error
pipes["two"].save_pretrained(out + "/again")
copy = DiffusionPipeline.from_pretrained(out + "/again", trust_remote_code=True)
images["copy"] = draw(copy)
save_file({name: image.contiguous() for name, image in images.items()}, out + "/images.safetensors")
"""
TRAINED: dict[str, dict[str, Any]] = {
    "two": {"method": "consistency", "student_steps": 2, "grid_points": 5},
    "four": {"method": "consistency", "student_steps": 4, "grid_points": 5},
    "start": {"method": "consistency", "student_steps": 4, "grid_points": 5, "student_level": 0.93},
    "mean_flow": {"method": "mean_flow", "student_steps": 4},
    "flow_map": {"method": "flow_map", "student_steps": 4},
    "edm": {"teacher": "edm", "method": "consistency", "student_steps": 2, "grid_points": 5},
    "gamma": {"method": "ctm", "student_steps": 3, "gamma": 0.4, "grid_points": 5, "dsm_weight": 0.0},
}


def test_a_stranger_draws_the_images_of_students_in_pixels(tiny_teacher: Callable[[str], Path], tmp_path: Path) -> None:
    jobs: dict[str, tuple[str, list[int]]] = {}
    for name, own in TRAINED.items():
        teacher = str(tiny_teacher(str(own.get("teacher", "flow"))))
        shared = {"data": "digits", "batch_size": 4, "student_lr": 0.02, "steps": 2, "ema": 0.0}
        run = tmp_path / name
        student = distill(**shared, sample_every=0, device="cpu", **own | {"teacher": teacher, "out": str(run)}).student
        jobs[name] = (str(student), [1, 2] if name in ("mean_flow", "flow_map", "gamma") else [])
        assert "trust_remote_code=True" in (student / "README.md").read_text()
    job = json.dumps([str(tmp_path), jobs])
    done = stranger(STRANGER, job)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    images = load_file(tmp_path / "images.safetensors")
    cond = {"class_labels": torch.tensor([1, 2, 3])}
    for name, (folder, others) in jobs.items():
        method = load_run(tmp_path / name)[0].method
        for player in method.players.values():
            player.eval()
        for key, steps in [(name, None), *((f"{name}/{n}", n) for n in others)]:
            if steps is not None:
                method.in_steps(steps)
            ours = method.sampler()((1, 8, 8), cond, seeds())
            assert (ours.clamp(-1, 1) / 2 + 0.5 - images[key]).abs().max() < 2e-4, key
        sampler, _ = load_student(folder)
        read = sampler((1, 8, 8), cond, seeds())
        assert (read.clamp(-1, 1) / 2 + 0.5 - images[name]).abs().max() < 2e-4, name
    assert torch.equal(images["copy"], images["two"])
    assert all((a - b).abs().max() > 1e-2 for a, b in pairwise(images[name] for name in TRAINED))


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(3)]
