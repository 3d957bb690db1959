"""Folders whose weights are in half precision, as most releases since 2024 are: each command on each family."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import distill, export
from diffdistill.data.encoded import encode
from diffdistill.eval.models import SamplingOptions, open_model
from diffdistill.eval.sample import SampleRequest, draw_samples
from diffdistill.families import FAMILIES, load_pipeline
from diffdistill.families._parts import stored_dtypes
from tests.players.tiny import BUILDERS, SIZES

LATENT = [name for name, family in FAMILIES.items() if family.autoencoder is not None]
IMAGES = [name for name in LATENT if name not in ("dit", "wan")]
WORDS = ["a red square", "two dogs"]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, type) -> a tiny pipeline's folder with all of its weights in that type."""
    root = tmp_path_factory.mktemp("half")

    def make(name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        folder = root / f"{name}-{dtype}"
        if not folder.exists():
            pipeline = BUILDERS[name]()
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module):
                    part.to(dtype)
            pipeline.save_pretrained(folder)
        return folder

    return make


def widened(folder: Path, to: Path) -> Path:
    """The same weights in float32 files."""
    load_pipeline(folder).save_pretrained(to)
    return to


@pytest.mark.parametrize("name", IMAGES)
def test_prompts_of_a_half_folder_are_encoded_in_float32(name: str, half: Callable[..., Path], tmp_path: Path) -> None:
    folder, prompts = half(name), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(WORDS))
    options: dict[str, Any] = {"prompts": str(prompts), "resolution": SIZES[name], "device": "cpu"}
    mine = encode(**options, teacher=str(folder), out=str(tmp_path / "half"))
    wide = encode(**options, teacher=str(widened(folder, tmp_path / "wide")), out=str(tmp_path / "float32"))
    got, expected = (load_file(path / "00000.safetensors") for path in (mine, wide))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and got[key].dtype not in (torch.bfloat16, torch.float16), key
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("name", IMAGES)
def test_a_half_teacher_and_its_student_are_drawn_by_everybody(
    name: str, half: Callable[..., Path], tmp_path: Path
) -> None:
    folder, prompts = half(name), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(WORDS))
    student = distill(
        method="dmd2", teacher=str(folder), prompts=str(prompts), resolution=SIZES[name], steps=1, batch_size=2,
        update_ratio=1, student_lr=1e-3, sample_every=0, device="cpu", out=str(tmp_path / "run"),
    ).student  # fmt: skip
    network = FAMILIES[name].component
    assert stored_dtypes(student / network)[1] is torch.bfloat16
    # A teacher is drawn at its own size, which the tiny Z-Image's positions do not reach.
    for model, steps in ((student, None), *([] if name == "z_image" else [(folder, 2)])):
        images = draw_samples(model, SampleRequest(prompts=WORDS[:1], count=1, steps=steps)).images
        assert bool(images.isfinite().all())
        drawn = open_model(model, SamplingOptions(steps=steps)).draw([0], 0, None, WORDS[:1])
        assert len(drawn) == 1
    card = (student / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(student))
    assert "torch_dtype=torch.bfloat16" in code
    plain = code.replace(", torch_dtype=torch.bfloat16", "")  # whoever leaves it out gets float32 throughout
    lines = f"import sys; sys.modules['diffdistill'] = None\n{code}\n{plain}\nassert len(images) == 1"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_export_may_be_of_another_type(half: Callable[..., Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(WORDS))
    folder = half("stable_diffusion", torch.float16)
    run = distill(
        method="dmd2", teacher=str(folder), prompts=str(prompts), steps=1, batch_size=2,
        update_ratio=1, sample_every=0, device="cpu", out=str(tmp_path / "run"),
    ).folder  # fmt: skip
    assert stored_dtypes(run / "student" / "unet")[1] is torch.float16
    assert "stored in float16" in (run / "student" / "README.md").read_text()
    wide = export(run, dtype="float32", out=tmp_path / "wide")
    assert stored_dtypes(wide / "unet") == ({}, torch.float32)
    assert "torch_dtype" not in (wide / "README.md").read_text()
