"""One folder of a student that takes the time to jump to serves several numbers of steps, as an export of each does."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import distill, export
from tests.players.conftest import encoded
from tests.players.every_method import OTHERS
from tests.players.test_player_kinds import options_for
from tests.stranger import stranger

__all__ = ["encoded"]
# Nothing of ours: one folder in several numbers of steps, and the folders that were exported for each.
STRANGER = """
import json, sys, torch
from safetensors.torch import save_file
from diffusers import DiffusionPipeline
folder, exports, what, again, out = json.loads(sys.argv[1])
def draw(pipe, steps, **more):
    pipe.set_progress_bar_config(disable=True)
    more = {"num_inference_steps": steps} | what | more
    return torch.as_tensor(pipe(generator=torch.Generator().manual_seed(3), **more).images)
own = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = {}
for steps, other in exports.items():
    images[f"one {steps}"] = draw(own, int(steps))
    call = json.load(open(other + "/diffdistill.json"))["call"] or {}
    images[f"own {steps}"] = draw(DiffusionPipeline.from_pretrained(other), int(steps), **call)
own.save_pretrained(again)
copy = DiffusionPipeline.from_pretrained(again, custom_pipeline=again, trust_remote_code=True)
images["copy"] = draw(copy, int(steps))
try:
    draw(own, 77)
except ValueError as error:
    print(error)
save_file({name: value.contiguous() for name, value in images.items()}, out)
"""


def compared(run: Path, steps: list[int], what: dict[str, Any], tmp_path: Path) -> str:
    """What the refusal of 77 steps says, after one folder was compared with the others."""
    exports = {n: str(export(run, student_steps=n, out=tmp_path / f"in-{n}")) for n in steps}
    job = [str(run / "student"), exports, what, str(tmp_path / "again"), str(tmp_path / "images.safetensors")]
    done = stranger(STRANGER, json.dumps(job))
    assert done.returncode == 0, done.stderr[-3000:]
    images = load_file(tmp_path / "images.safetensors")
    drawn = [images[f"one {n}"] for n in steps]
    for n, image in zip(steps, drawn, strict=True):
        assert (image - images[f"own {n}"]).abs().max() < 1e-3 * max(1, float(image.abs().max())), n
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(drawn))
    assert torch.equal(images["copy"], drawn[-1])
    return done.stdout


@pytest.mark.parametrize(
    ("method", "kind", "own"),
    [
        ("flow_map", "full", {}),
        ("mean_flow", "lora", {"lora": "student", "lora_alpha": 6.0}),
        ("ctm", "full", {"gamma": 0.0}),
        ("ctm", "full", {"gamma": 0.4}),
    ],
)
@pytest.mark.slow
def test_latent_students(
    method: str, kind: str, own: dict[str, Any], encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded("sd_v")
    options = options_for(folder, prompts, "sd_v", "sid", kind) | {"method": method, "student_lr": 0.05}
    run = tmp_path / "run"
    student = distill(**options | OTHERS[method] | own, out=str(run)).student
    said = compared(run, [1, 4], {"prompt": "a red square", "output_type": "latent"}, tmp_path)
    assert "num_inference_steps: 77 is none that this student takes; give one of 1, 2, 4," in said
    assert "`num_inference_steps=` one of 1, 2, 4" in (student / "README.md").read_text()
    if kind == "lora":
        assert not (student / "lora" / "scheduler" / "steps.safetensors").exists()


def test_a_student_of_a_flow_in_latents(encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    folder, prompts = encoded("sd3")
    options = options_for(folder, prompts, "sd3", "sid", "full") | {"method": "mean_flow", "student_lr": 0.05}
    own = {"longest_jump": 0.7, "mode": "distillation", "equal_share": 0.0, "student_steps": 3}
    distill(**options | own, out=str(tmp_path / "run"))
    said = compared(tmp_path / "run", [4, 5], {"prompt": "a red square", "output_type": "latent"}, tmp_path)
    assert "give one of 3, 4, 5" in said, "jumps that are too long are not trained"


@pytest.mark.parametrize("parameterization", ["vp", "edm"])
def test_students_in_pixels(parameterization: str, tiny_teacher: Callable[[str], Path], tmp_path: Path) -> None:
    shared: dict[str, Any] = {"teacher": str(tiny_teacher(parameterization)), "data": "digits", "batch_size": 4}
    settings: dict[str, Any] = {"student_lr": 0.05, "steps": 2, "sample_every": 0, "device": "cpu", "ema": 0.0}
    distill(method="mean_flow", **shared, **settings, student_steps=2, out=str(tmp_path / "run"))
    said = compared(tmp_path / "run", [1, 4], {"output_type": "np", "class_labels": 3}, tmp_path)
    assert "give one of 1, 2, " in said
