"""`diffdistill family-check`: right families pass line by line, and of wrong ones the fault is named."""

import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffdistill import UserError, family_check
from diffdistill.commands.cli import main
from diffdistill.families import FAMILIES, NOT_YET, Family, Source, Text, register_family
from diffdistill.players.teacher import Teacher
from tests.tiny import FRAMES, PIPELINES, SIZES

SD3 = FAMILIES["sd3"]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sd3")
    PIPELINES["sd3"]().save_pretrained(made)
    return made


def wrong(check: Callable[[Any], Any]) -> Callable[[Any, Source], Teacher]:
    """SD3's teacher with its denoiser changed."""

    def teacher(network: Any, source: Source) -> Teacher:
        made = SD3.teacher(network, source)
        check(made.denoiser)
        return made

    return teacher


def faults(family: Family, folder: Path) -> dict[str, str]:
    """Name -> what is said, of the checks that fail."""
    rows = family_check(folder, family=family, resolution=SIZES["sd3"], whole=False)
    return {row.name: row.said for row in rows if row.ok is False}


@pytest.mark.parametrize("name", ["sd3", "wan", "consistency_model"])
def test_a_right_family_passes_and_is_looked_at_in_full(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PIPELINES[name]().save_pretrained(tmp_path)
    size = [] if name == "consistency_model" else ["--resolution", str(SIZES[name])]
    size += ["--frames", str(FRAMES)] if name == "wan" else []
    assert main(["family-check", str(tmp_path), *size, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    latent = name != "consistency_model"
    for what in ("network", "lora_targets", "feature_layer", "export", "latents, guidance off"):
        assert any(line.startswith(f"ok   {what} ") for line in lines), what
    for what in ("text", "latents, guidance 5", "autoencoder", "latents in bfloat16, guidance 5"):
        assert any(line.startswith(f"ok   {what} ") for line in lines) == latent, what


def test_a_scheduler_of_other_steps_is_replaced_and_that_is_said(tmp_path: Path) -> None:
    from diffusers import PNDMScheduler

    pipe = PIPELINES["stable_diffusion"]()
    pipe.scheduler = PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1)  # set_alpha_to_one is off
    pipe.save_pretrained(tmp_path)
    rows = {row.name: row for row in family_check(tmp_path, resolution=16, whole=False)}
    assert all(row.ok is not False for row in rows.values())
    assert "in place of PNDMScheduler" in rows["latents, guidance 5"].said


def test_a_wrong_call_is_named_by_the_argument(folder: Path) -> None:
    def late(denoiser: Any) -> None:
        own = denoiser.call
        denoiser.call = lambda network, x, time, cond: own(network, x, time / 1000, cond)

    said = faults(replace(SD3, name="mine", teacher=wrong(late)), folder)
    assert "timestep is float32 (1,), 1 on average" in said["latents, guidance off"]
    assert "the pipeline's float32 (1,), 1000 on average" in said["latents, guidance off"]
    assert "latents, guidance 5" in said


def test_a_wrong_sign_is_found_though_the_network_is_given_the_right_arguments(folder: Path) -> None:
    def turned(denoiser: Any) -> None:
        own = denoiser.call
        denoiser.call = lambda network, x, time, cond: -own(network, x, time, cond)

    said = faults(replace(SD3, name="mine", teacher=wrong(turned)), folder)
    assert "its sign" in said["latents, guidance off"]


def test_each_other_fault_has_its_line(folder: Path) -> None:
    assert SD3.text is not None and SD3.autoencoder is not None

    def no_layer(denoiser: Any) -> None:
        denoiser.feature_layer = "blocks.7"

    text = SD3.text
    doubled = replace(SD3.autoencoder, decode=lambda vae, latents: vae.decode(latents).sample)
    same = Text(text.components, text.encode, lambda pipe, prompt: text.encode(pipe, ["a red fox in the snow"], prompt))
    shifted = replace(SD3, name="mine", lora_targets=("to_query",), autoencoder=doubled, text=same)
    said = faults(replace(shifted, teacher=wrong(no_layer), guided=lambda g: {"guidance_scale": g + 1}), folder)
    assert said["lora_targets"] == "the network has no to_query"
    assert said["feature_layer"] == "the network has no blocks.7"
    assert "decode gives other images" in said["autoencoder"]
    assert "null is what the prompt is" in said["text"]
    assert "else look at null and guided" in said["latents, guidance 5"]
    assert "latents, guidance off" not in said


def test_a_student_that_stock_diffusers_draws_otherwise_is_found(folder: Path) -> None:
    call = replace(SD3, name="mine", arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 3.0})
    rows = {row.name: row for row in family_check(folder, family=call, resolution=16, whole=True)}
    assert rows["export"].ok is False and "a one-step student" in rows["export"].said


def test_a_pipeline_that_no_family_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder is an index: nothing of it is loaded."""
    parts = {
        "transformer": ["diffusers", "LatteTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LattePipeline", **parts}))
    file = tmp_path / "mine.py"
    assert main(["family-check", str(tmp_path), "--write", str(file)]) == 1
    said = capsys.readouterr().out
    assert "transformer/         LatteTransformer3DModel  <- the network" in said
    assert "forward takes: hidden_states, timestep, encoder_hidden_states, encoder_attention_mask" in said
    assert 'component, network   "transformer", "LatteTransformer3DModel"' in said
    family = register_family(file)  # what is written is a family file
    assert family.class_names == ("LattePipeline",) and family.component == "transformer"
    assert main(["family-check", str(tmp_path), "--write", str(file), "--family", str(file)]) == 2
    assert "write: a family reads" in capsys.readouterr().err


def test_what_is_written_passes_once_its_gaps_are_filled(folder: Path, tmp_path: Path) -> None:
    FAMILIES.pop("sd3")
    assert main(["family-check", str(folder), "--write", str(tmp_path / "mine.py")]) == 1
    text = (tmp_path / "mine.py").read_text()
    rows = text.splitlines()
    (gap,) = (i for i, row in enumerate(rows) if "raise NotImplementedError" in row)
    with pytest.raises(UserError, match=r"^family: .*text cannot encode a prompt \(NotImplementedError: call pipe"):
        family_check(folder, family=tmp_path / "mine.py", resolution=16)
    rows[gap] = (
        "    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)\n"
        '    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}'
    )
    (tmp_path / "mine.py").write_text("\n".join(rows))
    checks = family_check(folder, family=tmp_path / "mine.py", resolution=16, whole=True)
    assert [row for row in checks if row.ok is False] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("FAMILIE = 1", "does not define FAMILY"),
        ("raise KeyError('x')", r"cannot be imported \(KeyError: 'x'\)"),
        ("Family('mine', 'mine', ('SD3',))", r"cannot be imported \(TypeError: .*missing 4 required .*'component'"),
        ("FAMILY = Family('m', 'm', 'LattePipeline', 'n', 'UNet2DModel', 'none', print)", "its pipelines is 'LatteP"),
        ("FAMILY = Family('m', 'm', ('NoPipeline',), 'n', 'UNet2DModel', 'none', print)", "its pipelines is"),
        ("FAMILY = Family('m', 'm', ('LattePipeline',), 'n', 'NoModel', 'none', print)", "its network is 'NoModel'"),
        ("FAMILY = Family('m', 'm', ('LattePipeline',), 'n', 'UNet2DModel', 'words', print)", "one of none, classes"),
        ("FAMILY = Family('m', 'm', ('LattePipeline',), 'n', 'UNet2DModel', 'text', print)", "its text is None"),
        (
            "FAMILY = Family('m', 'm', ('LattePipeline',), 'n', 'UNet2DModel', 'none', 3)",
            "its teacher is 3; it must be",
        ),
        (
            "FAMILY = Family('m', 'm', ('LattePipeline',), 'n', 'UNet2DModel', 'none', print)",
            "m reads LattePipeline, and",
        ),
    ],
)
def test_a_bad_family_file_is_one_line(
    text: str, says: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(f"from diffdistill.families import Family\n{text}\n"))
    assert main(["family-check", str(folder), "--family", str(path)]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and re.search(says, said) and len(said) < 400, said


def test_the_families_that_are_not_there_are_said_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    said = capsys.readouterr().out
    there = {name for family in FAMILIES.values() for name in family.class_names}
    for entry in NOT_YET:
        assert f"{entry.models}: {entry.reason}" in said
        assert not there & set(entry.pipelines), "it is there: take it out of the record"
