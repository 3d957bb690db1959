"""Where a model comes from, as its folder tells strangers: the teacher's name, model card and licence, and no path of
the machine that it was made on.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffdistill.config import SAVING
from diffdistill.errors import first_line
from diffdistill.families import Family, is_path, local_folder, public_name
from diffdistill.files import json_of, yaml_of

_LARGE = 1 << 20  # bytes of a JSON file that is no config: a tokenizer's vocabulary
_TERMS = re.compile(r"licen[cs]e|^notice|^copying|use_policy")


def public_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training without paths, and without those that say only where and how its result is saved."""

    def public(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if name in ("pairs", "prompts", "losers", "teacher_data", "reward") or (
            name == "method" and value.endswith(".py")
        ):  # which are files here
            return Path(value).name
        return public_name(value) if name in ("teacher", "data", "start") or is_path(value) else value

    return {name: public(name, value) for name, value in options.items() if name != "out" and name not in SAVING}


def teacher_folder(source: str, entry: Family | None) -> Path | None:
    """The folder of a student's teacher; None of a network that diffusers does not know."""
    return None if entry is None or not source else local_folder(source)


def card_of(folder: Path | None) -> dict[str, Any]:
    """The metadata at the head of a folder's README.md, as the hub has it; empty where there are none."""
    path = None if folder is None else folder / "README.md"
    if path is None or not path.is_file():
        return {}
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGE).removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
        head = re.match(rb"---\n(.*?\n)---\s*(?:\n|$)", data, re.DOTALL)
        return {} if head is None else yaml_of(head[1])
    except (OSError, ValueError) as error:
        print(f"note: the model card {path} cannot be read ({first_line(error)}), and is passed over", file=sys.stderr)
        return {}


def license_files(folder: Path | None) -> list[Path]:
    """The files of a model's folder that say what may be done with it."""
    if folder is None:
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and _TERMS.search(path.stem.lower()))


def copy_licenses(source: Path | None, folder: Path) -> None:
    """Put the licence files of a teacher into its student's folder."""
    for path in license_files(source):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def metadata(
    source: str, entry: Family | None, method: str, theirs: Mapping[str, Any], *, relation: str
) -> dict[str, Any]:
    """The head of a student's card, as the hub reads it: what its teacher's own, `theirs`, says, and its family.

    `relation` is what the student is to its base model, 'finetune' or 'adapter'.
    """
    texts = {
        name: theirs[name]
        for name in ("license", "license_name", "license_link", "pipeline_tag")
        if isinstance(theirs.get(name), str) and not is_path(theirs[name])
    }
    name = public_name(source)
    base = name if "/" in name else theirs.get("base_model")
    named = isinstance(base, str) or (isinstance(base, list) and all(isinstance(part, str) for part in base))
    tags = ["diffusion", "distillation", "diffdistill", method]
    if relation == "adapter":
        tags.append("lora")
    if entry is not None:
        tags.append(entry.name.replace("_", "-"))
    others = theirs.get("tags")
    tags += [tag for tag in others if isinstance(tag, str)] if isinstance(others, list) else []
    return {
        **({"library_name": "diffusers"} if entry is not None else {}),
        **({"pipeline_tag": texts.pop("pipeline_tag", None) or entry.task} if entry is not None else {}),
        **{name: text for name, text in texts.items() if name != "pipeline_tag"},
        **({"base_model": base, "base_model_relation": relation} if named and base else {}),
        "tags": list(dict.fromkeys(tags)),
    }


def head(values: Mapping[str, Any]) -> str:
    """The head of a model card."""
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)}---\n"


def license_note(source: str, folder: Path | None, theirs: Mapping[str, Any]) -> str:
    """What a student's card says of its licence: an empty text where its teacher, whose card is `theirs`, has none."""
    files = ", ".join(f"`{path.name}`" for path in license_files(folder))
    named = next((theirs[n] for n in ("license_name", "license") if isinstance(theirs.get(n), str)), None)
    if named is None and not files:
        return ""
    terms = " ".join(filter(None, [named, f"({files})" if named and files else files]))
    return f"Its weights come from those of {public_name(source)}, whose license holds for them: {terms}.\n\n"


def remove_paths(folder: Path) -> None:
    """Take what is a path of this machine out of the configs in a model's folder."""
    for file in folder.rglob("*.json"):
        if file.stat().st_size > _LARGE:
            continue
        try:
            values = json_of(file.read_bytes())
        except ValueError:
            continue
        if (clean := _without_paths(values)) != values:
            file.write_text(json.dumps(clean, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_paths(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        name: _without_paths(value)
        for name, value in values.items()
        if not (name.endswith(("path", "file", "dir")) and isinstance(value, str) and _on_this_machine(value))
    }


def _on_this_machine(text: str) -> bool:
    return is_path(text) or ("/" in text and Path(text).exists())
