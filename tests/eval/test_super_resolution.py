"""The script behind docs/super_resolution.md: its rows, and what is not made twice."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffdistill.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("super_resolution", DOCS / "super_resolution.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["super_resolution"] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module


def test_digits_are_made_judged_and_written(script: ModuleType, tmp_path: Path) -> None:
    settings = script.Settings(tmp_path / "runs", count=8, share=0.002)
    results = script.benchmark(settings, ["digits"])
    models = [(row["model"], row.get("learned from"), row.get("steps")) for row in results["rows"]]
    assert models == [
        ("enlarged, bicubic", None, None),
        ("teacher", "2 times", 1),
        ("teacher", "2 times", 16),
        ("yonos", "the teacher of 2 times", 1),
        ("teacher", "4 times", 1),
        ("teacher", "4 times", 16),
        ("ctmsr", "images", 1),
        ("dmd2", "the teacher of 4 times", 1),
    ]
    page = tmp_path / "super_resolution.md"
    page.write_text((DOCS / "super_resolution.md").read_text())
    script.write_page(results, settings.out, page)
    assert page.read_text().count("| digits |") == 8 and (tmp_path / "super_resolution_digits.png").is_file()
    weights = tmp_path / "runs" / "digits" / "teacher-2.safetensors"
    before = weights.stat().st_mtime_ns
    again = script.benchmark(settings, ["digits"])
    assert [row["psnr"] for row in again["rows"]] == [row["psnr"] for row in results["rows"]]
    assert weights.stat().st_mtime_ns == before


def test_a_perfect_image_is_read_right(script: ModuleType, tmp_path: Path) -> None:
    task = script.shapes(script.Settings(tmp_path, count=20))
    assert torch.equal(task.shows(task.images), task.truth)


def test_an_unknown_task_is_one_line(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tasks: 'digit' is not known; did you mean 'digits'"):
        script.benchmark(script.Settings(tmp_path), ["digit"])
