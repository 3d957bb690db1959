"""Aspect-ratio buckets: which sizes there are, what goes where, and batches of one bucket whatever divides them."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffdistill import UserError, distill, encode, make_pairs
from diffdistill.commands.cli import main
from diffdistill.config import TrainConfig
from diffdistill.data.batches import batches
from diffdistill.data.buckets import bucket_batch, bucket_sizes, in_buckets
from diffdistill.data.encoded import Bucketed, open_encoded
from diffdistill.families import load_teacher
from diffdistill.scaffold.method import Batch
from tests import tiny_a

SIZES = {"wide": (140, 40), "square": (66, 60), "tall": (40, 150)}  # width and height of the images
BUCKETS = {"64x64": "square", "32x128": "wide", "128x32": "tall"}
COLOURS = {"wide": "red", "square": "green", "tall": "blue"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("buckets")
    tiny_a.stable_diffusion().save_pretrained(root / "stable_diffusion")
    tiny_a.sdxl().save_pretrained(root / "sdxl")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of each ratio, in turn."""
    folder, rows = tmp_path_factory.mktemp("images"), []
    for i in range(15):
        kind = list(SIZES)[i % 3]
        Image.new("RGB", SIZES[kind], COLOURS[kind]).save(folder / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"{kind} {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def encoded(teachers: Path, images: Path, out: Path, name: str = "stable_diffusion", **more: Any) -> Path:
    shared = {"resolution": 64, "buckets": True, "batch_size": 4, "shard_size": 3, "device": "cpu"}
    return encode(teacher=teachers / name, data=images, out=out, **{**shared, **more})


def test_the_sizes_are_those_of_sdxl() -> None:
    sizes = bucket_sizes((1024, 1024))
    assert sizes[0] == (1024, 1024) and len(sizes) == len(set(sizes)) == 17
    assert {(960, 1088), (896, 1152), (832, 1216), (768, 1344), (640, 1600), (512, 2048), (2048, 512)} <= set(sizes)
    assert all(0.93 < height * width / 1024**2 <= 1 for height, width in sizes)
    assert bucket_sizes((720, 1280))[0] == (720, 1280)
    held = in_buckets([(300, 300), (3000, 2000), (100, 900)], sizes)
    assert held == {(1024, 1024): [0], (1216, 832): [1], (512, 2048): [2]}


def test_every_batch_is_of_one_bucket_and_every_sample_has_its_turn() -> None:
    counts, starts = [11, 3, 6], [0, 11, 14, 20]
    seen: set[int] = set()
    for step in range(60):
        rows = bucket_batch(counts, 2, step, seed=3).tolist()
        (bucket,) = {next(k for k in range(3) if starts[k] <= row < starts[k + 1]) for row in rows}
        assert len(set(rows)) == 2 and bucket in (0, 1, 2)
        seen |= set(rows)
        # Two processes see what one sees with twice the batch.
        halves = [bucket_batch(counts, 1, step, seed=3, rank=rank, world_size=2).tolist() for rank in (0, 1)]
        assert halves[0] + halves[1] == rows
    assert seen == set(range(20))
    one = [row for step in range(9) for row in bucket_batch(counts, 2, step, seed=3).tolist()]
    assert len(set(one)) == 18  # an epoch: five batches, one and three, none twice
    other = [row for step in range(9, 18) for row in bucket_batch(counts, 2, step, seed=3).tolist()]
    assert len(set(other)) == 18 and one != other
    with pytest.raises(UserError, match="batch_size: the steps take 12 samples of one bucket, and the largest has 11"):
        bucket_batch(counts, 6, 0, seed=3, world_size=2)


def test_each_image_goes_to_the_bucket_of_its_ratio(teachers: Path, images: Path, tmp_path: Path) -> None:
    folder = encoded(teachers, images, tmp_path / "out")
    data = open_encoded(folder)
    assert isinstance(data, Bucketed) and len(data) == 15 and data.counts == [5, 5, 5]
    assert {name: count for name, count in data.settings["buckets"].items()} == dict.fromkeys(BUCKETS, 5)
    for k, (size, kind) in enumerate(BUCKETS.items()):
        height, width = map(int, size.split("x"))
        rows = data.get(torch.arange(5 * k, 5 * k + 5))
        assert rows.x0 is not None and rows.x0.shape == (5, 4, height // 2, width // 2)
        # Row for row what a folder of that size alone has of the same images.
        alone = open_encoded(encoded(teachers, images, tmp_path / size, buckets=False, resolution=size))
        own = alone.get(torch.tensor([i for i in range(15) if list(SIZES)[i % 3] == kind]))
        assert own.x0 is not None and torch.equal(own.x0, rows.x0)
        assert all(torch.equal(own.cond[name], rows.cond[name]) for name in own.cond)
    assert data.get(torch.tensor([0, 14])).x0 is None  # of two sizes
    with pytest.raises(IndexError):
        data.get(torch.tensor([15]))


def test_sdxl_is_told_the_size_of_its_bucket(teachers: Path, images: Path, tmp_path: Path) -> None:
    data = open_encoded(encoded(teachers, images, tmp_path / "out", "sdxl"))
    ids = data.get(torch.tensor([0, 5, 10])).cond["time_ids"]
    assert ids.tolist() == [[h, w, 0, 0, h, w] for h, w in ((64, 64), (32, 128), (128, 32))]


def test_a_stopped_run_goes_on_to_the_same_bytes(teachers: Path, images: Path, tmp_path: Path) -> None:
    whole, parts = (encoded(teachers, images, tmp_path / name) for name in ("whole", "parts"))
    (parts / "32x128" / "00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"00000.safetensors is missing or damaged; run `diffdistill encode` again"):
        open_encoded(parts)
    encoded(teachers, images, parts)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert len(files) == 3 * 3  # two shards and null for each
    assert all((whole / file).read_bytes() == (parts / file).read_bytes() for file in files)
    with pytest.raises(UserError, match="holds encoded prompts made with buckets"):
        encoded(teachers, images, parts, buckets=False)


def test_noise_has_the_size_of_the_steps_bucket(teachers: Path, images: Path, tmp_path: Path) -> None:
    data = open_encoded(encoded(teachers, images, tmp_path / "out"))
    teacher = load_teacher(teachers / "stable_diffusion", resolution=64)
    config = TrainConfig(batch_size=2)

    def drawn(rank: int, world: int, batch_size: int) -> list[Batch]:
        place: Any = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
        step = batches(dataclasses.replace(config, batch_size=batch_size), teacher, data, place)
        return [step(i) for i in range(12)]

    whole = drawn(0, 1, 2)
    assert len({batch.shape for batch in whole}) == 3
    for batch, *parts in zip(whole, drawn(0, 2, 1), drawn(1, 2, 1), strict=True):
        assert batch.x0 is not None and batch.shape == batch.x0.shape[1:] == batch.randn("z").shape[1:]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.randn("z") for part in parts]), batch.randn("z"))


