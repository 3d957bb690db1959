"""MDT-dist: the exact checks hold, known mistakes are caught, and it trains and resumes, on images and on points."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import UserError, distill, load_teacher
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import LinearFlow
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.mdt_dist import verify
from diffdistill.methods.mdt_dist import Config, MDTDist
from diffdistill.players.teacher import Teacher
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]
REAL: dict[str, Any] = {name: getattr(MDTDist, name) for name in ("gap", "derivative", "second_term")}


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def swapped(self: MDTDist, batch: Any) -> Any:
    self.judge, self.teacher = self.teacher, self.judge
    try:
        return REAL["second_term"](self, batch)
    finally:
        self.judge, self.teacher = self.teacher, self.judge


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the gap has the other sign": (MDTDist, "gap", lambda self, f, at, *share: -REAL["gap"](self, f, at, *share)),
    "no derivative": (MDTDist, "derivative", lambda self, at, speed: 0 * at.x_t),
    "half the derivative": (MDTDist, "derivative", lambda self, at, speed: REAL["derivative"](self, at, speed / 2)),
    "an error of F is one of u": (MDTDist, "rho", lambda self, t: torch.ones_like(t)),
    "one scale for both terms": (MDTDist, "second_term", swapped),
    "always divided by its norm": (
        MDTDist,
        "gap",
        lambda self, f, at, *share: REAL["gap"](_limited(self), f, at, *share),
    ),
}


def _limited(method: MDTDist) -> MDTDist:
    object.__setattr__(method.config, "derivative_c", 0.1)
    return method


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_refusals(tiny_teacher: Teachers) -> None:
    with pytest.raises(UserError, match="mode: mdt_dist matches the velocity of its teacher; use distillation"):
        MDTDist(load_teacher(tiny_teacher("vp")), Config(mode="training"))


RUN = {"method": "mdt_dist", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu", "student_lr": 1e-2}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [
        ("vp", {"guidance_scale": 2.0, "matching_scale": 3.0, "student_steps": 2}),
        ("edm", {"matching_weight": 0.0, "derivative_c": 0.1}),
        ("flow", {"derivative": "backward"}),
    ],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), guidance_scale=2.0, **RUN)


class OfPoints(nn.Module):
    """A velocity of sets of points (B, N, 3), which attend to one another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.write = nn.Linear(4, 16), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)

    def forward(self, z: Tensor, s: Tensor) -> Tensor:
        time = s.to(z)[:, None, None].expand(*z.shape[:2], 1)
        return self.write(self.layer(self.read(torch.cat([z, time], 2))))


@pytest.mark.parametrize("shape", [(12, 3), (2, 4, 4, 4)])
def test_samples_need_not_be_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Sets of points, and latents of three dimensions."""
    torch.manual_seed(1)
    network: nn.Module = OfPoints() if len(shape) == 2 else OfVolumes()
    denoiser = Denoiser(network, LinearFlow(data_std=0.7, time_scale=1.0), OUTPUTS["flow_prediction"])
    run = distill(
        "mdt_dist", teacher=Teacher(denoiser, shape), data=0.7 * torch.randn(16, *shape), steps=3, batch_size=4,
        student_lr=1e-2, student_steps=2, out=tmp_path / "run", device="cpu", log_every=1,
    )  # fmt: skip
    sampler = run.sampler()
    drawn = sampler(shape, {}, [torch.Generator().manual_seed(k) for k in range(2)])
    assert drawn.shape == (2, *shape) and bool(drawn.isfinite().all())
    again = sampler(shape, {}, [torch.Generator().manual_seed(k) for k in range(2)])
    assert torch.equal(drawn, again)


class OfVolumes(nn.Module):
    """A velocity of latents (B, 2, D, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 2, 3, padding=1))

    def forward(self, z: Tensor, s: Tensor) -> Tensor:
        time = s.to(z)[:, None, None, None, None].expand(-1, 1, *z.shape[2:])
        return self.layers(torch.cat([z, time], 1))
