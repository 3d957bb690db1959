"""`diffdistill decoder`: the small autoencoder learns the own one's images, and the model is whole with it."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffdistill import UserError, distill, encode, sample, train_decoder
from diffdistill.commands.cli import main
from diffdistill.commands.decoder import SmallAutoencoding
from diffdistill.config import DecoderConfig
from diffdistill.data.encoded import open_encoded
from diffdistill.families import FAMILIES, load_pipeline
from diffdistill.pipelines.small_decoder import new_autoencoder
from diffdistill.scaffold.method import Batch
from tests import tiny

FIT: dict[str, Any] = {"device": "cpu", "batch_size": 4, "width": 16, "blocks": 1, "sample_every": 0, "ema": 0.0}


def latents_of(name: str, folder: Path) -> dict[str, str]:
    """A tiny model, and the latents of drawn shapes by it."""
    pipeline = tiny.PIPELINES[name]()
    pipeline.save_pretrained(folder / "teacher")
    (folder / "teacher" / "README.md").write_text("# A model\n", encoding="utf-8")
    made = encode(
        teacher=str(folder / "teacher"), data="shapes", count=12, resolution=tiny.SIZES[name], device="cpu",
        out=folder / "encoded",
    )  # fmt: skip
    return {"teacher": str(folder / "teacher"), "prompts": str(made)}


def off(model: str | Path, teacher: str, prompts: str) -> float:
    """How far a model's decoder is from its teacher's, an element."""
    entry, (own, other) = (
        FAMILIES["stable_diffusion"],
        (load_pipeline(Path(folder), only=("vae",)).vae for folder in (teacher, model)),
    )
    z = open_encoded(prompts).get(torch.arange(12)).x0
    assert z is not None and entry.autoencoder is not None
    with torch.no_grad():
        images, decoded = (entry.autoencoder.decode(vae, z).clamp(-1, 1) for vae in (own, other))
    return float((images - decoded).abs().mean())


@pytest.mark.parametrize("name", ["stable_diffusion", "sd3", "flux"])
def test_it_learns_the_images_and_stock_pipelines_draw_with_it(name: str, tmp_path: Path) -> None:
    given = latents_of(name, tmp_path)
    few, many = (
        train_decoder(**given, **FIT, steps=steps, warmup_steps=1, out=tmp_path / str(steps)) for steps in (1, 120)
    )
    assert off(many, **given) < off(few, **given) / 2
    card = (many / "README.md").read_text(encoding="utf-8")
    assert card.startswith(
        "# A model\n\nIts autoencoder is a small one, made by `diffdistill decoder`: the decoder has "
    )
    stock: Any = diffusers.DiffusionPipeline.from_pretrained(many)
    assert type(stock.vae) is diffusers.AutoencoderTiny
    z = open_encoded(given["prompts"]).get(torch.arange(2)).x0
    own = load_pipeline(many, only=("vae",)).vae
    entry = FAMILIES[name].autoencoder
    assert z is not None and entry is not None
    scaled = z / stock.vae.config.scaling_factor + stock.vae.config.shift_factor
    with torch.no_grad():
        assert torch.equal(stock.vae.decode(scaled).sample, entry.decode(own, z)), "the pipeline's own line"
        again = entry.encode(own, entry.decode(own, z).clamp(-1, 1))
    assert again.shape == z.shape


def test_a_turn_is_its_straight_line() -> None:
    torch.manual_seed(0)
    small = new_autoencoder(
        {"block_out_channels": [8, 8], "in_channels": 3, "out_channels": 3, "latent_channels": 4}, 8, 1
    )
    config = DecoderConfig(teacher="x", prompts="y", gan_weight=0.3)

    def own(z: torch.Tensor) -> torch.Tensor:
        return 2 * torch.nn.functional.interpolate(z[:, :3], scale_factor=2)  # some of it is beyond the range

    method = SmallAutoencoding(small, own, config)
    z = torch.randn(4, 4, 8, 8)
    batch = Batch(4, (4, 8, 8), {}, z, torch.device("cpu"), (0, 0, 0))
    generator, critic = method.turns(0)
    image, drawn = own(z).clamp(-1, 1), small.decode(z).sample
    terms = [(drawn - image).abs().mean(), (small.encode(image).latents - z).abs().mean()]
    logits = [method.discriminator(x) for x in (drawn, image)]
    outcome = generator.loss(batch)
    expected = sum(terms) + 0.3 * torch.nn.functional.softplus(-logits[0]).mean()
    torch.testing.assert_close(outcome.loss, expected)
    assert {"decoding", "encoding", "gan"} == outcome.shown.keys()
    judged = torch.nn.functional.softplus(-logits[1]).mean() + torch.nn.functional.softplus(logits[0]).mean()
    torch.testing.assert_close(critic.loss(batch).loss, judged)
    assert (generator.player, critic.player) == ("autoencoder", "discriminator") and not method.drawn


def test_a_student_keeps_its_steps_and_draws(tmp_path: Path) -> None:
    given = latents_of("stable_diffusion", tmp_path)
    shared: dict[str, Any] = {"batch_size": 2, "steps": 1, "sample_every": 0, "device": "cpu"}
    run = distill("dmd2", **given, **shared, out=tmp_path / "run", resolution=tiny.SIZES["stable_diffusion"])
    small = train_decoder(teacher=run.student, prompts=given["prompts"], **FIT, steps=2, out=tmp_path / "small")
    for file in ("diffdistill.json", "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (small / file).read_bytes() == (run.student / file).read_bytes()
    sample(small, prompt=["a red circle"], out=tmp_path / "drawn.png", device="cpu")
    assert (tmp_path / "drawn.png").is_file()


def test_with_a_gan_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    given = latents_of("stable_diffusion", tmp_path)
    fit: dict[str, Any] = {**FIT, "gan_weight": 0.1, "checkpoint_every": 2, "lr_schedule": "constant"}
    whole = train_decoder(**given, **fit, steps=4, out=tmp_path / "whole")
    train_decoder(**given, **fit, steps=2, out=tmp_path / "run")
    again = train_decoder(resume=tmp_path / "run", steps=4)
    file = "vae/diffusion_pytorch_model.safetensors"
    assert (whole / file).read_bytes() == (again / file).read_bytes()


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = latents_of("stable_diffusion", tmp_path)
    (tmp_path / "prompts.txt").write_text("a red square\n" * 4, encoding="utf-8")
    texts = encode(
        teacher=given["teacher"], prompts=str(tmp_path / "prompts.txt"), device="cpu", out=tmp_path / "texts"
    )
    tiny.PIPELINES["sana"]().save_pretrained(tmp_path / "sana")
    changed = tiny.PIPELINES["stable_diffusion"]()
    changed.vae.decoder.conv_in.weight.data.mul_(2)
    changed.save_pretrained(other := tmp_path / "other")
    for more, says in (
        ({"teacher": ""}, "teacher: none is given; give the folder of a latent model and one of `encode --data`"),
        (
            {"prompts": str(texts)},
            "prompts: .*texts' has no images; give a folder made by `diffdistill encode",
        ),
        ({"teacher": str(other)}, "prompts: .*encoded' was made by another model"),
        ({"teacher": str(tmp_path / "sana")}, "teacher: .*sana' has the autoencoder AutoencoderDC, and a small one is"),
    ):
        with pytest.raises(UserError, match=says):
            train_decoder(**{**given, **more}, **FIT, steps=1, out=tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()
    assert main(["decoder", "--teacher", "digits", "--prompts", str(texts), "--out", str(tmp_path / "out")]) == 2
    assert "has no autoencoder" in capsys.readouterr().err
