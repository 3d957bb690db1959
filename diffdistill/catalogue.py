"""The methods that there are, and what a method's file says of itself, read without importing it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffdistill.config import TrainConfig
from diffdistill.errors import UserError
from diffdistill.options import nearest, option


@dataclass(frozen=True)
class MethodInfo:
    """What a method's file says of itself, read without importing it."""

    name: str
    path: Path
    doc: str
    paper: str
    data: str
    equations: Mapping[str, str]
    presets: Mapping[str, Mapping[str, Any]]
    config: type
    end_to_end: Mapping[str, Any] | None = None  #: what its student should be on the plane (end_to_end.py)
    passes: Mapping[str, float] = field(default_factory=dict)  #: preset -> network passes that a step needs at least
    any_steps: bool = False  #: one student, sampled with any number of steps
    scales: Sequence[str] = ()  #: options that count training steps

    def load(self) -> types.ModuleType:
        """Import the method's module."""
        return _import(self.path, self.name, "")

    def verify(self) -> Callable[[], Iterable[Any]] | None:
        """What yields its exact checks: `verify` of its file, or of checks/<name>.py beside it; None if neither is."""
        module = self.load()
        beside = self.path.parent / "checks" / f"{self.name}.py"
        if not hasattr(module, "verify") and beside.is_file():
            module = _import(beside, self.name, "checks.")
        return getattr(module, "verify", None)


_LITERALS = {"PAPER", "DATA", "EQUATIONS", "PRESETS", "END_TO_END", "PASSES", "ANY_STEPS", "SCALES"}


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
    return sorted(p.stem for p in _methods_folder().glob("*.py") if not p.stem.startswith("_"))


def describe_method(name: str) -> MethodInfo:
    """A method of ours by name, or of the user's by path; UserError with the nearest name if there is none."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"method: {name!r} is not a file")
    else:
        path = _methods_folder() / f"{name}.py"
        if name not in method_names():
            raise UserError(f"method: {name!r} is not known; {nearest(name, method_names())}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"method: {path} does not parse ({error})") from None
    said: dict[str, Any] = {}
    defined: set[str] = set()
    try:
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                defined.add(node.targets[0].id)
                if node.targets[0].id in _LITERALS:
                    said[node.targets[0].id] = ast.literal_eval(node.value)
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                defined.add(node.name)
                if node.name == "Config":
                    said["Config"] = _config_class(node, path)
    except Exception as error:  # whatever the file's own text raises
        raise UserError(f"method: {path}, line {node.lineno}: {type(error).__name__}: {error}") from None
    missing = {"PAPER", "DATA", "EQUATIONS", "Config", "METHOD"} - defined
    if missing:
        raise UserError(f"method: {path} does not define {', '.join(sorted(missing))}; see CONTRIBUTING.md")
    config: type = said["Config"]
    clash = {f.name for f in dataclasses.fields(config)} & {f.name for f in dataclasses.fields(TrainConfig)}
    if clash:
        raise UserError(f"method: {path} has options of every training: {', '.join(sorted(clash))}; rename them")
    doc = ast.get_docstring(tree) or ""
    return MethodInfo(
        path.stem, path, doc, said["PAPER"], said["DATA"], said["EQUATIONS"], said.get("PRESETS", {}), config,
        said.get("END_TO_END"), said.get("PASSES", {}), said.get("ANY_STEPS", False), said.get("SCALES", ()),
    )  # fmt: skip


def _config_class(node: ast.stmt, path: Path) -> type:
    """The options class alone, executed with nothing but what an options class needs."""
    module = types.ModuleType(f"diffdistill._options.{path.stem}")
    module.__dict__.update({"dataclass": dataclass, "option": option, "Literal": Literal})
    sys.modules[module.__name__] = module  # get_type_hints looks names up there
    exec(compile(ast.Module([node], []), str(path), "exec"), module.__dict__)
    return module.__dict__["Config"]
