"""What holds for every method's options: each is read somewhere, and the defaults fit every kind of teacher."""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diffdistill import UserError
from diffdistill.catalogue import method_names
from diffdistill.families import load_teacher
from diffdistill.options import ScaleRange, StudentLevels, option

Teachers = Callable[..., Path]
TO_SAY: dict[str, dict[str, Any]] = {"pso": {"student_steps": 2}, "score_forgetting": {"forget": (1,)}}  # by the user


def modules(method: type) -> Iterator[ModuleType]:
    """Those that a method's class and its bases stand in, and what these import of the package but options."""
    for base in method.__mro__:
        if not base.__module__.startswith("diffdistill"):
            continue
        own = sys.modules[base.__module__]
        yield own
        for node in ast.walk(ast.parse(inspect.getsource(own))):
            name = str(node.module) if isinstance(node, ast.ImportFrom) else ""
            if name.startswith("diffdistill") and ".options" not in name:
                yield importlib.import_module(name)


def read_nowhere(method: type, config: type) -> list[str]:
    """The options that neither the method's modules nor a function of its `Config` reads as `.NAME`."""
    members = [getattr(value, "fget", value) for base in config.__mro__ for value in vars(base).values()]
    functions = [member for member in members if inspect.isfunction(member)]
    functions = [f for f in functions if f.__module__.startswith("diffdistill") and not f.__name__.startswith("__")]
    parts = [inspect.getsource(part) for part in (*dict.fromkeys(modules(method)), *functions)]
    names = [field.name for field in dataclasses.fields(config)]
    elsewhere = {f"{player}_lr" for player in ("student", "discriminator", "weight", "auxiliary")}  # by their name
    elsewhere.add("guidance_scale_2")  # of the teacher that a method is given, by training.assemble
    return [name for name in names if name not in elsewhere and not re.search(rf"\.{name}\b", "\n".join(parts))]


@pytest.mark.parametrize("name", method_names())
def test_no_option_is_without_effect(name: str) -> None:
    own: Any = importlib.import_module(f"diffdistill.methods.{name}")
    assert read_nowhere(own.METHOD, own.Config) == []


@pytest.mark.parametrize("kind", ["flow", "edm"])  # on vp each has been made by its own tests
def test_the_defaults_of_each_method_fit_the_teacher(kind: str, tiny_teacher: Teachers) -> None:
    for name in method_names():
        teacher = dataclasses.replace(load_teacher(tiny_teacher(kind)), move="renoise")
        own: Any = importlib.import_module(f"diffdistill.methods.{name}")
        own.METHOD(teacher, own.Config(**TO_SAY.get(name, {})))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pcm", {"solver_steps": 2000}),
        ("tscd", {"solver_steps": 2000}),
        ("scott", {"solver_steps": 2000}),
        ("boot", {"solver_steps": 2000}),
        ("perflow", {"solver_steps": 500}),
        ("lcm", {"ddim_steps": 2000}),
        ("multistep_consistency", {"segments": 2000}),
        ("progressive", {"start_steps": 2048}),
        ("lora_guidance", {"sampling_steps": 2000}),
        ("sims", {"sampling_steps": 2000}),
        ("consistency", {"student_steps": 2000}),
    ],
)
def test_more_steps_than_timesteps_are_refused_by_their_own_name(
    name: str, options: dict[str, Any], tiny_teacher: Teachers
) -> None:
    """`steps` is the number of training steps, which is not what was wrong."""
    own: Any = importlib.import_module(f"diffdistill.methods.{name}")
    said = "windows times solver_steps" if name == "perflow" else next(iter(options))
    with pytest.raises(UserError, match=f"^{said}: 20[04][08] is more than the teacher's 1000 timesteps"):
        own.METHOD(load_teacher(tiny_teacher("vp")), own.Config(**options)).sampler()


def test_a_methods_own_check_sees_what_its_groups_say() -> None:
    """Levels say how many steps there are, and a range of scales its middle, before `check` is asked."""

    @dataclasses.dataclass(frozen=True)
    class Config(StudentLevels, ScaleRange):
        student_steps: int = option(4, "steps")

        def check(self) -> None:
            raise UserError(f"check: {self.student_steps} {self.student_level} {self.guidance_scale}")

    with pytest.raises(UserError, match=r"^check: 3 900.0 3.0$"):
        Config(levels=(900.0, 500.0, 100.0))
