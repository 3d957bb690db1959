"""diffdistill.json: what is written reads back, old files still read, and a file that does not fit says why."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffdistill import UserError, distill, load_student, load_teacher
from diffdistill.families import (
    METADATA,
    DiversityRecord,
    Guidance,
    StudentRecord,
    TeacherRecord,
    is_student,
    read_record,
    record_of,
    write_record,
)

STUDENT = StudentRecord(
    levels=(999.0, 499.0),
    move="renoise",
    teacher="digits",
    method="lcm",
    step=40,
    guidance=Guidance(3.0, 1.0, 5.0),
    num_classes=10,
    null_class=10,
    resolution=64,
    call={"num_inference_steps": 2, "complex_human_instruction": None},
    options={"lr": 1e-4},
    environment={"gpu": None},
)


def written(folder: Path, **values: Any) -> Path:
    (folder / METADATA).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "record",
    [
        STUDENT,
        replace(STUDENT, resolution="16x24"),
        StudentRecord((0.5,), "ddim", "a"),
        TeacherRecord(10),
        DiversityRecord("a", "b", {"steps": 1}),
    ],
)
def test_what_is_written_reads_back(record: Any, tmp_path: Path) -> None:
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert json.loads((tmp_path / METADATA).read_text())["format"] == 1
    assert is_student(tmp_path) == isinstance(record, StudentRecord)


def test_a_folder_of_others_has_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None and not is_student(tmp_path)


def test_files_without_a_format_number_still_read(tmp_path: Path) -> None:
    shipped = record_of("digits")
    assert isinstance(shipped, TeacherRecord) and shipped.null_class == 10 and shipped.recipe["steps"] == 8000
    old = {"levels": [999.0], "renoise": False, "num_classes": 10, "null_class": 10, "teacher": "digits", "step": 3}
    made = {"method": "lcm", "options": {"guidance_min": 1.0, "guidance_max": 4.0, "guidance_scale": None}}
    record = read_record(written(tmp_path, **old, **made, environment={}))
    assert isinstance(record, StudentRecord) and record.levels == (999.0,) and record.move == "ddim"
    assert record.guidance == Guidance(2.5)  # into whose class embedding the scale was merged
    latent = read_record(written(tmp_path, **old, **made, call={"guidance_scale": 3.0}, resolution=64, frames=None))
    assert isinstance(latent, StudentRecord) and latent.guidance == Guidance(3.0, 1.0, 4.0) and latent.resolution == 64
    plain = read_record(written(tmp_path, **old, method="dmd2", options={"guidance_scale": 2.0}))
    assert isinstance(plain, StudentRecord) and plain.guidance == Guidance(2.0) and not plain.guidance.is_input
    both = read_record(written(tmp_path, student="a", teacher="b", call={"base_steps": 20}))
    assert both == DiversityRecord("a", "b", {"base_steps": 20})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format": 2}, r"is of format 2, and diffdistill \S+ reads formats up to 1; update diffdistill"),
        ({"format": "one"}, "is of format 'one'"),
        ({"kind": "pupil"}, "has the kind 'pupil'; known are student, teacher, diversity"),
        ({"levels": None}, "'levels' is None; it must be a list of at least one number"),
        ({"levels": []}, r"'levels' is \[\]; it must be a list of at least one number"),
        ({"levels": [999, "x"]}, "'levels' is 'x'; it must be a number"),
        ({"move": "jump"}, "'move' is 'jump', none of renoise, ddim"),
        ({"step": 1.5}, "'step' is 1.5; it must be a whole number"),
        ({"step": True}, "'step' is True; it must be a whole number"),
        ({"teacher": 3}, "'teacher' is 3; it must be a text"),
        ({"call": [1]}, r"'call' is \[1\]; it must be an object"),
        ({"guidance": 3.0}, "'guidance' is 3.0; it must be an object"),
        ({"guidance": {"scale": "much"}}, "'guidance.scale' is 'much'; it must be a number"),
        ({"guidance": {"strength": 1}}, "has the unknown field 'guidance.strength'"),
        ({"resolution": "16x"}, "resolution: '16x' is no size"),
        ({"resolution": [1, 2, 3]}, "resolution: .* is no size"),
        ({"null_clas": 10}, "has the unknown field 'null_clas'"),
    ],
)
def test_a_file_that_does_not_fit_says_why_in_one_line(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_record(tmp_path, STUDENT)
    written(tmp_path, **json.loads((tmp_path / METADATA).read_text()) | changed)
    with pytest.raises(UserError, match=f"^record: .*{METADATA}.*{says}") as error:
        read_record(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["levels", "move", "teacher"])
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    write_record(tmp_path, STUDENT)
    values = json.loads((tmp_path / METADATA).read_text())
    values.pop(name)
    with pytest.raises(UserError, match=f"has no '{name}'; export the model again"):
        read_record(written(tmp_path, **values))
    for text in ("[1]", "{", '"a"'):
        (tmp_path / METADATA).write_text(text)
        with pytest.raises(UserError, match=r"is not readable JSON|holds no JSON object"):
            read_record(tmp_path)


@pytest.mark.parametrize(
    ("options", "guidance"),
    [
        ({"method": "dmd2"}, Guidance(1.0)),
        ({"method": "dmd2", "guidance_scale": 3.0}, Guidance(3.0)),
        ({"method": "lcm", "data": "digits", "guidance_max": 4.0}, Guidance(2.5)),  # merged into the class embedding
        ({"method": "adapter_guidance", "guidance_max": 4.0}, Guidance(3.0, 1.0, 4.0)),
    ],
)
def test_an_export_says_which_guidance_it_imitates(
    options: dict[str, Any], guidance: Guidance, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    shared = {"steps": 1, "batch_size": 4, "sample_every": 0, "device": "cpu", "out": str(tmp_path / "run")}
    folder = distill(teacher=str(tiny_teacher("vp")), **shared, **options).student
    record = read_record(folder)
    assert isinstance(record, StudentRecord) and record.guidance == guidance
    assert record.null_class == 10 and record.step == 1 and load_student(folder)[0].levels == record.levels


def test_a_teacher_is_no_student(tiny_teacher: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"^student: .* has no levels in diffdistill.json; it is no student"):
        load_student(tiny_teacher("vp"))
    assert load_teacher(tiny_teacher("vp")).num_classes == 10
