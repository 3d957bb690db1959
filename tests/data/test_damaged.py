"""Images that are damaged in their middle end a training with one line, and what was trained is kept."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffdistill import Example, Teacher, UserError, distill, train_teacher
from diffdistill.commands.cli import main
from diffdistill.core.schedule import LinearFlow
from diffdistill.data.batches import batch_indices
from diffdistill.data.images import open_data
from diffdistill.training.checkpoint import checkpoints
from diffdistill.training.unread import Unread
from tests.data.reading import random_images, refused

SHORT = ["--batch-size", "4", "--widths", "8,16", "--layers", "1", "--attention", "", "--sample-every", "0"]
SHORT += ["--checkpoint-every", "0", "--device", "cpu", "--log-every", "1"]
COUNT = 16


def picture(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random_images(COUNT, 8, 8)[i]).save(file, "png")
    return file.getvalue()


def damaged(content: bytes) -> bytes:
    """The same length, head and end."""
    middle = content.index(b"IDAT") + 20
    return content[:middle] + bytes(byte ^ 0x55 for byte in content[middle : middle + 8]) + content[middle + 8 :]


def folder(path: Path, bad: int | None = None) -> Path:
    path.mkdir(exist_ok=True)
    for i in range(COUNT):
        (path / f"{i:02d}.png").write_bytes(damaged(picture(i)) if i == bad else picture(i))
    return path


def archive(path: Path, bad: int) -> Path:
    with tarfile.open(path, "w") as file:
        for i in range(COUNT):
            data = damaged(picture(i)) if i == bad else picture(i)
            info = tarfile.TarInfo(f"{i:02d}.png")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def seen_at(step: int, rank: int = 0, world_size: int = 1) -> int:
    """An image that no process sees before that step."""
    ranks = [(s, r) for s in range(step + 1) for r in range(world_size) if (s, r) < (step, rank)]
    before = {i for s, r in ranks for i in batch_indices(COUNT, 4, s, seed=0, rank=r, world_size=world_size).tolist()}
    here = batch_indices(COUNT, 4, step, seed=0, rank=rank, world_size=world_size).tolist()
    return next(i for i in here if i not in before)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_it_opens_and_is_named_when_it_is_read(kind: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "d", 5) if kind == "folder" else archive(tmp_path / "d.tar", 5)
    assert len(open_data(str(source))) == COUNT
    assert "05" in refused(source) and "cannot read the image" in refused(source)


def test_the_training_ends_with_a_checkpoint_and_goes_on_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, bad = folder(tmp_path / "d"), seen_at(2)
    argv = ["teacher", "--data", str(data), *SHORT, "--steps", "4"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    folder(data, bad)
    assert main([*argv, "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"{bad:02d}.png" in line and "step 2 is kept" in line and len(line) < 300
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    assert main(["teacher", "--resume", str(tmp_path / "run")]) == 2, "as long as it is not mended"
    assert "step 2 is kept" in capsys.readouterr().err
    folder(data)
    assert main(["teacher", "--resume", str(tmp_path / "run")]) == 0
    one, two = (
        load_file(tmp_path / name / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("whole", "run")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_nothing_is_kept_where_nothing_was_trained(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", seen_at(0))
    with pytest.raises(UserError, match="cannot read the image") as error:
        train_teacher(data=data, steps=2, batch_size=4, widths="8,16", attention="", out=tmp_path / "run", device="cpu")
    assert not isinstance(error.value, Unread) and not checkpoints(tmp_path / "run" / "checkpoints")


def test_whatever_data_of_ones_own_raise_a_checkpoint_is_kept(tmp_path: Path) -> None:
    class Faulty:
        reads = 0

        def __len__(self) -> int:
            return 8

        def get(self, indices: torch.Tensor) -> Example:
            self.reads += len(indices) == 4  # of a batch
            if self.reads > 2:
                raise ConnectionError("the store is gone")
            return Example(torch.zeros(len(indices), 2))

    class Network(torch.nn.Linear):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    teacher = Teacher.around(Network(2, 2), (2,), LinearFlow(), "flow_prediction")
    options = {"steps": 4, "batch_size": 4, "sample_every": 0, "device": "cpu"}
    with pytest.raises(ConnectionError, match="the store is gone"):
        distill("consistency", teacher=teacher, data=Faulty(), out=tmp_path / "run", **options)
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_processes_one_alone_meets_it(rank: int, tmp_path: Path) -> None:
    folder(tmp_path / "d", seen_at(1, rank, 2))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["--redirects", "3", "--log-dir", str(tmp_path / "logs"), "-m", "diffdistill"]
    argv = ["teacher", "--data", "d", *SHORT, "--steps", "4", "--out", "run"]  # short, so that the line is whole
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *argv], env=environment, cwd=tmp_path, capture_output=True, timeout=120
    )
    logs = {path.parent.name: path.read_text() for path in (tmp_path / "logs").glob("**/stderr.log")}
    lines = {
        name: [line for line in log.splitlines() if line.startswith("diffdistill: ")] for name, log in logs.items()
    }
    assert done.returncode != 0 and not any("Traceback" in log for log in logs.values()), logs
    assert [len(lines[name]) for name in ("0", "1")] == [1, 1], logs
    assert (
        f"rank {rank}: data: cannot read the image" in lines[str(rank)][0] and "step 1 is kept" in lines[str(rank)][0]
    )
    assert f"rank {1 - rank}: another process" in lines[str(1 - rank)][0]
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000001"]
