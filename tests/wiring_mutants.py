"""Mistakes in the wiring, one at a time, each of which the tests named beside it must see.

    python tests/wiring_mutants.py            apply each, run its tests, list those that nothing saw
    python tests/wiring_mutants.py --list     names and files
    python tests/wiring_mutants.py --only "adversary: *"

A mutant is a file, a text that stands in it exactly once, and what is put in its place: which noise, time, labels,
weight, sample or level reaches a loss, who is trained and at what rate, what an exported scheduler is told. They stand
in `tests/mutants/`. The tree itself is never touched: a copy is made, in the layout of an installed package. torch and
diffusers are imported once, and each mutant is tested in a fork.

Exits with 1 if a mutant survives, and with 2 if one does not fit the tree any more or cannot be imported.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import fnmatch
import importlib
import os
import py_compile
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTS = (
    "scaffold",
    "methods",
    "matching",
    "held",
    "own_networks",
    "pixels",
    "restoration",
    "joined",
    "trajectories",
    "core",
    "training",
    "pipelines",
    "players",
    "data",
)
MAPPED = ("methods", "pipelines", "eval")  # sub-packages of diffdistill that stand beside it in a checkout
SECONDS = 150  # after which a mutant that hangs counts as seen


@dataclass(frozen=True)
class Mutant:
    """One mistake."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def mutants() -> list[Mutant]:
    """All of them, in the order of the lists: `{"FILE | TEST TEST": [(name, old, new), ..]}` in each."""
    sys.path.insert(0, str(ROOT))
    found = []
    for name in LISTS:
        table: Mapping[str, Sequence[tuple[str, str, str]]] = importlib.import_module(f"tests.mutants.{name}").MUTANTS
        for place, rows in table.items():
            file, tests = (part.strip() for part in place.split("|"))
            short = Path(file).stem
            found += [Mutant(f"{short}: {label}", file, old, new, tuple(tests.split())) for label, old, new in rows]
    return found


def misfits(all_of_them: Sequence[Mutant]) -> list[str]:
    """What is wrong with the lists: texts that do not stand in their file exactly once, names that come twice."""
    wrong, names = [], set()
    for mutant in all_of_them:
        count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1 or mutant.old == mutant.new:
            wrong.append(f"{mutant.name}: its text stands {count} times in {mutant.file}")
        if mutant.name in names:
            wrong.append(f"{mutant.name}: the name comes twice")
        names.add(mutant.name)
        wrong += [f"{mutant.name}: there is no {test}" for test in mutant.tests if not (ROOT / test).is_file()]
    return wrong


def copied(folder: Path) -> None:
    """The package as it is installed, and the tests, with bytecode that is checked against the source."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "diffdistill", folder / "diffdistill", ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    for name in MAPPED:
        shutil.copytree(ROOT / name, folder / "diffdistill" / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    checked = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(folder / "diffdistill", quiet=2, invalidation_mode=checked)


def place(folder: Path, file: str) -> Path:
    """Where a file of the checkout is in the copy."""
    return folder / "diffdistill" / file if file.split("/")[0] in MAPPED else folder / file


@contextlib.contextmanager
def applied(folder: Path, mutant: Mutant | None) -> Iterator[None]:
    """The copy has the mistake inside the block."""
    if mutant is None:
        yield
        return
    path = place(folder, mutant.file)
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def import_what_is_heavy() -> None:
    """What every fork would import again; nothing of this package."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="offline")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("torch", "diffusers", "accelerate", "peft", "pytest", "safetensors.torch", "yaml", "tqdm"):
        importlib.import_module(name)
    diffusers = sys.modules["diffusers"]
    for name in ("UNet2DModel", "DDPMPipeline", "ConsistencyModelPipeline", "EDMEulerScheduler", "LCMScheduler"):
        getattr(diffusers, name)  # which are imported when they are first asked for


def tested(folder: Path, tests: Sequence[str], log: Path) -> int:
    """pytest's exit code in a fork whose package is the copy, or 1 where it hangs; its output goes to `log`."""
    process = os.fork()
    if process == 0:
        code = 3
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(folder)
            sys.dont_write_bytecode = True
            sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
            for name in [name for name in sys.modules if name.split(".")[0] in ("diffdistill", "tests")]:
                del sys.modules[name]
            import pytest

            plain = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "-o", "addopts="]
            code = int(pytest.main([*plain, "--basetemp", str(folder / "made"), *tests]))
            sys.stdout.flush()
        finally:
            os._exit(code)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return 1


def judged(chosen: Sequence[Mutant], folder: Path) -> int:
    """Run all of them; the exit code of the script."""
    log = folder / "log.txt"
    for tests in dict.fromkeys(mutant.tests for mutant in chosen):
        if tested(folder, tests, log) != 0:
            print(log.read_text(encoding="utf-8"), f"without a mistake {' '.join(tests)} must pass", sep="\n")
            return 2
    survivors, broken, began = [], [], time.monotonic()
    for number, mutant in enumerate(chosen, 1):
        with applied(folder, mutant):
            code = tested(folder, mutant.tests, log)
        verdict = {0: "SURVIVES", 1: "seen"}.get(code, "cannot be run")
        survivors += [mutant] if code == 0 else []
        broken += [mutant] if code not in (0, 1) else []
        print(f"{number:4}/{len(chosen)}  {verdict:13}  {mutant.name}", flush=True)
        if code not in (0, 1):
            print(log.read_text(encoding="utf-8")[-2000:])
    seconds = time.monotonic() - began
    print(f"{len(chosen)} mutants in {seconds:.0f} s: {len(survivors)} survive, {len(broken)} cannot be run")
    for mutant in survivors:
        print(f"survives: {mutant.name} ({mutant.file}): {mutant.old!r} -> {mutant.new!r}")
    return 2 if broken else int(bool(survivors))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    parser.add_argument("--only", metavar="NAME", help="the mutants of that name, which may be a pattern")
    options = parser.parse_args()
    all_of_them = mutants()
    if wrong := misfits(all_of_them):
        print("\n".join(wrong))
        return 2
    chosen = [m for m in all_of_them if options.only is None or fnmatch.fnmatchcase(m.name, options.only)]
    if options.list or not chosen:
        print("\n".join(f"{mutant.name}  ({mutant.file})" for mutant in chosen) or "no mutant has that name")
        return 0 if chosen else 2
    import_what_is_heavy()
    with tempfile.TemporaryDirectory() as made:
        copied(Path(made))
        return judged(chosen, Path(made))


if __name__ == "__main__":
    sys.exit(main())
