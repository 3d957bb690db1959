"""docs/publish_board.py: the rows of another board take their places among the published ones."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffdistill.eval.board import COLUMNS
from diffdistill.eval.report import markdown_table
from diffdistill.eval.suites import published_board

ROOT = Path(__file__).parents[2]


@pytest.fixture
def publish(tmp_path: Path) -> Any:
    """The script on copies of what it writes."""
    (tmp_path / "eval" / "suites").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "results.md", tmp_path / "docs")
    spec = importlib.util.spec_from_file_location("publish_board", ROOT / "docs" / "publish_board.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda folder: module.publish(folder, docs=tmp_path / "docs")


def test_rows_take_their_places(publish: Any, tmp_path: Path) -> None:
    before = published_board("digits")
    row = {key: 0.123456 for key in COLUMNS} | {"method": "scm", "steps": 1, "seeds": 1, "recall": None}
    teacher = {**row, "method": "teacher"}
    other = {"suite": "digits", "rows": [teacher, row], "results": [{"seed": None}, {"seed": 7}]}
    other |= {"environment": {"commit": "0123456789abcdef"}}
    (tmp_path / "board.json").write_text(json.dumps(other))
    publish(tmp_path)
    board = json.loads((tmp_path / "eval" / "suites" / "digits.board.json").read_text())
    old = [r for r in before["rows"] if r["method"] != "scm"]
    assert [r for r in board["rows"] if r["method"] != "scm"] == old
    assert [r for r in board["rows"] if r["method"] == "scm"] == [row | {k: 0.1235 for k in row if row[k] == 0.123456}]
    places = [r["frechet distance"] for r in board["rows"] if r["steps"] == 1 and not r["method"].startswith("teacher")]
    assert places == sorted(places)
    assert [part["methods"] for part in board["newer"] if "scm" in part["methods"]] == [["scm"]]
    page = (tmp_path / "docs" / "results.md").read_text()
    assert markdown_table(board["rows"], COLUMNS) in page
    assert "`scm` (`--seeds 7`, commit 0123456789)" in " ".join(page.split())
    assert (tmp_path / "docs" / "quality.png").is_file()
