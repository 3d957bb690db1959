"""Suites of the scoreboard: what all methods share, and what each needs, in one small file.

`diffdistill bench --suite NAME` runs one; NAME may also be a YAML file of your own with the same fields.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffdistill.errors import UserError
from diffdistill.options import nearest, read_yaml


@dataclass(frozen=True)
class SuiteMethod:
    """What a suite knows of a method."""

    passes: Mapping[str, float] = field(default_factory=dict)  #: preset -> the fewest network passes that a step needs
    scales: tuple[str, ...] = ()  #: options that count training steps, a stage's say, and keep their share of the whole
    any_steps: bool = False  #: one student, sampled with any number of steps


@dataclass(frozen=True)
class Suite:
    """The fields of a suite's file."""

    name: str
    title: str
    preset: str  #: the presets of a method that are run: those of this name, and of this name and a suffix, NAME-4step
    teacher: str  #: "": the user gives it
    data: str  #: the real images that students learn from; "": the user gives them
    protocol: str  #: by which teacher and students are judged
    budget: int  #: network passes of a batch in a training
    reference: str = ""  #: the real images that samples are compared with; "": those of data
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    overrides: Mapping[str, Any] = field(default_factory=dict)  #: option -> value, where a preset has that option
    methods: Mapping[str, SuiteMethod] = field(default_factory=dict)

    def method(self, name: str) -> SuiteMethod:
        """What the suite knows of a method: nothing of one that it does not list."""
        return self.methods.get(name, SuiteMethod())


def suite_names() -> list[str]:
    """The suites that are shipped."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def _folder() -> Any:
    return files("diffdistill.eval").joinpath("suites")


def published_board(suite: str) -> dict[str, Any]:
    """The board of a shipped suite as docs/results.md has it: `rows` with `board.COLUMNS`, `commit` and `seeds`.

    Raises UserError for a suite without one.
    """
    file = _folder().joinpath(f"{suite}.board.json")
    if not file.is_file():
        raise UserError(f"suite: no board of {suite!r} is shipped; that of digits is")
    board: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return board


def load_suite(name: str) -> Suite:
    """The suite of that name or file; UserError if there is none, or a field is not right."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in suite_names():
        path = Path(str(_folder().joinpath(f"{name}.yaml")))
    else:
        raise UserError(f"suite: {name!r} is not known; {nearest(name, suite_names())}, or give a .yaml file")
    values = read_yaml(str(path))
    known = {f.name: f for f in dataclasses.fields(Suite)}
    for key in values:
        if key not in known and key != "extends":
            raise UserError(f"{path.name}: {key!r} is no field; {nearest(key, known)}")
    if "extends" in values:
        base = load_suite(str(values.pop("extends")))
        values = {f.name: getattr(base, f.name) for f in dataclasses.fields(Suite)} | values
    values["name"] = path.stem
    for key, f in known.items():
        if key not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{path.name}: {key} is missing")
    _check(values, path.name)
    methods = {key: _method(value, f"{path.name}: methods: {key}") for key, value in values.get("methods", {}).items()}
    return Suite(**{**values, "methods": methods, "teacher_steps": tuple(values.get("teacher_steps", (1,)))})


def _check(values: Mapping[str, Any], where: str) -> None:
    for key in ("title", "preset", "teacher", "data", "protocol", "reference"):
        if not isinstance(values.get(key, ""), str):
            raise UserError(f"{where}: {key}: {values[key]!r} is not a text")
    counts = [("budget", values["budget"]), *(("teacher_steps", n) for n in _list(values, "teacher_steps", where))]
    for key, value in counts:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key}: {value!r} is not a whole number of at least 1")
    for key in ("overrides", "methods"):
        if not isinstance(values.get(key, {}), Mapping):
            raise UserError(f"{where}: {key}: {values[key]!r} is not a mapping")


def _list(values: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = values.get(key, [])
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: {key}: {value!r} is no list")
    return list(value)


def _method(value: Any, where: str) -> SuiteMethod:
    if isinstance(value, SuiteMethod):
        return value
    known = {f.name for f in dataclasses.fields(SuiteMethod)}
    if not isinstance(value, Mapping) or not isinstance(value.get("passes", {}), Mapping):
        raise UserError(f"{where}: {value!r} is not a mapping with {', '.join(sorted(known))}")
    for key in value:
        if key not in known:
            raise UserError(f"{where}: {key!r} is no field; {nearest(str(key), known)}")
    scales = tuple(_list(value, "scales", where))
    return SuiteMethod(dict(value.get("passes", {})), scales, bool(value.get("any_steps", False)))
