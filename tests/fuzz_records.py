"""Fuzzes the records that a run reads, and lists every case that ends otherwise than whole or in one short line.

    python tests/fuzz_records.py 7000 --seed 0

A script, not a test. A case is a record of ours (YAML options, protocols and suites, state.json and the other files of
a checkpoint, inputs.json, metrics.jsonl, diffdistill.json, safetensors of weights and data) with bytes or values
changed at random. It must be read, or refused in one line of under 300 characters; a traceback, a longer message, or
more than ten seconds is listed with the case's number, which alone determines it. Exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from diffdistill.catalogue import describe_method
from diffdistill.commands import distill
from diffdistill.commands.cli import main as command
from diffdistill.commands.run import Run
from diffdistill.config import TrainConfig
from diffdistill.data.images import open_data
from diffdistill.errors import UserError
from diffdistill.eval import protocol
from diffdistill.eval.suites import load_suite
from diffdistill.families import StudentRecord, load_teacher, local_folder, read_record, write_record
from diffdistill.options import build, split
from diffdistill.training.checkpoint import load_newest, save_checkpoint
from diffdistill.training.inputs import check_inputs, inputs_of, write_inputs
from diffdistill.training.metrics import MetricsFile

LIMIT, LONGEST = 10, 300
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**63, 2**64, -(2**200), 1e308, float("inf"), float("nan"), 0.5, "", "x", "\n",
    "a\nb\r\n", "\x00", "\x1b[31m", "\ud800", "\u2028", "é" * 400, "x" * 100_000, "../../etc/passwd", "/dev/null",
    "." * 300, [], {}, [[]], [1], ["x"], {"a": 1}, {"": {}}, [None] * 50, {str(i): i for i in range(500)}, "none",
    "1e5", "nan", "1_000",
]  # fmt: skip
YAML_VALUES = [
    "2001-13-01", "2001-02-30 25:00:00", "!!bool x", "!!int ''", "!!float x", "!!timestamp x", "!!binary x",
    "!!set x", "!!omap [1]", "!!pairs [1]", "!!null 3", "!!python/object:os.system x", "!!merge x", "!x y",
    "9" * 5000, "0x" + "f" * 5000, "0b" + "1" * 9000, "1" + ":59" * 5000, "[" * 3000, "[" * 60 + "]" * 60,
    "{a: " * 80, "- - - -", "*a", "&a [*a]", "&a 1", "'", '"\\ud800"', '"\\0"', '"\\xff"', "|\n  a\n  b",
    ">-\n x\n\n\n y", "{[1]: 2}", "{1: 2}", "? x", ".inf", ".nan", "~", "no", "@", "%", "\t", "\x85", "x: y: z",
    "1e5", "1e400", "=", "<<", "'" + "x" * 90_000 + "'", "[" + "1, " * 9000 + "1]",
]  # fmt: skip


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, ranges cut, doubled, zeroed, or filled with noise."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        if not data:
            break
        at, length = draw.randrange(len(data)), draw.choice([1, 1, 4, 40, 400])
        kind = draw.randrange(7)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + length] = bytes(min(length, len(data) - at))
        elif kind == 4:
            data[at:at] = draw.randbytes(length)
        elif kind == 5:
            del data[at:]
        else:
            data[at:at] = draw.choice(
                [b"[" * 5000, b"{", b"}", b'"', b",", b":", b"\xef\xbb\xbf", b"\xff\xfe", b"NaN", b"1e999"]
            )
    return bytes(data)


def changed_values(text: str, draw: random.Random) -> bytes:
    """A JSON text with values replaced by odd ones, and names removed, added or changed."""
    whole = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(whole)
    for _ in range(draw.choice([1, 1, 2, 4])):
        holder, key = draw.choice(places)
        if draw.random() < 0.25 and isinstance(holder, dict):
            holder.pop(key, None)
        elif draw.random() < 0.15 and isinstance(holder, dict):
            holder[draw.choice(["", "x" * 1000, "\n", "\ud800", "step "])] = draw.choice(ODD)
        elif isinstance(holder, list) or key in holder:
            holder[key] = draw.choice(ODD)
    odd = draw.choice(ODD) if draw.random() < 0.05 else whole
    return json.dumps(odd, ensure_ascii=draw.random() < 0.9).encode("utf-8", "surrogatepass")


def changed_yaml(text: str, draw: random.Random) -> bytes:
    """Lines of a YAML mapping with odd values, doubled, or followed by aliases that multiply."""
    lines = text.splitlines()
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(len(lines))
        name = lines[at].partition(":")[0]
        kind = draw.randrange(6)
        if kind < 3:
            lines[at] = f"{name}: {draw.choice(YAML_VALUES)}"
        elif kind == 3:
            value = json.dumps(draw.choice(ODD))
            lines[at] = f"{name}: {value}"
        elif kind == 4:
            lines[at:at] = [
                draw.choice(
                    [lines[at], "<<: 1", "? [a]", "1: 2", "---", "...", "%YAML 9.9", f"{draw.choice(YAML_VALUES)}: 1"]
                )
            ]
        else:
            width, depth = draw.randrange(2, 12), draw.randrange(1, 15)
            lines.append("a0: &a0 [x]")
            lines += [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * width)}]" for i in range(depth)]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


class Records:
    """One whole record of each kind in a folder, and how each is read."""

    def __init__(self, root: Path):
        self.root = root
        self.checkpoints = root / "run" / "checkpoints"
        tensors = {"student": {"w": torch.randn(3, 3)}, "average": {"w": torch.randn(3)}}
        for step in (1, 2):
            save_checkpoint(self.checkpoints, step, tensors, {"world_size": 1, "totals": {"student/loss": (0.5, 1)}})
        self.inputs = inputs_of({"seed": 0, "batch_size": 4, "lora": None, "method": "dmd2"})
        write_inputs(root / "run", self.inputs)
        self.config = root / "config.yaml"
        self.config.write_text(
            "method: dmd2\nseed: 0\nbatch_size: 4\nstudent_lr: 1e-4\nlora: student\nlr_schedule: cosine\nsteps: 5\n"
            "normalise: true\nresolution: null\nout: run\n"
        )
        self.protocol, self.suite = root / "protocol.yaml", root / "suite.yaml"
        self.protocol.write_bytes(resources.files("diffdistill.eval").joinpath("protocols/digits.yaml").read_bytes())
        self.suite.write_bytes(resources.files("diffdistill.eval").joinpath("suites/digits.yaml").read_bytes())
        metrics = root / "run" / "metrics.jsonl"
        metrics.write_text(
            "".join(json.dumps({"step": k, "seconds_per_step": 0.1, "loss": 0.5}) + "\n" for k in range(9))
        )
        self.student = root / "student"
        self.student.mkdir()
        write_record(self.student, StudentRecord((999.0, 500.0), "renoise", "digits", method="dmd2", call={"x": 1}))
        self.teacher = Path(shutil.copytree(local_folder("digits"), root / "teacher"))
        self.weights = next(self.teacher.rglob("*.safetensors"))
        self.data = root / "data.safetensors"
        from safetensors.torch import save_file

        save_file({"images": torch.zeros(4, 8, 8, dtype=torch.uint8), "labels": torch.arange(4)}, self.data)

    def kinds(self) -> dict[str, tuple[Path, Callable[[], Any], bool]]:
        """By name: the file that is changed, how it is read, and whether it is JSON."""
        newest, run = self.checkpoints / "step-00000002", self.root / "run"
        return {
            "yaml": (self.config, lambda: command(["train", "--config", str(self.config)]), False),
            "protocol": (self.protocol, lambda: protocol.load(str(self.protocol)), False),
            "suite": (self.suite, lambda: load_suite(str(self.suite)), False),
            "state.json": (newest / "state.json", lambda: load_newest(self.checkpoints), True),
            "checkpoint": (newest / "student.safetensors", lambda: load_newest(self.checkpoints), False),
            "inputs.json": (run / "inputs.json", lambda: check_inputs(run, self.inputs, False), True),
            "metrics.jsonl": (run / "metrics.jsonl", self._metrics, False),
            "diffdistill.json": (self.student / "diffdistill.json", lambda: read_record(self.student), True),
            "data": (self.data, lambda: open_data(str(self.data)).get(torch.tensor([0])), False),
            "weights": (self.weights, lambda: load_teacher(str(self.teacher)), False),
        }

    def _metrics(self) -> None:
        assert Run(self.root / "run").metrics is not None
        MetricsFile(self.root / "run" / "metrics.jsonl", 5)


def options_only(values: dict[str, Any]) -> int:
    """In place of a training: the options are built as `diffdistill train` builds them."""
    info = describe_method(str(values.get("method", TrainConfig.method)))
    shared, own = split({**info.about.defaults, **values}, TrainConfig, info.config)
    build(TrainConfig, shared)
    build(info.config, own)
    return 0


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(read: Callable[[], Any]) -> str | None:
    """What is wrong with how a case ends; None if it is read, or refused in one short line."""
    said, started = io.StringIO(), time.monotonic()
    try:
        with at_most(LIMIT), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            read()
    except UserError as error:
        said.write(f"diffdistill: {error}\n")
    except TimeoutError:
        return f"more than {LIMIT} s"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {str(error)[:100]!r}"
    if time.monotonic() - started > LIMIT:
        return f"more than {LIMIT} s"
    messages = [line for line in said.getvalue().split("\n") if line]
    if any(len(line) >= LONGEST for line in messages):
        return f"a message of {max(map(len, messages))} characters"
    return f"a message of {len(messages)} lines" if len(messages) > 1 else None


def main() -> int:
    """Run the cases; 1 if any has a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", type=int, nargs="?", default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case, to share them between processes")
    parser.add_argument("--only", type=int, help="run this case alone, and show its content")
    args = parser.parse_args()
    distill.run = options_only
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        kinds = Records(Path(folder)).kinds()
        whole = {name: path.read_bytes() for name, (path, _, _) in kinds.items()}
        assert not any(fault(read) for _, read, _ in kinds.values()), "records as they were written are read"
        for path, content in zip((path for path, _, _ in kinds.values()), whole.values(), strict=True):
            path.write_bytes(content)
        for case in range(args.first, args.first + args.cases) if args.only is None else [args.only]:
            draw = random.Random(f"{args.seed} {case}")
            name = draw.choice([*kinds, "yaml", "yaml", "state.json", "diffdistill.json"])
            path, read, is_json = kinds[name]
            if is_json and draw.random() < 0.6:
                content = changed_values(whole[name].decode(), draw)
            elif name in ("yaml", "protocol", "suite") and draw.random() < 0.7:
                content = changed_yaml(whole[name].decode(), draw)
            else:
                content = changed_bytes(whole[name], draw)
            path.write_bytes(content)
            if args.only is not None:
                print(content[:2000])
            wrong = fault(read)
            path.write_bytes(whole[name])
            if wrong:
                faults[name] += 1
                print(f"case {case}, {name}: {wrong}", flush=True)
    print(f"{args.cases} cases, seed {args.seed}: {sum(faults.values())} faults {dict(faults) or ''}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
