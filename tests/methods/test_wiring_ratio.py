"""A whole turn of the methods that take the ratio of two densities from a discriminator, against a rewrite of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.scaffold.method import Need
from tests.methods.test_wiring_matching import RANGE, Straight, injected, mean, play
from tests.scaffold.straight import EDM_, FLOW, TRIG, VP, Plain, agree, fold, gaussian, in_double, scatter, uniform

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)

H = {
    "jensen_shannon": lambda r: r / (1 + r),
    "forward_kl": lambda r: r,
    "neyman": lambda r: 2 / r,
}
P = {
    "jensen_shannon": lambda r: (r / (1 + r)) ** 2,
    "forward_kl": lambda r: 0 * r,
    "neyman": lambda r: 4 / r,
}


class Ratio(Straight):
    """`ratios` and `weight` are what the means of the steps before are."""

    ratios, weight = torch.ones(4, dtype=torch.float64), 1.0

    def ratio(self, x_t: Tensor, t: Tensor) -> Tensor:
        c = self.c
        with torch.no_grad():
            r = torch.exp(self.logits(x_t, t)).clamp(c.ratio_low, c.ratio_high)
        return r / self.ratios[(t / (torch.pi / 2) * c.ratio_bins).long()] if c.ratio_bins else r

    def _f_distill(self, x: Tensor, t: Tensor, x_t: Tensor) -> Values:
        with torch.no_grad():
            teacher, fake = self.both(x_t, t)
            size = mean((x - teacher).abs())
            grad = fold(1 / size if self.c.normalise else torch.tan(t) ** -2) * (fake - teacher)
            h = H[self.c.divergence](self.ratio(x_t, t)) / self.weight
        unit = self.plain.std if self.c.normalise else 1.0
        gap = (mean((fake - teacher).abs()) / size).mean()
        return {"loss": unit * injected(x, fold(h) * grad), "gap": gap, "weight": h.square().mean()}

    def _uni_instruct(self, x: Tensor, t: Tensor, x_t: Tensor) -> Values:
        teacher, fake = self.both(x_t, t)
        delta, r = teacher - fake, self.ratio(x_t, t)
        score = (fold(torch.cos(t) / torch.sin(t) ** 2) * delta).detach()
        name, shown = self.c.divergence, r.mean()
        r = r * (1 + (score * (x_t - x_t.detach())).flatten(1).sum(1))  # to first order, which is all that counts
        h, path = H[name](r) / self.weight, P[name](r) / self.weight
        each = path * mean(delta.square()) + 2 * h * mean(delta * (fake - x))
        if self.c.normalise:
            each = each / mean((x - teacher).abs()).detach()
        return {"loss": each.mean(), "gap": delta.detach().square().mean(), "ratio": shown}

    def student_t(self) -> Tensor:
        if self.name != "uni_instruct":
            return super().student_t()
        c = self.c
        return self.plain.karras(c.time_low + (c.time_high - c.time_low) * uniform("student/t", self.key))

    def fake_t(self) -> Tensor:
        if self.name != "uni_instruct":
            return super().fake_t()
        return self.plain.log_normal(gaussian("fake_score/t", self.key), -1.2, 1.2)

    def logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        adversary = self.method.adversaries[self.k]
        time, _, _, factor = self.plain.native(t)
        return adversary.head(self.fake.hidden(fold(factor) * x_t, time, self.labels))

    k = 0


GAN = {"gan_weight": 0.7, "discriminator_weight": 0.3, "update_ratio": 1, "ratio_bins": 4}
CASES: list[tuple[str, dict[str, Any], Plain]] = [
    ("f_distill", {**GAN, "ratio_low": 0.9, "ratio_high": 1.1, **RANGE}, VP),
    ("f_distill", {**GAN, "divergence": "forward_kl", "guidance_scale": 2.5, "time_shift": 3.0}, EDM_),
    ("f_distill", {**GAN, "divergence": "neyman", "ratio_bins": 0, "normalise": False}, TRIG),
    ("f_distill", {**GAN, "student_steps": 3, "student_level": 0.8}, FLOW),
    ("uni_instruct", {**GAN, "student_level": 9.0, "divergence": "jensen_shannon"}, VP),
    ("uni_instruct", {**GAN, "ratio_low": 0.9, "ratio_high": 1.1, **RANGE, "normalise": False}, EDM_),
    ("uni_instruct", {**GAN, "divergence": "neyman", "ratio_bins": 0, "guidance_scale": 2.5}, FLOW),
    ("uni_instruct", {**GAN, "fake_score_loss": "epsilon"}, TRIG),
]


@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_a_turn_is_its_straight_line(name: str, options: dict[str, Any], plain: Plain) -> None:
    straight = Ratio(name, options, plain)
    straight.weight = 1.0 if not straight.c.ratio_bins else float(H[straight.c.divergence](torch.ones(())))
    assert straight.method.needs == type(straight.method).needs == frozenset({Need.IMAGES})
    assert play(straight) == ["student", "fake_score"]


@pytest.mark.parametrize("name", ["f_distill"])
def test_the_means_are_those_of_the_samples_before(name: str) -> None:
    """After a step they are part of the next one's weights: by the rate, in each part of the noise that was seen."""
    straight = Ratio(name, {**GAN, "ratio_ema": 0.6}, VP)
    method, batch = straight.method, straight.batch
    for turn in method.turns(0):
        turn.loss(batch)
    method.after_step(0)
    t = straight.student_t()
    part = (t / (torch.pi / 2) * 4).long()
    x = straight.sample("z")
    x_t = torch.cos(fold(t)) * x + torch.sin(fold(t)) * batch.randn("student/eps")
    with torch.no_grad():
        r = torch.exp(straight.logits(x_t, t)).clamp(0.1, 20)
    seen = sorted(set(part.tolist()))
    assert 1 < len(seen) < 4, "some and not all"
    ratios = torch.ones(4, dtype=torch.float64)
    for k in seen:
        ratios[k] = 0.6 + 0.4 * r[part == k].mean()
    state = dict(method.state["weights"].named_buffers())
    assert torch.allclose(state["0.ratio"].double(), ratios, atol=1e-6)
    weight = 0.6 * 0.5 + 0.4 * (r / (1 + r)).mean()
    assert torch.allclose(state["0.weight"].double(), weight, atol=1e-6)
    assert set(method.state["weights"].state_dict()) == {"0.ratio", "0.weight"}, "what a checkpoint keeps"
    straight.ratios, straight.weight = ratios.float().double(), float(weight.float())
    for buffer in ("ratio", "weight"):  # to the last digit
        state[f"0.{buffer}"].copy_(ratios.float() if buffer == "ratio" else weight.float())
    assert play(straight) == ["student", "fake_score"]


