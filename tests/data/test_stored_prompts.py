"""How encoded prompts are stored: without padding, in a type of choice, and with the negative prompt that they have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from diffdistill import distill
from diffdistill.data.encoded import encode, open_encoded
from diffdistill.data.pairs import make_pairs
from diffdistill.data.shards import row_shapes, rows, without_padding
from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, Prompt, load_pipeline, load_teacher, read_record
from tests.data.encoding import options
from tests.players.tiny import BUILDERS, SIZES

PADDED = (
    *("qwen_image", "z_image", "pixart_sigma", "pixart_alpha", "sana", "sana_video", "wan", "aura_flow", "krea2"),
    "qwen_image21",
    "kandinsky5",
)
WORDS = ["a red square", "one", "two dogs that sleep below a tree", "three"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny pipeline, in its folder."""
    root = tmp_path_factory.mktemp("saved")

    def make(name: str) -> Path:
        if not (root / name).exists():
            BUILDERS[name]().save_pretrained(root / name)
        return root / name

    return make


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(WORDS))
    return path


def test_columns_come_back_as_they_were() -> None:
    full = torch.randn(2, 4, 3)
    short = full.clone()
    short[0, 2:] = 0
    short[1] = 0
    mask = torch.ones(2, 4, dtype=torch.bool)
    shards = [without_padding({"text": short, "mask": mask}), {"text": full, "mask": mask}]
    assert shards[0]["text"].shape == (2, 3)
    assert row_shapes(shards[0]) == row_shapes(shards[1]) == {"text": (4, 3), "mask": (4,)}
    found = rows(shards, 2, 4, torch.tensor([3, 0, 1, 2, 0]))
    assert torch.equal(found["text"], torch.stack([full[1], short[0], short[1], full[0], short[0]]))
    assert found["mask"].dtype == torch.bool


@pytest.mark.parametrize("name", PADDED)
@torch.no_grad()
def test_a_prompt_takes_the_space_of_its_own_tokens(
    name: str, saved: Callable[[str], Path], lines: Path, tmp_path: Path
) -> None:
    folder, frames = saved(name), 5 if FAMILIES[name].videos else None
    settings = options(folder, lines, tmp_path / "out", resolution=SIZES[name], frames=frames)
    encoded = open_encoded(encode(**settings))
    text, size = FAMILIES[name].text, tuple(encoded.settings["pixels"])
    assert text is not None
    pipeline = load_pipeline(folder, leave_out=(FAMILIES[name].component,))
    batches = [text.encode(pipeline, part, Prompt(size)) for part in (WORDS[:2], WORDS[2:3], WORDS[3:])]
    expected = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    cond = encoded.get(torch.arange(4)).cond
    assert cond.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(cond[key], value), key
    stored = sum(path.stat().st_size for path in encoded.folder.glob("0*.safetensors"))
    assert stored < 0.5 * len(save(expected))


@pytest.mark.parametrize("name", ["pixart_sigma", "sana"])
@torch.no_grad()
def test_padding_that_is_no_zeros_does_not_reach_the_image(name: str, saved: Callable[[str], Path]) -> None:
    folder, text = saved(name), FAMILIES[name].text
    assert text is not None
    pipeline = load_pipeline(folder, leave_out=(FAMILIES[name].component,))
    denoiser = load_teacher(folder).denoiser
    more = {} if name == "pixart_sigma" else {"complex_human_instruction": None}
    raw, _, _, _ = pipeline.encode_prompt(WORDS, do_classifier_free_guidance=False, clean_caption=False, **more)
    cond = text.encode(pipeline, WORDS, Prompt((16, 16)))
    assert not torch.equal(raw, cond["encoder_hidden_states"])
    x = torch.randn(len(WORDS), *load_teacher(folder).shape)
    t = torch.full((len(WORDS),), 1.0, dtype=torch.float64)
    assert torch.equal(denoiser(x, t, cond).y, denoiser(x, t, {**cond, "encoder_hidden_states": raw}).y)


