"""The tiny pipelines, one for each family and more, the prompts that are encoded with them, and how students draw."""

import inspect
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from diffdistill.config import run_options
from diffdistill.data.encoded import decoder
from diffdistill.data.seen import decoder_of
from diffdistill.families import FAMILIES
from diffdistill.families._family import stock_noise
from diffdistill.training.assemble import load_run, make_game
from tests import tiny, tiny_a
from tests.stranger import stranger

BUILDERS = {
    **tiny.PIPELINES,
    "sd_v": partial(tiny_a.stable_diffusion, prediction_type="v_prediction", zero_snr=True),
}
SIZES = {**tiny.SIZES, "sd_v": tiny_a.SIZES["stable_diffusion"]}
DRAWN = ("dit", "flux2", "ltx2")  # are compared as images (`ours`)
# Pipelines that hand their generator to the scheduler.
HANDS = (
    *("StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline", "PixArtAlphaPipeline"),
    *("SanaPipeline", "SanaVideoPipeline", "StableDiffusionInstructPix2PixPipeline", "CogVideoXPipeline"),
)
# Nothing of ours: what anybody has who was given the folders.
STRANGER = """
import json, sys, torch
from safetensors.torch import save_file
from diffusers import DiffusionPipeline
for job in json.load(open(sys.argv[1])):
    exec(job.get("setup", ""))
    pipe = DiffusionPipeline.from_pretrained(job["base"] or job["student"])
    pipe.set_progress_bar_config(disable=True)
    if job["base"]:
        pipe.load_lora_weights(job["student"] + "/lora", weight_name="pytorch_lora_weights.safetensors")
        if job.get("two"):
            second = {"weight_name": "pytorch_lora_weights_2.safetensors", "load_into_transformer_2": True}
            pipe.load_lora_weights(job["student"] + "/lora", **second)
        pipe.scheduler = DiffusionPipeline.from_pretrained(job["student"]).scheduler
    torch.manual_seed(5)
    call = json.load(open(job["student"] + "/diffdistill.json"))["call"]
    if "image" in job["what"]:
        from PIL import Image
        size = call["width"], call["height"]
        job["what"]["image"] = Image.open(job["what"]["image"]).resize(size, Image.BICUBIC, reducing_gap=3.0)
    got = pipe(**job["what"], generator=torch.Generator().manual_seed(3), output_type=job["type"], **call)
    latents = got.frames if hasattr(got, "frames") else got.images
    save_file({"x": torch.as_tensor(latents).contiguous()}, job["out"])
"""
PROMPTS = ["a red square", "a blue circle on the left", "nothing much", "two dogs"]


def draw_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the pipelines whose own sizes are those of the published models the sizes of the tiny ones."""
    kinds = ("Flux", "FluxKontext", "QwenImage", "QwenImageEdit", "Flux2Klein", "Flux2", "Chroma")
    for kind in (getattr(diffusers, f"{name}Pipeline") for name in kinds):
        small = property(lambda pipeline: 8, lambda pipeline, value: None)
        monkeypatch.setattr(kind, "default_sample_size", small, raising=False)
    large = {"sana": "SanaPipeline", "krea2": "Krea2Pipeline", "qwen_image21": "QwenImage21Pipeline"}
    for name, kind in ((name, getattr(diffusers, pipeline)) for name, pipeline in large.items()):
        call: Any = inspect.unwrap(kind.__call__)
        monkeypatch.setattr(call, "__defaults__", tuple(SIZES[name] if v == 1024 else v for v in call.__defaults__))


def ours(run: Path, cond: dict[str, torch.Tensor], shape: tuple[int, ...], trained: bool = True) -> torch.Tensor:
    """The player as the run's checkpoint has it, or as it was before the training: nothing exported is read.

    The noise is drawn as a stock pipeline does: the first from its generator, and the rest from there too where the
    pipeline hands it to its scheduler, else from the global one.
    """
    game = load_run(run)[0] if trained else make_game(run_options(run))
    sampler, teacher = game.method.sampler(), game.teacher
    first = torch.Generator().manual_seed(3)
    packing = FAMILIES[teacher.family].packing
    z = stock_noise(FAMILIES[teacher.family], teacher, first)
    pipeline = FAMILIES[teacher.family].pipelines[0]
    hands = pipeline in HANDS
    torch.manual_seed(5)

    def noise(j: int) -> torch.Tensor:
        drawn = torch.randn(z.shape if packing is None else packing.pack(z).shape, generator=first if hands else None)
        return drawn if packing is None else packing.unpack(drawn, shape)

    with torch.no_grad():
        x, t = sampler.input_at(len(sampler.levels) - 1, z, cond, noise)
        x0 = sampler.predict(x, t, len(sampler.levels), cond).x0
        if pipeline == "LTX2Pipeline":
            return (decoder_of(teacher)(x0).movedim(1, -1) / 2 + 0.5).clamp(0, 1)
        if pipeline in ("DiTPipeline", "Flux2KleinPipeline"):  # they give images, or latents of another shape
            return (decoder(teacher)(x0) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return x0 if packing is None else packing.pack(x0)


def apart(image: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value of `other` if that exceeds 1."""
    return float((image - other).abs().max()) / max(1, float(other.abs().max()))


def drawn_by_a_stranger(jobs: Sequence[dict[str, Any]], folder: Path) -> list[torch.Tensor]:
    """What STRANGER draws, in a process of its own; a job has student, base, what and type."""
    jobs = [job | {"out": str(folder / f"{k}.safetensors")} for k, job in enumerate(jobs)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = stranger(STRANGER, folder / "jobs.json")
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(job["out"])["x"] for job in jobs]
