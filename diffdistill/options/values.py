"""Options are dataclass fields with a help text and a range; the command line, YAML and Python share them.

No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, cast

from diffdistill.errors import UserError, shown
from diffdistill.files import yaml_mapping


def option(default: Any, help: str, *, above: float | None = None, at_least: float | None = None,
           below: float | None = None, at_most: float | None = None, repeated: bool = False,
           bare: str | None = None) -> Any:  # fmt: skip
    """A dataclass field with a help text and, for numbers, its range.

    `default` may be `dataclasses.MISSING` for what must be given. `repeated`: on the command line a tuple is given by
    repeating the option, where others are one text with commas. `bare`: what the option means there without a value.
    """
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    own = {k: v for k, v in bounds.items() if v is not None}
    return field(default=default, metadata={"help": help, "bounds": own, "repeated": repeated, "bare": bare})


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?' where X is close to the name or has it as its last or first word, else what is known."""
    known = list(known)

    def plain(text: str) -> str:
        return text.lstrip("-").replace("_", "-").lower()

    def close(cutoff: float) -> list[str]:
        by_plain = {plain(k): k for k in reversed(known)}
        return [by_plain[k] for k in difflib.get_close_matches(plain(name), by_plain, n=1, cutoff=cutoff)]

    last = [k for k in known if plain(k).endswith(f"-{plain(name)}")]
    first = [k for k in known if plain(k).startswith(f"{plain(name)}-")]
    if candidates := close(0.8) or last[:3] or first[:3] or close(0.5):
        return f"did you mean {' or '.join(map(repr, candidates))}?"
    return f"known are {', '.join(sorted(known))}"


Sides = tuple[int, int]
"""Height and width."""

Size = int | str
"""Of images: pixels a side, or 'HEIGHTxWIDTH'. An option of this type is a number where both sides are the same."""


def height_width(size: Size) -> Sides:
    """Height and width in pixels of a size that an option holds."""
    height, _, width = str(size).partition("x")
    return int(height), int(width or height)


def size_of(height: int, width: int) -> Size:
    """Height and width as an option holds them."""
    return height if height == width else f"{height}x{width}"


def _size(name: str, value: Any, bounds: Mapping[str, float]) -> Size:
    """The size that a number, a text or a pair says; UserError for anything else."""
    text = "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    sides = re.fullmatch(r"\s*(\d{1,9})(?:\s*[xX×]\s*(\d{1,9}))?\s*", text)
    if isinstance(value, bool) or sides is None:
        try:
            alone = coerce(name, value, int, {})  # 8.0, or a number of no range
        except UserError:
            raise UserError(
                f"{name}: {shown(value)} is no size; give pixels a side, or HEIGHTxWIDTH, such as 720x1280"
            ) from None
        return cast(int, _in_range(name, alone, bounds))
    height, width = (cast(int, _in_range(name, int(side or sides[1]), bounds)) for side in sides.groups())
    return size_of(height, width)


_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def optional(hint: Any) -> tuple[Any, bool]:
    """The type of an option's values without None, and whether None is one of them."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    others = tuple(k for k in kinds if k is not type(None))
    return Size if others == typing.get_args(Size) else others[0], len(kinds) > len(others)


def coerce(name: str, value: Any, hint: Any, bounds: Mapping[str, float]) -> Any:
    """The value as the option's type, from a string (command line), a YAML scalar or a Python value.

    A path becomes its text, and numpy's numbers are numbers. Raises UserError for whatever is not of that type; an
    object is never turned into text.
    """
    kind, may_be_none = optional(hint)
    if may_be_none and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    if typing.get_origin(kind) is tuple:
        return tuple(coerce(name, part, typing.get_args(kind)[0], bounds) for part in _parts(value))
    value = _plain(name, value, kind)
    if kind is Size:
        return _size(name, value, bounds)
    if isinstance(value, int) and value.bit_length() > 63:
        raise UserError(f"{name}: {shown(value)} is not within 63 bits, as every whole number here is")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        for choice in choices:
            if value == choice or str(value) == str(choice) or (value is False and choice == "no"):
                return choice
        raise UserError(f"{name}: {shown(value)} is not one of {', '.join(map(str, choices))}")
    try:
        return _in_range(name, _scalar(value, kind), bounds)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: {shown(value)} is not {_WORDS[kind]}") from None


def _parts(value: Any) -> Sequence[Any]:
    """The members of a list: a text is parted at its commas, and any other single value is a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _plain(name: str, value: Any, kind: Any) -> Any:
    """The value as Python's own type; UserError for an object that is none of them."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | bool | int | float | list | tuple | dict):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    words = _WORDS.get(kind) or f"one of {', '.join(map(str, typing.get_args(kind)))}"
    raise UserError(f"{name}: {words} is expected, not an object of type {type(value).__name__}")


_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        if str(value).lower() not in _BOOLS:
            raise TypeError
        return _BOOLS[str(value).lower()]
    if isinstance(value, bool | list | tuple | dict) or value is None:
        raise TypeError
    if kind is int and isinstance(value, float) and value != int(value):
        raise TypeError
    if kind is int and int(value).bit_length() > 63:
        raise ValueError
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
            raise UserError(f"{name}: {shown(value)} must be {words} {bound:g}")
    return value


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass from option values; UserError for a value that does not fit."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"{name}: no such option; {nearest(name, known)}")
    for name, f in known.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{name}: it is missing; give {f.metadata.get('help', 'it')}")
    # A text with commas, a prompt say, is one member of an option that is given by repeating it.
    whole = {n: [v] if isinstance(v, str) and known[n].metadata.get("repeated") else v for n, v in values.items()}
    fitted = {n: coerce(n, v, hints[n], known[n].metadata.get("bounds", {})) for n, v in whole.items()}
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
    return {key.replace("-", "_"): value for key, value in read_mapping(path, "config").items()}


def read_mapping(path: str, what: str) -> dict[str, Any]:
    """A YAML file that is a mapping with texts for keys; UserError, which begins with `what`, for anything else."""
    try:
        return yaml_mapping(path)
    except OSError as error:
        raise UserError(f"{what}: {shown(path)} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{what}: {shown(path)} cannot be read: {error}") from None
