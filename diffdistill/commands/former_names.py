"""Options of `train` by their first names, so that scripts and configuration files that have them go on."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_NAMES = {
    "adapter_rank": "lora_rank",
    "adapter_alpha": "lora_alpha",
    "adapter_targets": "lora_targets",
    "lora_lr": "fake_score_lr",  # of swiftbrush
    "label_drop": "label_dropout",
}
_ROLES = ("student", "fake_score")  # once options of their own, `full` or `lora`


def todays_arguments(argv: Sequence[str], known: Collection[str]) -> list[str]:
    """The arguments of a command with those options, by today's names; what was another is said on standard error."""
    words, lora = list[str](), list[str]()
    given = iter(argv)
    for word in given:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_") if option.startswith("--") else ""
        if name in _NAMES and option not in known:
            words.append(f"{_option(_NAMES[name])}{equals}{value}")
            print(f"diffdistill: {option} is {_option(_NAMES[name])} today", file=sys.stderr)
        elif name in _ROLES:
            following = [] if equals else list(itertools.islice(given, 1))
            kind = value if equals else "".join(following)
            if _is_kind(kind):
                lora += [name] * (kind == "lora")
                print(f"diffdistill: {option} {kind} is --lora ROLE or nothing today", file=sys.stderr)
            else:
                words += [word, *following]
        else:
            words.append(word)
    return words + (["--lora", ",".join(lora)] if lora else [])


def todays_values(values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The values of a configuration file by today's names."""
    kinds = {name: values[name] for name in _ROLES if _is_kind(values.get(name))}
    lora = ",".join(name for name, kind in kinds.items() if kind == "lora")
    named = {name if _option(name) in known else _NAMES.get(name, name): value for name, value in values.items()}
    return ({"lora": lora} if lora else {}) | {name: value for name, value in named.items() if name not in kinds}


def _is_kind(value: object) -> bool:
    """Whether it says how a role is trained, and is not a student's folder of that name."""
    return value in ("full", "lora") and not os.path.isdir(str(value))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
