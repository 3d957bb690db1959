"""Wan's image to video: what its network hears of the image, where the image comes from, and what is refused."""

import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import diffdistill
from diffdistill import UserError, distill, encode
from diffdistill.commands.cli import main
from diffdistill.core.schedule import sampling_grid
from diffdistill.data.encoded import open_encoded
from diffdistill.exact.stock import gap, half_cases, half_check, ours, scales_of, stock_case, stock_checks
from diffdistill.families import _loading, load_teacher
from tests.data.test_conditions import picture
from tests.players.tiny import apart
from tests.players.tiny import ours as students
from tests.tiny_d import wan_i2v

PROMPT = "a red fox in the snow"
SIZE: dict[str, Any] = {"resolution": 16, "frames": 5}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """With the image beside the sample, or inside of it."""
    root = tmp_path_factory.mktemp("wan")

    @cache
    def saved(inside: bool = False) -> Path:
        wan_i2v(inside=inside).save_pretrained(root / f"{inside}")
        return root / f"{inside}"

    return saved


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos with captions, and prompts that name their first frames."""
    root = tmp_path_factory.mktemp("data")
    for i in range(2):
        (root / "videos" / f"{i}").mkdir(parents=True)
        (root / "videos" / f"{i}.txt").write_text(f"video {i}")
        for j in range(5):
            picture(i + j).save(root / "videos" / f"{i}" / f"{j}.png")
    rows = [{"prompt": f"video {i}", "condition_image": f"videos/{i}/0.png"} for i in range(2)]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize("name", ["image_latents", "encoder_hidden_states_image", "encoder_hidden_states"])
def test_the_network_hears_the_prompt_and_both_views_of_the_image(name: str, teacher: Callable[..., Path]) -> None:
    """Else the comparison with the stock pipeline would say nothing of them."""
    case = stock_case(teacher(), **SIZE, prompt=PROMPT)
    grid = sampling_grid(case.teacher.denoiser.schedule, 4)
    before = ours(case, 1.0, grid)
    case.cond = case.cond | {name: case.cond[name].flip(-1)}
    assert gap(ours(case, 1.0, grid), before) > 1e-3


def test_the_image_inside_of_the_sample_is_the_stock_pipelines(teacher: Callable[..., Path]) -> None:
    """Wan 2.2 TI2V: also in bfloat16, and decoded."""
    case = stock_case(teacher(True), **SIZE, prompt=PROMPT)
    for row in stock_checks(case, PROMPT):
        assert row.ok, row
    wide, half = half_cases(teacher(True), **SIZE, prompt=PROMPT)
    for scale in scales_of(wide):
        row = half_check(wide, half, scale)
        assert row.ok, row.said
    latents = ours(case, 5.0, sampling_grid(case.teacher.denoiser.schedule, 4))
    assert gap(latents[:, :, :1], case.cond["image_latents"]) < 1e-5


@pytest.mark.parametrize("inside", [False, True])
def test_a_students_video_begins_with_the_image(
    inside: bool, teacher: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """From videos over the training to the stock pipeline; prompts that name first frames are encoded the same."""
    shared: dict[str, Any] = {"teacher": teacher(inside), **SIZE, "device": "cpu"}
    whole = open_encoded(encode(**shared, data=data / "videos", out=tmp_path / "whole"))
    alone = open_encoded(encode(**shared, prompts=data / "prompts.jsonl", out=tmp_path / "alone"))
    index = torch.arange(2)
    for name, value in whole.get(index).cond.items():
        assert torch.equal(value, alone.get(index).cond[name]), name
    run = tmp_path / "run"
    student = distill(
        "dmd2", **shared, prompts=tmp_path / "whole", student_steps=2, update_ratio=1, batch_size=2, steps=2,
        student_lr=1e-3, warmup_steps=0, sample_every=0, out=run,
    ).student  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(student)
    call = json.loads((student / "diffdistill.json").read_text())["call"]
    torch.manual_seed(5)
    drawn = pipeline(
        Image.open(data / "videos" / "1" / "0.png"), "video 1", generator=torch.Generator().manual_seed(3),
        output_type="latent", **call,
    ).frames  # fmt: skip
    cond = whole.get(torch.tensor([1])).cond
    expected = students(run, cond, tuple(drawn.shape[1:]))
    assert apart(drawn, expected) < 1e-3
    assert apart(expected, students(run, cond, tuple(drawn.shape[1:]), trained=False)) > 1e-2
    card = (student / "README.md").read_text()
    assert "# pip install ftfy" in card and "# what the video begins with" in card and "image-to-video" in card


def test_sample_takes_the_image(
    teacher: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        picture(5 * i).save(tmp_path / f"{i}.png")
    picture(0, (64, 16)).save(tmp_path / "wide.png")
    one, other = (
        diffdistill.sample(
            teacher(), prompt="a", image=tmp_path / f"{i}.png", count=1, steps=1, **SIZE, out=tmp_path / "x.gif"
        ).videos
        for i in range(2)
    )
    assert one.shape == (1, 5, 3, 16, 16) and not torch.equal(one, other)
    with Image.open(tmp_path / "x.gif") as video:
        assert video.n_frames == 5
    capsys.readouterr()
    usual = ["sample", str(teacher()), "--prompt", "a", "--steps", "1", "--resolution", "16", "--frames", "5"]
    for arguments, message in (
        ([], "begins with an image; give --image FILE"),
        (["--image", str(tmp_path / "gone.png")], "does not exist"),
        (["--image", str(tmp_path / "wide.png")], "is 16x64, and the model makes 16x16 (height by width)"),
    ):
        assert main([*usual, *arguments, "--out", str(tmp_path / "out.png")]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0] and len(lines[0]) < 300, lines


def test_data_that_do_not_do_are_one_line(teacher: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "gone.jsonl").write_text('{"prompt": "one", "condition_image": "gone.png"}\n')
    (tmp_path / "none.jsonl").write_text('{"prompt": "one"}\n')
    for options, message in (
        ({"data": data / "videos", "frames": 9}, r"has 5 frames, and a sample has 9"),
        ({"data": data / "videos", "frames": 4}, r"frames: 4 is not one more than a multiple of 4.*; use 5"),
        ({"prompts": tmp_path / "a.txt"}, "reads a condition image with each prompt; give a .jsonl"),
        ({"prompts": tmp_path / "gone.jsonl"}, "line 1: the condition image 'gone.png' does not exist"),
        ({"prompts": tmp_path / "none.jsonl"}, "line 1 names no condition image, which this teacher"),
    ):
        with pytest.raises(UserError, match=message) as error:
            encode(**{"teacher": teacher(), **SIZE, "out": tmp_path / "out", **options})
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def _edited(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            partial(_edited, file="transformer/config.json", pos_embed_seq_len=514),
            "a network that reads a first and a last image is not supported",
        ),
        (
            partial(_edited, file="transformer/config.json", in_channels=33),
            "the network takes 33 channels; one that reads a first image takes 36",
        ),
        (
            partial(_edited, file="model_index.json", image_encoder=[None, None]),
            "the network reads what an image_encoder sees, and model_index.json names none",
        ),
    ],
)
def test_other_networks_are_refused(edit: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    wan_i2v().save_pretrained(tmp_path)
    edit(tmp_path)
    with pytest.raises(UserError, match=f"^teacher: {re.escape(message)}") as error:
        load_teacher(tmp_path, **SIZE, weights=False)
    assert len(str(error.value)) < 300


def test_a_missing_package_of_the_stock_pipeline_is_named(
    teacher: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(0).save(tmp_path / "a.png")
    monkeypatch.setattr(_loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"WanImageToVideoPipeline imports the package ftfy, .*; pip install ftfy$"):
        diffdistill.sample(teacher(), prompt="a", image=tmp_path / "a.png", count=1, **SIZE)
