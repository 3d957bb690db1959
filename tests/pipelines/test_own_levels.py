"""Levels of the user's own: in training, in the folder, in what a stranger draws, and lists that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import UserError, distill, load_student
from diffdistill.core.schedule import DiscreteVP
from diffdistill.data.encoded import open_encoded
from diffdistill.families import load_teacher
from diffdistill.pipelines.card import student_call
from diffdistill.pipelines.schedulers import level_arguments, student_scheduler
from diffdistill.players.sampler import Gamma, Sampler, step_named
from diffdistill.training.assemble import load_run, make_game
from tests.players.conftest import encoded
from tests.players.test_player_kinds import apart, drawn_by_a_stranger, options_for, ours
from tests.players.tiny import PROMPTS
from tests.stranger import stranger

__all__ = ["encoded"]
Encoded = Callable[[str], tuple[Path, Path]]
Teachers = Callable[[str], Path]
PIXELS: dict[str, Any] = {"data": "digits", "batch_size": 4, "steps": 2, "sample_every": 0, "device": "cpu", "ema": 0.0}
DRAW = """
import json, sys, torch
from safetensors.torch import save_file
from diffusers import DiffusionPipeline
out, folders = json.loads(sys.argv[1])
images = {}
for name, folder in folders.items():
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images[name] = pipe(class_labels=[3], generator=torch.Generator().manual_seed(3), output_type="pt").images
save_file(images, out)
"""
RUNS: dict[str, dict[str, Any]] = {
    "vp": {"method": "dmd2", "levels": "900,640,333", "update_ratio": 1},
    "edm": {"method": "consistency", "levels": [60.0, 7.0, 1.0], "grid_points": 5},
    "flow": {"method": "flow_map", "levels": (0.95, 0.6, 0.2)},
}


def test_pixels_of_any_levels(tiny_teacher: Teachers, tmp_path: Path) -> None:
    folders = {}
    for kind, own in RUNS.items():
        options = {"teacher": str(tiny_teacher(kind)), "student_lr": 0.01, "out": str(tmp_path / kind)}
        folders[kind] = str(distill(**PIXELS | options | own).student)
    out = tmp_path / "images.safetensors"
    done = stranger(DRAW, json.dumps([str(out), folders]))
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, own in RUNS.items():
        levels = own["levels"]
        method = load_run(tmp_path / kind)[0].method
        for player in method.players.values():
            player.eval()
        sampler = method.sampler()
        levels = [float(part) for part in levels.split(",")] if isinstance(levels, str) else list(levels)
        assert list(sampler.levels) == list(load_student(folders[kind])[0].levels) == levels
        image = sampler((1, 8, 8), {"class_labels": torch.tensor([3])}, [torch.Generator().manual_seed(3)])
        assert (image.clamp(-1, 1) / 2 + 0.5 - load_file(out)[kind]).abs().max() < 2e-4, kind


@pytest.mark.parametrize(
    ("name", "method", "levels", "scheduler", "arguments"),
    [
        ("sd_v", "dmd2", (900, 640, 333), "LCMScheduler", {"timesteps": [900, 640, 333]}),
        ("sd3", "dmd2", (1.0, 0.5, 0.2), "FlowMatchLCMScheduler", {"sigmas": [1.0, 0.5, 0.2]}),
        ("sd3", "mean_flow", (0.9, 0.5), "FlowMatchEulerDiscreteScheduler", {"sigmas": [0.9, 0.5]}),
    ],
)
def test_latents_of_any_levels(
    name: str,
    method: str,
    levels: tuple[float, ...],
    scheduler: str,
    arguments: dict[str, Any],
    encoded: Encoded,
    tmp_path: Path,
) -> None:
    folder, prompts = encoded(name)
    options = options_for(folder, prompts, name, "sid", "full") | {"method": method, "levels": levels}
    data, run = open_encoded(prompts), tmp_path / "run"
    student = distill(**options, out=str(run)).student
    assert json.loads((student / "model_index.json").read_text())["scheduler"][1] == scheduler
    assert arguments.items() <= json.loads((student / "diffdistill.json").read_text())["call"].items()
    image = ours(run, data.get(torch.tensor([1])).cond, tuple(data.settings["shape"]))
    job = {"student": str(student), "base": "", "what": {"prompt": PROMPTS[1]}, "type": "latent"}
    (drawn,) = drawn_by_a_stranger([job], tmp_path)
    assert apart(drawn.reshape(image.shape), image) < 1e-3


@pytest.mark.parametrize("move", ["ddim", "gamma 0.4"])
def test_tcd_takes_the_timesteps_of_other_steps(move: str, encoded: Encoded) -> None:
    teacher, step = load_teacher(encoded("sd_v")[0]), step_named(move)
    assert step is not None and isinstance(teacher.denoiser.schedule, DiscreteVP)
    sampler = Sampler(teacher.denoiser, [900, 640, 333], step)
    call, scheduler = student_call(teacher, sampler), student_scheduler(teacher, sampler)
    assert call["timesteps"] == [900, 640, 333] and call["eta"] == (step.gamma if isinstance(step, Gamma) else 0.0)
    scheduler.set_timesteps(timesteps=call["timesteps"])
    x, abar = torch.randn(1, *teacher.shape), teacher.denoiser.schedule.alphas_cumprod
    if move == "ddim":
        got = scheduler.step(0 * x, torch.tensor(900), x, eta=0.0).prev_sample  # a v of 0
        x0, noise = abar[900].sqrt() * x, (1 - abar[900]).sqrt() * x
        assert torch.allclose(got, abar[640].sqrt() * x0 + (1 - abar[640]).sqrt() * noise, atol=1e-5)
    assert level_arguments(teacher, Sampler(teacher.denoiser, [999, 499], step)) == {}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"levels": "250,500"}, "levels: 250,500 do not descend; give the noisiest first"),
        ({"levels": "500,500"}, "levels: 500,500 do not descend"),
        ({"levels": ""}, "levels: nothing do not descend"),
        ({"levels": "a,b"}, "levels: 'a' is not a number"),
        ({"levels": "500,250", "student_steps": 3}, "student_steps: 3 was given, and levels 500,250 make it 2; leave"),
        ({"levels": "500,250", "student_level": 400}, "student_level: 400 was given, and levels 500,250 make it 500"),
        ({"levels": "1000,250"}, "levels: 1000 is not a whole timestep from 0 to 999"),
        ({"levels": "500,250.5"}, "levels: 250.5 is not a whole timestep"),
        ({"levels": "500,250", "method": "sim"}, "levels: no such option"),
        ({"levels": "749,499", "method": "lcm", "ddim_steps": 50}, "levels: 499 is none of the 50 .* 494 is near"),
    ],
)
def test_bad_lists_are_one_line(own: dict[str, Any], message: str, tiny_teacher: Teachers) -> None:
    options = {"method": "dmd2", "teacher": str(tiny_teacher("vp")), "data": "digits", "steps": 1, "device": "cpu"}
    with pytest.raises(UserError, match=message):
        make_game(options | own).method.sampler()
