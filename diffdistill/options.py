"""Options are dataclass fields with a help text and a range; the command line, YAML and Python share them.

No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from diffdistill.errors import UserError


def option(default: Any, help: str, *, above: float | None = None, at_least: float | None = None,
           below: float | None = None, at_most: float | None = None) -> Any:  # fmt: skip
    """A dataclass field with a help text and, for numbers, its range."""
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {"help": help, "bounds": {k: v for k, v in bounds.items() if v is not None}}
    return field(default=default, metadata=metadata)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?' where X is close to the name, else the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


def coerce(name: str, value: Any, hint: Any, bounds: Mapping[str, float]) -> Any:
    """The value as the option's type, from a string (command line) or a YAML scalar; UserError if it is not one."""
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    if type(None) in options:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        options = tuple(o for o in options if o is not type(None))
    (kind,) = options
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        for choice in choices:
            if value == choice or str(value) == str(choice) or (value is False and choice == "no"):
                return choice
        raise UserError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}")
    try:
        return _in_range(name, _scalar(value, kind), bounds)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise UserError(f"{name}: {value!r} is not {words[kind]}") from None


_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        if str(value).lower() not in _BOOLS:
            raise TypeError
        return _BOOLS[str(value).lower()]
    if isinstance(value, (bool, list, dict)) or value is None:
        raise TypeError
    if kind is int and isinstance(value, float) and value != int(value):
        raise TypeError
    return kind(value)


def _in_range(name: str, value: Any, bounds: Mapping[str, float]) -> Any:
    checks = {
        "above": (lambda v, b: v > b, "greater than"),
        "at_least": (lambda v, b: v >= b, "at least"),
        "below": (lambda v, b: v < b, "less than"),
        "at_most": (lambda v, b: v <= b, "at most"),
    }
    for key, bound in bounds.items():
        holds, words = checks[key]
        if not holds(value, bound):  # also false for nan
            raise UserError(f"{name}: {value} must be {words} {bound:g}")
    return value


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass from option values; UserError for a value that does not fit."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"{name}: no such option; {nearest(name, known)}")
    fitted = {n: coerce(n, v, hints[n], known[n].metadata.get("bounds", {})) for n, v in values.items()}
    return cls(**fitted)


def split(values: Mapping[str, Any], first: type, second: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Option values parted over two dataclasses; UserError with the nearest name for one that neither has."""
    names = [f.name for f in dataclasses.fields(first)]
    others = [f.name for f in dataclasses.fields(second)]
    for name in values:
        if name not in names and name not in others:
            raise UserError(f"{name}: no such option; {nearest(name, names + others)}")
    return {n: v for n, v in values.items() if n in names}, {n: v for n, v in values.items() if n in others}


def read_yaml(path: str) -> dict[str, Any]:
    """A flat mapping of option names to values; UserError for anything else."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config: {path!r} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: {path!r} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"config: {path!r} is not a mapping of options to values")
    return {key.replace("-", "_"): value for key, value in values.items()}
