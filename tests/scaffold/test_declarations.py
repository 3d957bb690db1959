"""What methods say of themselves: equations that lead to code, presets that build, options, and what is refused."""

import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import diffdistill
from diffdistill import distill
from diffdistill.catalogue import describe_method, method_names
from diffdistill.config import TrainConfig
from diffdistill.errors import UserError
from diffdistill.options import MatchingOptions, ScaleRange, StudentOptions, build, option, split


def resolve(module: ModuleType, name: str) -> Any:
    """What a dotted name means in a method's file, or else below diffdistill; AttributeError if nothing."""
    if hasattr(module, name.split(".")[0]):
        target: Any = module
    else:
        target = diffdistill
    for part in name.split("."):
        if isinstance(target, ModuleType) and not hasattr(target, part) and hasattr(target, "__path__"):
            importlib.import_module(f"{target.__name__}.{part}")
        target = getattr(target, part)
    return target


@pytest.mark.parametrize("name", method_names())
def test_every_equation_leads_to_code(name: str) -> None:
    info = describe_method(name)
    assert info.about.equations
    for equation, places in info.about.equations.items():
        for place in places.split(","):
            assert resolve(info.load(), place.strip()) is not None, equation


@pytest.mark.parametrize("name", method_names())
def test_every_preset_builds_and_says_where_it_is_from(name: str) -> None:
    info = describe_method(name)
    assert info.presets
    for preset in info.presets.values():
        options = {k: v for k, v in preset.options.items() if (k, v) != ("steps", None)}  # which the user says
        shared, own = split(options, TrainConfig, info.config)
        build(TrainConfig, {**info.about.defaults, **shared})
        build(info.config, own)
        assert preset.source.strip()


@pytest.mark.parametrize("name", method_names())
def test_what_a_method_says_that_it_needs_is_what_it_needs(name: str) -> None:
    info = describe_method(name)
    assert {need.name.lower() for need in info.load().METHOD.needs} == set(info.about.needs)


ABOUT = 'ABOUT = About(paper="p", data="d", equations={}, kind="distribution")'
REST = """
@dataclass(frozen=True)
class Config(StudentOptions):
    "Its options."

class Mine: ...

METHOD = Mine
"""


def written(folder: Path, *lines: str) -> str:
    path = folder / "mine.py"
    path.write_text("\n".join(lines) + "\n" + REST, encoding="utf-8")
    return str(path)


def test_a_file_as_it_should_be_is_described(tmp_path: Path) -> None:
    info = describe_method(written(tmp_path, ABOUT, "SIGMA_DATA = 0.5", "STEPS = 3"))
    assert (info.name, info.about.kind, info.presets) == ("mine", "distribution", {})
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/mine.yaml").write_text(
        'a: {source: "here", options: {student-lr: 0.1, steps: 3}}', encoding="utf-8"
    )
    presets = describe_method(info.path.as_posix()).presets
    assert presets["a"].options == {"student_lr": 0.1, "steps": 3}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([ABOUT[:-1] + ', papers="q")'], r"mine\.py, line 1: ABOUT has no field 'papers'; did you mean 'paper'\?"),
        ([ABOUT.replace('data="d", ', "")], r"mine\.py, line 1: ABOUT lacks data; add what is missing"),
        ([ABOUT[:-1] + ', defaults={"stepz": 1})'], r"ABOUT's defaults have no training option 'stepz'; .*'steps'"),
        ([], r"mine\.py does not define ABOUT; see CONTRIBUTING\.md"),
        ([ABOUT.replace("ABOUT", "ABUOT", 1)], r"mine\.py does not define ABOUT; ABUOT is none of them"),
        ([ABOUT, "PRESETS = {}"], r"mine\.py, line 2: PRESETS is not read; presets stand in presets/mine\.yaml"),
        ([ABOUT, "PRESET: dict = {}"], r"line 2: PRESET is not read; presets stand in presets/mine\.yaml"),
        ([ABOUT, 'END_TO_END = {"kind": "trajectory"}'], r"line 2: END_TO_END is not read; .* checks/mine\.py"),
        ([ABOUT, "PASSES = {}"], r"PASSES is not read; what a benchmark needs stands in eval/suites/"),
        ([ABOUT, "SCALES = ()"], r"SCALES is not read; what a benchmark needs stands in eval/suites/"),
        ([ABOUT, "ANY_STEPS = True"], r"ANY_STEPS is not read; what a benchmark needs stands in eval/suites/"),
    ],
)
def test_a_file_that_says_something_else_is_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        describe_method(written(tmp_path, *lines))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        'a: {sources: "here", options: {}}',
        'a: {source: "here", option: {}}',
        'a: {source: "here", options: {}, note: "no"}',
        'a: {source: "here", options: [steps]}',
        "a: {options: {}}",
        "a: 3",
    ],
)
def test_a_preset_with_another_key_is_refused(text: str, tmp_path: Path) -> None:
    info = describe_method(written(tmp_path, ABOUT))
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"presets: .*mine\.yaml, 'a' is not a mapping with source and options"
    ) as caught:
        _ = info.presets
    assert "\n" not in str(caught.value)


def test_a_preset_says_how_long_it_trains_or_that_the_user_is_to_say_it(tmp_path: Path) -> None:
    info = describe_method(written(tmp_path, ABOUT))
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/mine.yaml").write_text('a: {source: "here", options: {student_lr: 0.1}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"presets: .*mine\.yaml, 'a' says no steps; give a number, or null"):
        _ = info.presets
    with pytest.raises(UserError, match=r"steps: the source of the preset 'sd21' has no number of them; give steps"):
        distill("swiftbrush", preset="sd21", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- option groups -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(MatchingOptions, beta1=0.0, student_level=750.0):
    """Other defaults, and one more option."""

    extra: int = option(3, "one more", at_least=1)


def test_another_default_keeps_the_help_the_bounds_and_the_group() -> None:
    options, group = ({f.name: f for f in dataclasses.fields(cls)} for cls in (Config, MatchingOptions))
    assert (Config().beta1, Config().student_level, Config().extra) == (0.0, 750.0, 3)
    assert (MatchingOptions().beta1, MatchingOptions().student_level) == (0.9, None)
    assert set(options) == {*group, "extra"}
    for name in group:
        assert options[name].metadata == group[name].metadata, name
    with pytest.raises(UserError, match=r"beta1: 1\.0 must be less than 1"):
        build(Config, {"beta1": "1"})
    assert build(Config, {"student_level": "none"}).student_level is None


def test_a_default_of_an_option_that_no_group_has_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"Wrong: beta_1 is no option of its groups; did you mean 'beta1'\?"):

        class Wrong(StudentOptions, beta_1=0.0):
            """One name is misspelt."""


def test_groups_check_themselves_when_they_are_combined() -> None:
    @dataclass(frozen=True)
    class Both(StudentOptions, ScaleRange, guidance_max=3.0):
        """A student that takes the scale."""

    assert (Both().guidance_max, Both().scale) == (3.0, 2.0)
    with pytest.raises(UserError, match=r"guidance_min: 4\.0 must be at most guidance_max"):
        Both(guidance_min=4.0)
