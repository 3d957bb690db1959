"""LCM: its exact checks hold, known mistakes are caught, one student serves a range of scales, and LoRA folds away."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from diffdistill import UserError, distill, export, load_teacher
from diffdistill.core.denoiser import NONE, Extra
from diffdistill.core.prediction import expand
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.families import load_student
from diffdistill.methods.checks.lcm import verify
from diffdistill.methods.lcm import LCM, Config, Skip
from diffdistill.players import scale_input
from diffdistill.scaffold import following
from diffdistill.scaffold.method import Batch, Outcome
from tests.methods.short_runs import same_when_resumed

REAL_GUIDE, REAL_F, REAL_LOSS, REAL_STEP = scale_input.guide, LCM.f, LCM.following, LCM.less_noisy


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(c.name.startswith("the fixed point is") for c in checks) == 2


def half_guided(denoiser: Any, x_t: Tensor, t: Tensor, cond: Any, scale: Tensor) -> Any:
    """x0 guided, eps not."""
    x0, eps = REAL_GUIDE(denoiser, x_t, t, cond, scale).x0, denoiser(x_t, t, cond).eps

    class Mixed:
        def at(self, s: Tensor) -> Tensor:
            return expand(torch.cos(s), x0) * x0 + expand(torch.sin(s), x0) * eps

    return Mixed()


def one_scale_for_all(denoiser: Any, x_t: Tensor, t: Tensor, cond: Any, scale: Tensor) -> Any:
    return REAL_GUIDE(denoiser, x_t, t, cond, scale[:1].expand(len(scale)))


def roles_swapped(self: LCM, x_t: Tensor, x_r: Tensor, interval: Skip, cond: Any, seed: int = 0) -> Outcome:
    """The gradient at the less noisy point."""
    i, extra = interval.i, Extra(interval.scale)
    own, target = self.f(self.student, x_r, i + 1, cond, extra), self.f(self.target, x_t, i, cond, extra)
    return Outcome(self.distance(own, target.detach()))


def its_own_target(self: LCM, *args: Any) -> Any:
    self.target, kept = self.student, self.target
    try:
        return REAL_LOSS(self, *args)
    finally:
        self.target = kept


@torch.no_grad()
def fast_target(self: LCM, step: int) -> None:
    parameters = list(self.student.parameters())
    torch._foreach_lerp_(list(self.target.parameters()), parameters, self.config.target_ema)


def two_steps(self: LCM, x_t: Tensor, x0: Tensor, eps: Tensor, interval: Skip, cond: Any) -> Tensor:
    i = (interval.i - 1).clamp_min(0)
    return REAL_STEP(self, x_t, x0, eps, Skip(self.grid[i], i, interval.scale), cond)


def scalings_with_sigma_data(self: LCM, i: Tensor) -> tuple[Tensor, Tensor]:
    """c_out of consistency models, which has a factor 0.5 more."""
    c_skip, c_out = REAL_SCALINGS(self, i)
    return c_skip, c_out / 2


REAL_SCALINGS = LCM.scalings
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "1 + scale": (scale_input, "guide", lambda d, x, t, c, scale: REAL_GUIDE(d, x, t, c, scale + 1)),
    "w in place of the scale": (scale_input, "guide", lambda d, x, t, c, scale: REAL_GUIDE(d, x, t, c, scale - 1)),
    "one scale for the batch": (scale_input, "guide", one_scale_for_all),
    "x0 alone is guided": (scale_input, "guide", half_guided),
    "no guidance": (scale_input, "guide", lambda d, x, t, c, scale: d(x, t, c)),
    "the gradient at the less noisy point": (LCM, "following", roles_swapped),
    "the student is its own target": (LCM, "following", its_own_target),
    "the target follows fast": (LCM, "after_step", fast_target),
    "no target": (LCM, "after_step", lambda self, step: None),
    "c_out with sigma_data": (LCM, "scalings", scalings_with_sigma_data),
    "the target's scalings are those of t": (
        LCM,
        "scalings",
        lambda self, i: REAL_SCALINGS(self, (i - 1).clamp_min(0)),
    ),
    "no boundary": (LCM, "f", lambda self, d, x, i, c, extra=NONE: d(x, self.grid[i].clamp_min(1e-3), c, extra).x0),
    "two steps of the grid": (LCM, "less_noisy", two_steps),
    "c is not subtracted": (LCM, "distance", lambda self, x, y: (x - y).square().add(1e-6).sqrt().mean()),
    "the norm of the whole sample": (
        LCM,
        "distance",
        lambda self, x, y: ((x - y).square().sum(1) + 1e-6).sqrt().sub(1e-3).mean(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


def batch_of(n: int, shape: tuple[int, ...] = (1, 8, 8)) -> Batch:
    cond = {"class_labels": torch.arange(n) % 10} if len(shape) == 3 else {}
    return Batch(n, shape, cond, torch.randn(n, *shape), torch.device("cpu"), (0, 0, 0))


def test_the_grid_and_the_scalings_are_those_of_the_scripts(tiny_teacher: Callable[[str], Path]) -> None:
    method = LCM(load_teacher(tiny_teacher("vp")), Config())
    scripts = (np.arange(1, 51) * 20 - 1)[::-1].tolist()
    assert method.levels == scripts
    scheduler = diffusers.LCMScheduler()
    c_skip, c_out = method.scalings(torch.arange(51))
    for k, timestep in enumerate([*scripts, 0]):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        assert (float(c_skip[k]), float(c_out[k])) == pytest.approx(expected, rel=1e-12)
    assert float(c_skip[:-1].max()) < 1e-5


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_the_grid_descends_from_the_samplers_level(parameterization: str, tiny_teacher: Callable[[str], Path]) -> None:
    method = LCM(load_teacher(tiny_teacher(parameterization)), Config(ddim_steps=10, student_steps=2))
    assert len(method.grid) == 11
    assert bool((method.grid.diff() < 0).all())
    assert float(method.grid[-1]) == pytest.approx(method.schedule.t_min)
    angles = method.schedule.angle(torch.tensor(method.sampler().levels, dtype=torch.float64))
    assert torch.equal(angles, method.grid[[0, 5]])
    assert method.levels[0] == method.schedule.init_level


def test_passes_and_the_shared_dropout(tiny_teacher: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    method = LCM(load_teacher(tiny_teacher("vp")), Config(guidance_max=3.0))
    passes: list[tuple[str, int]] = []
    for name, denoiser in (("student", method.student), ("target", method.target), ("teacher", method.teacher)):
        denoiser.network.register_forward_hook(lambda m, args, out, name=name: passes.append((name, len(args[0]))))
    method.student_turn(0, batch_of(4)).loss.backward()
    assert sorted(passes) == [("student", 4), ("target", 4), ("teacher", 8)]
    assert all(p.grad is None for p in (*method.target.parameters(), *method.teacher.parameters()))
    monkeypatch.setattr(method, "f", lambda denoiser, x_t, i, cond, extra: torch.rand(4))
    assert float(method.student_turn(0, batch_of(4)).loss) == 0
    monkeypatch.setattr(following, "seeded", lambda seed, device: contextlib.nullcontext())
    assert float(method.student_turn(0, batch_of(4)).loss) > 0


def test_scales_are_drawn_for_each_sample(tiny_teacher: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    method = LCM(load_teacher(tiny_teacher("vp")), Config(guidance_min=2.0, guidance_max=6.0))
    seen: list[tuple[Tensor, Tensor]] = []

    def note(x_t: Tensor, x_r: Tensor, interval: Skip, cond: Any, seed: int) -> Outcome:
        seen.append((interval.i, interval.scale))
        return Outcome(torch.zeros(()))

    monkeypatch.setattr(method, "less_noisy", lambda x_t, *rest: x_t)
    monkeypatch.setattr(method, "following", note)
    method.student_turn(0, batch_of(5000))
    ((i, scale),) = seen
    assert torch.bincount(i, minlength=50).min() > 0
    assert (i.min(), i.max()) == (0, 49)
    assert 2 <= float(scale.min()) < 2.01
    assert 5.99 < float(scale.max()) < 6
    assert abs(float(torch.corrcoef(torch.stack([i.double(), scale]))[0, 1])) < 0.05


def test_unconditional_teachers_need_guidance_1() -> None:
    teacher = gaussian_teacher([0.3, 0.1], 0.7)
    method = LCM(teacher, Config(), student=teacher.denoiser)
    assert not method.config.takes_scale
    assert torch.isfinite(method.student_turn(0, batch_of(8, (2,))).loss)
    with pytest.raises(UserError, match=r"teacher: a guidance scale needs one that was trained with a null condition"):
        LCM(teacher, Config(guidance_max=2.0), student=teacher.denoiser)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_min": 3.0}, "guidance_min: 3.0 must be at most guidance_max"),
        ({"guidance_max": 3.0, "guidance_scale": 4.0}, r"guidance_scale: 4.0 is not in what is trained, 1.0"),
        ({"student_steps": 51}, r"student_steps: 51 must be at most ddim_steps \(50\)"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: dict[str, Any], words: str, tiny_teacher: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match=words):
        LCM(load_teacher(tiny_teacher("vp")), Config(**options))


LORA = {"lora": "student", "lora_rank": 2, "guidance_min": 2.0, "guidance_max": 2.0}
VARIANTS: list[dict[str, Any]] = [{"guidance_max": 3.0}, LORA, LORA | {"guidance_max": 3.0}]


def shared(teacher: Path) -> dict[str, Any]:
    return {
        "method": "lcm", "teacher": str(teacher), "data": "digits", "batch_size": 4, "student_lr": 1e-3,
        "ddim_steps": 10, "sample_every": 0, "device": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_it_trains_every_parameterisation(
    parameterization: str, variant: dict[str, Any], tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    teacher = tiny_teacher(parameterization)
    folder = distill(**shared(teacher), **variant, steps=2, out=str(tmp_path / "run")).student
    stock = load_file(teacher / "unet/diffusion_pytorch_model.safetensors")
    assert load_file(folder / "unet/diffusion_pytorch_model.safetensors").keys() == stock.keys()
    assert load_teacher(folder).num_classes == 10
    DiffusionPipeline.from_pretrained(folder)


def test_the_exported_student_is_the_one_at_its_scale(tiny_teacher: Callable[[str], Path], tmp_path: Path) -> None:
    """Of a student whose scale matters: the folder's samples are those of the method's sampler, to rounding."""
    options = {**shared(tiny_teacher("vp")), "student_lr": 1e-2, "ema": 0.0}
    run = tmp_path / "run"
    folder = distill(**options, guidance_max=5.0, guidance_scale=2.0, student_steps=2, steps=6, out=str(run)).student
    method = LCM(
        load_teacher(tiny_teacher("vp")),
        Config(ddim_steps=10, guidance_max=5.0, guidance_scale=2.0, student_steps=2),
    )
    method.student.load_state_dict(load_file(run / "checkpoints/step-00000006/student.safetensors"))
    method.student.eval()
    cond = {"class_labels": torch.arange(4)}

    def draw(sampler: Any) -> Tensor:
        return sampler((1, 8, 8), cond, [torch.Generator().manual_seed(k) for k in range(4)])

    own, exported = draw(method.sampler()), draw(load_student(folder)[0])
    assert torch.allclose(own, exported, atol=1e-5 * float(own.abs().max()))
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 1.0, dtype=torch.float64)
    two, five = (method.student(x, t, cond, Extra(torch.full((4,), a))).x0 for a in (2.0, 5.0))
    assert torch.equal(two, method.student(x, t, cond).x0)
    assert not torch.allclose(two, five, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    variant: dict[str, Any], tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    same_when_resumed(tmp_path, **shared(tiny_teacher("vp")), **variant, ema=0.9)
    run, file = tmp_path / "run", "unet/diffusion_pytorch_model.safetensors"
    last = run / "checkpoints/step-00000004"
    assert (last / "state.target.safetensors").is_file() == ("lora" not in variant)
    a, b = load_file(export(run, out=tmp_path / "again") / file), load_file(run / "student" / file)
    assert all(torch.equal(a[key], b[key]) for key in a)
    if "lora" in variant:
        base = load_file(tiny_teacher("vp") / file)
        assert all("lora_" in name or ".inputs." in name for name in load_file(last / "student.safetensors"))
        assert any(not torch.equal(a[k], base[k]) for k in base)
