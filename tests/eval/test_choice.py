"""A model of any kind is judged by a protocol that fits it, and `train` ends with the command that does so."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from diffdistill.commands.cli import main
from diffdistill.commands.run import Run
from diffdistill.data.images import open_data
from diffdistill.eval.features.pixels import fit
from diffdistill.eval.metrics.frechet import frechet_distance
from diffdistill.eval.metrics.moments import statistics
from tests import tiny_a

QUICK = ["--count", "40", "--teacher-steps", "1", "--bootstrap", "0"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """(pixels a side, channels) -> a stock DDPM pipeline of random weights."""
    root = tmp_path_factory.mktemp("stock")

    def make(side: int, channels: int) -> Path:
        folder = root / f"{channels}x{side}"
        if not folder.exists():
            torch.manual_seed(0)
            blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
            unet = UNet2DModel(
                sample_size=side, in_channels=channels, out_channels=channels, block_out_channels=(8, 8),
                layers_per_block=1, norm_num_groups=4, **blocks,
            )  # fmt: skip
            DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
        return folder

    return make


def photographs(folder: Path, width: int, height: int, channels: int, count: int = 40) -> Path:
    """Smooth images, each another."""
    folder.mkdir()
    random = np.random.RandomState(0)
    for i in range(count):
        slope = np.linspace(0, 255 * random.rand(), width)[None, :, None] * np.ones((height, 1, channels))
        image = (slope + 30 * random.rand(height, width, channels)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image.squeeze()).save(folder / f"{i:03d}.png")
    return folder


def printed_command(output: str) -> list[str]:
    line = next(line for line in output.splitlines() if "diffdistill eval" in line)
    return shlex.split(line.partition("diffdistill ")[2])


@pytest.mark.parametrize(("side", "channels", "with_data"), [(16, 3, False), (12, 1, True)])
def test_the_command_that_train_prints_runs(
    stock: Callable[[int, int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], side: int, channels: int,
    with_data: bool,
) -> None:  # fmt: skip
    data = ["--data", str(photographs(tmp_path / "my images", side + 4, side, channels))] if with_data else []
    run = tmp_path / "run"
    train = ["train", "--method", "dmd2", "--teacher", str(stock(side, channels)), *data, "--out", str(run)]
    assert main([*train, "--steps", "1", "--batch-size", "4", "--sample-every", "0", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert main([*printed_command(output), *QUICK]) == 0
    table = capsys.readouterr().out
    assert "pixels" in output and "pixels" in table and (run / "eval" / "results.json").is_file()
    assert ("my images" if with_data else "teacher's own samples") in output
    rows = Run(run).evaluate(count=40, teacher_steps=[1], bootstrap=0).rows
    assert [(row["model"], row["steps"]) for row in rows] == [("teacher", 1), ("student", 1)]
    assert all(row[name] is not None for row in rows for name in ("frechet distance", "recall", "coverage"))


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["dit", "stable_diffusion"])
def test_so_does_that_of_a_latent_model(pipeline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(tiny_a, pipeline)().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na house\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt")] if pipeline == "stable_diffusion" else []
    train = ["train", "--method", "dmd2", "--teacher", str(tmp_path / "teacher"), *prompts, "--device", "cpu"]
    train += ["--steps", "1", "--batch-size", "2", "--sample-every", "0", "--out", str(tmp_path / "run")]
    assert main(train) == 0
    command = printed_command(capsys.readouterr().out)
    assert main([*command, *QUICK, "--count", "12"]) == 0
    table = capsys.readouterr().out
    assert "teacher's own samples" in table and "student" in table


def test_28x28_grey_images_are_mnist_if_they_are_digits(
    stock: Callable[[int, int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = open_data("digits", resolution=28).get(torch.arange(60))
    pixels = ((digits.images[:, 0] + 1) * 127.5).round().byte().numpy()
    labels = digits.labels.numpy() if digits.labels is not None else None
    split = {"test_images": pixels[40:], "test_labels": labels[40:]}  # type: ignore[index]
    np.savez(tmp_path / "d.npz", train_images=pixels[:40], train_labels=labels[:40], **split)  # type: ignore[index]
    clothes = photographs(tmp_path / "clothes", 28, 28, 1)
    for data, protocol in ((tmp_path / "d.npz", "mnist"), (clothes, "pixels")):
        out = tmp_path / protocol
        assert main(["eval", str(stock(28, 1)), "--data", str(data), *QUICK, "--out", str(out)]) == 0
        table = capsys.readouterr().out
        assert f"{protocol}: " in table and ("d.npz#test" in table) == (protocol == "mnist")


def test_image_folders_and_their_mismatches(
    stock: Callable[[int, int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    colour, grey = photographs(tmp_path / "colour", 16, 16, 3), photographs(tmp_path / "grey", 16, 16, 1)
    wide, model = photographs(tmp_path / "wide", 20, 16, 3), str(stock(16, 3))
    assert main(["eval", str(colour), "--data", str(grey), "--bootstrap", "0"]) == 0
    same = capsys.readouterr().out
    assert "40 images" in same and not (colour / "eval").exists()
    assert main(["eval", str(wide), "--data", str(wide), "--bootstrap", "0"]) == 0
    alike = capsys.readouterr().out
    assert main(["eval", str(wide), "--data", str(colour), "--bootstrap", "0"]) == 0
    assert "40 images" in alike and alike != capsys.readouterr().out
    for arguments, message in (
        ([str(colour)], "name the real ones to compare with by --data"),
        ([str(grey), "--protocol", "mnist", "--count", "20", "--reference", str(grey)], "are 16x16 and the protocol's"),
        ([model, "--data", str(colour), "--count", "20", "--save-reference", "s.safetensors"], "save_reference"),
        ([model, "--data", str(colour), "--prompts", "p.txt"], "takes no prompts"),
    ):
        assert main(["eval", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and len(error) < 300, error


def test_components_tell_noise_blur_and_collapse() -> None:
    real = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(3) / 4 - 1
    components = fit(real[:200], "cpu")

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(statistics(components(images)), statistics(components(real[:200])))

    other = real[200:]
    noisy = other + 0.2 * torch.randn(other.shape, generator=torch.Generator().manual_seed(1))
    blurred = torch.nn.functional.avg_pool2d(other, 3, 1, 1, count_include_pad=False)
    for worse in (noisy, blurred, other[:1].expand(200, -1, -1, -1)):
        assert distance(worse) > 3 * distance(other)
    features: Any = components(real[:200])
    assert torch.allclose(features.std(0), torch.ones(features.shape[1], dtype=torch.float64), rtol=0.02)
