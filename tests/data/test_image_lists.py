"""Several condition images a prompt: from a list in a row of data to what is trained, drawn and judged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffdistill import distill, evaluate, sample
from diffdistill.data.encoded import encode, open_encoded
from diffdistill.data.images import open_data
from diffdistill.errors import UserError
from diffdistill.eval.choice import Wishes, choose, facts_of
from diffdistill.eval.judge import Judge
from diffdistill.eval.models import SamplingOptions, open_model
from tests import tiny
from tests.players.tiny import apart, ours

SIDE = 64
TEXTS = ["a red square", "a cat", "two dogs", *(f"thing {i}" for i in range(7))]  # 10 are the least that eval takes


def picture(i: int) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (11 * i, 200, 90))
    image.paste((0, 0, 255), (0, 0, SIDE // 2, 4 + 2 * i))
    return image


def listed(folder: Path, count: int | list[int] = 2) -> Path:
    """Images 0, 1, .. made from 3 and 4, 5 and 6, .. which a metadata.jsonl names as lists."""
    (folder / "from").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for i, text in enumerate(TEXTS):
        each = count if isinstance(count, int) else count[i % 3]
        picture(i).save(folder / f"{i}.png")
        names = [f"from/{i}-{k}.png" for k in range(each)]
        for k, name in enumerate(names):
            picture(3 + 2 * i + k).save(folder / name)
        rows.append({"file_name": f"{i}.png", "text": text, "condition_image": names})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = [{"prompt": row["text"], "condition_image": row["condition_image"]} for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.2, data with lists, and a student of both."""
    root = tmp_path_factory.mktemp("lists")
    tiny.PIPELINES["flux2"]().save_pretrained(root / "teacher")
    shared = {"teacher": str(root / "teacher"), "device": "cpu"}
    prompts = encode(**shared, data=str(listed(root / "data")), resolution=SIDE, out=str(root / "prompts"))
    options = {"method": "sid", "prompts": str(prompts), "resolution": SIDE, "batch_size": 2, "sample_every": 0}
    distill(**shared, **options, steps=1, student_lr=1e-3, warmup_steps=0, out=str(root / "run"))
    return root


def test_a_row_has_its_own_in_their_order(root: Path) -> None:
    samples = open_data(str(root / "data"), resolution=8, conditioned=True).get(torch.tensor([2, 0]))
    assert samples.conditions is not None and samples.conditions.shape == (2, 2, 3, 8, 8)
    for k, i in enumerate((2, 0)):
        for j in range(2):
            red = torch.tensor(11 * (3 + 2 * i + j)) / 127.5 - 1
            assert torch.allclose(samples.conditions[k, j, 0, -1, -1], red, atol=0.02)


def test_prompts_alone_are_encoded_with_the_same(root: Path) -> None:
    whole = open_encoded(root / "prompts")
    out = root / "alone"
    encode(teacher=str(root / "teacher"), prompts=str(root / "data" / "prompts.jsonl"), resolution=SIDE, out=str(out))
    alone, index = open_encoded(out), torch.arange(10)
    assert whole.has_images and not alone.has_images
    cond = whole.get(index).cond
    assert cond["image_latents"].shape[:2] == (10, 2)
    assert len({tuple(row.flatten().tolist()) for row in cond["image_latents"].flatten(0, 1)}) == 20
    for name, value in cond.items():
        assert torch.equal(value, alone.get(index).cond[name])


