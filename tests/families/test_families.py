"""Every family against its stock pipeline: tiny networks of the real architectures, random weights."""

import copy
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffdistill.catalogue import describe_method
from diffdistill.commands.cli import main
from diffdistill.core.guidance import guided, with_second_scale
from diffdistill.core.schedule import sampling_grid, student_levels
from diffdistill.data.encoded import decoder
from diffdistill.errors import UserError
from diffdistill.exact.stock import (
    Case,
    gap,
    half_cases,
    half_check,
    middle,
    ours,
    replaced,
    scales_of,
    stock,
    stock_case,
)
from diffdistill.families import (
    FAMILIES,
    Source,
    StudentRecord,
    family_of,
    kandinsky5,
    load_pipeline,
    load_teacher,
    prompt_of,
    with_null,
)
from diffdistill.pictures import opaque
from diffdistill.pipelines.card import model_card
from diffdistill.pipelines.export import save_pipeline
from diffdistill.players.lora import LoraSettings, lora_view
from diffdistill.players.sampler import Sampler
from tests import tiny, tiny_a, tiny_b, tiny_c, tiny_d

PROMPT = "a red fox in the snow"
FRAMES = tiny.FRAMES

# Other settings of the same family stand behind a space.
BUILDERS: dict[str, Callable[..., Any]] = {
    **tiny.PIPELINES,
    "stable_diffusion v": partial(tiny_a.stable_diffusion, prediction_type="v_prediction"),
    "stable_diffusion v zero_snr": partial(tiny_a.stable_diffusion, prediction_type="v_prediction", zero_snr=True),
    "stable_diffusion sample": partial(tiny_a.stable_diffusion, prediction_type="sample"),
    "pixart_alpha sized": partial(tiny_c.pixart_alpha, sample_size=128),
    "krea2 distilled": partial(tiny_c.krea2, is_distilled=True),
    "cogvideox sincos": partial(tiny_c.cogvideox, use_rotary_positional_embeddings=False),
    "cogvideox pairs": partial(tiny_c.cogvideox, patch_size_t=2, patch_bias=False),
    "kandinsky5 first": partial(tiny_d.kandinsky5, visual_cond=True),
    "qwen_image_edit_plus zero": partial(tiny_d.qwen_image_edit_plus, zero_cond_t=True),
    "wan two": partial(tiny_b.wan, boundary=0.8),
    "wan_i2v inside": partial(tiny_d.wan_i2v, inside=True),
    "wan_i2v two": partial(tiny_d.wan_i2v, boundary=0.8),
}
SIZES = tiny.SIZES
NAMES = [*tiny.PIPELINES]
CASES = [*BUILDERS]
LATENT = [name for name in CASES if name in FAMILIES and FAMILIES[name].autoencoder is not None]
TEXT = [name for name in LATENT if FAMILIES[name].text is not None]
GUIDED = [name for name in CASES if (family := FAMILIES.get(name.split()[0])) and family.guided is not None]
SCALES = [(name, g) for name in CASES for g in (1.0, 5.0) if g == 1 or name in GUIDED]
NEGATIVE = [
    name
    for name in TEXT
    if "negative_prompt" in inspect.signature(getattr(diffusers, FAMILIES[name].pipelines[0]).__call__).parameters
]
FLOW = (
    "sd3",
    "flux",
    "flux2",
    "flux2_dev",
    "flux_kontext",
    "chroma",
    "aura_flow",
    "krea2",
    "lumina2",
    "sana",
    "sana_video",
    "z_image",
    "wan",
    "wan_i2v",
    "hunyuan_video15",
    "ltx2",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """(name, times the usual height and width, or two numbers) -> that case."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def saved(name: str) -> tuple[Any, Path]:
        folder = root / name.replace(" ", "-")
        pipe = BUILDERS[name]()
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folder)
        return pipe, folder

    @cache
    def make(name: str, times: int | tuple[int, int] = 1) -> Case:
        pipe, folder = saved(name)
        height, width = (times, times) if isinstance(times, int) else times
        side = SIZES[name.split()[0]]
        resolution = f"{side * height}x{side * width}"
        return stock_case(folder, copy.copy(pipe), resolution=resolution, frames=FRAMES, prompt=PROMPT)

    return make


@pytest.mark.parametrize(("name", "guidance"), SCALES)
def test_same_samples_as_the_stock_pipeline(made: Callable[..., Case], name: str, guidance: float) -> None:
    case = made(name)
    latents, _, grid = stock(case, guidance)
    assert gap(ours(case, guidance, grid), latents) < 1e-4


@pytest.mark.parametrize("name", ["wan two", "wan_i2v two"])
def test_same_samples_with_a_scale_for_each_of_two_networks(made: Callable[..., Case], name: str) -> None:
    case = made(name)
    teacher = replace(case.teacher, denoiser=with_second_scale(case.teacher.denoiser, 5.0, 2.0))
    two = replace(case, teacher=teacher, call=lambda guidance: {**case.call(guidance), "guidance_scale_2": 2.0})
    latents, _, grid = stock(two, 5.0)
    assert gap(ours(two, 5.0, grid), latents) < 1e-4
    assert gap(ours(case, 5.0, grid), latents) > 1e-3


@pytest.mark.parametrize("name", LATENT)
def test_in_bfloat16_it_is_as_near_to_the_exact_latents_as_the_stock_pipeline(
    made: Callable[..., Case], name: str
) -> None:
    folder = made(name).folder
    wide, half = half_cases(folder, resolution=SIZES[name], frames=FRAMES, prompt=PROMPT)
    for scale in scales_of(wide):
        row = half_check(wide, half, scale)
        assert row.ok, row.said


@pytest.mark.parametrize("negative", ["a blurred picture", ""])
@pytest.mark.parametrize("name", NEGATIVE)
def test_same_samples_away_from_a_negative_prompt(made: Callable[..., Case], name: str, negative: str) -> None:
    case = made(name)
    assert case.family.text is not None
    call = {**case.call(5.0), "negative_prompt": negative}
    twin = copy.copy(case.teacher.denoiser)
    prompt = prompt_of(case.family, case.folder, case.teacher, negative=negative)
    encoders = load_pipeline(case.folder, leave_out=case.family.networks)
    with torch.no_grad():
        with_null(twin, case.family.text.null(encoders, prompt))
        cond = case.family.text.encode(encoders, [PROMPT], prompt)  # which may bring its own null condition
    led = replace(replaced(case, twin), call=lambda g: call, cond=cond)
    latents, _, grid = stock(led, 5.0)
    assert gap(ours(led, 5.0, grid), latents) < 1e-4
    # "" is what most have for no prompt; Qwen-Image has a space, this SDXL zeros, and Kandinsky a sentence.
    others = ("qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "sdxl", "kandinsky5")
    own = negative == "" and name not in others
    assert (gap(ours(case, 5.0, grid), latents) < 1e-4) == own


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("name", ["flux", "flux2_dev"])
def test_flux_is_told_its_guidance(made: Callable[..., Case], name: str, scale: float) -> None:
    case = made(name)
    usual, _, _ = stock(case, 1.0)
    call = {**case.call(1.0), "guidance_scale": scale}
    case = replace(case, call=lambda g: call, cond={**case.cond, "guidance": torch.tensor([scale])})
    latents, _, grid = stock(case, 1.0)
    assert gap(usual, latents) > 1e-3
    assert gap(ours(case, 1.0, grid), latents) < 1e-4


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_prompts_of_two_lengths_do_not_mind_each_other(made: Callable[..., Case], name: str) -> None:
    case = made(name)
    denoiser, prompts = case.teacher.denoiser, [PROMPT, "cat"]
    assert case.family.text is not None
    prompt = prompt_of(case.family, case.folder, case.teacher, 2)
    cond = case.family.text.encode(case.pipe, prompts, prompt)
    assert prompts == [PROMPT, "cat"]
    x, t, _ = middle(case, 2)
    both = guided(denoiser, 5.0)(x, t, cond).x0
    features = denoiser.features(x, t, cond)
    for i in range(2):
        own = prompt._replace(images=None if prompt.images is None else prompt.images[i : i + 1])
        one = case.family.text.encode(case.pipe, [prompts[i]], own)
        assert {k: v.shape for k, v in one.items()} == {k: v[:1].shape for k, v in cond.items()}
        assert gap(guided(denoiser, 5.0)(x[i : i + 1], t[:1], one).x0, both[i : i + 1]) < 1e-4
        assert gap(denoiser.features(x[i : i + 1], t[:1], one), features[i : i + 1]) < 1e-4


@pytest.mark.parametrize("name", TEXT)
def test_same_samples_at_twice_the_size(made: Callable[..., Case], name: str) -> None:
    case = made(name, 2)
    assert case.teacher.shape[-1] == 2 * made(name).teacher.shape[-1]
    scale = 5.0 if name in GUIDED else 1.0
    latents, _, grid = stock(case, scale)
    assert gap(ours(case, scale, grid), latents) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("times", [(1, 2), (3, 1)])
@pytest.mark.parametrize("name", TEXT)
def test_same_samples_of_another_height_than_width(
    made: Callable[..., Case], name: str, times: tuple[int, int], guidance: float
) -> None:
    case = made(name, times)
    side = made(name).teacher.shape[-1]
    assert case.teacher.shape[-2:] == (times[0] * side, times[1] * side)
    if guidance != 1 and name not in GUIDED:
        return
    latents, images, grid = stock(case, guidance)
    assert images.shape[-3:-1] == case.family.pixels(case.folder, case.teacher.shape)
    assert gap(ours(case, guidance, grid), latents) < 1e-4
    if name == "flux":  # whose shift is that of the number of tokens
        schedule = case.teacher.denoiser.schedule
        assert torch.allclose(schedule.angle(student_levels(schedule, 4)), grid[:-1], atol=1e-6)
    features = case.teacher.denoiser.features(*middle(case, 2))
    assert features.shape[2] * times[1] == features.shape[3] * times[0]
    first = images if images.ndim == 4 else images[:, 0]
    assert gap(decoder(case.teacher)(latents).clamp(-1, 1), first.permute(0, 3, 1, 2)) < 1e-4


def test_a_side_without_positions_is_refused(made: Callable[..., Case]) -> None:
    with pytest.raises(UserError, match="resolution: 16x64 is beyond this network's positions; use 48 a side"):
        load_teacher(made("aura_flow").folder, resolution="16x64")


@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize("name", FLOW)
def test_the_teachers_row_of_levels_is_the_pipelines(made: Callable[..., Case], name: str, steps: int) -> None:
    """FLUX.2's is shifted by a number that depends on the number of steps."""
    case = replace(made(name), steps=steps)
    _, _, grid = stock(case, 1.0)
    assert torch.allclose(grid, sampling_grid(case.teacher.denoiser.schedule, steps), atol=1e-5)


@pytest.mark.parametrize("name", GUIDED)
def test_the_comparison_sees_a_wrong_guidance_time_or_output(made: Callable[..., Case], name: str) -> None:
    case = made(name)
    denoiser = case.teacher.denoiser
    latents, _, grid = stock(case, 5.0)
    assert gap(ours(case, 4.0, grid), latents) > 1e-3
    for wrong in (
        lambda network, x, time, cond: denoiser.call(network, x, 1.01 * time, cond),
        lambda network, x, time, cond: -denoiser.call(network, x, time, cond),
    ):
        changed = copy.copy(denoiser)
        changed.call = wrong
        assert gap(ours(replaced(case, changed), 5.0, grid), latents) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_a_discriminator_can_read_features(made: Callable[..., Case], name: str) -> None:
    case = made(name)
    features = case.teacher.denoiser.features(*middle(case, 2))
    assert features.ndim == 4 and len(features) == 2 and features.isfinite().all()
    assert features.shape[2] == features.shape[3] > 1 or case.family.videos


@pytest.mark.parametrize("name", ["chroma", "krea2", "lumina2", "z_image"])
@torch.no_grad()
def test_features_lie_where_the_image_has_them(made: Callable[..., Case], name: str) -> None:
    """Of networks in which other tokens stand before or behind the image's."""
    case = made(name)
    x, t, cond = middle(case, 1)
    changed = x.clone()
    changed[:, :, 2:4, 4:6] += 3
    moved = case.teacher.denoiser.features(changed, t, cond) - case.teacher.denoiser.features(x, t, cond)
    assert divmod(int(moved.abs().sum(1).argmax()), moved.shape[3]) == (1, 2)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_players_start_as_the_teacher(made: Callable[..., Case], name: str) -> None:
    """In training mode too, where DiT would drop labels, and as LoRA on the layers that the family names."""
    case = made(name)
    x, t, cond = middle(case, 16)
    denoiser = copy.deepcopy(case.teacher.denoiser)
    expected = denoiser(x, t, cond).x0
    student = replaced(case, denoiser).teacher.player("student")
    assert student.network.training and gap(student(x, t, cond).x0, expected) < 1e-5
    lora = lora_view(denoiser, LoraSettings(2, targets=case.family.lora_targets)).train()
    assert gap(lora(x, t, cond).x0, expected) < 1e-5


@pytest.mark.parametrize("name", LATENT)
@torch.no_grad()
def test_the_autoencoder_is_used_as_the_pipeline_uses_it(made: Callable[..., Case], name: str) -> None:
    case = made(name)
    latents, images, _ = stock(case, 1.0)
    first = images if images.ndim == 4 else images[:, 0]
    decoded = decoder(case.teacher)(latents).clamp(-1, 1)
    assert gap(decoded, first.permute(0, 3, 1, 2)) < 1e-4

    autoencoder, vae = case.family.autoencoder, case.pipe.vae
    assert autoencoder is not None
    size = case.family.pixels(case.folder, case.teacher.shape)
    pictures = torch.rand(2, 3, *([FRAMES] if len(case.teacher.shape) == 4 else []), *size) * 2 - 1
    assert autoencoder.channels(dict(vae.config)) == case.teacher.shape[0]
    if not autoencoder.encodes:
        return
    encoded = autoencoder.encode(vae, pictures)
    assert encoded.shape == (2, *case.teacher.shape)
    again = autoencoder.decode(vae, encoded)
    lifted = pictures[:, :, None] if type(vae).__name__ == "AutoencoderKLQwenImage" else pictures
    if type(vae).__name__ == "AutoencoderKLQwenImage21":  # of images that say how opaque they are
        lifted = torch.cat([pictures, torch.ones_like(pictures[:, :1])], 1)[:, :, None]
    plain = torch.cat([vae(one).sample for one in lifted.split(1)])
    if plain.shape[1] == 4:
        plain = 2 * opaque(plain.clamp(-1, 1) / 2 + 0.5) - 1
    assert gap(again, plain.reshape(again.shape)) < 1e-4


@pytest.mark.parametrize("name", LATENT)
def test_a_size_that_does_not_fit_names_one_that_does(made: Callable[..., Case], name: str) -> None:
    with pytest.raises(UserError, match=r"^resolution: .*use \d+"):
        load_teacher(made(name).folder, resolution=SIZES[name] + 1, frames=FRAMES)
    if name in TEXT:
        size = SIZES[name]
        with pytest.raises(UserError, match=rf"^resolution: {size}x{2 * size + 1} is not a .*; use {size}x{2 * size}$"):
            load_teacher(made(name).folder, resolution=f"{size}x{2 * size + 1}", frames=FRAMES)
        for small in ((size, 1), (1, size)):
            with pytest.raises(UserError, match=r"^resolution: .*use \d+"):
                load_teacher(made(name).folder, resolution=small, frames=FRAMES)


def test_attention_that_leaves_blocks_out_is_refused(tmp_path: Path) -> None:
    tiny_d.kandinsky5(attention_type="nabla", attention_P=0.8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="teacher: the network's attention_type is 'nabla', of which blocks are left"):
        load_teacher(tmp_path, resolution=32, frames=FRAMES)


@pytest.mark.parametrize("size", [(32, 32), (480, 854), (512, 768), (479, 768), (512, 855), (1024, 1024)])
def test_kandinskys_positions_are_divided_as_its_pipeline_divides_them(size: tuple[int, int]) -> None:
    assert kandinsky5._scales(*size) == diffusers.Kandinsky5T2VPipeline(*[None] * 7)._get_scale_factor(*size)


@pytest.mark.parametrize(
    ("part", "setting", "value"), [("unet", "time_cond_proj_dim", 8), ("vae", "latents_mean", [0.0] * 4)]
)
def test_a_unet_or_vae_that_works_otherwise_is_refused(
    made: Callable[..., Case], part: str, setting: str, value: object
) -> None:
    case = made("stable_diffusion")
    config = copy.deepcopy(dict(case.pipe.vae.config))
    network = copy.copy(case.teacher.denoiser.network)
    if part == "unet":
        network.register_to_config(**{setting: value})  # type: ignore[operator]
    else:
        config[setting] = value

    class Changed(Source):
        def config(self, component: str) -> dict[str, Any]:
            return config

    scheduler = json.loads((case.folder / "scheduler" / "scheduler_config.json").read_text())
    with pytest.raises(UserError, match=f"^teacher: .*{setting}"):
        case.family.teacher(network, Changed(case.folder, {}, scheduler))


@pytest.mark.parametrize("name", LATENT)
def test_the_model_card_reads_the_network_as_a_single_file(
    made: Callable[..., Case], name: str, tmp_path: Path
) -> None:
    case = made(name)
    teacher, network = case.teacher, copy.deepcopy(case.teacher.denoiser.network)
    for part in network.parameters():  # not what the source folder holds
        part.data.add_(1e-3)
    level = float(teacher.denoiser.schedule.init_level)
    card = model_card(describe_method("dmd2"), {}, teacher, Sampler(teacher.denoiser, [level]), 1)
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    if not case.family.single_file:
        assert len(code) == 1
        return
    record = StudentRecord((level,), "ddim", str(case.folder))
    folder = save_pipeline(tmp_path / "student", name, network, case.pipe.scheduler, record, card, str(case.folder))
    namespace: dict[str, Any] = {}
    exec(code[-1].replace("FOLDER", str(folder)), namespace)
    loaded, kept = namespace["network"].state_dict(), network.state_dict()
    assert type(namespace["network"]) is type(network) and loaded.keys() == kept.keys()
    assert all(torch.equal(loaded[key], value) for key, value in kept.items())


def test_an_unknown_pipeline_is_told_which_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(UserError, match="NoSuchPipeline") as error:
        family_of(tmp_path)
    assert "`diffdistill families`" in str(error.value)  # which lists them all: a message is one short line
    assert main(["families"]) == 0
    listed = capsys.readouterr().out
    assert all(pipeline in listed for family in FAMILIES.values() for pipeline in family.pipelines)
    texts = [family.text for family in FAMILIES.values() if family.text is not None]
    assert all(repr(text) in listed for each in texts for text in (each.negative, each.advised) if text is not None)


def test_no_prompt_is_what_the_stock_pipeline_takes_where_it_is_given_none(made: Callable[..., Case]) -> None:
    """Not what Wan's makers draw with, which is offered and never taken unasked."""
    case = made("wan")
    assert case.family.text is not None and case.family.text.advised is not None
    assert "negative_prompt" not in case.call(5.0)
    latents, _, grid = stock(case, 5.0)
    assert gap(ours(case, 5.0, grid), latents) < 1e-4
    given = replace(case, call=lambda g: {**case.call(g), "negative_prompt": case.family.text.advised})
    assert gap(ours(case, 5.0, grid), stock(given, 5.0)[0]) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_whole(name: str) -> None:
    """Its stock pipeline exists, has the LoRA loader that it says, and takes the arguments of a student."""
    family = FAMILIES[name]
    stock_class = getattr(diffusers, family.pipelines[0])
    assert family.name == name and hasattr(diffusers, family.network)
    assert hasattr(stock_class, "load_lora_weights") == family.loads_lora
    readable = diffusers.loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES  # others have the method, and it raises
    assert (hasattr(getattr(diffusers, family.network), "from_single_file") and family.network in readable) == (
        family.single_file
    )
    assert (family.text is not None) == (family.conditions == "text")
    assert set(family.arguments(1)) <= set(inspect.signature(stock_class.__call__).parameters)
