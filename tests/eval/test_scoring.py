"""Evaluation by a protocol: the same numbers whatever interrupts it, independently computed ones, clear refusals."""

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
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

from diffdistill import distill
from diffdistill.commands.cli import main
from diffdistill.data.images import open_data
from diffdistill.data.shapes import HELD_OUT, draw_many
from diffdistill.errors import UserError
from diffdistill.eval import scoring
from diffdistill.eval.features.digit_classifier import load_digit_classifier
from diffdistill.eval.features.inception import Inception
from diffdistill.eval.models import Wanted, open_model
from diffdistill.eval.protocol import load
from diffdistill.pictures import save_png
from tests import tiny_a

PROTOCOL = {
    "title": "sixty digits", "conditions": ["classes", "none"], "classes": 10, "labels": "reference", "count": 60,
    "resolution": 8, "channels": 1, "reference": "digits", "batch": 10, "shard": 20,
    "metrics": [
        {"name": "frechet distance", "kind": "frechet", "measure": "digits"},
        {"name": "kernel distance", "kind": "kernel", "measure": "digits"},
        {"name": "precision_recall", "kind": "precision_recall", "measure": "digits"},
        {"name": "agreement %", "kind": "mean", "measure": "digits", "column": "agrees", "scale": 100},
    ],
}  # fmt: skip
Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # One for all tests, and nobody's own.
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("DIFFDISTILL_DATA", "nowhere")


@pytest.fixture
def protocol(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        path = tmp_path / "sixty.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (PROTOCOL | changes).items() if v is not None}))
        return str(path)

    return write


@pytest.fixture
def run(tmp_path: Path, tiny_teacher: Callable[[str], Path], protocol: Callable[..., str]) -> Run:
    """Options of the command -> the report; the model is an untrained teacher of digits in two steps."""

    def evaluate(out: str, folder: object = None, *more: str, **changes: Any) -> dict[str, Any]:
        teacher = folder or tiny_teacher("v")
        steps = () if folder else ("--steps", "2")
        where = tmp_path / out
        command = ["eval", str(teacher), "--protocol", protocol(**changes), *steps, "--out", str(where), *more]
        assert main(command) == 0
        return json.loads((where / "results.json").read_text())

    return evaluate


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("measured/*.safetensors"))}


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("rows", "reference", "metrics", "count", "seed")}


# -- the numbers -------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_an_independent_computation(
    run: Run, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    report = run("a")
    model = open_model(str(tiny_teacher("v")), Wanted(steps=2))
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
        found = torch.cat([load_file(p)["digits.features"] for p in files])[:60]
        assert ((found - tens).abs().amax(1) < 0.05).float().mean() > 0.95
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