def test_training_on_buckets_resumes_to_the_same_bits(teachers: Path, images: Path, tmp_path: Path) -> None:
    prompts = encoded(teachers, images, tmp_path / "out", "sdxl")
    options: dict[str, Any] = {
        "teacher": teachers / "sdxl", "prompts": prompts, "batch_size": 2, "gan_weight": 0.1, "update_ratio": 1,
        "sample_every": 2, "device": "cpu", "lr_schedule": "constant", "student_lr": 1e-3, "ema": 0.0,
    }  # fmt: skip
    whole = distill("dmd2", **options, steps=4, out=tmp_path / "whole").student
    distill("dmd2", **options, steps=2, out=tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    one, other = load_file(whole / name), load_file(tmp_path / "run" / "student" / name)
    before = load_file(teachers / "sdxl" / name)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not all(torch.equal(one[key], before[key]) for key in one)
    assert json.loads((whole / "diffdistill.json").read_text())["resolution"] == 64
    # In parts of a batch, which is the same step to rounding.
    parts = load_file(distill("dmd2", **options, steps=4, accumulate=2, out=tmp_path / "parts").student / name)
    moved = max(float((one[key] - before[key]).abs().max()) for key in one)
    assert max(float((one[key] - parts[key]).abs().max()) for key in one) < 0.1 * moved


def test_what_buckets_cannot_do_is_one_line(
    teachers: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"^buckets: prompts alone have no ratio; leave it out"):
        encode(teacher=teachers / "sdxl", prompts=tmp_path / "prompts.txt", buckets=True, out=tmp_path / "a")
    prompts = encoded(teachers, images, tmp_path / "out", count=7)
    assert open_encoded(prompts).settings["buckets"] == {"64x64": 2, "32x128": 3, "128x32": 2}
    shared: dict[str, Any] = {"teacher": teachers / "stable_diffusion", "prompts": prompts, "device": "cpu"}
    with pytest.raises(UserError, match=r"^prompts: .* has buckets, and pairs are of one size"):
        make_pairs(**shared, count=2, out=tmp_path / "pairs")
    run = {**shared, "steps": 1, "sample_every": 0, "out": tmp_path / "run"}
    with pytest.raises(UserError, match=r"^prompts: .* has buckets, and of lora_guidance the trajectories that it"):
        distill("lora_guidance", **run, batch_size=2, trajectories=True)
    with pytest.raises(UserError, match=r"^batch_size: the steps take 4 samples of one bucket, and the largest has 3"):
        distill("dmd2", **run, batch_size=4)
    capsys.readouterr()
    distill("dmd2", **run, batch_size=3, update_ratio=1)
    said = "2 of 3 buckets (4 of 7 samples) have less than a batch, which is of one bucket, and are not trained on"
    assert said in capsys.readouterr().err
