"""Two processes as torchrun starts them, but without it.

It ends the others a tenth of a second after the first has failed, often before they can say why they did.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def two_processes(*argv: str, output: int = subprocess.DEVNULL, **environment: str) -> list["subprocess.Popen[str]"]:
    """Python with these arguments, twice; `output` is what becomes of what they print."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *argv],
            env={**os.environ, **group, **environment, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