def test_a_text_to_image_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any stock pipeline: captions in, its own call, 8 bit, the protocol's size by its filter."""
    tiny_a.PIPELINES["stable_diffusion"]().save_pretrained(tmp_path / "sd")
    values = {
        "title": "t", "conditions": ["prompts"], "prompts": "p.txt", "count": 12, "resolution": 32, "channels": 3,
        "resize": "lanczos",
        "metrics": [{"name": "colour", "kind": "mean", "measure": "attributes", "column": "colour"}],
    }  # fmt: skip
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "p.txt").write_text("a red circle in the middle\n" * 12)
    command = ["eval", str(tmp_path / "sd"), "--protocol", str(tmp_path / "p.yaml"), "--steps", "2"]
    assert main([*command, "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= report["rows"][0]["colour"] <= 1 and report["rows"][0]["steps"] == 2
    assert Image.open(tmp_path / "out" / "samples.png").size[0] > 300
    # A caption that is none of a shape is named; and without --prompts it says where they belong.
    (tmp_path / "p.txt").write_text("two dogs\n" * 12)
    assert main([*command, "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "other")]) == 2
    assert "'two dogs' is no caption" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "prompts: nowhere/p.txt is not there" in capsys.readouterr().err


def test_fid_and_clip_score_are_those_of_scipy_and_transformers(tmp_path: Path) -> None:
    """Through the whole command, in Inception and CLIP networks of random weights."""
    from tests.eval.test_inception import randomise

    inception = Inception()
    randomise(inception)
    save_file(inception.state_dict(), tmp_path / "inception.safetensors")
    tokenizer = tiny_a.clip_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = tiny_a.clip_config(max_position_embeddings=77)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)).eval()
    clip.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    kinds = {}
    for kind in ("real", "drawn"):
        pixels = np.random.default_rng(len(kind)).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
        kinds[kind] = [Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC) for p in pixels]
        for i, image in enumerate(kinds[kind]):
            save_png(image, tmp_path / kind / f"{i}.png")
    prompts = [f"a picture of {i} things" for i in range(10)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    values = {
        "title": "t", "conditions": ["prompts"], "prompts": "p.txt", "count": 10, "resolution": 32, "channels": 3,
        "reference": "r", "metrics": [
            {"name": "FID", "kind": "frechet", "measure": "inception"},
            {"name": "CLIP score", "kind": "mean", "measure": "clip-score", "column": "score"},
        ],
    }  # fmt: skip
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    command = ["eval", str(tmp_path / "drawn"), "--protocol", str(tmp_path / "p.yaml"), "--bootstrap", "0"]
    command += ["--reference", str(tmp_path / "real"), "--prompts", str(tmp_path / "prompts.txt")]
    command += [
        f"--weights=inception={tmp_path / 'inception.safetensors'}",
        f"--weights=clip-score={tmp_path / 'clip'}",
    ]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = report["rows"]

    with torch.no_grad():
        sets = {
            kind: inception.eval()(torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]))
            for kind, images in kinds.items()
        }
    a, b = ((x - x.mean(0)).double().numpy() / 3 for x in sets.values())  # a' a is the covariance of ten images
    shift = (sets["real"].double().mean(0) - sets["drawn"].double().mean(0)).square().sum().item()
    # The trace of the root of a product of covariances a'a b'b is the sum of the singular values of a b'.
    expected = shift + (a**2).sum() + (b**2).sum() - 2 * scipy.linalg.svdvals(a @ b.T).sum()
    assert row["FID"] == pytest.approx(expected, rel=1e-5)
    assert "TensorFlow 1 bilinear to 299, 8 bit" in report["metrics"]["FID"]

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        found = clip(
            pixel_values=processor(kinds["drawn"], return_tensors="pt")["pixel_values"],
            **tokenizer(prompts, padding=True, return_tensors="pt"),
        )
    cosines = (found.image_embeds * found.text_embeds).sum(1)
    assert row["CLIP score"] == pytest.approx(100 * cosines.clamp_min(0).double().mean().item(), rel=1e-5)


# -- interruptions and processes ---------------------------------------------------------------------------


def test_interrupted_and_resumed_is_the_same_to_the_bit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole")
    for after in (1, 3, 2):  # batches of the six until it stops
        left = after

        def measured(*args: Any, own: Any = scoring.measured) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return own(*args)

        with monkeypatch.context() as patched:
            patched.setattr(scoring, "measured", measured)
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

    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
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


# -- references --------------------------------------------------------------------------------------------


