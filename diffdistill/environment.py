"""Versions, machine and commit, for run folders and published results."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdistill.errors import UserError

if TYPE_CHECKING:
    import torch


def environment() -> dict[str, Any]:
    """What a result depends on besides its options."""
    import torch

    packages = ("diffdistill", "torch", "diffusers", "accelerate", "peft", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
    }


def use_machine(device: str, threads: int = 0) -> torch.device:
    """The torch device of 'auto', 'cpu' or 'cuda', after setting torch's number of threads (0: as it is).

    Raises UserError for a GPU that is not there. 'auto' is a CUDA GPU or the CPU: Apple's MPS has no float64, in which
    times are kept.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' was asked for and torch sees no GPU; use --device cpu or auto")
    return torch.device("cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda")


def process_count() -> int:
    """How many processes a launcher has started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether this process is one of several that work together, as their launcher says to torch."""
    return process_count() > 1 and "LOCAL_RANK" in os.environ


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all that a launcher has started; also True without a launcher."""
    return os.environ.get("RANK", "0") == "0"


_LAUNCHERS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_", "RANK", "WORLD_SIZE")


def alone() -> dict[str, str]:
    """The environment of a child process that is none of those a launcher started; it sees this one's GPU alone."""
    import torch

    own = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    if launched() and torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpu = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        own["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
    return own


def peak_memory_mb() -> float:
    """The most memory this process has held: of the GPU if torch uses one, else resident."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # not getrusage, where a child process inherits its parent's
            return int(line.split()[1]) / 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else kB
    return most / (2**20 if sys.platform == "darwin" else 1024)


def commit() -> str | None:
    """The commit of this package's checkout, with '+' when it has local changes; None outside of one."""

    def git(*args: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # A package in site-packages may lie inside somebody else's repository.
        if not git("ls-files", "environment.py"):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
