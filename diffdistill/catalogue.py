"""The methods and recipes that there are, and what their files say of them, read without importing a method.

A method is one file, `<name>.py`, with its presets beside it in presets/<name>.yaml and its exact checks in
checks/<name>.py. Both are optional for a method of one's own. Recipes, settings published for one model, stand in
recipes/<model>.yaml.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from diffdistill.config import TrainConfig
from diffdistill.errors import UserError
from diffdistill.options import groups as option_groups
from diffdistill.options import nearest, read_mapping
from diffdistill.options import trajectories as more_groups

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class About:
    """What a method says of itself, with literals, so that it can be read without importing torch."""

    paper: str  #: authors, year, arXiv number
    data: str  #: what it learns from
    equations: Mapping[
        str, str
    ]  #: equation of the paper -> dotted names in its own file or below diffdistill, by commas
    #: what its student is to repeat of the teacher; preference: the teacher is a student, which is tuned; restoration:
    #: what is in an image that says too little of it, and is read beside the sample
    kind: Literal["distribution", "trajectory", "guidance", "preference", "restoration"]
    #: what it cannot be trained without, whatever its options
    needs: tuple[Literal["images", "pairs", "reward", "losers", "teacher_data"], ...] = ()
    defaults: Mapping[str, Scalar] = field(default_factory=dict)  #: training options that are others than usual


@dataclass(frozen=True)
class Preset:
    """Options under a name."""

    source: str  #: where they stand in a paper or its code, or how they were come by
    options: Mapping[str, Scalar]  #: `steps` among them; None where the source has no number, and the user says it


@dataclass(frozen=True)
class MethodInfo:
    """What a method's file says of itself, read without importing it."""

    name: str
    path: Path
    doc: str
    about: About
    config: type

    @cached_property
    def presets(self) -> Mapping[str, Preset]:
        """By name; UserError for a file that is not of that form."""
        path = self.path.parent / "presets" / f"{self.name}.yaml"
        if not path.is_file():
            return {}
        entries = read_mapping(str(path), "presets")
        return {name: _preset(path, name, entry) for name, entry in entries.items()}

    def load(self) -> types.ModuleType:
        """Import the method's module."""
        return _import(self.path, self.name, "")

    @cached_property
    def checks(self) -> types.ModuleType:
        """The module of its checks: checks/<name>.py beside it, or its own where there is none."""
        beside = self.path.parent / "checks" / f"{self.name}.py"
        return _import(beside, self.name, "checks.") if beside.is_file() else self.load()

    @property
    def verify(self) -> Callable[[], Iterable[Any]] | None:
        """What yields its exact checks, if it has any."""
        return vars(self.checks).get("verify")

    @property
    def plane(self) -> Mapping[str, Mapping[str, Scalar]] | None:
        """Its trainings in the plane (exact/plane.py), options by a name for each, if it says any.

        UserError for a PLANE of another form.
        """
        trainings = vars(self.checks).get("PLANE")
        if trainings is not None and not all(isinstance(options, Mapping) for options in dict(trainings).values()):
            raise UserError(f"PLANE: that of {self.name} must map the name of each training to its options")
        return trainings


def _preset(path: Path, name: str, entry: Any) -> Preset:
    known = [f.name for f in dataclasses.fields(Preset)]
    if not isinstance(entry, dict) or set(entry) != set(known) or not isinstance(entry["options"], dict):
        raise UserError(f"presets: {path}, {name!r} is not a mapping with {' and '.join(known)}")
    options = {str(key).replace("-", "_"): value for key, value in entry["options"].items()}
    if "steps" not in options:
        raise UserError(f"presets: {path}, {name!r} says no steps; give a number, or null where the user is to say it")
    return Preset(str(entry["source"]), options)


@dataclass(frozen=True)
class Setting:
    """The value of an option."""

    value: Scalar
    source: str  #: where it stands


@dataclass(frozen=True)
class ModelRecipe:
    """How somebody distilled a model: a method with its options, as far as they are published."""

    name: str
    title: str  #: of the model
    family: str  #: of its pipelines
    known_by: tuple[str, ...]  #: parts of the names that the model goes by
    makes: str  #: the student
    method: str
    data: str  #: what it learns from
    other: str  #: what is otherwise than published; "" where nothing is known to be
    settings: Mapping[str, Setting]  #: by option; `steps` among them, None where the source has no number

    @property
    def options(self) -> dict[str, Scalar]:
        """What `train` takes, the method among it."""
        return {"method": self.method} | {name: setting.value for name, setting in self.settings.items()}


_MODEL_FIELDS = ("title", "family", "teacher", "known_by", "recipes")
_RECIPE_FIELDS = ("makes", "method", "data", "parts")


@cache
def recipes() -> Mapping[str, ModelRecipe]:
    """All recipes by name, which begins with the name of the model's file; UserError for a file of another form.

    They are read once in a process: every training of a known family names those that fit it.
    """
    found = {}
    for path in sorted((_methods_folder() / "recipes").glob("*.yaml")):
        model = read_mapping(str(path), "recipe")
        if tuple(model) != _MODEL_FIELDS:
            raise UserError(f"recipe: {path} has not the fields {', '.join(_MODEL_FIELDS)}")
        for key, entry in model["recipes"].items():
            recipe = _recipe(f"{path.stem}-{key}", model, entry)
            found[recipe.name] = recipe
    return types.MappingProxyType(found)


def describe_recipe(name: str) -> ModelRecipe:
    """The recipe of that name; UserError with those whose names are near, or that begin with it."""
    known = recipes()
    if name not in known:
        raise UserError(f"recipe: {name!r} is not known; {nearest(name, known)}")
    return known[name]


