"""Whether two checkouts train alike: every preset that can run here, 20 steps, every logged value to the bit.

    python tests/same_bits.py record OLD/.venv/bin/diffdistill old.json
    python tests/same_bits.py record .venv/bin/diffdistill new.json
    python tests/same_bits.py compare old.json new.json

A preset runs here on the embedded digits teacher, or, where it needs prompts, on a tiny text-to-image teacher that
is made first. Stages and annealings are cut to five steps, so that all of them are passed; batches are of eight.
What a checkout refuses is recorded by its error line.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SHORT = {"stage-steps": 5, "guidance-steps": 5, "anneal-steps": 10, "ramp-steps": 10}
TEXT = {"shapes", "shapes-4step"}
UNSEEN = {"seconds_per_step", "peak_memory_mb"}  # of the machine
RENAMED = {"lora_teacher/": "fake_score/"}  # SwiftBrush's second player, whose values are compared all the same
# Whatever a preset does not say; some presets want a package (lpips) that is not installed here.
VARIANTS: dict[str, list[str]] = {
    "dmd2:digits gan": ["--data", "digits", "--gan-weight", "0.01", "--update-ratio", "2"],
    "dmd2:digits epsilon": ["--fake-score-loss", "epsilon", "--guidance-scale", "2", "--normalise", "false"],
    "consistency:digits training": ["--mode", "training"],
    "consistency:digits easy": ["--mode", "easy"],
    "multistep_consistency:digits guided": ["--guidance-scale", "2", "--eta", "0.5"],
    "sid:digits guided": ["--guidance-scale", "2", "--fake-score-guidance", "1.5"],
    "sim:digits l2": ["--distance", "l2", "--weight", "score"],
    "dmd:digits huber": ["--distance", "huber", "--guidance-scale", "2"],
    "guided:digits fixed": ["--guidance-min", "2", "--guidance-max", "2", "--guidance-scale", "2"],
    "progressive:digits guided": ["--guidance-scale", "2"],
    "lora_guidance:digits trajectories": ["--trajectories", "true"],
    "diff_instruct:digits ratio": ["--update-ratio", "3", "--guidance-scale", "2"],
}


def run(binary: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary, *arguments], capture_output=True, text=True)


def presets(binary: str) -> list[str]:
    """method:preset of every method, as `diffdistill methods NAME` prints them."""
    names = re.findall(r"^(\w+) +", run(binary, "methods").stdout, re.MULTILINE)
    listed = []
    for name in names:
        text = run(binary, "methods", name).stdout
        block = text.partition("\npresets:\n")[2]
        listed += [f"{name}:{preset}" for preset in re.findall(r"^  ([\w-]+):? ", block, re.MULTILINE)]
    return listed


def record(binary: str) -> dict[str, object]:
    rows: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run(binary, "pairs", "--count", "64", "--sampling-steps", "4", "--out", str(root / "pairs"))
        run(
            binary,
            "pairs",
            "--count",
            "64",
            "--sampling-steps",
            "4",
            "--guidance-scale",
            "2",
            "--out",
            str(root / "p2"),
        )
        made = run(binary, "teacher", "--architecture", "stable-diffusion", "--data", "shapes", "--layers", "1",
                   "--attention", "0,1", "--vae-steps", "3", "--steps", "3", "--batch-size", "4",
                   "--vae-batch-size", "4", "--sample-every", "0", "--out", str(root / "text"))  # fmt: skip
        text = root / "text" / "teacher"
        run(binary, "encode", "--teacher", str(text), "--data", "shapes:64", "--out", str(root / "prompts"))
        print(made.stderr[-300:], file=sys.stderr)
        for name in [*presets(binary), *VARIANTS]:
            preset, _, variant = name.partition(" ")
            method, preset = preset.split(":")
            more = list(VARIANTS.get(name, []))
            if preset in TEXT:
                more += ["--teacher", str(text), "--prompts", str(root / "prompts")]
            else:
                more += ["--teacher", "digits", *([] if "--data" in more else ["--data", "digits"])]
            if method == "dmd":
                more += ["--pairs", str(root / "pairs")]
                more += [] if "--distance" in more else ["--distance", "l2"]
            elif method == "consistency" and not variant and preset != "digits":
                more += ["--distance", "huber"]
            options = run(binary, "methods", method).stdout
            for option, value in SHORT.items():
                more += [f"--{option}", str(value)] if f"--{option}" in options else []
            out = root / name.replace(":", "-").replace(" ", "-")
            done = run(binary, "train", "--method", method, "--preset", preset, *more, "--steps", "20",
                       "--batch-size", "8", "--log-every", "1", "--sample-every", "0", "--checkpoint-every", "0",
                       "--threads", "1", "--device", "cpu", "--out", str(out))  # fmt: skip
            if done.returncode:
                rows[name] = done.stderr.strip().splitlines()[-1:]
            else:
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                rows[name] = [{_renamed(k): v for k, v in line.items() if k not in UNSEEN} for line in lines]
            print(name, len(rows[name]), rows[name][-1], file=sys.stderr, flush=True)  # type: ignore
    return rows


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def compare(old: dict[str, object], new: dict[str, object]) -> int:
    differing = 0
    for name in [*old, *(n for n in new if n not in old)]:
        a, b = old.get(name), new.get(name)
        trained = isinstance(a, list) and a and isinstance(a[0], dict)
        if trained and isinstance(b, list) and len(a) == len(b) and isinstance(b[0], dict):
            # What only the new one logs is left out.
            b = [{k: v for k, v in line.items() if k in before} for line, before in zip(b, a, strict=True)]
        same = a == b
        verdict = ("the same bits, 20 steps" if trained else f"both refuse: {a}") if same else f"DIFFERS: {a} | {b}"
        print(f"{name}: {verdict}"[:400])
        differing += not same
    return differing


if __name__ == "__main__":
    if sys.argv[1] == "record":
        Path(sys.argv[3]).write_text(json.dumps(record(sys.argv[2]), indent=1) + "\n")
    else:
        sys.exit(bool(compare(*(json.loads(Path(path).read_text()) for path in sys.argv[2:4]))))
