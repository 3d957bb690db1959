"""The Python functions: every public name is there, typed, and takes what the command line does."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

import diffdistill
from diffdistill import Run, UserError, bench, compare, distill, evaluate, sample, speed
from diffdistill.commands import keywords
from diffdistill.config import (
    BenchConfig,
    CompareConfig,
    DrawConfig,
    EncodeConfig,
    EvalConfig,
    FitConfig,
    JudgeConfig,
    MachineConfig,
    PairsConfig,
    PruneConfig,
    SampleConfig,
    SpeedConfig,
    TeacherConfig,
    TrainConfig,
)
from diffdistill.options import coerce
from diffdistill.training.recipe import READ

ROOT = Path(__file__).resolve().parents[2]
Teachers = Callable[[str], Path]
SHORT = {"steps": 1, "batch_size": 4, "sample_every": 0, "device": "cpu"}


def test_every_public_name_is_there_and_what_editors_read_is_what_runs() -> None:
    tree = ast.parse(Path(diffdistill.__file__).read_text())
    typed = {
        alias.name: node.module.removeprefix("diffdistill.")
        for branch in tree.body
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    assert typed == diffdistill._MODULES
    assert set(diffdistill.__all__) == {*typed, "UserError", "__version__"} == set(dir(diffdistill))
    for name in typed:
        assert getattr(diffdistill, name).__doc__, name
    with pytest.raises(AttributeError, match="distil"):
        diffdistill.distil  # type: ignore[attr-defined]  # noqa: B018


def test_no_argument_of_a_public_function_may_be_anything() -> None:
    for name in diffdistill.__all__:
        value = getattr(diffdistill, name)
        if inspect.isfunction(value):
            for parameter in inspect.signature(value).parameters.values():
                assert parameter.annotation not in (inspect.Parameter.empty, "Any", typing.Any), (name, parameter)


def _without_path(hint: object) -> object:
    """The type of a keyword without the path that may stand for a text; a sequence is a tuple, and one text is one."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [_without_path(part) for part in typing.get_args(hint) if part is not Path]
        parts = [part for part in parts if part is not str or tuple[str, ...] not in parts]
        return typing.Union[tuple(parts)]  # noqa: UP007
    if typing.get_origin(hint) is Sequence:
        return tuple[typing.get_args(hint)[0], ...]
    return hint


@pytest.mark.parametrize(
    ("options", "config", "elsewhere"),
    [
        (keywords.MachineOptions, MachineConfig, set()),
        (keywords.FitOptions, FitConfig, set()),
        (keywords.TrainOptions, TrainConfig, {"method", "teacher", *READ}),
        (keywords.TeacherOptions, TeacherConfig, set()),
        (keywords.EncodeOptions, EncodeConfig, {"teacher"}),
        (keywords.PairsOptions, PairsConfig, {"teacher"}),
        (keywords.PruneOptions, PruneConfig, {"teacher"}),
        (keywords.DrawOptions, DrawConfig, set()),
        (keywords.JudgeOptions, JudgeConfig, set()),
        (keywords.EvalOptions, EvalConfig, {"model", "teacher"}),
        (keywords.CompareOptions, CompareConfig, {"models"}),
        (keywords.SpeedOptions, SpeedConfig, {"models"}),
        (keywords.SampleOptions, SampleConfig, {"model", "out"}),
        (keywords.BenchOptions, BenchConfig, {"suite"}),
    ],
)
def test_keywords_are_the_options(options: type, config: type, elsewhere: set[str]) -> None:
    typed = {name: _without_path(hint) for name, hint in typing.get_type_hints(options).items()}
    hints = {name: _without_path(hint) for name, hint in typing.get_type_hints(config).items()}
    assert typed == {name: hint for name, hint in hints.items() if name not in elsewhere}
    functions: tuple[Callable[..., object], ...] = (distill, evaluate, compare, speed, sample, bench)
    assert any(elsewhere <= inspect.signature(function).parameters.keys() for function in functions)
    assert {f.name for f in dataclasses.fields(config)} == hints.keys()


SNIPPET = """
import torch
import diffdistill
from diffdistill.methods.dmd2 import DMD2, Config

diffdistill.distill("dmd2", data=torch.zeros(8, 1, 8, 8), steps=5, out="x").sampler()
diffdistill.distill(DMD2, options=Config(update_ratio=1))
diffdistill.distill("dmd2", options={"update_ratio": 1})
diffdistill.distill("dmd2", stepz=5)  # refused
diffdistill.distill("dmd2", steps="many")  # refused
diffdistill.distill("dmd2", teacher=3)  # refused
diffdistill.distill("dmd2", data=3)  # refused
diffdistill.distill("dmd2", device="tpu")  # refused
diffdistill.distil("dmd2")  # refused
diffdistill.export("run", stp=3)  # refused
diffdistill.train_teacher(lrr=3.0)  # refused
diffdistill.make_pairs(teacher=diffdistill.load_teacher("digits"), count=4)
diffdistill.make_pairs(teacher=torch.nn.Linear(2, 2))  # refused
diffdistill.encode(teacher="folder", prompt="prompts.txt")  # refused
"""


