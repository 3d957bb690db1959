"""Kills an evaluation ten times at random, resumes it, and compares with an uninterrupted one and with two processes.

    python tests/killed_ten_times.py MODEL --reference mnist.npz#test --protocol mnist --steps 2

A script, not a test: 10,000 images take minutes. Every shard of measurements must be the same bytes, and the results.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS = 10


def digest(out: Path) -> tuple[str, str]:
    sha = hashlib.sha256()
    for path in sorted((out / "measured").glob("*.safetensors")):
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:16], json.dumps(json.loads((out / "results.json").read_text())["rows"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    args, more = parser.parse_known_args()
    draw, kills = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["DIFFDISTILL_CACHE"] = str(root / "cache")

        def command(out: str) -> list[str]:
            return ["-m", "diffdistill.commands.cli", "eval", args.model, *more, "--out", str(root / out)]

        started = time.monotonic()
        subprocess.run([sys.executable, *command("whole")], check=True)
        seconds = time.monotonic() - started
        for _ in range(KILLS):
            child = subprocess.Popen(
                [sys.executable, *command("killed")], stdout=subprocess.DEVNULL, start_new_session=True
            )
            time.sleep(draw.uniform(0.25, 1) * max(12, seconds / 6))
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                kills += 1
            child.wait()
            made = len(list((root / "killed" / "measured").glob("*.safetensors")))
            print(f"killed {kills} times, {made} shards are there", flush=True)
        subprocess.run([sys.executable, *command("killed")], check=True, stdout=subprocess.DEVNULL)
        two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command("both")]
        subprocess.run(two, check=True, stdout=subprocess.DEVNULL)
        whole, killed, both = (digest(root / name) for name in ("whole", "killed", "both"))
    print(f"{kills} kills: {killed == whole}; two processes: {both == whole} ({whole[0]}, {killed[0]}, {both[0]})")
    return 0 if killed == both == whole and kills == KILLS else 1


if __name__ == "__main__":
    sys.exit(main())
