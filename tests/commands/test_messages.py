"""YAML that PyYAML cannot construct or that never ends, and messages that stay one short line."""

from pathlib import Path

import pytest

from diffdistill.commands.cli import main
from diffdistill.errors import LONGEST, UserError, one_line, shown
from diffdistill.options import read_yaml
from tests.launched import two_processes

Capture = pytest.CaptureFixture[str]

BOMB = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12))
REFUSED = {
    "a month 13": ("seed: 2001-13-01", "line 1: the value of 'seed' is none (month must be in 1..12)"),
    "a bool that is none": ("seed: 1\nnormalise: !!bool x", "line 2: the value of 'normalise' is none"),
    "an int that is none": ("seed: !!int ''", "the value of 'seed' is none"),
    "5,000 digits": ("seed: " + "9" * 5000, "the value of 'seed' is none"),
    "5,000 digits in hex": ("seed: 0x" + "f" * 5000, "the value of 'seed' is none"),
    "minutes and seconds": ("seed: 1" + ":59" * 5000, "the value of 'seed' is none"),
    "200 digits": ("seed: " + "9" * 200, "999 is not within 63 bits"),
    "a deep list": ("lora: " + "[" * 3000, "nested too deeply"),
    "a list 60 deep": ("lora: " + "[" * 60 + "]" * 60, "nested more than 40 deep"),
    "an alias of itself": ("lora: &a [*a]", "nested more than 40 deep"),
    "an alias bomb": (BOMB, "more than 10000 values once its aliases are written out"),
    "a megabyte": ("lora: '" + "x" * (1 << 20) + "'", "larger than 128 KiB"),
    "a NUL": ('out: "a\\0b"', "is no text"),
    "half a pair": ('out: "\\ud800"', "is no text"),
    "a name twice": ("seed: 1\nsteps: 1\nseed: 2", "line 3: 'seed' stands twice"),
    "a name of 100,000 letters": ("x" * 100_000 + ": 1", "config: "),
    "a method of two lines": ("method: |\n  a\n  b", "is not known"),
    "an object": ("seed: !!python/object:os.system x", "the value of 'seed' is none"),
}


@pytest.mark.parametrize("text, says", REFUSED.values(), ids=REFUSED)
def test_hostile_yaml_is_one_line(text: str, says: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1 and len(line) < 300, line


def test_usual_yaml_is_read_as_before(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 3\r\nlora: null\r\nlr: 1.0e-05\r\nmixed_precision: no\r\nclasses: [1, 2]\r\n")
    assert read_yaml(str(file)) == {"seed": 3, "lora": None, "lr": 1e-5, "mixed_precision": False, "classes": [1, 2]}
    file.write_text("base: &b {x: 1}\nother:\n  <<: *b\n  y: *b\n")
    assert read_yaml(str(file))["other"] == {"x": 1, "y": {"x": 1}}
    file.write_text('data: "f\\udce9"')  # a folder name that is not UTF-8, as Python and our config.yaml write it
    assert read_yaml(str(file)) == {"data": "f\udce9"}


@pytest.mark.parametrize("text", ["x" * 10**6, "a\nb\r\nc\u2028d\x1b[31m\0", "\ud800" * 500, "", "é" * 280])
def test_a_message_is_one_short_line_whatever_it_holds(text: str) -> None:
    for message in (str(UserError(f"seed: {text}; give a number")), one_line(text)):
        assert len(message) <= LONGEST and message.isprintable()
    assert str(UserError(f"seed: {text}; give a number")).endswith("; give a number")


def test_a_value_is_shown_in_short() -> None:
    assert shown("digits") == "'digits'" and shown([1, 2]) == "[1, 2]"
    assert shown(16**5000) == "a value of type int"
    deep: list[object] = []
    for _ in range(10**5):
        deep = [deep]
    for value in (deep, "x" * 10**7, {"a\n": "b\n"}, list(range(10**6))):
        assert len(shown(value)) <= 100 and "\n" not in shown(value)


def test_every_process_says_what_ended_it(tmp_path: Path) -> None:
    options = ["--method", "dmd2", "--batch-size", "4096", "--gan-weight", "1", "--data", "digits", "--device", "cpu"]
    argv = ["-m", "diffdistill", "train", *options, "--steps", "1", "--out", str(tmp_path / "run")]
    processes = two_processes(*argv)
    for rank, process in enumerate(processes):
        said = [line for line in process.communicate()[1].splitlines() if line.startswith("diffdistill: ")]
        assert process.returncode == 2 and len(said) == 1, said
        assert said[0].startswith(f"diffdistill: rank {rank}: ") and "4096" in said[0]
