"""The command line as a user meets it: quick help, one clear line for bad input, exit codes."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from diffdistill.catalogue import describe_method
from diffdistill.commands.cli import main
from diffdistill.config import DERIVED, TrainConfig

Teachers = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]


def refused(argv: list[str], capsys: Capture) -> str:
    """The one line that a refused command prints."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("diffdistill: ") and err.count("\n") == 1, (out, err)
    return err


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["methods"], ["methods", "dmd2"], ["eval", "--help"]]
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys\nfrom diffdistill.commands.cli import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'PIL', 'accelerate'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_explains_every_option_with_its_default(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    info = describe_method("dmd2")
    for f in [*dataclasses.fields(TrainConfig), *dataclasses.fields(info.config)]:
        assert f"--{f.name.replace('_', '-')} " in text
        explained = " ".join(f.metadata["help"].split())
        default = "from the teacher" if f.name in DERIVED else f.default
        assert (f"{explained} (default: {default}" if default not in (None, ()) else explained) in text
    assert "(default: 1000; at least 1)" in text, "and its range"
    for title in ("Method, teacher, data and players:", "Where it runs:", "How long, how much at a time"):
        assert title in text, "in groups"


def test_methods_lists_and_describes(capsys: Capture) -> None:
    assert main(["methods"]) == 0
    assert "Yin et al. 2024, arXiv:2405.14867" in capsys.readouterr().out
    assert main(["methods", "dmd2"]) == 0
    out = capsys.readouterr().out
    assert "distribution_matching_gradient" in out and "--gan-weight" in out and "imagenet64" in out


def test_verify_prints_expected_got_error(capsys: Capture, tmp_path: Path) -> None:
    assert main(["verify", "dmd2", "--exact", "--json", str(tmp_path / "rows.json")]) == 0
    out = capsys.readouterr().out
    assert "expected" in out and "got" in out and "error" in out and "FAIL" not in out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["ok"] for row in rows) and len(rows) > 20


