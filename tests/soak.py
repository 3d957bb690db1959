"""A long training of a tiny network with checkpoints, judging and kills: do memory and the number of files stay?

    python -m tests.soak --steps 20000 --kills 10

A script, not a test. The training is killed by SIGKILL at random steps and resumed. While it runs, its resident memory
(/proc) and the files of its folder are noted, but for the sample grids, of which there is one each time. Printed is, of
each process that took 2,000 steps or more, the slope of memory over steps after its first fifth, with its standard
error from blocks of the trace. The exit code is 1 if a slope is above 0.1 MB in 1,000 steps by more than twice that
error, or if the files became more than 20 more than after the first kill.
"""

import argparse
import importlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.killed_at_random import ended, finished, last_step, prepare, started

FLAT = 0.1  # MB in 1,000 steps, which is 2 MB in 20,000
LONG = 2000
BLOCKS = 8


def resident_mb(process: int) -> float:
    """What a process holds in memory now."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def files_of(run: Path) -> int:
    """Files of a run folder that is not being written to, without the sample grids."""
    return sum(path.is_file() for path in run.rglob("*") if "samples" not in path.parts)


def slope(trace: list[tuple[int, float]]) -> tuple[float, float]:
    """MB in 1,000 steps and its standard error: from the slopes of blocks between their means."""
    late = trace[len(trace) // 5 :]
    size = len(late) // BLOCKS
    means = [
        (statistics.fmean(s for s, _ in part), statistics.fmean(mb for _, mb in part))
        for part in (late[k * size : (k + 1) * size] for k in range(BLOCKS))
    ]
    fit = statistics.linear_regression(*zip(*means, strict=True))
    left = [mb - fit.intercept - fit.slope * s for s, mb in means]
    spread = statistics.pstdev([s for s, _ in means]) * BLOCKS**0.5
    return 1000 * fit.slope, 1000 * (sum(r * r for r in left) / (BLOCKS - 2)) ** 0.5 / spread


def watched(argv: list[str], run: Path, until: int | None) -> list[tuple[int, float]]:
    """(step, MB) while a training runs, to its end or until it is killed after a step; SystemExit where it fails."""
    log = run.parent / "log.txt"
    process, trace = started(argv, log), []
    while (code := ended(process)) is None:
        step = last_step(run)
        if until is not None and step >= until:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return trace
        if step >= 0 and (not trace or step > trace[-1][0]):
            trace.append((step, resident_mb(process)))
        time.sleep(0.05)
    if code:
        raise SystemExit(f"{' '.join(argv)} ended with {code}\n{log.read_text()[-2000:]}")
    return trace


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="dmd2")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    for name in ("distill", "teacher", "shards", "in_training"):
        importlib.import_module(f"diffdistill.commands.{name}")
    draw, grown, files = random.Random(args.seed), False, []
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        os.environ["DIFFDISTILL_CACHE"] = str(made / "cache")
        prepare(made, made / "log.txt")
        run, part = made / "run", max(100, args.steps // 40)
        argv = ["train", "--method", args.method, "--preset", "digits", "--teacher", str(made / "pixels" / "teacher")]
        argv += ["--data", "digits", "--batch-size", "2", "--steps", str(args.steps), "--log-every", "20"]
        argv += ["--checkpoint-every", str(part), "--sample-every", str(2 * part), "--judge-every", str(2 * part)]
        argv += ["--judge-count", "100", "--threads", "1", "--device", "cpu", "--out", str(run)]
        half = args.steps // 2  # one process goes the second half alone
        kills = [*sorted(draw.sample(range(3 * part, half), args.kills)), None]
        for until in kills:
            trace = watched(["train", "--resume", str(run)] if files else argv, run, until)
            files.append(files_of(run))
            line = f"steps {trace[0][0]} to {trace[-1][0]}: {trace[-1][1]:.1f} MB, {files[-1]} files"
            if trace[-1][0] - trace[0][0] >= LONG:
                rise, error = slope(trace)
                grown = grown or rise - 2 * error > FLAT
                line += f", {rise:+.4f} MB in 1,000 steps (standard error {error:.4f})"
            print(line, flush=True)
        finished(["train", "--resume", str(run)], made / "log.txt")
        files.append(files_of(run))
    # What a kill left half-written is removed by the next process; the student's own files come at the end.
    print(f"{args.steps} steps, {args.kills} kills: {files[0]} files after the first kill, {files[-1]} at the end")
    return int(grown or max(files[1:-1], default=0) > files[0] + 20)


if __name__ == "__main__":
    sys.exit(main())