def test_statistics_of_a_file(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our own file gives the images' number; one of another network, size or protocol is refused in one line."""
    values = {"labels": "balanced", "metrics": PROTOCOL["metrics"][:1]}  # type: ignore[index]
    images = run("images", **values)
    file = tmp_path / "r.safetensors"
    # A second time from the statistics that are kept in the cache.
    assert run("images", None, "--save-reference", str(file), **values)["rows"] == images["rows"]
    given = run("file", None, "--reference", str(file), **values)
    assert given["rows"][0]["frechet distance"] == images["rows"][0]["frechet distance"]

    # A distance that the file has no statistics of is a dash, and the other one is there.
    logits = {"name": "of logits", "kind": "frechet", "measure": "digits", "column": "logits"}
    two = run("two", None, "--reference", str(file), labels="balanced", metrics=[*values["metrics"], logits])
    assert two["rows"][0]["frechet distance"] == images["rows"][0]["frechet distance"]
    assert two["rows"][0]["of logits"] is None
    assert "of logits: none, r.safetensors holds no statistics of digits.logits" in two["notes"]

    def refused(told: str, **changes: Any) -> None:
        with pytest.raises(AssertionError):
            run("no", None, "--reference", str(file), **changes)
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1, error

    refused("holds statistics alone", labels="balanced", metrics=PROTOCOL["metrics"][1:2])  # type: ignore[index]
    some = run("some", None, "--reference", str(file), labels="balanced")
    assert some["rows"][0]["frechet distance"] == images["rows"][0]["frechet distance"]
    assert some["rows"][0]["kernel distance"] is None
    assert "kernel distance: none, r.safetensors holds statistics alone, and it needs the images" in some["notes"]
    refused("is of images 1x8x8 None, and the protocol's are 1x28x28", resolution=28, **values)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    other = told | {"measures": json.dumps({"digits": "0" * 16})}
    save_file(load_file(file), file, other)
    refused("was made with 0000000000000000 of digits", **values)
    file.write_bytes(file.read_bytes()[:100])
    refused("is not a whole safetensors file", **values)


def test_real_images_that_change_are_measured_again(run: Run, tmp_path: Path) -> None:
    """Under the same names and of the same sizes in bytes."""
    for i in range(20):
        (tmp_path / "real").mkdir(exist_ok=True)
        draw = np.random.default_rng(i)
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "real" / f"{i:02d}.bmp")
    changes: dict[str, Any] = {"labels": "balanced"}
    before = run("a", None, "--reference", str(tmp_path / "real"), **changes)["rows"][0]["frechet distance"]
    for path in (tmp_path / "real").iterdir():
        size = path.stat().st_size
        Image.new("L", (8, 8), 255 * (int(path.stem) % 2)).save(path)
        assert path.stat().st_size == size
    after = run("a", None, "--reference", str(tmp_path / "real"), **changes)["rows"][0]["frechet distance"]
    assert abs(after - before) > 1


def test_the_usual_npz_of_mu_and_sigma(tmp_path: Path) -> None:
    mean, cov = np.arange(2048.0), np.eye(2048)
    np.savez(tmp_path / "s.npz", mu=mean, sigma=cov)
    found = scoring._statistics_file(tmp_path / "s.npz", load("cifar10"), [])
    assert found is not None
    (statistics,) = found.values()
    assert torch.equal(statistics.mean, torch.from_numpy(mean)) and torch.equal(statistics.cov, torch.from_numpy(cov))
    np.savez(tmp_path / "s.npz", mu=mean[:3], sigma=cov[:3, :3])
    with pytest.raises(UserError, match="is of 3 features, and Inception's are 2048"):
        scoring._statistics_file(tmp_path / "s.npz", load("cifar10"), [])
    (tmp_path / "s.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read"):
        scoring._statistics_file(tmp_path / "s.npz", load("cifar10"), [])


# -- bad input ---------------------------------------------------------------------------------------------


def pictures(folder: Path, *kinds: tuple[str, int], count: int = 20) -> Path:
    folder.mkdir()
    for i in range(count):
        mode, side = kinds[i % len(kinds)]
        Image.new(mode, (side, side)).save(folder / f"{i:03d}.png")
    return folder


