"""What a run reads: fingerprints of it, kept in the run folder, and what is another when the run goes on.

inputs.json holds the resolved options, where the teacher is, and a fingerprint each of the teacher's weights, its
scheduler, the data, the prompts, the pairs and the method's file. A resumed run that reads anything else would be
neither the old run nor a new one, so it is refused unless the user allows the change.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Container, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from diffdistill.config import EVERYTHING, SAVING
from diffdistill.config import INPUTS as FILE
from diffdistill.data import encoded, pairs
from diffdistill.data.examples import Examples, Preferred, TensorExamples, TwoViews
from diffdistill.data.shards import Kind, bytes_of, read_index
from diffdistill.errors import UserError, shown
from diffdistill.files import atomic_write, json_object
from diffdistill.options import nearest
from diffdistill.players.teacher import Teacher

FORMAT = 1
PROCESSES = "processes"
"""What their number is called in --allow-change."""

Allowed = bool | Collection[str]
"""What may be another than when the run began: all, nothing, or what is called so, `EVERYTHING` among it."""

MAY_CHANGE = {
    "steps",
    "device",
    "threads",
    "accumulate",
    "offload",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_hours",
    "skip_nonfinite",
    "skip_unreadable",
    "figures_every",
    "judge_every",
    "export_best",
    "tracker",
    *SAVING,
}
"""Options that may be others when a run goes on; `accumulate` changes the last bits."""

# Where they lie does not matter.
_BY_CONTENT = {"out", "teacher", "student", "data", "pairs", "prompts", "losers", "teacher_data", "start"}


def inputs_of(
    options: Mapping[str, Any],
    *,
    data: Examples | None = None,
    teacher: Teacher | None = None,
    prompts: Examples | None = None,
    noise_pairs: Examples | None = None,
    method: object = None,
    reward: object = None,
) -> dict[str, Any]:
    """What inputs.json holds. `method` and `reward` are a path, a module, a class or a function.

    Of a class or function its own source counts. The whole of the teacher's weights is read, at about 1 GB a second.
    Modules that such a file imports are not.
    """
    kept = {name: value for name, value in options.items() if name not in MAY_CHANGE | _BY_CONTENT}
    fingerprints = {
        "teacher's weights": None if teacher is None else pairs.weights_fingerprint(teacher),
        "teacher's scheduler": None if teacher is None else _scheduler(teacher),
        "data": _examples(data),
        "prompts": _examples(prompts),
        "pairs": _examples(noise_pairs),
        "method": _source(method),
        "reward's function": _source(reward),
    }
    if teacher is not None and teacher.small is not None:
        fingerprints["student's weights"] = pairs.weights_fingerprint(replace(teacher, denoiser=teacher.small))
    source = None if teacher is None else teacher.source  # where it is, which may change
    whole = {"format": FORMAT, "teacher": source, "options": json.loads(json.dumps(kept))}
    return whole | {"fingerprints": fingerprints}


def allows(allow_change: Allowed, name: str) -> bool:
    """Whether what is called so may be another than when the run began."""
    if isinstance(allow_change, bool):
        return allow_change
    return EVERYTHING in allow_change or plain_name(name) in map(plain_name, allow_change)


def plain_name(name: str) -> str:
    """The name of an option or fingerprint as --allow-change takes it: teacher-weights, guidance-scale."""
    return name.replace("'s ", "-").replace("_", "-").lower()


def changes(
    run: Path, now: Mapping[str, Any], field: str = "resume", read: Container[str] | None = None
) -> dict[str, str]:
    """Name -> in words what differs from what the run began with.

    UserError, of `field`, where its record cannot be read.

    `read` names the fingerprints that count; None: all.
    """
    path = run / FILE
    hint = f"so that what the run began with is not known; go on with --allow-change {FILE}"
    if not path.is_file():
        raise UserError(f"{field}: {shown(str(run))} has no {FILE}, {hint}")
    try:
        before = json_object(path)
        parts = [before.get("options"), before.get("fingerprints")]
        if before.get("format") != FORMAT or not all(isinstance(part, dict) for part in parts):
            raise ValueError("it has no options and fingerprints")
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: {shown(str(path))} is damaged ({error}), {hint}") from None
    differ = {}
    for name, value in before["options"].items():  # others are of a later version, and had one value only
        if name in now["options"] and now["options"][name] != value:
            differ[name] = f"{name} ({shown(value)}, now {shown(now['options'][name])})"
    for name, value in now["fingerprints"].items():
        if before["fingerprints"].get(name) != value and (read is None or name in read):
            was = before["fingerprints"].get(name)
            differ[name] = f"{name} ({_short(was)}, now {_short(value)})"
    return differ


def check_inputs(
    run: Path, now: Mapping[str, Any], allow_change: Allowed, field: str = "resume", read: Container[str] | None = None
) -> str | None:
    """UserError of `field`, which names it, if the run reads anything else than when it began.

    `read` names the fingerprints that count; None: all. Of what `allow_change` allows there is the text of a note
    instead; None if all is the same. UserError for a name in `allow_change` that nothing has.
    """
    known = {plain_name(name) for name in (*now["options"], *now["fingerprints"], *MAY_CHANGE, *_BY_CONTENT)}
    for name in () if isinstance(allow_change, bool) or EVERYTHING in allow_change else allow_change:
        if plain_name(name) not in known | {FILE, PROCESSES}:
            raise UserError(f"allow_change: nothing here is called {name!r}; {nearest(name, sorted(known))}")
    try:
        differ = changes(run, now, field, read)
    except UserError as error:
        if not allows(allow_change, FILE):
            raise
        return f"note: {error}"
    refused = [name for name in differ if not allows(allow_change, name)]
    if refused:
        raise changed(field, _listed([differ[name] for name in refused]), *refused)
    return f"note: changed since the run began: {_listed(list(differ.values()))}" if differ else None


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def changed(field: str, what: str, *names: str) -> UserError:
    """The refusal to go on where `what`, which is called so, is another than when the run began."""
    flags = (
        " ".join(f"--allow-change {plain_name(name)}" for name in names[:3]) if len(names) <= 3 else "--allow-change"
    )
    return UserError(f"{field}: changed since the run began: {what}; undo that, or go on with {flags}")


def write_inputs(run: Path, now: Mapping[str, Any]) -> None:
    """Write inputs.json, before config.yaml: a folder with a config.yaml is a run."""
    atomic_write(run / FILE, json.dumps(now, indent=2) + "\n")


def _short(fingerprint: Any) -> str:
    return "none" if fingerprint is None else shown(fingerprint).strip("'")


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _scheduler(teacher: Teacher) -> str:
    return _digest(json.dumps(pairs.described_schedule(teacher), default=str).encode())


def _examples(examples: Examples | None) -> str | None:
    """How many there are, and a fingerprint of their content where there is a way to tell it."""
    if examples is None:
        return None
    if isinstance(examples, Preferred):
        return f"{_examples(examples.winners)} over {_examples(examples.losers)}"
    if isinstance(examples, TwoViews):
        return f"{_examples(examples.student)} beside {_examples(examples.teacher)}"
    if isinstance(examples, encoded.Encoded | pairs.Pairs):
        content = _shards(encoded.KIND if isinstance(examples, encoded.Encoded) else pairs.KIND, examples.folder)
    elif isinstance(examples, TensorExamples):
        columns = sorted(examples.cond.items())
        content = _digest(bytes_of(examples.x0), *(part for k, v in columns for part in (k.encode(), bytes_of(v))))
    else:
        content = str(getattr(examples, "fingerprint", type(examples).__name__))
    return f"{len(examples)} of {content}"


def _shards(kind: Kind, folder: Path) -> str:
    index = read_index(kind, folder)
    contents = {name: value for name, value in index.items() if name in ("settings", "shards", "null")}
    return _digest(json.dumps(contents, sort_keys=True).encode())


def _source(method: object) -> str | None:
    if isinstance(method, ModuleType):
        method = getattr(method, "__file__", None)
    if isinstance(method, str | Path):
        return _digest(Path(method).read_bytes())
    try:
        return None if method is None else _digest(inspect.getsource(method).encode())  # type: ignore[arg-type]
    except (OSError, TypeError):  # typed into an interpreter, or made by a function
        return None
