"""Kills trainings at random moments, resumes them, and compares them bit for bit with trainings in one go.

    python tests/killed_at_random.py --kills 5
    python tests/killed_at_random.py --methods dmd2,progressive --kills 3 --judge-every 4

A script, not a test. Of every method a short training on a tiny teacher is run in one go, and once more, killed by
SIGKILL so many times: while it starts, at a step, or inside a checkpoint. Compared are all checkpoints (weights,
optimizer states, averages, stages, sums of the log), the student, metrics.jsonl without times and memory, and
looks.jsonl. The exit code is 0 if no bit differs.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

UNSEEN = {"seconds_per_step", "peak_memory_mb"}  # of the machine
SHORT = {"stage_steps": 5, "guidance_steps": 5, "anneal_steps": 10, "ramp_steps": 10, "tangent_warmup": 4}
TEXT = ("dmd2:shapes", "progressive:shapes")
KINDS = ("start", "step", "step", "checkpoint", "checkpoint")
SECONDS = 600  # after which a training counts as hanging


def started(argv: Sequence[str], log: Path) -> int:
    """The process of a fork that runs the command line, with everything heavy imported already."""
    process = os.fork()
    if process:
        with suppress(OSError):  # both set it, whoever comes first, since it may be killed before it runs
            os.setpgid(process, process)
        return process
    code = 3
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from diffdistill.commands.cli import main

        code = main(argv)
    finally:
        os._exit(code)


def ended(process: int) -> int | None:
    """The exit code of a process that has ended; None as long as it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def finished(argv: Sequence[str], log: Path) -> None:
    """Run the command line to its end; SystemExit where it fails."""
    process, until = started(argv, log), time.monotonic() + SECONDS
    while (code := ended(process)) is None and time.monotonic() < until:
        time.sleep(0.01)
    if code != 0:
        raise SystemExit(f"{' '.join(argv)} ended with {code}\n{log.read_text()[-2000:]}")


