"""The scoreboard: passes are counted, trainings share a budget, and what is done is not repeated."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from diffdistill import UserError, distill
from diffdistill.catalogue import describe_method, method_names
from diffdistill.commands.bench import bench
from diffdistill.commands.cli import main
from diffdistill.eval.board import averaged, panels
from diffdistill.eval.budget import Entry, entries, passes_per_step, planned, preset_options
from diffdistill.eval.judge import score
from diffdistill.eval.suites import load_suite
from diffdistill.eval.trainings import students, train
from diffdistill.options import build
from diffdistill.training.assemble import load_run, make_game

DIGITS = load_suite("digits")


def test_every_method_has_a_preset_for_the_suite() -> None:
    special = ("preference", "restoration")  # from students; from images beside
    others = {name for name in method_names() if describe_method(name).about.kind in special}
    assert {e.info.name for e in entries(DIGITS, None, [0])} == set(method_names()) - others
    listed = entries(DIGITS, ["dmd2"], [0, 1])
    assert [(e.name, e.seed) for e in listed] == [("dmd2", 0), ("dmd2 4step", 0), ("dmd2", 1), ("dmd2 4step", 1)]


def test_passes_are_counted_with_guidance_and_backward() -> None:
    shared = {"method": "dmd2", "update_ratio": 1, "batch_size": 4}
    assert passes_per_step(make_game(shared)) == (4, 8)  # two of the four are trained
    assert passes_per_step(make_game(shared | {"guidance_scale": 2.0})) == (5, 9)
    # three steps of four move the fake score alone, on fresh samples
    assert passes_per_step(make_game(shared | {"update_ratio": 4})) == (2.5, 5)


@pytest.mark.parametrize("name", method_names())
def test_no_pass_is_done_that_the_definition_does_not_need(name: str) -> None:
    info = describe_method(name)
    for preset in (p for p in info.presets if p.split("-")[0] == "digits"):
        values = dict(preset_options(info, preset)) | {"method": name, "batch_size": 4 if name == "twin_flow" else 2}
        passes, _ = passes_per_step(make_game(values))
        assert passes == pytest.approx(DIGITS.method(name).passes[preset], rel=0.15), preset


def test_the_suite_trains_by_the_preset_alone() -> None:
    """As `train --preset` does: what is open in a preset would be derived in a board's training."""
    for entry in entries(DIGITS, None, [0]):
        values = {"steps": 100, **preset_options(entry.info, entry.preset), "method": entry.info.name}
        game = make_game({name: value for name, value in values.items() if name != "pairs"}, deriving=True)
        assert not game.derived, entry.name


def test_the_budget_sets_the_steps_and_stages_keep_their_share() -> None:
    info = describe_method("progressive")
    values, passes, scale = planned(Entry(info, "digits", 0), DIGITS, 500, {})
    assert values["steps"] == 100 and passes == 3 and scale == 1  # five passes with the backward one
    assert values["stage_steps"] == 20


def test_settings_of_a_strangers_board_are_derived(tiny_teacher: Callable[[str], Path]) -> None:
    suite, others = load_suite("mnist"), {"pso", "distillation_dpo", "yonos", "ctmsr"}
    assert {e.info.name for e in entries(suite, None, [0])} == set(method_names()) - others
    (entry,) = entries(DIGITS, ["dmd2:derived"], [0])
    assert (entry.name, entry.folder) == ("dmd2 derived", "dmd2-derived-seed0")
    shared = {"teacher": str(tiny_teacher("vp")), "data": "digits"}
    values, passes, _ = planned(entry, suite, 600, shared)
    assert set(values) == {"method", "steps", *shared}, "the training derives the rest, as it does alone"
    game = make_game(values, deriving=True)
    counted, units = passes_per_step(game)
    assert game.derived and (passes, values["steps"]) == (counted, round(600 / units))


