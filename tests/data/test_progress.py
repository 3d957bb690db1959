"""What a log says of long work: soon, then ever less often, with rate and rest."""

import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffdistill import distill
from diffdistill.data import progress as module
from diffdistill.data.progress import FIRST, Pace, rate_and_rest, slow, speaking
from diffdistill.eval.metrics.bootstrap import bootstrap_mean
from diffdistill.eval.metrics.manifold import precision_recall


class Clock:
    """Seconds that pass as the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def test_quick_work_has_a_line_at_each_tenth() -> None:
    pace = Pace(1000, Clock())
    assert [done for done in range(1, 1001) if pace.due(done, 1)] == [*range(100, 1001, 100)]


def test_slow_work_speaks_within_half_a_minute_and_ever_less_often() -> None:
    clock = Clock()
    pace, said = Pace(10_000_000, clock), []
    for done in range(1, 36_001):  # a second each, ten hours in all
        clock.now += 1
        if pace.due(done, 1):
            said.append(clock.now - 100)
    gaps = [b - a for a, b in itertools.pairwise(said)]
    assert said[0] == FIRST <= 30 and len(said) < 80
    assert gaps == sorted(gaps) and gaps[-1] < 0.11 * 36_000


def test_rate_and_rest() -> None:
    assert rate_and_rest(12.0, 60, "it") == "12.00 it/s  5 s left"
    assert rate_and_rest(0.02, 3, "it") == "50.0 s/it  150 s left"


def taking(clock: Clock, items: list[torch.Tensor], seconds: float) -> Iterator[torch.Tensor]:
    for item in items:
        clock.now += seconds
        yield item


def test_a_slow_loop_speaks_where_somebody_is_to_hear_it(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [torch.zeros(10)] * 12
    assert len(list(slow(taking(clock, blocks, 4), 120, "row"))) == 12
    assert capsys.readouterr().out == "", "nobody listens"
    with speaking("student") as speaker:
        speaker.name = "student, precision"
        list(slow(taking(clock, blocks, 4), 120, "row"))
    with speaking("another"):
        list(slow(taking(clock, blocks[:3], 0.1), 30, "row"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "student, precision: row 40/120  2.50 row/s  32 s left"
    assert len(lines) == 2, "and what is quick is silent"
    list(slow(taking(clock, blocks, 4), 120, "row"))
    assert capsys.readouterr().out == "", "nobody listens any more"


def test_metrics_speak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "FIRST", 0.0)
    monkeypatch.setattr("diffdistill.eval.metrics.moments.PAIRS_AT_ONCE", 600)
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    with speaking("it"):
        precision_recall(x, x + 0.1, 3)
        bootstrap_mean(x[:, 0], 5)
    assert time.perf_counter() - started < 60
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"it: row \d+/60  \S+ row/s  \d+ s left", line) for line in lines)


def test_a_training_in_a_log_speaks_before_its_first_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "FIRST", 0.0)
    options = {"steps": 3, "log_every": 3, "batch_size": 4, "sample_every": 0, "device": "cpu", "figures_every": 0}
    distill("dmd2", preset="digits", out=tmp_path / "run", **options)  # type: ignore[arg-type]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all(re.search(r" it/s  \d+ s left| s/it  \d+ s left", line) for line in lines)
