"""Flash-DMD: its exact checks hold, known mistakes are caught, its turns are their straight lines, and it resumes."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill import UserError
from diffdistill.data.seen import decoder_of
from diffdistill.eval.budget import any_batch
from diffdistill.exact.checks import run_checks
from diffdistill.families import load_teacher
from diffdistill.methods.checks.flash_dmd import verify
from diffdistill.methods.flash_dmd import Config, FlashDMD
from diffdistill.options import build
from diffdistill.players.discriminator import ImageDiscriminator
from diffdistill.scaffold import matching
from diffdistill.scaffold.adversary import PixelAdversary
from diffdistill.scaffold.method import Need
from tests import tiny_a
from tests.methods.short_runs import same_when_resumed
from tests.methods.test_wiring_matching import RANGE, Straight, Values
from tests.scaffold.straight import EDM_, FLOW, TRIG, VP, Plain, agree, draw, in_double, noised, normal, scatter
from tests.training.test_derived import STOCK_DDPM, derived_for, teacher_of

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL_LOSS = FlashDMD.student_loss
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "all levels are matched": (FlashDMD, "matched_levels", lambda self: range(self.steps)),
    "the first level is judged too": (FlashDMD, "judged_levels", lambda self: range(self.steps)),
    "the matched samples are judged": (FlashDMD, "judged", lambda self, batch: self.generate(batch, "student")),
    "there is no discriminator": (FlashDMD, "other_turns", lambda self, step: ()),
    "real and generated are swapped": (
        PixelAdversary,
        "student_loss",
        lambda self, x, batch: F.softplus(self.logits(x)).mean(),
    ),
    "the matching's sign": (
        matching,
        "dmd_loss",
        lambda x, t, eps, c, p, q, n, f=matching.dmd_loss: f(x, t, eps, c, q, p, n),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())  # stops at the first


class Flash(Straight):
    """Steps of much noise are matched, those of little noise judged; `judged` are the samples of this step's turn."""

    seen: Tensor | None = None
    latent = False

    def __init__(self, options: dict[str, Any], plain: Plain, key: tuple[int, ...] = (5, 4, 4)):
        super().__init__("flash_dmd", options, plain, key)
        self.weight = self.c.gan_weight
        self.c = SimpleNamespace(**{k: v for k, v in asdict(self.c).items() if k != "gan_weight"})  # which is no head's
        if self.latent:
            self.method.needs = self.method.needs | {Need.DECODER}
            self.method.decode = lambda x: x.flip(-1) ** 2

    def drawn(self, n: int, purpose: str) -> int:
        return int(torch.randint(n, (), generator=draw(*self.key[:2], purpose)))

    def at(self, k: int) -> Tensor:
        levels = self.plain.levels(self.c.student_steps, self.c.student_level)
        x_t, t = self.plain.start(levels[0], normal("z", self.key))
        for j in range(1, k + 1):
            with torch.no_grad():
                x0 = self.x0(self.student, x_t, t)
            t = torch.full_like(t, self.plain.angle(levels[j]))
            x_t = noised(x0, t, normal(f"z {j}", self.key))
        return self.x0(self.student, x_t, t)

    @property
    def matched(self) -> int:
        return self.c.matched_steps or -(-self.c.student_steps // 2)

    def simulated(self, labels: Tensor | None = None) -> Tensor:
        if self.c.fake_scores == "per_level":
            return self.at(self.key[1] // self.c.update_ratio % self.matched)
        return self.at(self.drawn(self.matched, "student/level"))

    def of_judged(self) -> Tensor:
        first = min(self.matched, self.c.student_steps - 1)
        return self.at(first + self.drawn(self.c.student_steps - first, "student/judged level"))

    def logits_of(self, x: Tensor) -> Tensor:
        images = self.plain.std * x
        if self.latent:
            images = images.flip(-1) ** 2
        method: Any = self.method
        return method.adversary.discriminator.layers(images).flatten(1).mean(1)

    def student_turn(self) -> Values:
        values = super().student_turn()
        x = self.of_judged()
        self.seen = x.detach()
        gan = F.softplus(-self.logits_of(x)).mean()
        return {**values, "loss": values["loss"] + self.weight * gan, "gan": gan}

    def discriminator_turn(self) -> Values:
        if self.seen is None:
            with torch.no_grad():
                self.seen = self.of_judged()
        gan = F.softplus(-self.logits_of(self.batch.images)).mean() + F.softplus(self.logits_of(self.seen)).mean()
        return {"loss": gan, "gan": gan}

    def play(self) -> list[str]:
        order = []
        for turn in self.method.turns(self.key[1]):
            mine = {"student": self.student_turn, "discriminator": self.discriminator_turn}
            agree(self.method, turn, self.batch, mine.get(turn.player, self.fake_turn))
            scatter(self.method.players[turn.player], 40)
            order.append(turn.player)
        return order

    _flash_dmd = Straight._dmd2


class FlashLatent(Flash):
    latent = True


SHARED = {"fake_scores": "shared", "update_ratio": 1, "gan_weight": 0.7}
CASES: list[tuple[type[Flash], dict[str, Any], Plain]] = [
    (Flash, {**SHARED, "guidance_scale": 2.5, "time_shift": 3.0}, VP),
    (Flash, {**SHARED, "student_steps": 3, "normalise": False, **RANGE}, EDM_),
    (Flash, {**SHARED, "student_steps": 1, "student_level": 0.8}, FLOW),
    (Flash, {**SHARED, "student_steps": 3, "matched_steps": 1, "update_ratio": 2}, TRIG),
    (FlashLatent, {**SHARED, "student_steps": 2, "matched_steps": 2}, EDM_),
]


@pytest.mark.parametrize(("kind", "options", "plain"), CASES)
def test_turns_are_their_straight_lines(kind: type[Flash], options: dict[str, Any], plain: Plain) -> None:
    with double():
        for step in (4, 6, 7):
            order = kind(options, plain, (5, step, 4)).play()
            moves = step % options["update_ratio"] == 0
            assert order == ["student"] * moves + ["fake_score", "discriminator"]


@pytest.mark.parametrize("step", [0, 2, 3])
def test_each_matched_level_has_its_own_fake_score(step: int) -> None:
    with double():
        straight = Flash({"student_steps": 4, "update_ratio": 2}, VP, (5, step, 1))
        method, k = straight.method, step // 2 % 2
        role = ["fake_score", "fake_score_2"][k]
        assert list(method.players) == ["student", "fake_score", "fake_score_2", "discriminator"]
        straight.fake = method.fake_scores[k].network
        assert straight.play() == ["student"] * (step == 2 or step == 0) + [role, "discriminator"]


def test_what_the_discriminator_reads_has_no_gradient() -> None:
    with double():
        for step in (4, 5):  # the student's samples, and its own
            straight = Flash({**SHARED, "update_ratio": 2, "student_steps": 2}, TRIG, (5, step, 4))
            loss = [turn.loss(straight.batch).loss for turn in straight.method.turns(step)][-1]
            weights = list(straight.method.student.parameters())
            assert torch.autograd.grad(loss, weights, allow_unused=True) == (None,) * len(weights)


def test_rates_needs_and_who_is_trained() -> None:
    rates = {"student_lr": 0.1, "fake_score_lr": 0.2, "discriminator_lr": 0.3, "beta1": 0.4, "weight_decay": 0.5}
    method = Flash(rates, VP).method
    found = [method.optimizer(player) for player in ("student", "fake_score", "fake_score_2", "discriminator")]
    assert found == [(rate, (0.4, 0.999), 0.5) for rate in (0.1, 0.2, 0.2, 0.3)]
    assert method.needs == {Need.IMAGES} and method.exported == "student"
    assert Flash({"reward_beta": 1.0}, VP).method.needs == {Need.IMAGES, Need.REWARD}
    latent = replace(VP.teacher(), latent=True)
    assert FlashDMD(latent, Config()).needs == {Need.IMAGES, Need.DECODER}


@pytest.mark.parametrize(
    ("shape", "latent", "images", "sides"),
    [
        ((1, 8, 8), False, (5, 1, 8, 8), 2),
        ((3, 64, 32), False, (5, 3, 64, 32), 2),
        ((4, 8, 8), True, (5, 3, 64, 64), 8),
        ((16, 3, 8, 8), True, (5, 3, 2, 64, 64), 8),
        ((2,), False, (5, 2), None),
    ],
)
def test_the_discriminator_reads_images_videos_and_vectors(
    shape: tuple[int, ...], latent: bool, images: tuple[int, ...], sides: int | None
) -> None:
    network = ImageDiscriminator(shape, latent)
    x = torch.randn(images, requires_grad=True)
    logits = network(x)
    assert logits.shape == (5,)
    (slope,) = torch.autograd.grad(logits[2], x)
    assert {k for k in range(5) if slope[k].abs().sum() > 0} == {2}  # each sample has its own logit
    assert (slope[2] != 0).all()  # every place and channel counts
    if sides:
        frames = x[:, :, 0] if x.ndim == 5 else x
        assert min(network.layers(frames).shape[2:]) == sides
        several = [layer for layer in network.layers if isinstance(layer, nn.GroupNorm)]
        assert len(several) == len([m for m in network.layers if isinstance(m, nn.Conv2d)]) - 3


def test_latents_are_decoded_with_a_gradient_and_the_vae_has_none(tmp_path: Path) -> None:
    pipeline = tiny_a.stable_diffusion(prediction_type="v_prediction", zero_snr=True)
    pipeline.save_pretrained(tmp_path / "sd")
    teacher = load_teacher(tmp_path / "sd", resolution=16)
    assert teacher.latent and not load_teacher("digits").latent
    method = FlashDMD(teacher, Config(fake_scores="shared"))
    method.decode = decode = decoder_of(teacher)
    x = torch.randn(2, *teacher.shape, requires_grad=True)
    images = method.as_images(x)
    vae = pipeline.vae.eval()
    with torch.no_grad():
        expected = vae.decode(x * teacher.denoiser.schedule.data_std / vae.config.scaling_factor).sample
    assert images.shape == (2, 3, 16, 16) and torch.allclose(images, expected, atol=1e-5)
    assert float(torch.autograd.grad(images.sum(), x)[0].abs().sum()) > 0
    assert not decode(x.detach()).requires_grad
    method.decode = None  # as for a plan, which loads no autoencoder
    counted = any_batch(method, teacher, 2, 0)
    assert method.adversary.logits(counted.images).shape == (2,)


RUN = {"method": "flash_dmd", "batch_size": 4, "sample_every": 0, "device": "cpu", "data": "digits"}


@pytest.mark.parametrize("lora", [None, "student,fake_score"])
def test_a_resumed_run_has_the_same_bits(lora: str | None, tiny_teacher: Teachers, tmp_path: Path) -> None:
    teacher = str(tiny_teacher("vp"))
    same_when_resumed(
        tmp_path, teacher=teacher, lora=lora, lora_rank=2, student_steps=2, fake_scores="shared", update_ratio=2, **RUN
    )


def test_what_is_derived_and_what_is_refused() -> None:
    teacher = teacher_of(STOCK_DDPM, VP.teacher().denoiser.output)
    four = derived_for(teacher, Config, 1000)
    assert four["update_ratio"].value == 2  # as many as there are fake scores
    assert derived_for(teacher, Config, 1000, student_steps=6)["update_ratio"].value == 3
    assert derived_for(teacher, Config, 1000, matched_steps=1)["update_ratio"].value == 1
    assert "discriminator_lr" not in four and four["beta1"].value == 0.0
    with pytest.raises(UserError, match="matched_steps: 3 is more than the student's 2 steps"):
        FlashDMD(VP.teacher(), Config(matched_steps=3, levels=(20.0, 9.0)))
    assert FlashDMD(VP.teacher(), Config(matched_steps=5, student_steps=5)).judged_levels() == range(4, 5)
    with pytest.raises(UserError, match="gan_weight: 0"):
        build(Config, {"gan_weight": 0})
