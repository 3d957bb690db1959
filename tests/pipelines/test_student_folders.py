"""What a student's folder holds and says: a LoRA alone, shards, links, a teacher's licence, and no path of ours."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffdistill import UserError, distill, export, load_student
from diffdistill.commands.cli import main
from diffdistill.families import load_pipeline, read_record, student_record, teacher_of
from diffdistill.pipelines.origin import card_of
from diffdistill.rng import image_generators
from tests import tiny_a, tiny_c
from tests.stranger import stranger

TEACHER_CARD = """---
license: openrail++
license_name: tiny-license
license_link: LICENSE.md
base_model: somebody/their-base
pipeline_tag: text-to-image
tags: [stable-diffusion, tiny]
---
# A teacher
"""

# A stranger runs the card's own lines, each card in turn, and keeps the images.
STRANGER = """
import json, sys, torch
sys.modules["diffdistill"] = None  # an import of it would fail
from safetensors.torch import save_file
images = {}
for name, code in json.load(open(sys.argv[1])).items():
    names = {}
    exec(code, names)
    pipeline = names["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a red square", num_inference_steps=2, guidance_scale=1.0, output_type="pt",
                     height=32, width=32, generator=torch.Generator().manual_seed(3))
    images[name] = drawn.images.contiguous()
save_file(images, sys.argv[2])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher that has a card and a licence, and the runs of a LoRA student and of a full one."""
    root = tmp_path_factory.mktemp("place")
    teacher = root / "tiny"
    tiny_a.stable_diffusion().save_pretrained(teacher)
    (teacher / "README.md").write_text(TEACHER_CARD)
    (teacher / "LICENSE.md").write_text("terms of the teacher")
    (root / "prompts.txt").write_text("a red square\ntwo dogs")
    shared: dict[str, Any] = {
        "method": "dmd2", "teacher": str(teacher), "prompts": str(root / "prompts.txt"), "steps": 1, "batch_size": 2,
        "update_ratio": 1, "student_steps": 2, "sample_every": 0, "resolution": 32, "device": "cpu",
    }  # fmt: skip
    distill(**shared, lora="student,fake_score", lora_rank=2, lora_alpha=4.0, student_lr=0.3, out=str(root / "lora"))
    distill(**shared, student_lr=1e-2, out=str(root / "full"))
    return root


def test_a_guidance_that_is_a_part_of_the_folder_is_off_in_a_students(tmp_path: Path) -> None:
    """HunyuanVideo 1.5's, whose call takes no scale; its teacher's stays, whose files may be linked."""
    teacher, prompts = tmp_path / "teacher", tmp_path / "prompts.txt"
    tiny_c.hunyuan_video15().save_pretrained(teacher)
    prompts.write_text("a red square\ntwo dogs")
    options: dict[str, Any] = {
        "method": "sid", "teacher": str(teacher), "prompts": str(prompts), "steps": 1, "batch_size": 2, "frames": 5,
        "resolution": 32, "sample_every": 0, "device": "cpu", "out": str(tmp_path / "run"),
    }  # fmt: skip
    with pytest.raises(UserError, match="parts: the guidance of HunyuanVideo15Pipeline is a file of its folder"):
        distill(**options, parts="reference")
    student = distill(**options, parts="link").student
    scales = [json.loads((place / "guider/guider_config.json").read_text()) for place in (teacher, student)]
    assert [values["guidance_scale"] for values in scales] == [6.0, 1.0]
    assert load_pipeline(teacher).guider.guidance_scale == 1.0  # off, until a scale is asked for


def code_of(folder: Path, teacher: Path) -> str:
    """The first lines of code of a model card, without its call."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = [line for line in code.splitlines() if not line.startswith("images = ")]
    return "\n".join(lines).replace("FOLDER", str(folder)).replace("TEACHER", str(teacher))


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_form_gives_the_same_images_to_a_stranger(place: Path, tmp_path: Path) -> None:
    run, teacher = place / "lora", place / "tiny"
    forms = {
        "both": run / "student",
        "inside": run / "student" / "lora",
        "lora": export(run, export="lora", out=tmp_path / "lora"),
        "merged": export(run, export="merged", out=tmp_path / "merged"),
        "shards": export(run, export="merged", max_shard_size="100KB", out=tmp_path / "shards"),
        "linked": export(run, export="merged", parts="link", out=tmp_path / "linked"),
        "referred": export(run, export="merged", parts="reference", out=tmp_path / "referred"),
    }
    codes = {name: code_of(folder, teacher) for name, folder in forms.items()}
    line = f'pipeline = DiffusionPipeline.from_pretrained("{teacher}")'
    codes["teacher"] = f"from diffusers import DiffusionPipeline\n{line}"
    (tmp_path / "codes.json").write_text(json.dumps(codes))
    done = stranger(STRANGER, tmp_path / "codes.json", tmp_path / "images.safetensors")
    assert done.returncode == 0, done.stderr[-2000:]
    images = load_file(tmp_path / "images.safetensors")
    assert (images["teacher"] - images["both"]).abs().max() > 1e-2
    for name in forms:
        assert (images[name] - images["both"]).abs().max() < 1e-4, name
    assert files_of(forms["lora"]) == {
        "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "README.md", "LICENSE.md",
        "diffdistill.json", "pipeline.py",
    }  # fmt: skip
    assert files_of(forms["inside"]) == files_of(forms["lora"])
    assert not (forms["merged"] / "lora").exists()
    assert len(list((forms["shards"] / "unet").glob("*-of-*.safetensors"))) > 1
    assert "from_single_file" in (forms["merged"] / "README.md").read_text()
    assert "from_single_file" not in (forms["shards"] / "README.md").read_text()
    assert not (forms["referred"] / "vae").exists() and not (forms["referred"] / "text_encoder").exists()

    # And to us, who load all of them as the student that was trained.
    expected: torch.Tensor | None = None
    for name in ("both", "lora", "shards", "referred"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)  # where a folder called tiny is
            sampler, student = load_student(forms[name])
        cond = {"encoder_hidden_states": torch.ones(2, 77, sampler.denoiser.network.config.cross_attention_dim)}
        drawn = sampler(student.shape, cond, image_generators(0, range(2)))
        expected = drawn if expected is None else expected
        assert (drawn - expected).abs().max() < 1e-4, name