def test_verify_trains_where_it_is_told_and_compares_formulas_on_the_cpu(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from diffdistill.exact import plane

    seen: list[torch.device] = []

    def trained(info: object, device: torch.device) -> list[object]:
        seen.append(device)
        return []

    monkeypatch.setattr(plane, "checks", trained)
    assert main(["verify", "sim"]) == 0 and main(["verify", "sim", "--device", "auto", "--threads", "1"]) == 0
    assert seen == [torch.device("cpu"), torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    assert main(["verify", "sim", "--exact", "--device", "gpu"]) == 2
    assert "device: 'gpu' is not one of auto, cpu, cuda" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["verify", "sim", "--device", "cuda"]) == 2
        assert "torch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--method", "dmd22"], "method: 'dmd22' is not known; did you mean 'dmd2'?"),
        (["train", "--method", "./nowhere.py"], "method: the file './nowhere.py' does not exist"),
        (["train", "--studentlr", "1"], "--studentlr: no such option of train; did you mean '--student-lr'?"),
        (["train", "--lr", "1"], "--lr: no such option of train; did you mean '--student-lr' or '--fake-score-lr'?"),
        (["teacher", "--stps", "1"], "--stps: no such option of teacher; did you mean '--steps'?"),
        (["trian"], "trian: no such command; did you mean 'train'?"),
        (["--verison"], "--verison: no such option of diffdistill; did you mean '--version'?"),
        (["export"], "run: it is missing; give a run folder made by train"),
        (["export", "a", "b"], "b: export takes no such argument; see `diffdistill export --help`"),
        (["verify", "dmd2", "--exact", "maybe"], "maybe"),
        (["pairs", "--threads", "-1"], "threads: -1 must be at least 0"),
        (["train", "--steps", "0"], "steps: 0 must be at least 1"),
        (["train", "--steps", "-5"], "steps: -5 must be at least 1"),
        (["train", "--steps", "many"], "steps: 'many' is not a whole number"),
        (["train", "--student-lr", "0"], "student_lr: 0.0 must be greater than 0"),
        (["train", "--ema", "1"], "ema: 1.0 must be less than 1"),
        (["train", "--normalise", "maybe"], "normalise: 'maybe' is not true or false"),
        (["train", "--device", "tpu"], "device: 'tpu' is not one of auto, cpu, cuda"),
        (["train", "--fake-score-loss", "x0"], "fake_score_loss: 'x0' is not one of v, epsilon"),
        (["train", "--teacher", "./nowhere"], "teacher: './nowhere' is not a folder"),
        (["train", "--preset", "imagnet64"], "preset: 'imagnet64' is not known; did you mean 'imagenet64'?"),
        (["train", "--config", "nowhere.yaml"], "config: 'nowhere.yaml' cannot be read"),
        (["train", "--resume", "nowhere"], "config: 'nowhere/config.yaml' cannot be read"),
        (["train", "--time-low", "0.9", "--time-high", "0.5"], "time_low: 0.9 must be less than time_high"),
        (["train", "--method", "swiftbrush", "--time-low", "0.9", "--time-high", "0.5"], "time_low: 0.9 must be less"),
        (["train", "--method", "adapter_guidance", "--guidance-max", "2"], "guidance_scale: 3.0 is not in what is"),
        (["train", "--student-level", "5000"], "student_level: 5000.0 is not a whole timestep from 0 to 999"),
        (["eval", "digits", "--count", "50"], "count: 50 must be at least 100"),
        (["eval", "nowhere"], "eval: 'nowhere' holds no student or teacher yet"),
        (["sample", "nowhere"], "teacher: 'nowhere' is not a folder"),
        (["sample", "digits", "--classes", "12"], "classes: 12 is not among the 10 classes"),
        (["sample", "digits", "--steps", "0"], "steps: 0 must be at least 1"),
        (["sample", "digits", "--resolution", "8x16"], "is a model of pixels, which takes no resolution; leave it out"),
        (["encode", "--resolution", "720x"], "resolution: '720x' is no size; give pixels a side, or HEIGHTxWIDTH"),
        (["train", "--resolution", "0x64"], "resolution: 0 must be at least 1"),
        (["plan", "--resolution", "many"], "resolution: 'many' is no size"),
        (["speed", "digits", "--resolutions", "8,8y"], "resolutions: '8y' is no size"),
        (["speed", "digits", "--resolutions", "8x16"], "resolution: 8x16 is not the 8 that digits makes"),
        (["export", "nowhere"], "run: 'nowhere' is not a run folder"),
        (["teacher", "--data", "./nowhere"], "./nowhere"),
        (["teacher", "--widths", "7,9"], "widths: '7,9'"),
        (["verify"], "method: name one method to verify, or give --all instead"),
    ],
)
def test_bad_input_gets_one_line(
    argv: list[str], says: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(argv, capsys)
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_yaml_is_overridden_by_the_command_line(tiny_teacher: Teachers, tmp_path: Path, capsys: Capture) -> None:
    import yaml

    file = tmp_path / "run.yaml"
    file.write_text(
        f"method: dmd2\nteacher: {tiny_teacher('vp')}\nsteps: 50\nbatch_size: 4\nstudent-lr: 1e-3\nsample_every: 0\n"
        f"mixed_precision: no\nout: {tmp_path / 'run'}\ndevice: cpu\n"
    )
    assert main(["train", "--config", str(file), "--steps", "1"]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["steps"] == 1 and saved["batch_size"] == 4 and saved["student_lr"] == 1e-3
    # The resolved file is a config itself.
    capsys.readouterr()
    assert main(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "twin")]) == 0
    capsys.readouterr()
    assert "already holds a run" in refused(["train", "--config", str(file)], capsys)
    file.write_text("steps: 5\nbatchsize: 4\n")
    assert "batchsize: no such option; did you mean 'batch_size'?" in refused(["train", "--config", str(file)], capsys)
    file.write_text("preset: [digits]\n")
    assert "preset: ['digits'] is not a text" in refused(["train", "--config", str(file)], capsys)
    file.write_text("- a\n")
    assert "is not a mapping" in refused(["train", "--config", str(file)], capsys)


