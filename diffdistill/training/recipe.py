"""A method to train by: by name, from a file or module, or a class; and what Python gives as objects."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from diffdistill.catalogue import About, Preset, describe_method
from diffdistill.data.examples import Examples
from diffdistill.errors import UserError
from diffdistill.options import build
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Method
from diffdistill.scaffold.reward import Reward

OBJECT = "python:"
"""How the recorded options of a run begin where Python gave an object, whose type follows."""


@dataclass(frozen=True)
class Recipe:
    """A method's class with its options and what is said of it."""

    name: str
    about: About
    config: type  #: the dataclass of its options
    presets: Mapping[str, Preset]
    make: Callable[[Teacher, Any], Method]  #: from a teacher and an instance of `config`
    source: object = None  #: the path of its file, its module or its class


def recipe_of(method: str | ModuleType | Callable[..., Method]) -> Recipe:
    """The recipe of a method's name, file, module or class; UserError for anything else.

    A class says its options in a dataclass `Config` inside it or beside it in its module.
    """
    if isinstance(method, str):
        info = describe_method(method)

        def make(teacher: Teacher, options: Any) -> Method:
            # The method's own Config has the same fields; the one read from source served only to parse options.
            module = info.load()
            return module.METHOD(teacher, module.Config(**shallow(options)))

        return Recipe(info.name, info.about, info.config, info.presets, make, info.path)
    source: Any = method
    if isinstance(method, ModuleType):
        factory, config, module = source.METHOD, source.Config, method
        presets = describe_method(str(module.__file__)).presets if module.__file__ else {}
    else:
        factory, presets, module = source, {}, sys.modules.get(getattr(source, "__module__", ""), ModuleType("none"))
        config = vars(source).get("Config") if hasattr(source, "__dict__") else None
        config = config or vars(module).get("Config")
    name = str(getattr(source, "__name__", type(source).__name__)).rpartition(".")[2]
    if not callable(factory) or not isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise UserError(
            f"method: {name} is no method; give a name, a file, or a class with a dataclass Config of its options"
        )
    about = vars(module).get("ABOUT")
    unsaid = About(paper="unpublished", data="samples", equations={}, kind="distribution")
    return Recipe(name, about if isinstance(about, About) else unsaid, config, presets, factory, method)


def shallow(options: Any) -> dict[str, Any]:
    """A dataclass instance as a dict of its fields, whose values stay what they are."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


def recorded(options: Any) -> dict[str, Any]:
    """The options for a run folder: what YAML has no word for is named by its type."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [plain(part) for part in value]
        return value if value is None or isinstance(value, str | bool | int | float) else marker(value)

    return {name: plain(value) for name, value in shallow(options).items()}


def marker(value: Any) -> str:
    """What stands in recorded options for an object."""
    return f"{OBJECT}{getattr(value, '__name__', type(value).__name__)}"


READ = ("data", "pairs", "losers", "teacher_data", "reward")
"""The options of what a training reads, in whose place Python may give objects."""


@dataclass(frozen=True)
class Objects:
    """What Python gave as objects, where the command line has a name or a path."""

    recipe: Recipe | None = None
    options: Any = None  #: an instance of the method's own Config
    teacher: Teacher | None = None
    data: Tensor | tuple[Tensor, Tensor] | Examples | None = None
    pairs: Examples | None = None
    losers: Tensor | Examples | None = None
    teacher_data: Examples | None = None
    reward: Reward | None = None
    named: Mapping[str, str] = field(default_factory=dict)  #: the option values that stand for them

    @staticmethod
    def split(values: Mapping[str, Any], options: Any) -> tuple[dict[str, Any], Objects]:
        """The option values as the command line would have them, and the objects among them.

        `options` are the method's own, as a mapping or an instance of its Config. None stands for what was not given.
        """
        plain: dict[str, Any] = {}
        objects: dict[str, Any] = {}
        for name, value in values.items():
            if value is None:
                continue
            if name in ("method", "teacher", *READ) and not isinstance(value, str | os.PathLike):
                objects[name] = value
            else:
                plain[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        named = {name: marker(value) for name, value in objects.items()}
        if "teacher" in objects and not isinstance(objects["teacher"], Teacher):
            raise UserError(
                f"teacher: {type(objects['teacher']).__name__} is no teacher; give a folder, a hub id, 'digits', or "
                "Teacher.around(network, ..)"
            )
        if "reward" in objects and not callable(objects["reward"]):
            raise UserError(
                f"reward: {type(objects['reward']).__name__} is none; give a function (images, conditions) -> a number "
                "for each image, or FILE.py:FUNCTION"
            )
        recipe = recipe_of(objects.pop("method")) if "method" in objects else None
        if isinstance(options, Mapping):
            plain |= options
            options = None
        elif options is not None and (isinstance(options, type) or not dataclasses.is_dataclass(options)):
            raise UserError(
                f"options: give a mapping or the method's Config, not an object of type {type(options).__name__}"
            )
        return plain, Objects(recipe, options, named=named, **objects)

    def method_of(self, values: Mapping[str, Any], default: str) -> Recipe:
        """The method that the options or the objects mean."""
        return self.recipe or recipe_of(str(values.get("method", default)))

    def require_objects(self, values: Mapping[str, Any]) -> None:
        """UserError where a recorded option stands for an object that Python has not given again."""
        for name, value in values.items():
            if isinstance(value, str) and value.startswith(OBJECT) and name not in self.named and self.options is None:
                kind = value.removeprefix(OBJECT)
                raise UserError(f"{name}: it was an object of type {kind}; give it again in Python, as {name}=..")

    def method_options(self, recipe: Recipe, own: Mapping[str, Any]) -> Any:
        """An instance of the method's Config; UserError where an instance of another method's was given."""
        if self.options is None:
            return build(recipe.config, own)
        names = {f.name for f in dataclasses.fields(recipe.config)}
        if {f.name for f in dataclasses.fields(self.options)} != names:
            raise UserError(
                f"options: {type(self.options).__qualname__} is not the Config of {recipe.name}; give an "
                "instance of that"
            )
        return self.options
