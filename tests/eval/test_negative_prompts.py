"""What a guided teacher of text is led away from, and arguments of the stock call that are None."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import distill, sample
from diffdistill.errors import UserError
from diffdistill.eval.ladder import ladder_models
from diffdistill.eval.models import SamplingOptions, open_model
from diffdistill.eval.sample import SampleRequest, draw_samples
from diffdistill.families import load_pipeline
from diffdistill.rng import image_generators
from tests.players.tiny import BUILDERS, SIZES, draw_small

WORDS = "a red square"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny pipeline, in its folder."""
    root = tmp_path_factory.mktemp("saved")

    def make(name: str) -> Path:
        if not (root / name).exists():
            BUILDERS[name]().save_pretrained(root / name)
        return root / name

    return make


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_small(monkeypatch)


@torch.no_grad()
def stock(folder: Path, **call: Any) -> Tensor:
    """The stock pipeline's first image (1, 3, H, W) in [-1, 1]."""
    generator = image_generators(0, [0])
    call = {"num_inference_steps": 2, **call}
    pictures = load_pipeline(folder)(prompt=WORDS, generator=generator, output_type="np", **call)
    return 2 * torch.from_numpy(pictures.images).permute(0, 3, 1, 2) - 1


GUIDED = {"stable_diffusion": "guidance_scale", "sdxl": "guidance_scale", "qwen_image": "true_cfg_scale"}


@pytest.mark.parametrize("name", GUIDED)
def test_a_guided_teacher_is_led_away_from_the_negative_prompt(name: str, saved: Callable[[str], Path]) -> None:
    folder = saved(name)
    makers = {"negative_prompt": " "} if name == "qwen_image" else {}
    expected = {
        "ugly": stock(folder, **{GUIDED[name]: 5.0, "negative_prompt": "ugly"}),
        None: stock(folder, **{GUIDED[name]: 5.0, **makers}),
    }
    assert float((expected["ugly"] - expected[None]).abs().max()) > 2e-4
    for negative, image in expected.items():
        drawn = sample(
            folder, prompt=WORDS, count=1, steps=2, guidance_scale=5.0, negative_prompt=negative, device="cpu"
        )
        assert torch.allclose(drawn.images, image, atol=1e-5)
        options = SamplingOptions(steps=2, guidance_scale=5.0, negative_prompt=negative, eight_bit=False)
        model = open_model(folder, options)
        assert model.call.get("negative_prompt", None) == (negative or makers.get("negative_prompt"))
        two = model.draw([0, 1], 0, None, [WORDS, "two dogs"])
        assert torch.allclose(two[:1], image, atol=1e-4)


def test_a_scale_that_is_an_input_leaves_guidance_to_the_other(saved: Callable[[str], Path]) -> None:
    folder = saved("flux")
    drawn = sample(folder, prompt=WORDS, count=1, steps=2, guidance_scale=5.0, negative_prompt="ugly", device="cpu")
    expected = stock(folder, guidance_scale=3.5, true_cfg_scale=5.0, negative_prompt="ugly")
    assert torch.allclose(drawn.images, expected, atol=1e-5)