def test_images_that_are_not_right(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(folder: Path, told: str, **changes: Any) -> None:
        with pytest.raises(AssertionError):
            run("no", folder, **({"count": 20, "labels": "balanced"} | changes))
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1, error

    refused(pictures(tmp_path / "sizes", ("L", 8), ("L", 9)), "001.png is 9x9 L where 000.png is 8x8 L")
    refused(pictures(tmp_path / "modes", ("L", 8), ("RGB", 8)), "001.png is 8x8 RGB where 000.png is 8x8 L")
    refused(pictures(tmp_path / "alpha", ("RGBA", 8)), "000.png is of mode RGBA")
    refused(pictures(tmp_path / "colour", ("RGB", 8)), "are RGB and the protocol's grey")
    refused(
        pictures(tmp_path / "few", ("L", 8), count=5), "few has 5 images and sixty takes 20; give more, or --count 5"
    )
    refused(pictures(tmp_path / "large", ("L", 16)), "are 16x16 and the protocol's 8x8, without resizing")
    unpadded = pictures(tmp_path / "unpadded", ("L", 8))
    for path in sorted(unpadded.iterdir()):
        path.rename(unpadded / f"{int(path.stem)}.png")
    refused(unpadded, "are not in the order of their numbers")
    split = tmp_path / "split"
    split.mkdir()
    pictures(split / "train", ("L", 8)), pictures(split / "test", ("L", 8))
    refused(split, "has 40 image files and 20 of them are read as data")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no pipeline (model_index.json) and no images")
    corrupt = pictures(tmp_path / "corrupt", ("L", 8))
    (corrupt / "007.png").write_bytes((corrupt / "007.png").read_bytes()[:-30])
    refused(corrupt, "007.png")
    (corrupt / "007.png").write_bytes(b"no picture")
    refused(corrupt, "cannot read the image")


@pytest.mark.parametrize(
    ("more", "changes", "told"),
    [
        ([], {"conditions": ["prompts"], "prompts": "shapes"}, "takes class labels, and the protocol sixty prompts"),
        ([], {"classes": 1000, "labels": "balanced"}, "has 10 classes and the protocol sixty 1000"),
        ([], {"resolution": 28}, "images of digits are 8x8 and the protocol's 28x28"),
        ([], {"reference": "mnist.npz", "fetch": "it there"}, "nowhere/mnist.npz is not there; fetch it there"),
        (["--reference", "gone"], {}, "'gone' does not exist"),
        (["--weights", "digits"], {}, "'digits' is not KEY=PATH"),
        (["--count", "3"], {}, "count: 3 must be at least 10"),
        (["--attention", "flash"], {}, "attention: 'flash' is not one of"),
        (["--prompts", "p.txt"], {}, "the protocol sixty has none"),
        ([], {"metrics": [{"name": "d", "kind": "frechet", "measure": "vgg"}]}, "'vgg' is not known"),
        (
            [],
            {"metrics": [{"name": "d", "kind": "vendi", "measure": "digits", "column": "x"}]},
            "d reads digits.x, and",
        ),
        (
            [],
            {"metrics": [{"name": "d", "kind": "kid", "measure": "digits"}]},
            "d: it cannot be had, its subsets are of",
        ),
        (["--weights", "bogus=x"], {}, "'bogus' is no measure of sixty; they are digits"),
        (["--dtype", "bfloat16"], {}, "bfloat16 is for latent pipelines"),
        (["--dtype", "float16"], {}, "float16 is for GPUs"),
        (["--data", "digits"], {}, "data: that is for an evaluation without --protocol"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    run: Run, capsys: pytest.CaptureFixture[str], more: list[str], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(AssertionError):
        run("no", None, *more, **changes)
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1, error


def test_options_of_protocols_want_a_protocol(
    tiny_teacher: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny_teacher("v")), "--bootstrap", "3"]) == 2
    assert "give --protocol" in capsys.readouterr().err


# -- comparison --------------------------------------------------------------------------------------------


def test_compare(tmp_path: Path, protocol: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded teacher against itself: no difference; against images of noise: one that is certain."""
    noise = pictures(tmp_path / "noise", ("L", 8), count=60)
    for path in sorted(noise.glob("*.png")):
        draw = np.random.default_rng(int(path.stem))
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    distill(method="dmd2", preset="digits", steps=2, sample_every=0, device="cpu", out=str(tmp_path / "student"))
    command = ["compare", "digits", "digits", str(noise), str(tmp_path / "student"), "--protocol", protocol()]
    command += ["--steps", "2"]  # of the teachers
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    same, other, _ = (d for d in report["differences"] if d["metric"] == "frechet distance")
    assert [row["steps"] for row in report["rows"]] == [2, 2, None, 1]
    assert same["difference"] == same["95% from"] == same["to"] == 0 and same["p"] == 1
    assert other["95% from"] > 0 and other["p"] < 0.02
    assert [row["ms per image"] is None for row in report["rows"]] == [False, False, True, False]
    for name in ("grid.png", "quality.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 100
    assert "| model |" in (tmp_path / "out" / "table.md").read_text()
    assert main(["compare", "digits", "--protocol", protocol()]) == 2
    assert "give two or more" in capsys.readouterr().err