@pytest.mark.parametrize("entry", entries(DIGITS, None, [0]), ids=lambda entry: entry.name)
def test_a_training_gets_what_was_planned(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}

    def started(command: list[str], **_: object) -> SimpleNamespace:
        assert main(command[3:]) == 0
        return SimpleNamespace(stderr=io.StringIO(), wait=lambda: None, returncode=0)

    monkeypatch.setattr("diffdistill.eval.budget.passes_per_step", lambda game: (3.0, 5.0))
    monkeypatch.setattr("diffdistill.eval.trainings.subprocess.Popen", started)
    monkeypatch.setattr("diffdistill.commands.distill.run", taken.update)
    values = planned(entry, DIGITS, 4000, {"teacher": "digits", "data": "digits"}).values
    train(entry, DIGITS, values, tmp_path)
    own = {field.name for field in dataclasses.fields(entry.info.config)}
    got, wanted = (build(entry.info.config, {k: v for k, v in read.items() if k in own}) for read in (taken, values))
    assert got == wanted
    assert all(taken[name] == value for name, value in values.items() if name not in own)
    taken.clear()
    assert train(entry, DIGITS, values, tmp_path)["done"] and not taken, "what is done is not done again"
    with pytest.raises(UserError, match="was made with steps"):
        train(entry, DIGITS, values | {"steps": 1}, tmp_path)


def test_each_number_of_steps_is_made_by_the_student_that_was_trained_for_it(tmp_path: Path) -> None:
    (entry,) = entries(DIGITS, ["tscd"], [0])
    more = {"steps": 3, "stage_steps": 1, "batch_size": 2, "sample_every": 0, "checkpoint_every": 1, "device": "cpu"}
    distill("tscd", preset="digits", **more, keep_checkpoints=100, out=tmp_path / entry.folder)
    made = list(students(entry, DIGITS, tmp_path, torch.device("cpu")))
    assert [len(sampler.levels) for sampler in made] == [4, 2, 1]
    assert [type(sampler.step).__name__ for sampler in made] == ["DDIM", "DDIM", "Gamma"]


def test_the_passes_for_pairs_are_part_of_the_budget() -> None:
    entry = Entry(describe_method("dmd"), "digits", 0)
    values, passes, _ = planned(entry, DIGITS, 1000 + 11 * 120, {})  # 2000 pairs in 32 steps are 1000 batches of 64
    assert values["steps"] == 120 and passes == 5
    with pytest.raises(UserError, match=r"budget: 1000 network passes are no more than the 1000 for the pairs of dmd"):
        planned(entry, DIGITS, 1000, {})


def own_method(folder: Path, preset: str = "digits") -> Path:
    """The file of a method of one's own, with one preset beside it."""
    methods = Path(__file__).parents[2] / "methods"
    (folder / "presets").mkdir()
    presets = yaml.safe_load((methods / "presets" / "progressive.yaml").read_text())
    (folder / "presets" / "mine.yaml").write_text(yaml.safe_dump({preset: presets["digits"]}))
    return Path(shutil.copy(methods / "progressive.py", folder / "mine.py"))


def test_a_file_of_ones_own_is_trained_by_its_path(tmp_path: Path) -> None:
    mine = own_method(tmp_path)
    (entry,) = entries(DIGITS, [str(mine)], [0])
    assert planned(entry, DIGITS, 5, {}).values["method"] == str(mine)
    (tmp_path / "dmd2.py").write_text(mine.read_text())
    with pytest.raises(UserError, match=r"methods: '.*dmd2.py' has the name of a method of ours"):
        entries(DIGITS, [str(tmp_path / "dmd2.py")], [0])


def test_what_is_named_twice_is_trained_once() -> None:
    assert len(entries(DIGITS, ["sim", "sim:digits"], [0, 0])) == 1


def test_a_method_without_the_preset_is_refused(tmp_path: Path) -> None:
    mine = own_method(tmp_path, preset="other")
    with pytest.raises(UserError, match="methods: mine has no preset 'digits'; mine:derived needs none"):
        entries(DIGITS, [str(mine)], [0])