def test_a_ladder_is_led_away_as_the_student_was_taught(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder, prompts = saved("stable_diffusion"), tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo")
    student = distill(
        "dmd2", teacher=str(folder), prompts=str(prompts), negative_prompt="ugly", guidance_scale=5.0, steps=1,
        batch_size=2, update_ratio=1, sample_every=0, device="cpu", out=str(tmp_path / "run"),
    ).student  # fmt: skip
    protocol: Any = SimpleNamespace(prompts="captions", name="ours", count=1)
    expected = stock(folder, guidance_scale=5.0, negative_prompt="ugly")
    taught = ladder_models(student, SamplingOptions(eight_bit=False), None, (2,), protocol)
    assert [model.name for model in taught] == ["teacher, guidance 5 away from 'ugly'", "student"]
    led = SamplingOptions(guidance_scale=5.0, negative_prompt="ugly", eight_bit=False)
    alone = ladder_models(folder, led, None, (2,), protocol)
    usual = ladder_models(folder, SamplingOptions(guidance_scale=5.0, eight_bit=False), None, (2,), protocol)
    for models, same in ((taught, True), (alone, True), (usual, False)):
        image = models[0].draw([0], 0, None, [WORDS])
        assert (float((image - expected).abs().max()) < 1e-3) == same
    assert taught[0].call == alone[0].call != usual[0].call
    with pytest.raises(UserError, match=r"negative_prompt: 'ugly' was given, and a student has its own"):
        ladder_models(student, SamplingOptions(negative_prompt="ugly"), None, (2,), protocol)


def test_where_a_negative_prompt_changes_nothing(saved: Callable[[str], Path]) -> None:
    folder = saved("stable_diffusion")
    protocol: Any = SimpleNamespace(prompts="captions", name="ours", count=1)
    for call in (
        lambda: sample(folder, prompt=WORDS, negative_prompt="ugly"),
        lambda: open_model(folder, SamplingOptions(negative_prompt="ugly")),
        lambda: ladder_models(folder, SamplingOptions(negative_prompt="ugly"), None, (2,), protocol),
    ):
        with pytest.raises(UserError, match=r"negative_prompt: without guidance it changes nothing"):
            call()
    for model in ("digits", saved("dit")):
        for call in (
            lambda model=model: sample(model, negative_prompt="ugly", guidance_scale=2.0),
            lambda model=model: open_model(model, SamplingOptions(guidance_scale=2.0, negative_prompt="ugly")),
        ):
            with pytest.raises(UserError, match=r"negative_prompt: .* takes no"):
                call()


def test_sana_is_drawn_without_its_default_instruction(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Its call must be given `complex_human_instruction=None`: left out, the pipeline has pages of its own."""
    folder, prompts = saved("sana"), tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo")
    usual = {"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}
    size = {"height": SIZES["sana"], "width": SIZES["sana"]}
    student = distill(
        "dmd2", teacher=str(folder), prompts=str(prompts), steps=1, batch_size=2, update_ratio=1, sample_every=0,
        device="cpu", resolution=SIZES["sana"], out=str(tmp_path / "run"),
    ).student  # fmt: skip
    assert float((stock(folder, **usual) - stock(folder, **usual, complex_human_instruction=None)).abs().max()) > 1e-3
    for model, steps, call in ((folder, 2, usual), (student, 1, usual | size)):
        expected = stock(model, num_inference_steps=steps, **call, complex_human_instruction=None)
        chosen = steps if model == folder else None
        drawn = sample(model, prompt=WORDS, count=1, steps=chosen, device="cpu").images
        assert torch.allclose(drawn, expected, atol=1e-5)
        options = SamplingOptions(steps=chosen, eight_bit=False, strict=model == student)  # as eval, and as compare
        assert torch.allclose(open_model(model, options).draw([0], 0, None, [WORDS]), expected, atol=1e-5)


def test_images_with_transparency_are_seen_on_white(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """By `sample` and by the judge, as by whoever opens the pipeline's own picture."""
    folder = saved("qwen_image21")
    pipeline = load_pipeline(folder)
    call = {"sigmas": [1.0, 0.5], "height": 64, "width": 64, "output_type": "np"}
    picture = pipeline(WORDS, generator=image_generators(0, [0]), **call).images[0]
    assert picture.shape == (64, 64, 4) and picture[..., 3].min() < 0.9
    expected = torch.tensor(picture[..., :3] * picture[..., 3:] + 1 - picture[..., 3:]).permute(2, 0, 1)[None]
    drawn = draw_samples(folder, SampleRequest(prompts=[WORDS], count=1, steps=2, resolution=64)).images
    assert drawn.shape == expected.shape and (drawn - (2 * expected - 1)).abs().max() < 1e-4
    judged = open_model(folder, SamplingOptions(steps=2, eight_bit=False)).draw([0], 0, None, [WORDS])
    assert judged.shape == expected.shape and (judged - (2 * expected - 1)).abs().max() < 1e-4