def writes_a_checkpoint(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(name.startswith(".step-") for name in os.listdir(folder))


def last_step(run: Path) -> int:
    """The step of the last line of metrics.jsonl; -1 where there is none."""
    try:
        return int(re.findall(rb'\{"step": (\d+)', (run / "metrics.jsonl").read_bytes())[-1])
    except (OSError, IndexError):
        return -1


def killed(process: int, run: Path, kind: str, step: int, draw: random.Random) -> bool:
    """Kill a training at a moment of that kind; False if it had ended before."""
    until = time.monotonic() + (draw.uniform(0, 3) if kind == "start" else SECONDS)
    while time.monotonic() < until:
        if ended(process) is not None:
            return False
        if kind != "start" and last_step(run) >= step and (kind == "step" or writes_a_checkpoint(run)):
            time.sleep(draw.uniform(0, 0.01 if kind == "checkpoint" else 0.1))
            break
        time.sleep(0.0005)
    os.killpg(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def content(run: Path) -> dict[str, str]:
    """A digest of each file that is compared, by its path, and of each line of the logs."""
    parts = {}
    for path in sorted([*(run / "checkpoints").rglob("*"), *(run / "student").rglob("*.safetensors")]):
        if path.is_file():
            parts[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("metrics.jsonl", "looks.jsonl"):
        for k, line in enumerate((run / name).read_text().splitlines()):
            values = {key: value for key, value in json.loads(line).items() if key not in UNSEEN}
            parts[f"{name}:{k + 1}"] = json.dumps(values)
    return parts


def options_of(name: str, made: Path, args: argparse.Namespace) -> list[str]:
    """The command line of a training by METHOD or METHOD:PRESET, but for --out."""
    from diffdistill.catalogue import describe_method

    method, _, preset = name.partition(":")
    info, text = describe_method(method), preset.startswith("shapes")
    argv = ["train", "--method", method, "--preset", preset or "digits", "--steps", str(args.steps)]
    argv += ["--teacher", str(made / ("text" if text else "pixels") / "teacher")]
    argv += ["--prompts", str(made / "prompts")] if text else ["--data", "digits"]
    argv += ["--pairs", str(made / "pairs")] if method == "dmd" else []
    own: dict[str, Any] = {f: v for f, v in SHORT.items() if f in info.config.__dataclass_fields__}
    fit = {"batch_size": 4, "checkpoint_every": 2, "log_every": 1, "figures_every": 3, "sample_every": 0, "ema": 0.9}
    judging = {"judge_every": args.judge_every, "judge_count": 100}
    for name, value in {**own, **fit, **judging, "threads": 1, "device": "cpu"}.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


def prepare(made: Path, log: Path) -> None:
    """Tiny teachers of pixels and of text, encoded prompts and pairs."""
    short = ["--layers", "1", "--steps", "2", "--batch-size", "4", "--sample-every", "0", "--device", "cpu"]
    pixels = ["--data", "digits", "--widths", "8,16", "--attention", "1"]
    finished(["teacher", *pixels, *short, "--out", str(made / "pixels")], log)
    text = ["--architecture", "stable-diffusion", "--data", "shapes", "--attention", "0,1"]
    text += ["--vae-steps", "2", "--vae-batch-size", "4"]
    finished(["teacher", *text, *short, "--out", str(made / "text")], log)
    teacher = {name: str(made / name / "teacher") for name in ("pixels", "text")}
    finished(["encode", "--teacher", teacher["text"], "--data", "shapes:64", "--out", str(made / "prompts")], log)
    pairs = ["--count", "64", "--sampling-steps", "2"]
    finished(["pairs", "--teacher", teacher["pixels"], *pairs, "--out", str(made / "pairs")], log)


def round_of_kills(argv: Sequence[str], run: Path, at: Sequence[int], draw: random.Random) -> list[bool]:
    """Train to the end, killed at these steps or before; of each kill, whether it was inside a checkpoint."""
    log, kills = run.parent / "log.txt", []
    for step in at:
        resumed = (run / "config.yaml").is_file()
        process = started(["train", "--resume", str(run)] if resumed else [*argv, "--out", str(run)], log)
        if not killed(process, run, draw.choice(KINDS), step, draw):
            break
        kills.append(writes_a_checkpoint(run))
    if not (run / "config.yaml").is_file():
        finished([*argv, "--out", str(run)], log)
    finished(["train", "--resume", str(run)], log)
    return kills


def compared(name: str, made: Path, args: argparse.Namespace, draw: random.Random) -> tuple[int, int]:
    """(kills, differing parts) of a method; a line says how it went."""
    argv, folder = options_of(name, made, args), made / "runs" / name.replace(":", "-")
    folder.mkdir(parents=True)
    finished([*argv, "--out", str(folder / "whole")], folder / "log.txt")
    one, kills, differing, rounds = content(folder / "whole"), [], 0, 0
    while len(kills) < args.kills and rounds < 2 * args.kills:
        run, rounds = folder / f"killed-{rounds}", rounds + 1
        at = sorted(draw.choices(range(args.steps - 1), k=args.kills - len(kills)))
        kills += round_of_kills(argv, run, at, draw)
        two = content(run)
        differ = [part for part in one | two if one.get(part) != two.get(part)]
        differing += len(differ)
        for part in differ[:5]:
            print(f"  {part}\n    {one.get(part)}\n    {two.get(part)}")
    counts = f"{len(kills)} kills, {sum(kills)} inside a checkpoint, in {rounds} trainings of {len(one)} parts"
    print(f"{name:22} {counts}: {differing} differ", flush=True)
    return len(kills), differing


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="METHOD or METHOD:PRESET, with commas; default: all")
    parser.add_argument("--kills", type=int, default=5, help="of each method")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--judge-every", type=int, default=0, help="steps between two judgings, which are compared too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    for name in ("distill", "teacher", "shards", "in_training"):
        importlib.import_module(f"diffdistill.commands.{name}")
    from diffdistill.catalogue import method_names

    names = args.methods.split(",") if args.methods else [*method_names(), *TEXT]
    draw, kills, differing = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as made:
        os.environ["DIFFDISTILL_CACHE"] = str(Path(made) / "cache")
        prepare(Path(made), Path(made) / "log.txt")
        for name in names:
            one, other = compared(name, Path(made), args, draw)
            kills, differing = kills + one, differing + other
    print(f"{kills} kills of {len(names)} methods: {differing} parts differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
