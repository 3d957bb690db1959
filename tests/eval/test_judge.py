"""Evaluation by a protocol: the same numbers whatever interrupts it, and independently computed ones."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import load_file

from diffdistill.commands.cli import main
from diffdistill.data.images import open_data
from diffdistill.data.shapes import HELD_OUT, draw_many
from diffdistill.eval import judge
from diffdistill.eval.features.digit_classifier import load_digit_classifier
from diffdistill.eval.models import SamplingOptions, open_model
from diffdistill.pictures import save_png
from tests.eval.sixty import Run, numbers, shards

# -- the numbers -------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_an_independent_computation(
    run: Run, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    report = run("a")
    model = open_model(str(tiny_teacher("v")), SamplingOptions(steps=2))
    data = open_data("digits")
    real = data.get(torch.arange(len(data)))
    assert real.labels is not None
    images = model.draw(range(60), 0, real.labels[:60], None)
    network = load_digit_classifier()
    with torch.no_grad():
        fakes = network.features(images.float() / 127.5 - 1).double().numpy()
        reals = network.features(((real.images + 1) * 127.5).round() / 127.5 - 1).double().numpy()
        agrees = network(images.float() / 127.5 - 1).argmax(1) == real.labels[:60]
    root = scipy.linalg.sqrtm(np.cov(fakes.T) @ np.cov(reals.T)).real
    shift = ((fakes.mean(0) - reals.mean(0)) ** 2).sum()
    expected = shift + np.trace(np.cov(fakes.T) + np.cov(reals.T) - 2 * root)
    (row,) = report["rows"]
    # Drawn in one batch here and in tens there: a pixel that lies between two of the 256 levels may fall otherwise.
    assert row["frechet distance"] == pytest.approx(expected, rel=1e-3)
    assert row["agreement %"] == pytest.approx(100 * agrees.double().mean().item(), abs=2)
    low, high = row["intervals"]["frechet distance"]
    assert low < high
    assert report["metrics"]["frechet distance"].startswith("digit classifier") or "digit" in str(report["metrics"])


def test_real_images_against_themselves(run: Run, tmp_path: Path) -> None:
    data = open_data("digits")
    folder = tmp_path / "real"
    for i, image in enumerate(data.get(torch.arange(100)).images):
        save_png(Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy()), folder / f"{i:03d}.png")
    report = run("a", folder, "--reference", str(folder), count=100, labels="balanced")
    (row,) = report["rows"]
    assert row["frechet distance"] == pytest.approx(0, abs=1e-9) and row["precision"] == row["recall"] == 1
    assert row["agreement %"] is None  # nobody says which classes they were to be


def test_the_noise_of_an_image_does_not_depend_on_the_batch(run: Run, tmp_path: Path) -> None:
    run("tens"), run("sixes", batch=6, shard=12), run("more", count=80)
    tens = torch.cat([load_file(p)["digits.features"] for p in sorted(tmp_path.glob("tens/measured/*.safetensors"))])
    for other in ("sixes", "more"):
        files = sorted(tmp_path.glob(f"{other}/measured/*.safetensors"))
        features = torch.cat([load_file(p)["digits.features"] for p in files])[:60]
        assert ((features - tens).abs().amax(1) < 0.05).float().mean() > 0.95
    other_seed = run("seed", None, "--seed", "1")
    assert other_seed["rows"] != run("tens")["rows"]


def test_drawn_shapes_show_what_their_captions_say(tmp_path: Path) -> None:
    images, _, _ = draw_many(HELD_OUT, 40)
    for i, image in enumerate(images):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        save_png(Image.fromarray(pixels), tmp_path / "drawn" / f"{i:03d}.png")
    command = ["eval", str(tmp_path / "drawn"), "--protocol", "shapes", "--count", "40", "--out"]
    assert main([*command, str(tmp_path / "right")]) == 0
    (row,) = json.loads((tmp_path / "right" / "results.json").read_text())["rows"]
    assert row["all three %"] == 100
    # The same pictures in another order are seldom right.
    for path in sorted((tmp_path / "drawn").glob("*.png")):
        path.rename(path.with_name(f"{39 - int(path.stem):02d}.png"))
    assert main([*command, str(tmp_path / "wrong")]) == 0
    (row,) = json.loads((tmp_path / "wrong" / "results.json").read_text())["rows"]
    assert row["all three %"] < 20


# -- interruptions and processes ---------------------------------------------------------------------------


def test_interrupted_and_resumed_is_the_same_to_the_bit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole")
    for after in (1, 3, 2):  # batches of the six until it stops
        left = after

        def measured(*args: Any, own: Any = judge.measured) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return own(*args)

        with monkeypatch.context() as patched:
            patched.setattr(judge, "measured", measured)
            with pytest.raises(AssertionError):
                run("parts")
    assert numbers(run("parts")) == numbers(whole)
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")
    # One that another process once made is made again too, whatever that noted of it.
    gone = next((tmp_path / "parts").glob("measured/00002*"))
    (gone.parent / "samples.1.json").write_text(json.dumps({"shards": {gone.name: "0" * 64}}))
    (gone.parent / ".samples.json.0123.tmp").write_text("{")  # of a write that was killed
    gone.unlink()
    assert numbers(run("parts")) == numbers(whole)
    # A damaged shard is made again.
    damaged = next((tmp_path / "parts").glob("measured/00001*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
    assert numbers(run("parts")) == numbers(whole)
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")


def command_of(folder: Path, protocol: str, out: Path, *more: str) -> list[str]:
    return ["-m", "diffdistill.commands.cli", "eval", str(folder), "--protocol", protocol, "--steps", "2", *more,
            "--out", str(out)]  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_and_two_processes(
    run: Run, tmp_path: Path, tiny_teacher: Callable[[str], Path], protocol: Callable[..., str]
) -> None:
    changes: dict[str, Any] = {"count": 3000, "shard": 50, "batch": 50}
    whole = run("whole", **changes)
    command = [sys.executable, *command_of(tiny_teacher("v"), protocol(**changes), tmp_path / "killed")]
    draw, killed = random.Random(0), 0
    for _ in range(2):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        started = len(shards(tmp_path / "killed"))
        deadline = time.monotonic() + 60
        while len(shards(tmp_path / "killed")) == started and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 0.3))
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            killed += 1
        child.wait()
    assert killed >= 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    assert numbers(json.loads((tmp_path / "killed" / "results.json").read_text())) == numbers(whole)

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    both = command_of(tiny_teacher("v"), protocol(**changes), tmp_path / "both")
    subprocess.run([*launch, *both], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "both" / "measured" / "samples.1.json").is_file()  # the second process did its share
    assert shards(tmp_path / "both") == shards(tmp_path / "whole")
    assert numbers(json.loads((tmp_path / "both" / "results.json").read_text())) == numbers(whole)


def test_another_model_in_the_folder_is_refused(
    run: Run, tmp_path: Path, tiny_teacher: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run("a")
    with pytest.raises(AssertionError):
        run("a", tiny_teacher("flow"), "--steps", "2")
    assert "holds measured images made with fingerprint" in capsys.readouterr().err