def test_rows_are_averaged_over_seeds_once_each() -> None:
    row = {"method": "a", "steps": 1, "seed": 0, "noise": 0, "frechet distance": 1.0, "recall": 0.5}
    other = row | {"noise": 1, "frechet distance": 3.0}
    third = [row | {"seed": 1, "noise": n, "frechet distance": 4.0} for n in (0, 1)]
    (mean,) = averaged([row, row, other, *third])
    assert mean["seeds"] == 2 and mean["frechet distance"] == 3.0 and mean["recall"] == 0.5
    assert mean["+-"] == pytest.approx(2**0.5)  # of 2 and 4


def test_peak_memory_is_not_inherited() -> None:
    held = b"x" * (800 << 20)  # what the operating system would count as the child's too
    code = "from diffdistill.environment import peak_memory_mb; print(peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < len(held) / 2**20


def test_the_picture_has_panels_of_one_kind_that_can_be_read() -> None:
    names = [*method_names(), "dmd2 4step", "my_own"]
    parts = panels(names)
    assert sorted(name for _, part in parts for name in part) == sorted(names), "each once"
    assert all(1 <= len(part) <= 8 for _, part in parts)
    kinds = {name: kind for kind, part in parts for name in part}
    assert (kinds["dmd2 4step"], kinds["reflow"], kinds["my_own"]) == ("distribution", "trajectory", "your own")
    assert panels([]) == [("", [])], "a board of the teacher alone has its picture too"


@pytest.mark.slow
def test_a_board_is_made_and_taken_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffdistill.eval.bench.MOST_IMAGES", 400)
    out, suite = tmp_path / "out", tmp_path / "short.yaml"
    suite.write_text("extends: digits\nteacher_steps: [1, 2]\n")
    inside, most = [0], [0]  # threads that make or judge a model

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*values: Any, **named: Any) -> Any:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            try:
                return call(*values, **named)
            finally:
                inside[0] -= 1

        return counting

    for place, call in {"bench.score": score, "trainings.load_run": load_run}.items():
        monkeypatch.setattr(f"diffdistill.eval.{place}", counted(call))
    made_as = nn.Module.register_parameter

    def run(methods: list[str]) -> list[str]:
        bench(suite, methods=methods, seeds=[0], budget=40, reference="digits#test", out=out, jobs=2)
        return capsys.readouterr().out.splitlines()

    run(["dmd2:digits"])
    before = json.loads((out / "board.json").read_text())
    note = (out / "runs" / "dmd2-seed0.json").stat().st_mtime_ns
    run(["dmd2:digits", "guided"])
    after = json.loads((out / "board.json").read_text())
    assert (out / "runs" / "dmd2-seed0.json").stat().st_mtime_ns == note
    rows = {(r["method"], r["steps"]): r for r in after["rows"]}
    assert {(r["method"], r["steps"]) for r in before["rows"]} < set(rows)
    for steps in (1, 2, 4):  # beside the teacher that it imitates
        assert {("guided", steps), ("teacher, guidance 1.5", steps)} <= set(rows)
    assert rows["dmd2", 1]["passes"] == rows["dmd2", 1]["least"] == 4 and rows["dmd2", 1]["peak MB"] > 100
    assert (out / "board.md").read_text().endswith("\nCompared with the images of digits#test.\n")
    board = {"methods": ["dmd2"], "seeds": [0], "budget": 40, "reference": "digits#test", "out": out}
    for changed in ({"budget": 50}, {"data": str(tmp_path)}, {"reference": "digits"}):
        with pytest.raises(UserError, match=f"{next(iter(changed))}: .* is not the board's"):
            bench(suite, **board | changed)
    assert most == [1] and nn.Module.register_parameter is made_as, "two loading at once leave networks without weights"
    for name in ("board.md", "quality.png", "samples.png", "report.html"):
        assert (out / name).stat().st_size > 100
