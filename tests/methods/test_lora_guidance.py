"""LoRA guidance distillation: exact checks, caught mistakes, and an export that is a stock network."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffdistill import UserError, distill, load_student, load_teacher
from diffdistill.catalogue import describe_method
from diffdistill.core.guidance import guide
from diffdistill.core.prediction import Prediction
from diffdistill.exact.analytic import class_gaussians_teacher, gaussian_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.lora_guidance import verify
from diffdistill.methods.lora_guidance import Config, LoRAGuidance
from diffdistill.players.lora import LoraSettings
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators
from diffdistill.scaffold import imitating
from diffdistill.scaffold import method as scaffold_method
from diffdistill.scaffold.chains import GuidedChains
from diffdistill.scaffold.method import Batch
from tests.methods.short_runs import same_when_resumed

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def not_detached(
    self: LoRAGuidance, x_t: Tensor, t: Tensor, cond: Any, scale: Tensor | None = None
) -> tuple[Tensor, Prediction]:
    target = guide(self.student, x_t, t, cond, torch.full_like(t, self.config.guidance_scale))
    return (self.student(x_t, t, cond).y - target.y).square().mean(), target


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the scale is w": (imitating, "guide", lambda d, x, t, c, s: guide(d, x, t, c, s + 1)),
    "no guidance": (imitating, "guide", lambda d, x, t, c, s: guide(d, x, t, c, s**0)),
    "the target follows the student": (LoRAGuidance, "imitation", not_detached),
    "all times are alike": (scaffold_method, "native_uniform", lambda s, n, g: torch.full((n,), 1.0).double()),
    "all chains at the beginning": (
        GuidedChains,
        "_start",
        lambda self, batch, teacher, f=GuidedChains._start: (f(self, batch, teacher), self.step.zero_()),
    ),
    "the sampler adds noise": (
        LoRAGuidance,
        "sampler",
        lambda self: Sampler(self.student, self.schedule.levels(self.config.sampling_steps).tolist()),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


def options(teacher: Path, out: Path, **changes: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {"method": "lora_guidance", "teacher": str(teacher), "data": "digits", "steps": 2}
    own = {"sampling_steps": 4, "lora_targets": "all", "guidance_scale": 3.0, "student_lr": 1e-2}
    return shared | own | {"batch_size": 4, "sample_every": 0, "device": "cpu", "out": str(out)} | changes


@pytest.mark.parametrize(("parameterization", "steps"), [("vp", 4), ("edm", 4), ("flow", 1)])
def test_it_trains_every_parameterisation_and_exports_a_stock_network(
    parameterization: str, steps: int, tiny_teacher: Teachers, tmp_path: Path
) -> None:
    teacher = tiny_teacher(parameterization)
    folder = distill(**options(teacher, tmp_path / "run", sampling_steps=steps)).student
    plain, before = (UNet2DModel.from_pretrained(path, subfolder="unet") for path in (folder, teacher))
    assert plain.state_dict().keys() == before.state_dict().keys()
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), before.parameters(), strict=True))
    sampler, student = load_student(folder)
    assert len(sampler.levels) == steps and sampler.step == DDIM()
    images = sampler(student.shape, {"class_labels": torch.arange(4)}, image_generators(0, range(4)))
    assert bool(images.isfinite().all())


def with_lora(teacher: Teacher, layers: str = "attention") -> Teacher:
    """The teacher whose student is LoRA by the method's defaults, on its attention layers or on all."""
    defaults = describe_method("lora_guidance").about.defaults
    targets = None if layers == "all" else str(defaults["lora_targets"]).split(",")
    return dataclasses.replace(teacher, lora={"student": LoraSettings(int(str(defaults["lora_rank"])), None, targets)})


def test_only_lora_is_trained(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    before = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    for layers in ("attention", "all"):
        method = LoRAGuidance(with_lora(teacher, layers), Config())
        names = [name for name, p in method.student.named_parameters() if p.requires_grad]
        assert names and all("lora_" in name for name in names)
        assert layers == "all" or all("attentions" in name for name in names)
        base = sum(p.numel() for p in method.teacher.parameters())
        assert sum(p.numel() for p in method.student.parameters() if p.requires_grad) < base
        data = torch.randn(4, 1, 8, 8)
        batch = Batch(4, teacher.shape, {"class_labels": torch.arange(4)}, data, torch.device("cpu"), (0, 0, 0))
        optimizer = torch.optim.AdamW([p for p in method.student.parameters() if p.requires_grad], lr=1e-2)
        method.turns(0)[0].loss(batch).loss.backward()
        optimizer.step()
        after = {name.replace(".base_layer", ""): p for name, p in teacher.denoiser.state_dict().items()}
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_on_trajectories_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    shared = options(tiny_teacher("vp"), tmp_path, data=None, trajectories=True, trajectory_steps=4)
    same_when_resumed(tmp_path, stop=3, end=6, **shared)


def test_one_guided_call_and_one_pass_a_step(tiny_teacher: Teachers) -> None:
    teacher = with_lora(load_teacher(tiny_teacher("vp")))
    method = LoRAGuidance(teacher, Config())
    seen: list[tuple[str, int]] = []
    for name, denoiser in (("student", method.student), ("teacher", method.teacher)):
        denoiser.register_forward_hook(lambda m, args, out, name=name: seen.append((name, len(args[0]))))
    data = torch.randn(4, 1, 8, 8)
    batch = Batch(4, teacher.shape, {"class_labels": torch.arange(4)}, data, torch.device("cpu"), (0, 0, 0))
    method.turns(0)[0].loss(batch)
    assert sorted(seen) == [("student", 4), ("teacher", 8)]


def test_training_reaches_the_guided_means() -> None:
    """On classes of one variance the guided network is known, and plain descent on the loss finds it."""
    means, std = torch.tensor([[0.7, -0.4], [-0.9, 0.3], [0.1, 0.2]]).double(), torch.tensor([0.5, 1.3]).double()
    teacher, student = class_gaussians_teacher(means, std), class_gaussians_teacher(means, std).denoiser
    method = LoRAGuidance(teacher, Config(guidance_scale=3.0, trajectories=True), student=student)
    learned = next(student.parameters())
    optimizer = torch.optim.Adam([learned], lr=0.05)
    for step in range(150):
        cond = {"class_labels": torch.arange(32) % 2}
        (turn,) = method.turns(step)
        loss = turn.loss(Batch(32, (2,), cond, None, torch.device("cpu"), (0, step, 0))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    aim = means[-1] + 3 * (means - means[-1])
    assert torch.allclose(learned[:2].detach(), aim[:2], rtol=0, atol=0.02), learned


def test_what_cannot_be_used_is_refused(tiny_teacher: Teachers, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"guid.* distillation needs one that was trained with a null condition"):
        LoRAGuidance(gaussian_teacher([0.0], 1.0), Config())
    with pytest.raises(UserError, match=r"data: lora_guidance .* needs real images"):
        distill(**options(tiny_teacher("vp"), tmp_path / "run", data=None))