def test_the_student_is_drawn_from_lists_by_the_stock_pipeline_by_sample_and_by_eval(root: Path) -> None:
    run, data = root / "run", open_encoded(root / "prompts")
    cond, shape = data.get(torch.tensor([1])).cond, tuple(data.settings["shape"])
    expected = ours(run, cond, shape)
    student = run / "student"
    pipeline = DiffusionPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    files = [root / "data" / "from" / f"1-{k}.png" for k in range(2)]
    call = {"prompt": TEXTS[1], "image": [Image.open(file) for file in files], "output_type": "np"}
    call |= json.loads((student / "diffdistill.json").read_text())["call"]
    torch.manual_seed(5)
    drawn = torch.as_tensor(pipeline(**call, generator=torch.Generator().manual_seed(3)).images)
    assert apart(drawn, expected) < 1e-3
    assert (
        '[load_image(file).resize((64, 64)) for file in ["IMAGE 1", "IMAGE 2"]]' in (student / "README.md").read_text()
    )
    # `sample` gives the pipeline pairs in turn, and `eval` each prompt its own.
    names = [str(file) for file in files]
    both = sample(run, prompt=TEXTS[1], image=[*names, *names[::-1]], images_per_prompt=2, count=2).images
    first = sample(run, prompt=TEXTS[1], image=names, images_per_prompt=2, count=2).images
    turned = sample(run, prompt=TEXTS[1], image=names[::-1], images_per_prompt=2, count=2).images
    assert torch.equal(both, torch.cat([first[:1], turned[1:]])) and not torch.equal(first[1:], turned[1:])
    choice = choose(facts_of(run), Wishes(count=3))
    assert choice.conditions is not None and choice.protocol.count == 3
    _, captions, pictures = Judge(choice.options()).conditions(None, [0, 1])
    model = open_model(run, SamplingOptions(eight_bit=False))
    images = model.draw([0, 1], 0, None, captions, pictures)
    again = model.draw([1], 0, None, captions[1:], pictures[1:])
    assert torch.allclose(images[1:], again, atol=1e-4) and captions[1] == TEXTS[1]
    assert not torch.equal(again, model.draw([1], 0, None, captions[1:], pictures[:1]))
    table = evaluate(run, count=2, teacher_steps=(1,), bootstrap=0, device="cpu", out=str(root / "table"))
    assert [score.model.partition(" ")[0] for score in table.scores] == ["teacher", "student"]


def test_without_images_it_is_a_model_of_text(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    plain = encode(teacher=str(root / "teacher"), prompts=str(tmp_path / "a.txt"), out=str(tmp_path / "out"))
    assert set(open_encoded(plain).get(torch.arange(1)).cond) == {"encoder_hidden_states"}
    assert choose(facts_of(root / "teacher"), Wishes(prompts=str(tmp_path / "a.txt"), count=2)).conditions is None


def test_what_does_not_fit_is_one_line(root: Path, tmp_path: Path) -> None:
    tiny.PIPELINES["instruct_pix2pix"]().save_pretrained(tmp_path / "one")
    uneven = listed(tmp_path / "uneven", [2, 2, 1])
    shared = {"resolution": SIDE, "out": str(tmp_path / "out"), "device": "cpu"}
    flux2, one = str(root / "teacher"), str(tmp_path / "one")
    for teacher, options, message in (
        (flux2, {"data": str(uneven)}, "line 3 has 1 condition images, and the first row has 2; give all rows as many"),
        (flux2, {"prompts": str(uneven / "prompts.jsonl")}, "line 3 has 1 condition images, and the first row has 2"),
        (one, {"data": str(root / "data")}, "has 2 condition images a row, and instruct_pix2pix takes one; give one"),
        (one, {"prompts": str(root / "data" / "prompts.jsonl")}, "has 2 condition images a row, and instruct_pix2pix"),
    ):
        with pytest.raises(UserError, match=message) as error:
            encode(teacher=teacher, **options, **shared)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    names = [str(root / "data" / "from" / f"0-{k}.png") for k in range(2)]
    drawn: dict[str, Any] = {"prompt": "a", "steps": 1, "count": 1, "device": "cpu"}
    for model, given, each, message in (
        (flux2, names[:1], 2, "image: 1 were given, and --images-per-prompt is 2; give 2, or a multiple"),
        (flux2, [], 2, "image: 0 were given, and --images-per-prompt is 2"),
        (one, names, 2, "images_per_prompt: 2 was given, and .* takes one image a prompt; give 1"),
    ):
        with pytest.raises(UserError, match=message):
            sample(model, **drawn, image=given, images_per_prompt=each)
    with pytest.raises(UserError, match=r"has 2 condition images a row, and .* takes one; give one"):
        choose(facts_of(one), Wishes(data=str(root / "data")))
