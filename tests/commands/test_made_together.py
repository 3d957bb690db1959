"""Several processes make pairs, encoded prompts and a scoreboard as one does."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from diffdistill import encode, make_pairs
from diffdistill.commands.cli import main
from diffdistill.data.encoded import open_encoded
from diffdistill.eval import bench
from tests import tiny_a
from tests.data.encoding import PROMPTS, contents
from tests.data.test_encode_streaming import stand_in, streamed
from tests.launched import two_processes

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
for size in map(int, sys.argv[3:]):
    encode(**streamed(Path(sys.argv[1]), Path(sys.argv[2]) / str(size), count=20, shard_size=size, batch_size=1))
"""


def test_a_stream_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, sizes = tmp_path / "teacher", ("2", "7", "20")
    tiny_a.stable_diffusion().save_pretrained(teacher)
    said = together("-c", STREAM, str(teacher), str(tmp_path / "two"), *sizes)
    assert said.count("has 7 rows") == len(sizes)
    stand_in(monkeypatch)
    for size in sizes:
        # Seven rows where twenty are asked for: they end in a shard of the first process or between two.
        one, two = tmp_path / "one" / size, tmp_path / "two" / size
        encode(**streamed(teacher, one, count=20, shard_size=int(size), batch_size=1))
        assert contents(two) == contents(one) and len(open_encoded(two)) == 7


@pytest.mark.slow
def test_scoreboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = tmp_path / "short.yaml"
    suite.write_text("extends: digits\nteacher_steps: [1, 4]\n")
    options = ["--suite", str(suite), "--methods", "dmd2:digits,consistency:digits", "--seed", "0", "--budget", "24"]
    options += ["--reference", "digits#test", "--threads", "1"]
    code = "import diffdistill.eval.bench as b, diffdistill.commands.cli as c; b.MOST_IMAGES = 200; exit(c.main())"
    together("-c", code, "bench", *options, "--out", str(tmp_path / "2"))
    monkeypatch.setattr(bench, "MOST_IMAGES", 200)
    shutil.copytree(tmp_path / "2" / "runs", tmp_path / "1" / "runs")  # each of a process of its own, in both
    assert main(["bench", *options, "--out", str(tmp_path / "1")]) == 0
    one, two = (json.loads((tmp_path / n / "board.json").read_text())["rows"] for n in "12")
    for row in one + two:
        row.pop("training s", None), row.pop("peak MB", None)
    assert one == two and {row["method"] for row in one} == {"teacher", "dmd2", "consistency"}
