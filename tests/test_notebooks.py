"""Every notebook runs from top to bottom, shows its pictures, and what it says of its figures holds."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from diffdistill.catalogue import describe_method
from diffdistill.eval.board import COLUMNS
from diffdistill.eval.report import markdown_table
from diffdistill.eval.suites import published_board

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PICTURES = {
    "choosing_a_method": 1,
    "first_steps": 2,
    "reading_the_curves": 1,
    "text_to_image": 3,
    "what_methods_do": 8,
    "write_your_own_method": 1,
    "your_own_network": 1,
    "your_own_renderer": 1,
}
WITHOUT_PAIRS = ("diff_instruct", "dmd2", "sid", "sim")


def first_steps(printed: str) -> None:
    """The process without diffdistill drew, and drew what the sampler of the training does."""
    assert re.search(r"^diffusers\.pipelines\.\S+ \w+Pipeline \(10, 1, 8, 8\)$", printed, re.MULTILINE)
    assert float(re.findall(r"greatest difference: (\S+)", printed)[0]) < 1e-4


def what_methods_do(printed: str) -> None:
    """The map and the distribution are judged as the text between the cells says."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    table = {line[0]: [float(cell) for cell in line[2:]] for line in lines if len(line) == 6 and "." in line[-1]}
    off = {name: row[-1] for name, row in table.items()}
    trajectory = ("progressive", "consistency", "multistep_consistency")
    assert off["the teacher's map"] < 0.01
    assert max(off[name] for name in trajectory) < min(off[name] for name in WITHOUT_PAIRS)
    assert off["dmd"] < min(off[name] for name in WITHOUT_PAIRS)
    limits = table["limit of verify"]
    for name in (*trajectory, *WITHOUT_PAIRS, "dmd", "consistency, turned"):
        # After a seventh of the training that the limits are for.
        assert all(got < 2 * limit for got, limit in zip(table[name][:3], limits[:3], strict=True)), name
    # A student that matches distributions may turn a class's line round.
    assert all(off[name] < off["before training"] for name in (*trajectory, "dmd"))
    assert off["consistency, turned"] > 1 > 5 * off["consistency"]
    both = zip(table["consistency, turned"][:3], table["consistency"][:3], strict=True)
    assert all(turned < 1.5 * straight for turned, straight in both)
    assert all(got > limit for got, limit in zip(table["before training"], limits, strict=True))


def your_own_network(printed: str) -> None:
    """The student's one step is far better than the teacher's, and loads again as it was."""
    off = {name: float(value) for name, value in re.findall(r"^(\w+, \d+ steps?): (\S+)$", printed, re.MULTILINE)}
    assert off["teacher, 32 steps"] < 0.02 and off["student, 1 step"] < off["teacher, 1 step"] / 3
    assert "greatest difference: 0.0\n" in printed


def your_own_renderer(printed: str) -> None:
    """Both sides of the scene are read as the digits that were asked for."""
    said = re.findall(
        r"^(\w+): (\d) from the front, (\d) from the side; (\d) and (\d) were asked for$", printed, re.MULTILINE
    )
    assert [name for name, *_ in said] == ["SDS", "VSD"]
    assert all((front, side) == (asked, other) for _, front, side, asked, other in said), said


def reading_the_curves(printed: str) -> None:
    """Each run that is made to fail is warned of in its own words, and the one that goes well is not."""
    said = dict(re.findall(r"^([a-z' ]+):\n((?:    .*\n)+)", printed, re.MULTILINE))
    expected = {
        "goes well": "    no warning\n",
        "the fake score learns nothing": "    lagging fake score: ",
        "the student's rate is too high": "    learning rate too high: a step moves a weight of student",
        "the fake score's rate is too high": "    learning rate too high: a step moves a weight of fake_score",
        "the student's rate is too low": "    learning rate too low: ",
        "samples become alike": "    collapse: ",
    }
    assert list(said) == list(expected)
    assert all(words in said[name] for name, words in expected.items()), said


def choosing_a_method(printed: str) -> None:
    """What is chosen is the best of the published board that the answers allow."""
    rows = published_board("digits")["rows"]
    blocks = re.findall(r"^(the [^\n]+):\n(.*?)\n\n", printed, re.MULTILINE | re.DOTALL)
    first = {situation: table.splitlines()[2].split()[:2] for situation, table in blocks}
    assert len(first) == 4 and all(int(steps) <= 4 for _, steps in first.values())
    students = [row for row in rows if not row["method"].startswith("teacher")]
    best = min((row for row in students if row["steps"] == 1), key=lambda row: row["frechet distance"])
    assert first["the model and images, one step"] == [best["method"], "1"]
    assert not describe_method(first["the model alone, one step"][0]).about.needs


SAYS: dict[str, Callable[[str], None]] = {
    "choosing_a_method": choosing_a_method,
    "first_steps": first_steps,
    "reading_the_curves": reading_the_curves,
    "what_methods_do": what_methods_do,
    "your_own_network": your_own_network,
    "your_own_renderer": your_own_renderer,
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in an activated environment: the notebooks call `diffdistill`.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in shown) == PICTURES[path.stem]
    films = [out["data"]["text/html"] for out in shown if "text/html" in out.get("data", {})]
    frames = [len(re.findall(r"frames\[\d+\] = ", film)) for film in films]
    assert frames == ([24] if path.stem == "what_methods_do" else []), frames
    if path.stem in SAYS:
        SAYS[path.stem]("".join(out.text for out in shown if out.output_type == "stream" and out.name == "stdout"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_first_code_installs_what_is_missing(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert re.search(
        r"find_spec\(.diffdistill.\) is None:\n    %pip install -q .diffdistill\[eval,notebooks\].$", first
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_the_published_board_is_the_one_in_the_docs() -> None:
    board = published_board("digits")
    text = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    assert markdown_table(board["rows"], COLUMNS) in text and board["commit"] in text