def test_prompts_are_stored_in_the_type_that_is_named(
    saved: Callable[[str], Path], lines: Path, tmp_path: Path
) -> None:
    folder = saved("stable_diffusion")
    exact = open_encoded(encode(**options(folder, lines, tmp_path / "exact"))).get(torch.arange(4)).cond
    for kind, limit in (("bfloat16", 0.01), ("float16", 0.001)):
        out = encode(**options(folder, lines, tmp_path / kind, prompt_dtype=kind))
        held = load_file(out / "00000.safetensors")["encoder_hidden_states"]
        assert held.dtype == getattr(torch, kind) and held.shape[1:] == exact["encoder_hidden_states"].shape[1:]
        encoded = open_encoded(out)
        assert encoded.get(torch.arange(4)).cond["encoder_hidden_states"].dtype == torch.float32
        assert encoded.null["encoder_hidden_states"].dtype == torch.float32
        found = encoded.get(torch.arange(4)).cond["encoder_hidden_states"]
        assert 0 < float((found - exact["encoder_hidden_states"]).abs().max()) < limit * float(found.abs().max())
    with pytest.raises(UserError, match="made with prompt_dtype float16"):
        encode(**options(folder, lines, tmp_path / "float16"))


def train(teacher: Path, prompts: Path, out: Path, **more: Any) -> Any:
    shared = {"batch_size": 2, "steps": 1, "update_ratio": 1, "sample_every": 0, "device": "cpu", "resolution": 16}
    return distill("dmd2", teacher=str(teacher), prompts=str(prompts), out=str(out), **(shared | more))


@pytest.mark.parametrize("name", ["stable_diffusion", "qwen_image"])
def test_the_negative_prompt_stands_in_every_record(
    name: str, saved: Callable[[str], Path], lines: Path, tmp_path: Path
) -> None:
    folder, own = saved(name), " " if name == "qwen_image" else None
    plain = open_encoded(encode(**options(folder, lines, tmp_path / "plain")))
    led = open_encoded(encode(**options(folder, lines, tmp_path / "led", negative_prompt="ugly")))
    assert plain.settings["negative_prompt"] == own and led.settings["negative_prompt"] == "ugly"
    key = "encoder_hidden_states"
    assert torch.equal(plain.get(torch.arange(4)).cond[key], led.get(torch.arange(4)).cond[key])
    assert not torch.equal(plain.null[key], led.null[key])
    with pytest.raises(UserError, match="made with negative_prompt ugly"):
        encode(**options(folder, lines, tmp_path / "led"))
    run = train(folder, led.folder, tmp_path / "run", guidance_scale=2.0)
    record = read_record(run.student)
    assert record is not None and record.guidance.negative_prompt == "ugly"  # type: ignore[union-attr]
    inside = train(folder, lines, tmp_path / "inside", guidance_scale=2.0, negative_prompt="ugly")
    weights = f"{FAMILIES[name].component}/diffusion_pytorch_model.safetensors"
    assert (run.student / weights).read_bytes() == (inside.student / weights).read_bytes()
    for other in ("blurred", ""):
        with pytest.raises(UserError, match=r"negative_prompt: .*led' was made with 'ugly', and '.*' is given"):
            train(folder, led.folder, tmp_path / "refused", negative_prompt=other)


def test_pairs_have_the_negative_prompt_of_their_prompts(
    saved: Callable[[str], Path], lines: Path, tmp_path: Path
) -> None:
    folder = saved("stable_diffusion")
    plain, led = (encode(**options(folder, lines, tmp_path / name, negative_prompt=name)) for name in ("plain", "led"))
    shared = {"teacher": str(folder), "count": 4, "sampling_steps": 2, "guidance_scale": 3.0, "device": "cpu"}
    pairs = make_pairs(**shared, prompts=str(led), out=str(tmp_path / "pairs"))
    made = {"method": "dmd", "guidance_scale": 3.0, "pairs": str(pairs)}
    shared = {"batch_size": 2, "steps": 1, "sample_every": 0, "device": "cpu", "teacher": str(folder)}
    with pytest.raises(UserError, match=r"plain' was made with 'plain', and '.*pairs' with 'led'; make"):
        distill(**shared, **made, prompts=str(plain), out=str(tmp_path / "refused"))
    distill(**shared, **made, prompts=str(led), out=str(tmp_path / "run"))


def test_classes_take_no_negative_prompt(saved: Callable[[str], Path], lines: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"negative_prompt: .*dit' takes class labels and no prompts"):
        encode(teacher=str(saved("dit")), data="shapes:4", negative_prompt="ugly", out=str(tmp_path / "out"))
