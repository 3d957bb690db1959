"""Several processes make pairs, encoded prompts and a scoreboard as one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffdistill import encode, make_pairs
from diffdistill.data.encoded import open_encoded
from tests import tiny_a
from tests.data.encoding import PROMPTS, contents
from tests.launched import ROOT, two_processes

MODULE = ["-m", "diffdistill"]


def together(*argv: str) -> str:
    """What two processes print, the second after the first; both must end well."""
    started = two_processes(*argv, output=subprocess.PIPE)
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return "".join(out for out, _ in said)


def test_pairs(tmp_path: Path) -> None:
    options = {"count": 50, "shard_size": 8, "batch_size": 4, "sampling_steps": 4}
    whole = make_pairs(out=tmp_path / "one", threads=1, **options)
    given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    out = tmp_path / "two"
    said = together(*MODULE, "pairs", "--threads", "1", "--out", str(out), *given)
    assert said.count("use them with") == 1
    assert (out / "pairs.1.json").exists() and contents(out) == contents(whole) and len(contents(out)) == 7
    damaged = out / "00003.safetensors"  # of the second process
    damaged.write_bytes(damaged.read_bytes()[:-1])
    together(*MODULE, "pairs", "--threads", "1", "--out", str(out), *given)
    assert contents(out) == contents(whole)
    damaged.unlink()
    make_pairs(out=out, threads=1, **options)  # one process goes on with what two have made
    assert contents(out) == contents(whole) and not (out / "pairs.1.json").exists()


def test_prompts(tmp_path: Path) -> None:
    teacher, prompts = tmp_path / "teacher", tmp_path / "prompts.txt"
    tiny_a.stable_diffusion().save_pretrained(teacher)
    prompts.write_text("\n".join(PROMPTS))
    options = {"shard_size": 2, "batch_size": 1, "threads": 1}
    whole = encode(teacher=teacher, prompts=prompts, out=tmp_path / "one", **options)
    given = ["--teacher", str(teacher), "--prompts", str(prompts), "--shard-size", "2", "--batch-size", "1"]
    said = together(*MODULE, "encode", "--threads", "1", "--out", str(tmp_path / "two"), *given)
    assert said.count("use it with") == 1
    assert contents(tmp_path / "two") == contents(whole) and len(open_encoded(tmp_path / "two")) == len(PROMPTS)


STREAM = """
import sys
from pathlib import Path
import pytest
from diffdistill import encode
from tests.data.test_encode_streaming import stand_in, streamed
stand_in(pytest.MonkeyPatch())
encode(**streamed(Path(sys.argv[1]), Path(sys.argv[2]), count=20, shard_size=int(sys.argv[3]), batch_size=1))
"""


@pytest.mark.parametrize("size", [2, 7, 20])
def test_a_stream_that_ends_early(size: int, tmp_path: Path) -> None:
    # Seven rows where twenty are asked for: they end in a shard of the first process or between two.
    teacher = tmp_path / "teacher"
    tiny_a.stable_diffusion().save_pretrained(teacher)
    subprocess.run([sys.executable, "-c", STREAM, str(teacher), str(tmp_path / "one"), str(size)], cwd=ROOT, check=True)
    assert "has 7 rows" in together("-c", STREAM, str(teacher), str(tmp_path / "two"), str(size))
    assert contents(tmp_path / "two") == contents(tmp_path / "one") and len(open_encoded(tmp_path / "two")) == 7


@pytest.mark.slow
def test_scoreboard(tmp_path: Path) -> None:
    options = ["--methods", "dmd2:digits,consistency:digits", "--seed", "0", "--budget", "24"]
    options += ["--reference", "digits#test"]
    code = "import diffdistill.eval.bench as b, diffdistill.commands.cli as c; b.MOST_IMAGES = 200; exit(c.main())"
    for processes in (1, 2):
        argv = ["-c", code, "bench", *options, "--out", str(tmp_path / str(processes))]
        if processes == 1:
            subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, capture_output=True)
        else:
            together(*argv)
    one, two = (json.loads((tmp_path / n / "board.json").read_text())["rows"] for n in "12")
    for row in one + two:
        row.pop("training s", None), row.pop("peak MB", None)
    assert one == two and {row["method"] for row in one} == {"teacher", "dmd2", "consistency"}