@pytest.mark.parametrize("name", ["f_distill"])
def test_each_level_has_its_own_discriminator_and_means(name: str) -> None:
    options = {**GAN, "student_steps": 2, "fake_scores": "per_level", "update_ratio": 2}
    straight = Ratio(name, options, VP, (5, 2, 1))
    method: Any = straight.method
    straight.k, straight.fake = 1, method.fake_scores[1].network
    scatter(method.adversaries[1].head, 9)
    scatter(method.fake_scores[1], 10)
    straight.weight = 0.25
    method.weights[1].weight.fill_(0.25)
    turns = method.turns(2)
    assert [turn.player for turn in turns] == ["student", "fake_score_2"]
    for turn in turns:
        agree(method, turn, straight.batch, straight.student_turn if turn.player == "student" else straight.fake_turn)
    method.after_step(2)
    assert bool((method.weights[0].ratio == 1).all()) and not bool((method.weights[1].ratio == 1).all())


def test_no_network_drops_out_and_how_uni_instruct_is_sampled() -> None:
    straight = Ratio("uni_instruct", {**GAN, "student_level": 9.0}, VP)
    method: Any = straight.method
    for turn in method.turns(0):
        turn.loss(straight.batch)
        assert not method.student.training and not method.fake_score.training
    assert method.sampler().levels == (9.0,)
    method.after_step(0)
    assert not bool((method.weights[0].ratio == 1).all())
