"""Students whose passes say policies: a wide last layer in every family, and folders that stock diffusers runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from diffdistill import UserError, distill, load_student, load_teacher
from diffdistill.data.encoded import open_encoded
from diffdistill.families import FAMILIES
from diffdistill.players.lora import is_lora, lora
from diffdistill.players.policy import PolicySettings, policy_player
from diffdistill.players.scale_input import plain_network
from tests.players import tiny
from tests.players.tiny import SIZES, apart, drawn_by_a_stranger, ours
from tests.stranger import stranger

LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
DRAW = """
images = pipe(class_labels=[1], num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images
images[0].save(sys.argv[2])
"""

Encoded = Callable[[str], tuple[Path, Path]]
LATENT = [name for name, family in FAMILIES.items() if family.autoencoder is not None]
NARROW = ("z_image", "krea2", "kandinsky5", "ltx2")
"""Families whose class of networks has no number of output channels, or two last layers."""
ANGLES = torch.tensor([1.5, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("name", LATENT)
def test_a_wide_network_says_its_teachers_output_for_each_component(name: str, encoded: Encoded) -> None:
    folder, prompts = encoded(name)
    data, settings = open_encoded(prompts), PolicySettings("mixture", 3, 4)
    frames = {"frames": 5} if FAMILIES[name].videos else {}
    teacher = load_teacher(folder, resolution=SIZES[name], **frames)
    cond, c = data.get(torch.tensor([1, 2])).cond, teacher.shape[0]
    x, t = torch.randn(2, *teacher.shape), torch.full((2,), 1.5).double()
    before = teacher.denoiser(x, t, cond).y
    players = [teacher.player("student").eval(), lora(teacher.denoiser, 2)]
    for player in players:
        if name in NARROW:
            with pytest.raises(UserError, match=r"policy: .* has no single last layer that is known"):
                policy_player(player, settings, c, ANGLES)
            continue
        unused = unread(player, player(x, t, cond).y)
        student = policy_player(player, settings, c, ANGLES)
        y = student(x, t, cond).y
        means, rest = y.split([3 * c, 4], 1)
        for mean in means.split(c, 1):  # which lie apart by a twentieth of the last layer's weights
            assert 1e-4 < (mean - before).abs().mean() / before.abs().mean() < 0.4
        assert not rest.any()
        if is_lora(student.network):
            assert unread(student, y) == unused  # and what has no part any longer is not trained
        with torch.no_grad():
            assert torch.equal(teacher.denoiser(x, t, cond).y, before)  # whose network it may share
            plain: Any = plain_network(student.network)
            stock = type(plain).from_config(plain.config).eval()
            stock.load_state_dict(plain.state_dict())
            assert apart(student.with_network(stock, None)(x, t, cond).y, y) < 1e-5


def unread(player: torch.nn.Module, y: torch.Tensor) -> set[str]:
    """The trained parameters that an output does not depend on."""
    trained = {name: p for name, p in player.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(y.square().sum(), list(trained.values()), allow_unused=True)
    return {name for name, slope in zip(trained, slopes, strict=True) if slope is None}


# Channels of a convolution, features of patches, and tokens that the pipeline packs.
EXPORTED = [
    ("sd_v", "full", "mixture"), ("sd3", "lora", "mixture"), ("qwen_image", "full", "nodes"),
    ("flux", "lora", "heads"),
]  # fmt: skip


def test_stock_diffusers_draws_the_students_images_by_the_folders_scheduler(
    encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = "from_pretrained(job['base'] or job['student'], trust_remote_code=True)"
    monkeypatch.setattr(
        tiny, "STRANGER", tiny.STRANGER.replace('from_pretrained(job["base"] or job["student"])', trusting)
    )
    jobs, expected = [], []
    shared = {"batch_size": 2, "steps": 2, "sample_every": 0, "device": "cpu"}
    for name, kind, policy in EXPORTED:
        folder, prompts = encoded(name)
        options = shared | {"lora": "student", "lora_rank": 2, "lora_alpha": 6.0, "student_lr": 0.1}
        options = options if kind == "lora" else shared | {"student_lr": 1e-2}
        own = {"method": "pi_flow", "policy": policy, "components": 3, "substeps": 4}
        own = {"method": "pdd", "intervals": 4} if policy == "heads" else own
        own |= {"student_steps": 2, "states": 2}
        run = tmp_path / name
        student = distill(
            **options, **own, teacher=str(folder), prompts=str(prompts), resolution=SIZES[name], out=str(run)
        ).student
        data = open_encoded(prompts)
        cond, shape = data.get(torch.tensor([1])).cond, tuple(data.settings["shape"])
        expected.append(ours(run, cond, shape))
        kept = "np" if name in tiny.DRAWN else "latent"
        jobs.append({"student": str(student), "base": "", "what": {"prompt": tiny.PROMPTS[1]}, "type": kept})
        assert not (student / "lora").exists() and "trust_remote_code=True" in (student / "README.md").read_text()
        sampler, described = load_student(student)
        z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
        packing = FAMILIES[load_teacher(folder, resolution=SIZES[name]).family].packing
        with torch.no_grad():
            x, t = sampler.input_at(1, z, cond, lambda j, z=z: z)  # type: ignore[misc]
            again = sampler.denoiser(x, t, cond).x0
        assert apart(again if packing is None else packing.pack(again), expected[-1]) < 1e-4
        assert described.shape == shape
    for (name, *_), got, image in zip(EXPORTED, drawn_by_a_stranger(jobs, tmp_path), expected, strict=True):
        assert apart(got.reshape(image.shape), image) < 1e-3, name


def test_a_student_of_pixels_draws_the_same_in_its_stock_pipeline(
    tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"method": "pi_flow", "teacher": str(tiny_teacher("edm")), "batch_size": 2, "steps": 2, "sample_every": 0}
    own = {"components": 3, "student_steps": 3, "substeps": 4, "states": 2, "student_lr": 1e-3, "device": "cpu"}
    student = distill(**options, **own, out=str(tmp_path / "run")).student
    pipeline = DiffusionPipeline.from_pretrained(student, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(k) for k in range(2)]
    images = pipeline(
        batch_size=2, class_labels=[1, 3], num_inference_steps=3, output_type="np", generator=seeds
    ).images
    sampler, described = load_student(student)
    seeds = [torch.Generator().manual_seed(k) for k in range(2)]
    ours = (sampler(described.shape, {"class_labels": torch.tensor([1, 3])}, seeds) / 2 + 0.5).clamp(0, 1)
    assert apart(torch.as_tensor(images).permute(0, 3, 1, 2), ours) < 1e-4
    with pytest.raises(ValueError, match="num_inference_steps: this student makes 3 steps, and 2 were asked for"):
        pipeline(num_inference_steps=2)
    for code, *argv in (
        (LOAD + "pipe.save_pretrained(sys.argv[2])", student, tmp_path / "again"),
        (LOAD + DRAW, student, tmp_path / "first.png"),
        (LOAD + DRAW, tmp_path / "again", tmp_path / "second.png"),
    ):
        done = stranger(code, *argv)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert json.loads((student / "diffdistill.json").read_text())["move"] == "ddim"


def test_what_cannot_be_saved_is_said_before_training(encoded: Encoded, tmp_path: Path) -> None:
    folder, prompts = encoded("sd3")
    options = {"method": "pi_flow", "teacher": str(folder), "prompts": str(prompts), "resolution": SIZES["sd3"]}
    for name, value in (("export", "lora"), ("parts", "reference"), ("layout", "comfyui")):
        more = {name: value, "lora": "student", "steps": 1, "device": "cpu", "out": str(tmp_path / name)}
        with pytest.raises(UserError, match=f"{name}: a student of policies has a last layer and a scheduler"):
            distill(**options, **more)
    assert not list(tmp_path.iterdir())