def test_linked_weights_are_the_teachers_and_survive_it(place: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(place / "tiny", tmp_path / "tiny"))
    run = Path(shutil.copytree(place / "full", tmp_path / "run"))
    options = yaml.safe_load((run / "config.yaml").read_text()) | {"teacher": str(teacher)}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    source = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    os.chmod(source, 0o640)
    linked = export(run, parts="link", out=tmp_path / "linked") / "vae"
    assert os.path.samefile(source, linked / source.name) and source.stat().st_mode & 0o777 == 0o640
    assert not os.path.samefile(teacher / "vae" / "config.json", linked / "config.json")
    copied = export(run, out=tmp_path / "copied") / "vae"
    assert not os.path.samefile(source, copied / source.name)
    before = source.read_bytes()
    shutil.rmtree(teacher)
    assert (linked / source.name).read_bytes() == before


def test_the_card_says_what_the_teachers_says(place: Path) -> None:
    relations = {place / "full" / "student": "finetune", place / "lora" / "student" / "lora": "adapter"}
    for folder, relation in relations.items():
        head = card_of(folder)
        assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "text-to-image"
        assert head["license"] == "openrail++" and head["license_link"] == "LICENSE.md"
        assert head["base_model"] == "somebody/their-base" and head["base_model_relation"] == relation
        assert {"diffdistill", "dmd2", "stable-diffusion", "tiny"} <= set(head["tags"])
        assert ("lora" in head["tags"]) == (relation == "adapter")
        assert (folder / "LICENSE.md").read_text() == "terms of the teacher"
        assert "whose license holds for them: tiny-license (`LICENSE.md`)" in (folder / "README.md").read_text()


def test_no_path_of_this_machine_goes_out(place: Path, tmp_path: Path) -> None:
    method = tmp_path / "mine.py"
    import diffdistill.methods.dmd2 as dmd2

    method.write_text(Path(str(dmd2.__file__)).read_text())
    student = distill(
        method=str(method), teacher=str(place / "tiny"), prompts=str(place / "full" / "encoded"), steps=1,
        batch_size=2, sample_every=0, resolution=32, device="cpu", out=str(tmp_path / "run"),
    ).student  # fmt: skip
    for folder in (student, place / "full" / "student", place / "lora" / "student"):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                text = path.read_text()
                assert str(place) not in text and str(tmp_path) not in text, path
                assert os.path.expanduser("~") not in text, path
    record = json.loads((student / "diffdistill.json").read_text())
    assert record["teacher"] == record["options"]["teacher"] == "tiny"
    assert record["options"]["method"] == "mine.py" and "out" not in record["options"]
    # The run, which stays here, knows the way.
    assert teacher_of(student, student_record(student)) == str(place / "tiny")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"export": "lora"}, "export: 'lora' is for a student that is LoRA"),
        ({"max_shard_size": "big"}, "max_shard_size: 'big' is no size"),
        ({"export": "folded"}, "export: 'folded' is not one of both, lora, merged"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_training(
    options: dict[str, Any], says: str, place: Path, tmp_path: Path
) -> None:
    shared = {"teacher": str(place / "tiny"), "prompts": str(place / "full" / "encoded"), "resolution": 32, "steps": 1}
    with pytest.raises(UserError, match=says):
        distill(**shared, **options, device="cpu", out=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_student_as_a_teacher_is_noted(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distill(
        teacher=str(place / "full" / "student"), prompts=str(place / "full" / "encoded"), steps=1, batch_size=2,
        sample_every=0, resolution=32, device="cpu", out=str(tmp_path / "run"),
    )  # fmt: skip
    said = capsys.readouterr().err
    assert "is itself a student of 2 steps (dmd2)" in said and "'tiny', which it was distilled from" in said


def test_a_lora_of_pixels_alone_is_refused(tiny_teacher: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"lora": "student,fake_score", "lora_rank": 2, "export": "lora", "device": "cpu"}
    with pytest.raises(UserError, match="export: stock diffusers loads no LoRA on ConsistencyModelPipeline"):
        distill("dmd2", teacher=tiny_teacher("vp"), **options, steps=1, out=str(tmp_path / "run"))


def test_a_lora_alone_is_trained_drawn_and_not_diverse(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shared = {"teacher": str(place / "tiny"), "prompts": str(place / "full" / "encoded"), "resolution": 32, "steps": 1}
    student = distill(
        "dmd2", **shared, batch_size=2, sample_every=0, student_steps=2, lora="student,fake_score", lora_rank=2,
        export="lora", device="cpu", out=str(run),
    ).student  # fmt: skip
    record = read_record(student)
    assert record is not None and getattr(record, "form", "") == "lora" and not (student / "unet").exists()
    assert main(["sample", str(run), "--prompt", "a", "--count", "1", "--out", str(tmp_path / "a.png")]) == 0
    assert main(["diversity", str(run), "--out", str(tmp_path / "div")]) == 2
    assert "is a LoRA alone" in capsys.readouterr().err
    elsewhere = Path(shutil.copytree(student, tmp_path / "elsewhere" / "student"))
    with pytest.raises(UserError, match="was distilled from 'tiny', which is no folder here"):
        load_student(elsewhere)
