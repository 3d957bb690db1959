"""Comparison of models by one protocol."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffdistill.commands.cli import main
from diffdistill.commands.distill import distill
from tests.eval.sixty import pictures


def test_compare(
    tmp_path: Path, protocol: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded teacher against itself: no difference; against images of noise: one that is certain."""
    noise = pictures(tmp_path / "noise", ("L", 8), count=60)
    for path in sorted(noise.glob("*.png")):
        draw = np.random.default_rng(int(path.stem))
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    distill(method="dmd2", preset="digits", steps=2, sample_every=0, device="cpu", out=str(tmp_path / "student"))
    command = ["compare", "digits", "digits", str(noise), str(tmp_path / "student"), "--protocol", protocol()]
    command += ["--steps", "2"]  # of the teachers
    monkeypatch.setattr("diffdistill.data.progress.FIRST", 0.0)
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^noise, frechet distance: replicate \d+/\d+  \S+ replicate/s  \d+ s left$", said, re.MULTILINE)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    same, other, _ = (d for d in report["differences"] if d["metric"] == "frechet distance")
    assert [row["steps"] for row in report["rows"]] == [2, 2, None, 1]
    assert same["difference"] == same["95% from"] == same["to"] == 0 and same["p"] == 1
    assert other["95% from"] > 0 and other["p"] < 0.02
    assert [row["ms per image"] is None for row in report["rows"]] == [False, False, True, False]
    for name in ("grid.png", "quality.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 100
    assert "| model |" in (tmp_path / "out" / "table.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 2 and "<h2>Differences</h2>" in page and "<td>digits</td>" in page
    assert main(["compare", "digits", "--protocol", protocol()]) == 2
    assert "give two or more" in capsys.readouterr().err
