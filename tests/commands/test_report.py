"""The page of a run: read with an HTML parser, so that what is text is text, and in a browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, report
from diffdistill.commands.cli import main
from diffdistill.eval import html
from diffdistill.pictures import image_grid, save_png

HOSTILE = "<script>alert('x')</script><img src=http://a.b/c onerror=\"y()\">&amp;</table>"
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "p",
        "nav",
        "a",
        "section",
        "h2",
        "ul",
        "li",
        "div",
    ),
    *("table", "tr", "th", "td", "pre", "figure", "figcaption", "b", "svg", "path", "text", "img", "label", "input"),
    *("output", "script"),
}


class Page(HTMLParser):
    """Tags with their attributes, and all text outside of style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("style", "script"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("style", "script"):
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.text += data + "\n"

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def grid(path: Path, value: float) -> None:
    save_png(image_grid(torch.full((4, 1, 8, 8), value), 2), path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as a training leaves it, whose prompt, teacher and warning are hostile, and whose folder too."""
    run = tmp_path / "<b>&'run"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"method: dmd2\nteacher: {json.dumps(HOSTILE)}\nprompts: {json.dumps(HOSTILE)}\nsteps: 40\n"
    )
    lines: list[dict[str, Any]] = [
        {"step": k, "seconds_per_step": 0.5, "peak_memory_mb": 100.0, "student/gap": 1.0 / k, HOSTILE + "/loss": 0.5}
        for k in range(1, 41)
    ]
    lines[3]["warnings"] = [HOSTILE]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "environment.json").write_text(json.dumps({"torch": HOSTILE}))
    for step, value in ((0, -1.0), (20, 0.0), (40, 1.0)):
        grid(run / "samples" / f"step-{step:08d}.png", value)
    results = {"protocol": "digits", "rows": [{"model": HOSTILE, "steps": 1, "fid": 2.5}], "notes": [HOSTILE]}
    (run / "eval").mkdir()
    (run / "eval" / "results.json").write_text(json.dumps(results))
    grid(run / "eval" / "comparison.png", 0.5)
    (run / "student").mkdir()
    (run / "student" / "README.md").write_text('```python\nload("FOLDER")\n# ' + HOSTILE + "\n```\n")
    return run


def test_all_of_a_run_is_in_its_page_and_nothing_is_loaded(run: Path) -> None:
    out = report(run)
    assert out == run / "report.html" and out.stat().st_size < 200_000
    page = Page(out)
    for said in ("step 40 of 40", "student/gap", "0.025, between 0.025 and 1", "2.500", "How to load the student"):
        assert said in page.text, said
    assert f"load({str(run / 'student')!r})" in page.text
    assert len(page.of("img")) == 4 and all(
        (i["src"] or "").startswith("data:image/png;base64,") for i in page.of("img")
    )
    (slider,) = page.of("input")
    assert slider["type"] == "range" and slider["max"] == "2" == slider["value"]
    assert [f["data-name"] for f in page.of("figure") if "data-name" in f] == ["step 0", "step 20", "step 40"]
    reached = [a[name] or "" for _, a in page.tags for name in ("href", "src", "action", "srcset") if name in a]
    assert all(where.startswith(("#", "data:")) for where in reached)
    (policy,) = [m["content"] or "" for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:") and "script-src 'sha256-" in policy


def test_what_is_hostile_is_shown_as_text(run: Path) -> None:
    page = Page(report(run))
    assert {tag for tag, _ in page.tags} <= TAGS
    assert len(page.of("script")) == 1 and not page.of("script")[0]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    # Teacher (title, heading, options), prompt, warning, environment, model, note, the card's line, the curve's name.
    assert page.text.count(HOSTILE) >= 9
    assert "<b>&'run" in page.text


def test_the_script_is_the_one_that_the_policy_allows(run: Path) -> None:
    import base64
    import hashlib

    source = report(run).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    assert f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in source


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no headless browser")
def test_the_slider_works_in_a_browser(run: Path, tmp_path: Path) -> None:
    page = report(run, tmp_path / "page.html")
    for fragment, shown in (("", "step 40"), ("#frame=1", "step 20"), ("#frame=0", "step 0")):
        command = [
            "chromium",
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--dump-dom",
            f"file://{page}{fragment}",
        ]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        assert re.findall(r"<output>(.*?)</output>", dom) == [shown]
        figures = re.findall(r"<figure [^>]*data-name[^>]*>", dom)
        assert [figure for figure in figures if 'class="shown"' in figure] == [f for f in figures if f'"{shown}"' in f]


def test_a_run_that_has_just_begun_and_a_teachers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("data: digits\nsteps: 10\n")
    page = Page(report(run, tmp_path / "page.html"))
    assert "a teacher of digits" in page.text and "There is no line in its metrics.jsonl yet" in page.text
    assert not page.of("img") and not (run / "report.html").exists()


def test_many_and_large_grids_are_few_and_small_enough(run: Path) -> None:
    noise = torch.rand(1, 3, 700, 700, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for step in range(100, 200, 10):
        save_png(image_grid(noise, 1), run / "samples" / f"step-{step:08d}.png")
    page = report(run)
    assert page.stat().st_size < 5_000_000
    names = [f["data-name"] for f in Page(page).of("figure") if "data-name" in f]
    assert names[0] == "step 0" and names[-1] == "step 190" and 2 <= len(names) < 13
    assert "of 13 grids" in Page(page).text


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda run: (run / "config.yaml").unlink(), "is not a run folder"),
        (lambda run: (run / "environment.json").write_text("{"), "environment.json cannot be read"),
        (lambda run: (run / "eval" / "results.json").write_text('{"rows": 3}'), "has no rows"),
        (lambda run: (run / "samples" / "step-00000020.png").write_bytes(b"\x89PNG\r\n\x1a\nno"), "is no whole image"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    run: Path, harm: Any, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    harm(run)
    out = tmp_path / "page.html"
    out.write_text("as it was")
    assert main(["report", str(run), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and len(error) < 300
    assert out.read_text() == "as it was"


def test_a_folder_is_no_page(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out: .* is a folder; name a file, such as .*report\.html"):
        report(run, tmp_path)


def test_a_curve_is_drawn_from_its_first_step_to_its_last() -> None:
    drawn = html.curve("a", [(0, 2.0), (50, float("nan")), (100, 4.0)])
    assert 'd="M4.0 106.0L296.0 8.0"' in drawn and "logarithmic" not in drawn
    assert "logarithmic" in html.curve("a", [(0, 1.0), (1, 5000.0)])
    assert html.curve("a", [(0, float("inf"))]) == ""
    many = html.curve("a", [(float(k), float(k)) for k in range(5000)])
    assert many.count("L") < 450