def _recipe(name: str, model: Mapping[str, Any], entry: Mapping[str, Any]) -> ModelRecipe:
    if set(entry) - {"other"} != set(_RECIPE_FIELDS):
        raise UserError(f"recipe: {name} has not the fields {', '.join(_RECIPE_FIELDS)}")
    settings = {"teacher": Setting(model["teacher"], "the model's own repository")}
    for part in entry["parts"]:
        if "preset" in part:
            preset = describe_method(entry["method"]).presets[part["preset"]]
            source = f"preset {part['preset']} of {entry['method']}: {preset.source}"
        else:
            preset, source = Preset(**part), part["source"]
        settings |= {option: Setting(value, source) for option, value in preset.options.items()}
    described = {field: entry[field] for field in ("makes", "method", "data")} | {"other": entry.get("other", "")}
    known_by = tuple(model["known_by"])
    return ModelRecipe(name, model["title"], model["family"], known_by, settings=settings, **described)


def _methods_folder() -> Path:
    spec = importlib.util.find_spec("diffdistill.methods")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _import(path: Path, name: str, folder: str) -> types.ModuleType:
    if _methods_folder() in path.parents:
        return importlib.import_module(f"diffdistill.methods.{folder}{name}")
    name = f"diffdistill_method_{folder.replace('.', '_')}{name}"  # a file called random.py must not hide the real one
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def method_names() -> list[str]:
    """The names of the methods that diffdistill ships."""
    return sorted(p.stem for p in _methods_folder().glob("*.py") if not p.stem.startswith("_"))


def describe_method(name: str) -> MethodInfo:
    """A method of ours by name, or of the user's by path; UserError with the nearest name if there is none."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"method: the file {name!r} does not exist; give the path of a method's file")
    else:
        path = _methods_folder() / f"{name}.py"
        if name not in method_names():
            raise UserError(f"method: {name!r} is not known; {nearest(name, method_names())}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"method: {path} does not parse ({error})") from None
    definitions = _definitions(tree)
    missing = [name for name in ("ABOUT", "Config", "METHOD") if name not in definitions]
    if missing:
        unknown = [name for name in definitions if name.isupper() and name not in ("ABOUT", "METHOD")]
        hint = "".join(f"; {name} is none of them" for name in unknown if nearest(name, missing).startswith("did"))
        raise UserError(f"method: {path} does not define {', '.join(missing)}{hint}; see CONTRIBUTING.md")
    _refuse_unread(definitions, path)
    about, config = _about(definitions["ABOUT"], path), _config_class(definitions["Config"], path)
    clash = {f.name for f in dataclasses.fields(config)} & {f.name for f in dataclasses.fields(TrainConfig)}
    if clash:
        raise UserError(f"method: {path} has options of every training: {', '.join(sorted(clash))}; rename them")
    return MethodInfo(path.stem, path, ast.get_docstring(tree) or "", about, config)


# Constants of earlier versions, which nothing reads, and what is read in their place.
_UNREAD = {
    "PRESETS": "presets stand in presets/{name}.yaml",
    "END_TO_END": "what it learns in the plane is ABOUT's kind, and with which options PLANE in checks/{name}.py",
    "PASSES": "what a benchmark needs stands in eval/suites/",
    "SCALES": "what a benchmark needs stands in eval/suites/",
    "ANY_STEPS": "what a benchmark needs stands in eval/suites/",
}


def _refuse_unread(definitions: Mapping[str, ast.stmt], path: Path) -> None:
    """UserError for a constant that would have no effect, also a slightly misspelt one."""
    for name, node in definitions.items():
        close = difflib.get_close_matches(name, _UNREAD, n=1, cutoff=0.85) if name.isupper() else []
        if close:
            hint = _UNREAD[close[0]].format(name=path.stem)
            raise UserError(f"method: {path}, line {node.lineno}: {name} is not read; {hint}")


def _definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """What a module defines at its top level, by name."""
    definitions: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            definitions |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            definitions[node.target.id] = node
    return definitions


def _about(node: ast.stmt, path: Path) -> About:
    where = f"method: {path}, line {node.lineno}"
    call = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) != "About":
        raise UserError(f"{where}: ABOUT must be a call, About(paper=.., data=.., equations=.., kind=..)")
    try:
        said = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except ValueError:
        raise UserError(
            f"{where}: ABOUT has a value that is no literal; write texts, numbers, lists and mappings"
        ) from None
    known = {f.name: f for f in dataclasses.fields(About)}
    for name in said:
        if name not in known:
            raise UserError(f"{where}: ABOUT has no field {name!r}; {nearest(name, known)}")
    required = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in said]
    if missing:
        raise UserError(f"{where}: ABOUT lacks {', '.join(missing)}; add what is missing")
    training = [f.name for f in dataclasses.fields(TrainConfig)]
    for name in said.get("defaults", {}):
        if name not in training:
            raise UserError(f"{where}: ABOUT's defaults have no training option {name!r}; {nearest(name, training)}")
    return About(**said)


def _config_class(node: ast.stmt, path: Path) -> type:
    """The options class alone, executed with nothing but what an options class needs."""
    module = types.ModuleType(f"diffdistill._options.{path.stem}")
    module.__dict__.update(vars(option_groups) | vars(more_groups) | {"__name__": module.__name__})
    sys.modules[module.__name__] = module  # get_type_hints looks names up there
    try:
        exec(compile(ast.Module([node], []), str(path), "exec"), module.__dict__)
    except Exception as error:  # whatever the file's own text raises
        raise UserError(f"method: {path}, line {node.lineno}: {type(error).__name__}: {error}") from None
    return module.__dict__["Config"]
