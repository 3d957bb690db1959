"""Folders whose weights are in half precision, as most releases since 2024 are: each command on each family."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import distill, export
from diffdistill.commands.cli import main
from diffdistill.data.encoded import encode
from diffdistill.eval.models import SamplingOptions, open_model
from diffdistill.eval.sample import SampleRequest, draw_samples
from diffdistill.families import FAMILIES, load_pipeline
from diffdistill.families._parts import stored_dtypes
from tests.players.tiny import BUILDERS, SIZES, draw_small
from tests.stranger import stranger

LATENT = [name for name, family in FAMILIES.items() if family.autoencoder is not None]
# Of those that read images the families' own test has bfloat16.
IMAGES = [n for n in LATENT if n != "dit" and not FAMILIES[n].videos and not FAMILIES[n].reads_image]
WORDS = ["a red square", "two dogs"]
HALVES = (torch.bfloat16, torch.float16)
EACH = [(name, dtype) for dtype in HALVES for name in IMAGES]
# In float16 the rest takes as long again and is the same code. Of some the families' own test has bfloat16.
USED = [
    pytest.param(*case, marks=[pytest.mark.slow] if case[1] is torch.float16 and case[0] != "sd3" else [])
    for case in EACH
    if case[0] not in ("lumina2", "qwen_image21")
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_small(monkeypatch)


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


@pytest.mark.parametrize(("name", "dtype"), EACH, ids=str)
def test_prompts_of_a_half_folder_are_encoded_in_float32(
    name: str, dtype: torch.dtype, half: Callable[..., Path], tmp_path: Path
) -> None:
    folder, prompts = half(name, dtype), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(WORDS))
    options: dict[str, Any] = {"prompts": str(prompts), "resolution": SIZES[name], "device": "cpu"}
    mine = encode(**options, teacher=str(folder), out=str(tmp_path / "half"))
    wide = encode(**options, teacher=str(widened(folder, tmp_path / "wide")), out=str(tmp_path / "float32"))
    got, expected = (load_file(path / "00000.safetensors") for path in (mine, wide))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and got[key].dtype not in (torch.bfloat16, torch.float16), key
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize(("name", "dtype"), USED, ids=str)
def test_a_half_teacher_and_its_student_are_drawn_by_everybody(
    name: str, dtype: torch.dtype, half: Callable[..., Path], tmp_path: Path
) -> None:
    folder, prompts = half(name, dtype), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(WORDS))
    student = distill(
        method="dmd2", teacher=str(folder), prompts=str(prompts), resolution=SIZES[name], steps=1, batch_size=2,
        update_ratio=1, student_lr=1e-3, sample_every=0, device="cpu", out=str(tmp_path / "run"),
    ).student  # fmt: skip
    network = FAMILIES[name].component
    assert stored_dtypes(student / network)[1] is dtype
    # A teacher is drawn at its own size, which these tiny networks' positions do not reach.
    for model, steps in ((student, None), *([] if name in ("z_image", "aura_flow") else [(folder, 2)])):
        images = draw_samples(model, SampleRequest(prompts=WORDS[:1], count=1, steps=steps)).images
        assert bool(images.isfinite().all())
        drawn = open_model(model, SamplingOptions(steps=steps)).draw([0], 0, None, WORDS[:1])
        assert len(drawn) == 1
    card = (student / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(student))
    assert f"torch_dtype={dtype}" in code
    plain = code.replace(f", torch_dtype={dtype}", "")  # whoever leaves it out gets float32 throughout
    done = stranger(f"{code}\n{plain}\nassert len(images) == 1")
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


def test_a_merged_student_in_shards_is_of_the_teachers_type(half: Callable[..., Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(WORDS))
    student = distill(
        method="dmd2", teacher=str(half("stable_diffusion", torch.bfloat16)), prompts=str(prompts), steps=1,
        batch_size=2, update_ratio=1, sample_every=0, device="cpu", lora="student,fake_score", lora_rank=2,
        max_shard_size="100KB", out=str(tmp_path / "run"),
    ).student  # fmt: skip
    shards = list((student / "unet").glob("diffusion_pytorch_model-*-of-*.safetensors"))
    assert len(shards) > 1 and max(path.stat().st_size for path in shards[:-1]) < 200_000
    assert {value.dtype for path in shards for value in load_file(path).values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_commands_of_the_readme_on_a_half_folder(
    dtype: torch.dtype, half: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    block = next(part for part in readme.split("```") if "diffdistill encode" in part)
    lines = [line for line in block.replace("\\\n", " ").strip().splitlines() if "push-to-hub" not in line]
    assert [line.split()[1] for line in lines][:3] == ["encode", "train", "sample"]
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(WORDS))
    folder = str(half("stable_diffusion", dtype))
    small = {"train": ["--steps", "1", "--batch-size", "2"], "sample": ["--count", "1"]}
    for line in lines:
        _, command, *rest = shlex.split(line, comments=True)
        arguments = [folder if word == "MODEL" else word for word in rest]
        assert main([command, *arguments, *small.get(command, []), "--device", "cpu"]) == 0
    assert Path("samples.png").is_file()
    assert stored_dtypes(Path("runs/mine/student/unet"))[1] is dtype
