"""`eval` of a model that changes images: what it is given to change, and what it is to make of it, go together."""

import json
from pathlib import Path

import pytest
import torch

from diffdistill import distill, evaluate, speed
from diffdistill.data.encoded import encode
from diffdistill.data.shapes import HELD_OUT, caption, draw_edits
from diffdistill.errors import UserError
from diffdistill.eval.choice import Wishes, choose, facts_of
from diffdistill.eval.judge import Judge
from diffdistill.eval.models import SamplingOptions, open_model
from diffdistill.pictures import image_grid, save_png
from tests import tiny_d


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("edits")
    tiny_d.instruct_pix2pix().save_pretrained(root / "teacher")
    shared = {"teacher": str(root / "teacher"), "device": "cpu"}
    prompts = encode(**shared, data="edits:8", resolution=32, out=str(root / "prompts"))
    options = {"method": "sid", "prompts": str(prompts), "batch_size": 2, "steps": 1, "sample_every": 0}
    distill(**shared, **options, out=str(root / "run"))
    return root / "run"


def folder_of(edits: int, path: Path) -> Path:
    """The first drawn edits as files."""
    drawn = draw_edits(0, edits)
    rows = []
    for i in range(edits):
        for name, images in ((f"{i}.png", drawn.images), (f"{i}.condition.png", drawn.conditions)):
            save_png(image_grid(images[i : i + 1], 1), path / name)
        rows.append({"file_name": f"{i}.png", "condition_image": f"{i}.condition.png", "text": drawn.captions[i]})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def test_drawn_edits_are_read_by_rules_beside_the_teacher(run: Path) -> None:
    choice = choose(facts_of(run), Wishes(count=4))
    assert choice.protocol.name == "edits"
    judge = Judge(choice.options())
    drawn = draw_edits(HELD_OUT, 4)
    _, captions, pictures = judge.conditions(None, [3, 1])
    assert captions == [drawn.captions[3], drawn.captions[1]]
    assert torch.allclose(pictures, drawn.conditions[[3, 1]].clamp(-1, 1))
    assert judge.described([3]) == [caption(*drawn.attributes[3].tolist())]
    # The stock pipeline is given them, one for each prompt.
    model = open_model(run, SamplingOptions(eight_bit=False))
    one = model.draw([3, 1], 0, None, captions, pictures)
    other = model.draw([3, 1], 0, None, captions, pictures.flip(0))
    assert one.shape == (2, 3, 32, 32) and not torch.equal(one, other)
    table = evaluate(run, count=4, teacher_steps=(1,), bootstrap=0, device="cpu")
    assert [score.model.partition(" ")[0] for score in table.scores] == ["unchanged,", "drawn,", "teacher", "student"]
    # Our own rows and the stock pipeline's are of the same pictures.
    assert table.scores[3].values["colour %"] is not None


def test_folders_of_ones_own_are_compared_in_pixels(run: Path, tmp_path: Path) -> None:
    folder = folder_of(12, tmp_path)
    choice = choose(facts_of(run), Wishes(data=str(folder), count=14))
    assert choice.protocol.name == "pixels" and choice.conditions is not None
    _, captions, pictures = Judge(choice.options()).conditions(None, [13])
    drawn = draw_edits(0, 12)
    assert captions == [drawn.captions[1]]
    assert float((pictures - drawn.conditions[[1]]).abs().max()) < 0.02


def test_what_is_missing_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("make it red\n")
    for options, message in (
        ({"prompts": str(tmp_path / "a.txt")}, "changes images; give images with captions and condition images"),
        ({"data": "shapes"}, "'shapes' has no condition images"),
        ({"protocol": "shapes"}, "changes images, and none are known|changes images, and the protocol"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(run, **options, count=4, teacher_steps=(1,), device="cpu", out=str(tmp_path / "out"))


def test_its_speed_is_measured(run: Path) -> None:
    table = speed([run], batch_sizes=(1, 2), repeats=1, device="cpu", out=str(run / "speed"))
    assert {(row["model"], row["batch"]) for row in table.rows} == {(n, b) for n in ("teacher", "run") for b in (1, 2)}
    assert all(min(row["seconds a batch"]) > 0 for row in table.rows)
