"""What goes wrong in the middle of a training: an infinite loss, damaged images, a full disk, another teacher."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffdistill import UserError, distill
from diffdistill.commands.cli import main
from diffdistill.data.images import Data, open_data
from diffdistill.data.unreadable import skipping
from diffdistill.training.checkpoint import checkpoints
from diffdistill.training.metrics import MetricsFile
from diffdistill.training.trainer import NonFinite, Trainer
from tests.data.reading import random_images
from tests.data.test_damaged import COUNT, SHORT, folder
from tests.training.test_trainer import TwoPlayers, metrics, trainer_of

Teachers = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]


class Poisoned(TwoPlayers):
    """Player a's loss is infinite at some steps."""

    def __init__(self, steps: set[int]):
        super().__init__()
        self.steps = steps

    def turns(self, step: int):  # type: ignore[no-untyped-def]
        self.poison = step if step in self.steps else None
        return super().turns(step)


def test_updates_that_are_not_finite_are_skipped_and_counted(tmp_path: Path, capsys: Capture) -> None:
    trainer = trainer_of(Poisoned({1, 2}), tmp_path, steps=5, log_every=1, skip_nonfinite=2, ema=0.5)
    trainer.fit()
    warnings = capsys.readouterr().err.splitlines()
    assert [w[:40] for w in warnings] == [f"warning: step {k}, player 'a': loss inf, gr"[:40] for k in (1, 2)]
    assert warnings[1].endswith("the update is skipped (2 of at most 2)")
    lines = metrics(tmp_path)
    assert [line.get("skipped_updates") for line in lines] == [None, 1, 2, 2, 2]
    assert ["a/loss" in line for line in lines] == [True, False, False, True, True]
    assert all("b/loss" in line for line in lines) and "NaN" not in json.dumps(lines)


def test_a_skipped_update_changes_nothing_of_its_player(tmp_path: Path) -> None:
    trainer = trainer_of(Poisoned({0}), tmp_path, steps=2, skip_nonfinite=1, ema=0.5)
    before = [p.clone() for p in trainer.method.players["a"].parameters()]
    trainer.iteration()
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.method.players["a"].parameters(), strict=True))
    assert not trainer.optimizers["a"].state and trainer.optimizers["b"].state


def test_the_average_stays_where_its_player_was_skipped(tmp_path: Path) -> None:
    trainer = trainer_of(Poisoned({1}), tmp_path, steps=3, skip_nonfinite=1, ema=0.5)
    assert trainer.average is not None
    trainer.iteration()
    before = trainer.average.averages[0].clone()
    assert not torch.equal(before, next(iter(trainer.method.players["a"].parameters())))
    trainer.iteration()
    assert torch.equal(before, trainer.average.averages[0])


@pytest.mark.parametrize("stopped_at", [None, 3])
def test_one_more_than_the_limit_stops_also_after_a_resume(stopped_at: int | None, tmp_path: Path) -> None:
    def trainer(steps: int) -> Trainer:
        return trainer_of(Poisoned({1, 4}), tmp_path, steps=steps, checkpoint_every=1, skip_nonfinite=1)

    if stopped_at:
        trainer(stopped_at).fit()
    again = trainer(6)
    again.resume()
    with pytest.raises(NonFinite, match=r"step 4, player 'a': loss inf.*; 1 updates were skipped.*step-00000004"):
        again.fit()


# -- images ------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path: Path) -> Data:
    data = folder(tmp_path / "d", 5)
    (data / "06.png").write_bytes((data / "05.png").read_bytes())
    return open_data(str(data))


def test_the_next_image_stands_for_one_that_cannot_be_read(bad: Data, capsys: Capture) -> None:
    for rows in ([4, 5, 6, 7], [6, 5]):  # in either order
        images = skipping(bad, 2).get(torch.tensor(rows)).images
        expected = bad.get(torch.tensor([7 if row in (5, 6) else row for row in rows])).images
        assert torch.equal(images, expected)
    warnings = capsys.readouterr().err.splitlines()
    assert (
        len(warnings) == 4
        and "05.png" in warnings[0]
        and warnings[0].endswith("it is skipped (1 of at most 2), and the next image stands for it")
    )
    with pytest.raises(UserError, match=r"06.png.*; 1 other images are skipped already"):
        skipping(bad, 1).get(torch.tensor([5]))


def test_a_training_skips_them(tmp_path: Path, capsys: Capture) -> None:
    data = folder(tmp_path / "d", 5)
    argv = ["teacher", "--data", str(data), *SHORT, "--steps", "4"]
    assert main([*argv, "--out", str(tmp_path / "run"), "--skip-unreadable", "1"]) == 0
    assert capsys.readouterr().err.count("05.png") == 1, "it is named once"
    Image.fromarray(random_images(COUNT, 8, 8)[6]).save(data / "05.png")
    assert main([*argv, "--out", str(tmp_path / "same")]) == 0
    one, two = (
        load_file(tmp_path / n / "teacher" / "unet" / "diffusion_pytorch_model.safetensors") for n in ("run", "same")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- disk and teacher --------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_line_of_metrics_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = MetricsFile.write

    def full(self: MetricsFile, values: dict[str, object]) -> None:
        if values["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, values)

    monkeypatch.setattr(MetricsFile, "write", full)
    with pytest.raises(UserError, match=r"No space left.*the last good checkpoint is step-00000003.*--resume"):
        trainer_of(TwoPlayers(), tmp_path, steps=5, log_every=1, checkpoint_every=1).fit()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_teacher_that_changes_underneath_is_noticed_at_the_next_checkpoint(
    mapped: bool, tiny_teacher: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import shutil

    teacher = shutil.copytree(tiny_teacher("vp"), tmp_path / "teacher")
    file = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    iteration = Trainer.iteration

    def changing(self: Trainer, batch=None):  # type: ignore[no-untyped-def]
        if self.step == 2:
            save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
            if mapped:
                next(self.method.teacher.parameters()).data.add_(1)  # type: ignore[attr-defined]
        return iteration(self, batch)

    monkeypatch.setattr(Trainer, "iteration", changing)
    options = {"teacher": teacher, "steps": 4, "batch_size": 4, "checkpoint_every": 1, "sample_every": 0}
    run = tmp_path / "run"
    if mapped:
        with pytest.raises(UserError, match=r"model.safetensors has changed .*, and with it the weights in memory"):
            distill("diff_instruct", **options, out=run)
        assert checkpoints(run / "checkpoints")[-1].name == "step-00000002"
        return
    distill("diff_instruct", **options, out=run)
    warning = capsys.readouterr().err
    assert warning.count("has changed since the training began") == 1 and len(warning.splitlines()[-1]) < 300
    with pytest.raises(UserError, match="changed since the run began: teacher's weights"):
        distill(resume=run, steps=5)


def test_weights_that_are_not_mapped_to_a_changed_file_are_trained_on(
    tiny_teacher: Teachers, tmp_path: Path, capsys: Capture
) -> None:
    """Those in parts or in few bits are copies: the change is said, once, and the training goes on."""
    import shutil

    from diffdistill.families import load_teacher
    from diffdistill.training.underneath import teacher_check

    folder = shutil.copytree(tiny_teacher("vp"), tmp_path / "teacher")
    check = teacher_check(load_teacher(folder), None)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    check()
    check()
    assert capsys.readouterr().err.count("warning: teacher: ") == 1
