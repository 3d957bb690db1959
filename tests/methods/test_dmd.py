"""DMD: its exact checks hold, known mistakes are caught, and pairs decide where the divergence cannot."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill, load_teacher
from diffdistill.config import FitConfig, PairsConfig
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.losses import denoising_loss
from diffdistill.core.prediction import diffuse
from diffdistill.data.pairs import draw_pairs, make_pairs
from diffdistill.exact.analytic import AffineGenerator, LearnedGaussian, gaussian_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks import dmd as checks_of_dmd
from diffdistill.methods.checks.dmd import verify
from diffdistill.methods.dmd import DMD, Config
from diffdistill.scaffold import matching
from diffdistill.scaffold.method import Batch, Outcome, Pair
from diffdistill.training.trainer import Trainer, accelerator_for
from tests.methods.short_runs import same_when_resumed

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(c.name.startswith("gradient of KL") for c in checks) == 6


def opposite_sign(*args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
    grad, gap = REAL_GRADIENT(*args, **kw)
    return -grad, gap


def both_guided(x: Tensor, x_t: Tensor, t: Tensor, cond: Any, teacher: Any, fake: Any, normalise: bool) -> Any:
    scale = getattr(teacher, "scale", 1.0)
    fake = fake if hasattr(fake, "scale") else guided(fake, scale)
    return REAL_GRADIENT(x, x_t, t, cond, teacher, fake, normalise)


def swapped_networks(x: Tensor, x_t: Tensor, t: Tensor, cond: Any, teacher: Any, fake: Any, normalise: bool) -> Any:
    return REAL_GRADIENT(x, x_t, t, cond, fake, teacher, normalise)


def wrong_samples(fake_score: Any, x: Tensor, t: Tensor, eps: Tensor, cond: Any, kind: str) -> Tensor:
    return denoising_loss(fake_score(diffuse(x, t, eps), t, cond), x.flip(0), eps)


def turn_with_pair(change: Callable[[Pair], Pair]) -> Callable[..., Any]:
    def turn(self: DMD, drawn: list[Tensor], batch: Batch) -> Outcome:
        return REAL_TURN(self, drawn, replace(batch, pair=change(batch.pair)) if batch.pair else batch)

    return turn


def unweighted(self: DMD, drawn: list[Tensor], batch: Batch) -> Outcome:
    outcome = REAL_TURN(self, drawn, batch)
    missing = (1 - self.config.regression_weight) * outcome.shown.get("regression", torch.zeros(()))
    return replace(outcome, loss=outcome.loss + missing)


REAL_GRADIENT, REAL_INJECTION = matching.distribution_matching_gradient, matching.gradient_injection
REAL_TURNS, REAL_TURN, REAL_REGRESSION = DMD.turns, DMD.student_turn, DMD.regression
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "opposite sign": (matching, "distribution_matching_gradient", opposite_sign),
    "the teacher and the fake score swapped": (matching, "distribution_matching_gradient", swapped_networks),
    "the fake score is guided too": (matching, "distribution_matching_gradient", both_guided),
    "the teacher is not guided": (matching, "guided", lambda denoiser, scale: denoiser),
    "the student is detached": (matching, "gradient_injection", lambda x, g: REAL_INJECTION(x.detach() + 0 * x, g)),
    "the gradient's target is not detached": (
        matching,
        "gradient_injection",
        lambda x, g: 0.5 * ((x - (x - g)) ** 2).mean(),
    ),
    "the fake score is trained on the wrong samples": (matching, "fake_score_loss", wrong_samples),
    "the student moves last": (DMD, "turns", lambda self, step: REAL_TURNS(self, step)[::-1]),
    "the fake score does not move": (DMD, "turns", lambda self, step: REAL_TURNS(self, step)[:1]),
    "the regression is left out": (DMD, "regression", lambda self, x, y: 0 * REAL_REGRESSION(self, x, y)),
    "the regression's student is detached": (
        DMD,
        "regression",
        lambda self, x, y: REAL_REGRESSION(self, x.detach() + 0 * x, y),
    ),
    "the regression is not weighted": (DMD, "student_turn", unweighted),
    "the pairs' noise is another": (DMD, "student_turn", turn_with_pair(lambda p: p._replace(z=p.z.flip(0)))),
    "the regression is to the noise": (DMD, "student_turn", turn_with_pair(lambda p: p._replace(x0=p.z))),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    monkeypatch.setattr(
        checks_of_dmd, "_mode_checks", lambda: iter(())
    )  # the descents, which no mutant needs, take seconds
    assert any(not c.ok for c in run_checks(verify))


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "sign"), [(0.25, 1.0), (0.0, -1.0)])
def test_pairs_decide_what_the_divergence_cannot(weight: float, sign: float, tmp_path: Path) -> None:
    """A student that begins mirrored, m - s z, turns round with pairs, and without them stays so."""
    mean, std = torch.tensor([0.8, -0.5]), torch.tensor([0.7, 1.4])
    teacher = gaussian_teacher(mean.tolist(), std.double())
    generator = AffineGenerator(torch.zeros(2), -torch.ones(2))
    schedule, row = teacher.denoiser.schedule, teacher.denoiser.output
    method = DMD(
        teacher,
        Config(student_lr=1e-2, fake_score_lr=4e-2, regression_weight=weight, beta1=0.0, time_low=0.1),
        student=Denoiser(generator, schedule, row),
        fake_score=Denoiser(LearnedGaussian(2), schedule, row),
    )
    config = FitConfig(steps=1000, batch_size=256, lr_schedule="cosine", max_grad_norm=0, sample_every=0, device="cpu")
    accelerator = accelerator_for(config, tmp_path)

    def batch(step: int) -> Batch:
        fresh = Batch(256, (2,), {}, None, accelerator.device, (0, step, 0))
        z = fresh.randn("pair")
        return replace(fresh, pair=Pair(z, mean + std * z, {}))

    trainer = Trainer(method, batch, config, tmp_path, accelerator)
    trainer.fit()
    assert torch.allclose(generator.mean.detach().float(), mean, rtol=0.05, atol=0), generator.mean
    assert torch.allclose(generator.scale.detach().float(), sign * std, rtol=0.05, atol=0), generator.scale


@pytest.fixture(scope="module")
def pairs_of(tiny_teacher: Teachers, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("pairs")

    def make(parameterization: str) -> str:
        teacher, out = str(tiny_teacher(parameterization)), root / parameterization
        if not out.exists():
            make_pairs(teacher=teacher, count=10, sampling_steps=2, shard_size=8, device="cpu", out=str(out))
        return str(out)

    return make


RUN = {"method": "dmd", "batch_size": 4, "ema": 0.5, "sample_every": 0, "device": "cpu", "student_lr": 1e-3}


def run(teacher: Path, out: Path, **options: Any) -> Path:
    return distill(**RUN | {"teacher": str(teacher), "out": str(out)} | options).student


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_it_trains_every_parameterisation(
    parameterization: str, tiny_teacher: Teachers, pairs_of: Callable[[str], str], tmp_path: Path
) -> None:
    folder = run(tiny_teacher(parameterization), tmp_path / "run", steps=2, pairs=pairs_of(parameterization))
    assert (folder / "model_index.json").is_file()
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "student/regression" in line and "fake_score/denoising" in line


def test_a_resumed_run_has_the_same_bits(
    tiny_teacher: Teachers, pairs_of: Callable[[str], str], tmp_path: Path
) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), pairs=pairs_of("vp"), distance="huber", **RUN)


def test_pairs_are_needed_for_the_regression_alone(
    tiny_teacher: Teachers, pairs_of: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="pairs: dmd with these options needs noise-image pairs; make them with"):
        run(tiny_teacher("vp"), tmp_path / "without", steps=1)
    with pytest.raises(UserError, match="was made with another teacher"):
        run(tiny_teacher("vp"), tmp_path / "others", steps=1, pairs=pairs_of("edm"))
    with pytest.raises(UserError, match="holds 10 and a step takes 11"):
        run(tiny_teacher("vp"), tmp_path / "few", steps=1, pairs=pairs_of("vp"), batch_size=11)
    assert not list(tmp_path.iterdir())
    run(tiny_teacher("vp"), tmp_path / "free", steps=1, regression_weight=0.0)


def test_one_pass_of_each_network_a_turn_and_guidance_is_the_teachers(tiny_teacher: Teachers) -> None:
    method = DMD(load_teacher(tiny_teacher("vp")), Config(guidance_scale=3.0))
    seen = []
    for name, network in (
        ("student", method.student.network),
        ("fake", method.fake_score.network),
        ("teacher", method.teacher.denoiser.network),
    ):
        network.register_forward_hook(lambda module, args, out, name=name: seen.append((name, len(args[0]))))
    cond = {"class_labels": torch.arange(4)}
    pair = Pair(torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), cond)
    batch = Batch(4, (1, 8, 8), cond, None, torch.device("cpu"), (0, 0, 0), pair)
    student, fake_score = method.turns(0)
    outcome = student.loss(batch)
    assert sorted(seen) == [("fake", 4), ("student", 8), ("teacher", 8)]
    seen.clear()
    fake_score.loss(batch)
    assert seen == [("fake", 4)]
    # The turn's loss is not changed by dropout, which the tiny teacher has.
    again = DMD(load_teacher(tiny_teacher("vp")), Config(guidance_scale=3.0)).turns(0)[0].loss(batch)
    assert float(again.loss.detach()) == float(outcome.loss.detach())


def test_the_students_noise_is_that_of_the_pairs(tiny_teacher: Teachers) -> None:
    """At one sampling step the teacher's pairs are what the student makes before any training, in either scaling."""
    for parameterization in ("vp", "edm"):
        teacher = load_teacher(tiny_teacher(parameterization))
        drawn = draw_pairs(teacher, teacher.denoiser, PairsConfig(sampling_steps=1), range(4))
        method = DMD(teacher, Config())
        with torch.no_grad():
            x = method.sampler().one_step(drawn["z"], {"class_labels": drawn["class_labels"]})
        assert float(method.regression(x, drawn["x0"])) < 1e-10


def test_options_that_cannot_be_are_refused(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    with pytest.raises(UserError, match=r"time_low: 0.9 must be less than time_high"):
        DMD(teacher, Config(time_low=0.9, time_high=0.5))
    with pytest.raises(UserError, match="distance: lpips"):
        DMD(gaussian_teacher([0.0, 1.0], 1.0), Config(distance="lpips"))
