"""Somebody without diffdistill, who runs a script with stock diffusers.

One process has imported diffusers, which takes seconds, and forks for every script: nothing of one reaches another.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import json, os, sys, traceback

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffdistill":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

def run(job):
    os.chdir(job["cwd"])
    for number, name in enumerate((os.devnull, job["stdout"], job["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.argv = ["script.py", *job["argv"]]
    try:
        exec(compile(job["code"], "script.py", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code if code else "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    child = os.fork()
    if not child:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with the tests, when its input is closed."""
    pipe, environment = subprocess.PIPE, os.environ | {"HF_HOME": tempfile.mkdtemp(prefix="stranger-")}
    command = [sys.executable, "-c", SERVER]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, text=True)


def stranger(code: str, *argv: object, cwd: Path | str = ".") -> subprocess.CompletedProcess[str]:
    """What became of a script with those arguments, in a process where an import of diffdistill fails."""
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        said = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
        job = {"code": code, "argv": [str(a) for a in argv], "cwd": str(Path(cwd).resolve()), **said}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (Path(said[name]).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(code, status, out, err)
