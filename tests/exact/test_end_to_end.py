"""The plane: exact teacher, fitted players, and measures that a perfect student passes and a poor one fails."""

import math

import pytest
import torch

from diffdistill.catalogue import describe_method, method_names
from diffdistill.exact import plane as end_to_end
from diffdistill.exact.plane import LIMITS, checks, measures, mixture, plane_teacher
from diffdistill.players.sampler import Sampler


def test_the_mixture_has_unit_variance() -> None:
    x = mixture().sample(200_000, torch.Generator().manual_seed(0))
    assert torch.allclose(x.var(0), torch.ones(2, dtype=x.dtype), atol=0.01)


def test_exact_samples_pass_and_a_lost_mode_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    mix, labels = mixture(), torch.arange(2000) % 2
    exact = mix.sample(2000, torch.Generator().manual_seed(1), labels)
    lost = torch.where((exact - mix.means[0]).norm(dim=1, keepdim=True) < 0.7, mix.means[4] + 0 * exact, exact)
    sampler = Sampler(mix.denoiser(), [math.pi / 2])
    for x, good in ((exact, True), (lost, False), (1.3 * exact, False)):
        monkeypatch.setattr(end_to_end, "_draw", lambda sampler, x=x: x)
        measured = measures(sampler, "distribution")
        assert all(value <= LIMITS[name.split()[0]] for name, value in measured.items()) == good, measured


@pytest.mark.slow
def test_players_begin_near_the_teacher() -> None:
    teacher = plane_teacher()
    assert teacher.start is not None and not any(p.requires_grad for p in teacher.start.parameters())
    draw = torch.Generator().manual_seed(5)
    t = torch.rand(2000, generator=draw, dtype=torch.float64) * math.pi / 2
    cond = {"class_labels": torch.randint(3, (2000,), generator=draw)}
    x0 = mixture().sample(2000, draw, cond["class_labels"])
    x_t = (torch.cos(t)[:, None] * x0 + torch.sin(t)[:, None] * torch.randn(2000, 2, generator=draw)).float()
    error = (teacher.start(x_t, t, cond).v - teacher.denoiser(x_t, t, cond).v).square().mean().sqrt()
    assert error < 0.1
    twin = teacher.player("student")
    assert all(p.requires_grad for p in twin.parameters())


def test_every_method_says_what_its_student_should_be() -> None:
    # The two that repeat guidance step for step are exempt: the plane's classes lie so far apart that guidance moves
    # a sample by less than a small network errs. Their own tests train them to guided answers.
    silent = {name for name in method_names() if describe_method(name).plane is None}
    assert silent == {"adapter_guidance", "lora_guidance"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmd2", "progressive"])  # all of them take ten minutes: `verify --all`
def test_a_method_reaches_its_end(name: str) -> None:
    assert [c for c in checks(describe_method(name)) if not c.ok] == []