def test_a_batch_larger_than_the_data(tiny_teacher: Teachers, tmp_path: Path, capsys: Capture) -> None:
    argv = ["train", "--teacher", str(tiny_teacher("vp")), "--data", "digits", "--gan-weight", "0.1"]
    says = refused([*argv, "--batch-size", "4096", "--out", str(tmp_path / "run"), "--device", "cpu"], capsys)
    assert "4096" in says and "1797" in says
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit_the_teacher(tiny_teacher: Teachers, tmp_path: Path, capsys: Capture) -> None:
    import numpy as np

    np.savez(tmp_path / "plain.npz", images=np.zeros((20, 8, 8), np.uint8))
    argv = ["train", "--teacher", str(tiny_teacher("vp")), "--data", str(tmp_path / "plain.npz"), "--gan-weight", "0.1"]
    says = refused([*argv, "--batch-size", "4", "--out", str(tmp_path / "run"), "--device", "cpu"], capsys)
    assert "has no labels and the teacher has 10 classes" in says


def test_a_full_disk_is_noticed_at_the_start(
    tiny_teacher: Teachers, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("diffdistill.training.folder.shutil.disk_usage", lambda path: usage(10, 10, 0))
    says = refused(["train", "--teacher", str(tiny_teacher("vp")), "--out", str(tmp_path / "run")], capsys)
    assert "0 MiB free and this run needs" in says
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_noticed_at_the_start(tiny_teacher: Teachers, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    says = refused(["train", "--teacher", str(tiny_teacher("vp")), "--out", str(tmp_path / "file" / "run")], capsys)
    assert "out: cannot write to" in says


def test_a_non_finite_loss_is_one_line(tiny_teacher: Teachers, tmp_path: Path, capsys: Capture) -> None:
    argv = ["train", "--teacher", str(tiny_teacher("vp")), "--out", str(tmp_path / "run"), "--steps", "200"]
    argv += ["--student-lr", "1e30", "--update-ratio", "1", "--batch-size", "2", "--sample-every", "0"]
    assert main([*argv, "--device", "cpu", "--checkpoint-every", "1", "--max-grad-norm", "0"]) == 2
    err = capsys.readouterr().err
    assert "player" in err and "checkpoint" in err and "Traceback" not in err


def test_train_then_sample_then_eval(tiny_teacher: Teachers, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    argv = ["train", "--teacher", str(tiny_teacher("vp")), "--steps", "1", "--batch-size", "4", "--out", str(run)]
    assert main([*argv, "--device", "cpu"]) == 0
    assert f"diffdistill eval {run}" in capsys.readouterr().out
    assert "steps: 4 was given, and a student has its own; leave it out" in refused(
        ["sample", str(run), "--steps", "4"], capsys
    )
    picture = tmp_path / "picture.png"
    assert main(["sample", str(run / "student"), "--count", "6", "--classes", "3,5", "--out", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main(["eval", str(run), "--count", "100", "--teacher-steps", "1,2"]) == 0
    out = capsys.readouterr().out
    assert "frechet distance" in out and "not FID" in out and "FID:" not in out
    report = json.loads((run / "eval" / "results.json").read_text())
    assert [(row["model"], row["steps"]) for row in report["rows"]] == [("teacher", 1), ("teacher", 2), ("student", 1)]
    assert (run / "eval" / "comparison.png").is_file() and (run / "eval" / "table.md").is_file()


def test_a_guided_student_is_judged_by_the_teacher_at_its_scale(
    tiny_teacher: Teachers, tmp_path: Path, capsys: Capture
) -> None:
    run = str(tmp_path / "run")
    argv = ["train", "--method", "guided", "--data", "digits", "--teacher", str(tiny_teacher("vp")), "--steps", "2"]
    argv += ["--guidance-steps", "1", "--stage-steps", "1", "--start-steps", "4", "--sample-every", "0"]
    assert main([*argv, "--batch-size", "4", "--out", run, "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "note: all stages of guided take 3 steps and steps is 2: it stops at an earlier stage" in said
    assert main(["eval", run, "--count", "100", "--teacher-steps", "1"]) == 0
    assert "teacher, guidance 3" in capsys.readouterr().out


def test_teacher_trains_and_its_folder_distills(tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    argv = ["teacher", "--steps", "2", "--batch-size", "4", "--widths", "8,16", "--layers", "1", "--device", "cpu"]
    assert main([*argv, "--out", str(out)]) == 0
    assert main(["train", "--teacher", str(out / "teacher"), "--steps", "1", "--batch-size", "4", "--out",
                 str(tmp_path / "run"), "--device", "cpu"]) == 0  # fmt: skip


IMITATION = '''"""What the teacher gives at the noisiest level."""

from dataclasses import dataclass

from diffdistill.catalogue import About
from diffdistill.options import StudentOptions
from diffdistill.players.sampler import one_step_sampler
from diffdistill.players.teacher import frozen
from diffdistill.scaffold.method import Method, Outcome, Turn

ABOUT = About(paper="unpublished", data="nothing", equations={}, kind="trajectory")


@dataclass(frozen=True)
class Config(StudentOptions):
    """No options of its own."""


class Imitation(Method):
    def __init__(self, teacher, config):
        super().__init__(teacher, config)
        self.teacher = frozen(teacher.denoiser)
        self.players = {"generator": teacher.player("generator")}

    def turns(self, step):
        return [Turn("generator", self.loss)]

    def loss(self, batch):
        x_t, t = self.sampler().start(batch.randn("z"))
        ours, theirs = (network(x_t, t, batch.cond).x0 for network in (self.players["generator"], self.teacher))
        return Outcome((ours - theirs).square().mean())

    def sampler(self):
        return one_step_sampler(self.players["generator"], None)


METHOD = Imitation
'''


def test_a_method_file_of_the_users_own(tiny_teacher: Teachers, tmp_path: Path, capsys: Capture) -> None:
    import diffdistill.methods.dmd2 as dmd2

    mine, other = tmp_path / "my_method.py", tmp_path / "other.py"
    shutil.copy(str(dmd2.__file__), mine)
    other.write_text(IMITATION)
    shared = ["--teacher", str(tiny_teacher("vp")), "--steps", "1", "--batch-size", "4", "--device", "cpu"]
    for path in (mine, other):  # whatever the first player is called, it is the one that is exported
        run = str(tmp_path / path.stem)
        assert main(["train", "--method", str(path), *shared, "--out", run, "--student-lr", "1e-4"]) == 0
        assert main(["export", run]) == 0
        assert main(["verify", "--exact", str(path)]) == 0
    assert "other has no verify(), in its file or in checks/other.py beside it" in capsys.readouterr().out
    mine.write_text('"""No options."""\nABOUT = 1\n')
    assert "does not define Config, METHOD;" in refused(["train", "--method", str(mine)], capsys)


def test_first_names_of_options_go_on(tiny_teacher: Teachers, tmp_path: Path, capsys: Capture) -> None:
    from diffdistill.options import read_yaml

    shared = ["train", "--teacher", str(tiny_teacher("vp")), "--steps", "1", "--batch-size", "4", "--device", "cpu"]
    former = ["--student", "lora", "--fake-score=lora", "--adapter-rank", "2", "--adapter-alpha=4"]
    file = tmp_path / "former.yaml"
    file.write_text("student: lora\nfake_score: full\nadapter_rank: 2\nadapter_alpha: 4\n")
    for name, words in {"argv": former, "file": ["--config", str(file)]}.items():
        assert main([*shared, *words, "--out", str(tmp_path / name)]) == 0
        config = read_yaml(str(tmp_path / name / "config.yaml"))
        assert config["lora"] == ("student,fake_score" if name == "argv" else "student")
        assert (config["lora_rank"], config["lora_alpha"], config["student"]) == (2, 4.0, None)
    assert "--adapter-rank is --lora-rank today" in capsys.readouterr().err
    swiftbrush = [*shared, "--method", "swiftbrush", "--lora-lr", "2e-3", "--label-drop", "0.3"]
    assert main([*swiftbrush, "--out", str(tmp_path / "swiftbrush")]) == 0
    config = read_yaml(str(tmp_path / "swiftbrush" / "config.yaml"))
    assert (config["fake_score_lr"], config["label_dropout"]) == (2e-3, 0.3)
    capsys.readouterr()
    said = refused([*shared, "--student", "nowhere"], capsys)
    assert "nowhere" in said and "--lora" not in said, "a folder, as ever"
