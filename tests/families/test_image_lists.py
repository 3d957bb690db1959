"""Families whose stock pipeline takes a list of images for a prompt, against it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock_of_plus

from diffdistill.errors import UserError
from diffdistill.exact.stock import Case, gap, middle, ours, stock
from diffdistill.families import FAMILIES, Prompt, qwen_image_edit
from diffdistill.families._family import example_images
from tests.families import test_families
from tests.families.test_families import GUIDED, PROMPT, SIZES

made = test_families.made

LISTS = [
    *(("flux2", 1), ("flux2", 2), ("flux2_dev", 2), ("qwen_image_edit_plus", 2), ("qwen_image_edit_plus zero", 3)),
]
SCALES = [(*pair, g) for pair in LISTS for g in (1.0, 5.0) if g == 1 or pair[0] in GUIDED]


def spots(count: int, size: tuple[int, int]) -> torch.Tensor:
    """(count, 3, H, W) images of 8 bits with a bright half each, no two alike."""
    images = example_images(count, size)
    images[:, :, : size[0] // 2] = 1
    return torch.stack([image.roll((17 * i, 13 * i), (1, 2)) * (-1) ** i for i, image in enumerate(images)])


def test_every_family_that_takes_lists_is_here() -> None:
    assert {name.split()[0] for name, _ in LISTS} == {name for name, family in FAMILIES.items() if family.several}


@pytest.mark.parametrize(("name", "count", "guidance"), SCALES)
def test_same_samples_with_a_list_of_images(made: Callable[..., Case], name: str, count: int, guidance: float) -> None:
    times = 64 // SIZES[name.split()[0]] if name[:5] == "flux2" else 1  # the least that its pipeline takes
    case = made(name, (times, 2 * times))
    size, text, prompts = case.family.pixels(case.folder, case.teacher.shape), case.family.text, [PROMPT, "cat"]
    assert text is not None
    asked = Prompt(size, images=spots(2 * count, size).unflatten(0, (2, count)))
    with torch.no_grad():
        cond = text.encode(case.pipe, prompts, asked)
    rows = [{key: value[i : i + 1] for key, value in cond.items()} for i in range(2)]
    for prompt, pictures, row in zip(prompts, asked.lists, rows, strict=True):
        call = {**case.call(guidance), "prompt": prompt, "image": pictures}
        one = replace(case, call=lambda g, call=call: call, cond=row)
        latents, _, grid = stock(one, guidance)
        assert gap(ours(one, guidance, grid), latents) < 4e-6
        if count > 1:  # and the network hears which is which
            turned = replace(one, cond=row | {"image_latents": row["image_latents"].flip(1)})
            assert gap(ours(turned, guidance, grid), latents) > 4e-5
    # In a batch each hears its own, in the order of its list.
    x, t, _ = middle(case, 2)
    denoiser = case.teacher.denoiser
    both = denoiser(x, t, cond).x0
    assert gap(denoiser(x[1:], t[1:], rows[1]).x0, both[1:]) < 1e-4
    assert gap(denoiser.features(x[1:], t[1:], rows[1]), denoiser.features(x, t, cond)[1:]) < 1e-4


@torch.no_grad()
def test_the_text_encoder_is_shown_pictures_of_the_samples_shape(
    made: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, seen = made("qwen_image_edit_plus", (1, 2)), []
    monkeypatch.setattr(stock_of_plus, "calculate_dimensions", lambda area, ratio: (int(16 * ratio), 16))
    monkeypatch.setattr(qwen_image_edit, "both_words", lambda pipe, prompts, prompt, shown: seen.extend(shown) or {})
    size = case.family.pixels(case.folder, case.teacher.shape)
    assert case.family.text is not None
    case.family.text.encode(case.pipe, ["a", "b"], Prompt(size, images=spots(4, size).unflatten(0, (2, 2))))
    assert len(seen) == 2 and all(picture.width == 2 * picture.height for row in seen for picture in row)


@torch.no_grad()
def test_features_are_the_samples_and_not_those_of_images_behind_it(made: Callable[..., Case]) -> None:
    case = made("flux2", 2)
    x, t, cond = middle(case, 1)
    cond = cond | {"image_latents": torch.randn(1, 2, *x.shape[1:])}
    changed = x.clone()
    changed[:, :, 4, 6] += 3
    moved = case.teacher.denoiser.features(changed, t, cond) - case.teacher.denoiser.features(x, t, cond)
    assert divmod(int(moved.abs().sum(1).argmax()), moved.shape[3]) == (4, 6)


def test_an_image_that_the_pipeline_refuses_is_one_line(made: Callable[..., Case]) -> None:
    case = made("flux2")
    size, text = case.family.pixels(case.folder, case.teacher.shape), case.family.text
    assert text is not None
    with pytest.raises(UserError, match=r"^resolution: the pipeline takes no such image \(Image too small: 32"):
        text.encode(case.pipe, [PROMPT], Prompt(size, images=example_images(1, size)))