@pytest.mark.slow
def test_mypy_refuses_a_misspelt_argument_and_a_wrong_type(tmp_path: Path) -> None:
    # mypy does not see through an editable install: a folder of links stands for an installed package.
    package = tmp_path / "site" / "diffdistill"
    package.mkdir(parents=True)
    for path in [*(ROOT / "diffdistill").iterdir(), *(ROOT / name for name in ("methods", "pipelines", "eval"))]:
        (package / path.name).symlink_to(path)
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "snippet.py"]
    environment = {"MYPYPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    refused = {
        int(line.split(":")[1]) for line in done.stdout.splitlines() if re.match(r"snippet.py:\d+: error:", line)
    }
    lines = SNIPPET.splitlines()
    assert refused == {i for i, line in enumerate(lines, 1) if line.endswith("# refused")}, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("hint", "value", "says"),
    [
        (str, object(), "name: a text is expected, not an object of type object"),
        (str | None, torch.zeros(1), "name: a text is expected, not an object of type Tensor"),
        (int, torch.tensor(3), "name: a whole number is expected, not an object of type Tensor"),
        (typing.Literal["auto", "cpu"], torch.device("cpu"), "name: one of auto, cpu is expected, not an object of"),
        (str, ["a"], r"name: \['a'\] is not a text"),
        (tuple[int, ...], "1,x", "name: 'x' is not a whole number"),
        (tuple[int, ...], (0,), "name: 0 must be at least 1"),
    ],
)
def test_an_object_is_never_turned_into_text(hint: object, value: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        coerce("name", value, hint, {"at_least": 1} if "tuple" in str(hint) else {})


def test_what_an_option_may_be_besides_its_type() -> None:
    import numpy as np

    assert coerce("name", Path("a") / "b", str | None, {}) == "a/b"
    assert coerce("name", np.int64(3), int, {}) == 3 and coerce("name", np.float32(0.5), float, {}) == 0.5
    assert coerce("name", "1, 4", tuple[int, ...], {}) == coerce("name", [1, 4], tuple[int, ...], {}) == (1, 4)
    assert coerce("name", "none", tuple[int, ...] | None, {}) is None and coerce("name", 2, tuple[int, ...], {}) == (2,)


def test_the_module_runs_as_the_command(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "diffdistill", "methods"], capture_output=True, text=True)
    assert done.returncode == 0 and "dmd2" in done.stdout
    done = subprocess.run([sys.executable, "-m", "diffdistill", "train", "--lr", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and "--student-lr" in done.stderr


def test_a_run_is_its_students_folder(tiny_teacher: Teachers, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    run = distill("dmd2", teacher=tiny_teacher("vp"), out=tmp_path / "run", log_every=1, **SHORT)
    assert run == Run(tmp_path / "run") and run.student == tmp_path / "run" / "student" == Path(run) == Path(str(run))
    assert DiffusionPipeline.from_pretrained(run.student).unet.config.sample_size == 8
    assert [row["step"] for row in run.metrics] == [1]
    copy = run.save(tmp_path / "copy")
    assert {p.name for p in copy.iterdir()} == {p.name for p in run.student.iterdir()}
    with pytest.raises(UserError, match="is not a folder with diffdistill"):
        run.save(tmp_path)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    assert run.sampler()((1, 8, 8), {"class_labels": torch.arange(2)}, generators).shape == (2, 1, 8, 8)
    assert run.evaluate(count=100).rows[-1]["model"] == "student"
    assert distill("dmd2", teacher=run, out=tmp_path / "of a run", **SHORT).student.is_dir(), "a run is a teacher too"


def test_a_methods_own_options(tiny_teacher: Teachers, tmp_path: Path) -> None:
    from diffdistill.methods.dmd2 import Config

    shared = {"teacher": tiny_teacher("vp"), **SHORT}
    own = dataclasses.asdict(Config(update_ratio=1))  # all of them, so that none is derived
    mapping = distill("dmd2", options=own, out=tmp_path / "a", **shared)
    record = distill("dmd2", options=Config(update_ratio=1), out=tmp_path / "b", **shared)
    a, b = (yaml.safe_load((run.folder / "config.yaml").read_text()) for run in (mapping, record))
    assert a | {"out": ""} == b | {"out": ""} and a["update_ratio"] == 1
    for wrong, says in (
        ({"update_ratoi": 1}, "update_ratoi: no such option; did you mean 'update_ratio'"),
        ({"update_ratio": object()}, "update_ratio: a whole number is expected"),
        (TrainConfig(), "options: TrainConfig is not the Config of dmd2"),
        (3, "options: give a mapping or the method's Config, not an object of type int"),
    ):
        with pytest.raises(UserError, match=says):
            distill("dmd2", options=wrong, out=tmp_path / "c", **shared)  # type: ignore[arg-type]


def test_a_method_with_stages_takes_all_of_them_by_default(
    tiny_teacher: Teachers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"teacher": tiny_teacher("vp"), "batch_size": 4, "sample_every": 0, "device": "cpu", "data": "digits"}
    stages = {"start_steps": 4, "stage_steps": 2, "final_steps": 1}
    run = distill("progressive", options=stages, out=tmp_path / "run", **settings)
    assert run.metrics[-1]["step"] == 4 and "note" not in capsys.readouterr().err
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["steps"] == 4
    distill("progressive", options=stages, steps=2, out=tmp_path / "short", **settings)
    assert "all stages of progressive take 4 steps and steps is 2" in capsys.readouterr().err
    distill("progressive", options=stages, steps=5, out=tmp_path / "long", **settings)
    assert "steps is 5: the rest trains nothing" in capsys.readouterr().err
    merging = {"solver_steps": 4, "stages": [2, 1], "stage_steps": 1}
    distill("tscd", options=merging, steps=3, out=tmp_path / "merged", **settings)
    assert "take 2 steps and steps is 3: the last stage goes on in the rest" in capsys.readouterr().err
