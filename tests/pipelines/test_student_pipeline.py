"""A student's folder gives its images by the plain call, and the same ones for the same generators, in every family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import distill
from diffdistill.commands.cli import main
from diffdistill.data.encoded import encode
from diffdistill.eval.models import SamplingOptions, open_model
from tests import tiny_a, tiny_b
from tests.stranger import stranger

BUILDERS = {**tiny_a.PIPELINES, **tiny_b.PIPELINES}
SIZES = {**tiny_a.SIZES, **tiny_b.SIZES}
# As a stranger does, who has no diffdistill: the plain call, the call with the arguments written out, twice the same
# noise, and a list of generators.
STRANGER = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

folder, out = sys.argv[1:]
call = json.load(open(f"{folder}/diffdistill.json"))["call"]
own = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
stock = DiffusionPipeline.from_pretrained(folder)
assert type(own).__name__ == f"Student{type(stock).__name__}" and type(own).__mro__[1] is type(stock)


def draw(pipeline, seeds, prompts="a red square", **more):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    generator = generators if len(seeds) > 1 else generators[0]
    torch.manual_seed(len(seeds))  # what another's noise must not follow
    pipeline.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipeline(prompts, generator=generator, output_type="np", **more).images).float()


images = {"plain": draw(own, [3]), "explicit": draw(own, [3], **call)}
images["two"] = draw(own, [3, 4], ["a red square", "two dogs"])
images["second"] = draw(own, [4], "two dogs")
torch.manual_seed(1)
images["stock"] = draw(stock, [3], **call)
save_file({name: value.contiguous() for name, value in images.items()}, out)
"""


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> a student of four steps, which renoises."""
    root = tmp_path_factory.mktemp("students")

    def make(name: str) -> Path:
        out = root / name
        if not out.exists():
            BUILDERS[name]().save_pretrained(root / f"{name}-teacher")
            (root / "prompts.txt").write_text("a red square\ntwo dogs")
            shared: dict[str, Any] = {"teacher": str(root / f"{name}-teacher"), "resolution": SIZES[name]}
            encode(**shared, prompts=str(root / "prompts.txt"), out=str(root / f"{name}-prompts"))
            distill(
                **shared, prompts=str(root / f"{name}-prompts"), method="dmd2", update_ratio=1, student_steps=4,
                batch_size=2, steps=2, sample_every=0, device="cpu", out=str(out),
            )  # fmt: skip
        return out / "student"

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion", "sd3"])
def test_a_stranger_needs_no_arguments(name: str, students: Callable[[str], Path], tmp_path: Path) -> None:
    done = stranger(STRANGER, students(name), tmp_path / "images.safetensors")
    assert done.returncode == 0, done.stderr[-3000:]
    images = load_file(tmp_path / "images.safetensors")
    assert torch.equal(images["plain"], images["explicit"])
    assert (images["two"] - torch.cat([images["plain"], images["second"]])).abs().max() < 1e-4
    assert (images["plain"] - images["second"]).abs().max() > 1e-3
    if name == "stable_diffusion":  # whose stock pipeline hands its generators on itself
        assert torch.equal(images["plain"], images["stock"])


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_our_commands_draw_the_same_twice(name: str, students: Callable[[str], Path], tmp_path: Path) -> None:
    for i in (0, 1):
        torch.manual_seed(i)
        out = ["--seed", "0", "--out", str(tmp_path / f"{i}.png")]
        assert main(["sample", str(students(name)), "--prompt", "a", "--count", "2", *out]) == 0
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    model = open_model(str(students(name)), SamplingOptions())
    drawn = []
    for i in (0, 1):
        torch.manual_seed(i)
        drawn.append(model.draw([0, 1], 0, None, ["a", "b"]))
    assert torch.equal(*drawn)
    assert json.loads((students(name) / "diffdistill.json").read_text())["call"]["num_inference_steps"] == 4
