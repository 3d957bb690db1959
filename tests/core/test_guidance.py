"""Classifier-free guidance in one batched call is the formula of two separate ones."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import Guided, guided
from diffdistill.core.ode import ddim_step, solve
from diffdistill.core.prediction import OUTPUTS, Prediction
from diffdistill.core.schedule import EDM, LinearFlow, Schedule
from diffdistill.errors import UserError

NULL = 10


class Network(nn.Module):
    """Per sample, so that a batched call and single ones are alike; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NULL + 1, 5, dtype=torch.float64)
        self.calls: list[int] = []

    def forward(self, x: Tensor, time: Tensor, *, class_labels: Tensor, scale: Tensor | None = None) -> Tensor:
        self.calls.append(len(x))
        shift = self.embedding(class_labels) + (0 if scale is None else scale[:, None])
        return torch.tanh(x + shift) + torch.cos(time / 100)[:, None]


def null(cond: Cond) -> Cond:
    return {**cond, "class_labels": torch.full_like(cond["class_labels"], NULL)}


def denoiser(schedule: Schedule | None = None, row: str = "flow_prediction") -> Any:
    return Denoiser(Network(), schedule or LinearFlow(), OUTPUTS[row], null=null)


def inputs() -> tuple[Tensor, Tensor, Cond]:
    x = torch.randn(4, 5, dtype=torch.float64)
    t = torch.tensor([0.2, 0.7, 1.1, 1.5], dtype=torch.float64)
    return x, t, {"class_labels": torch.tensor([3, 0, 7, 3])}


def assert_same(got: Prediction, want: Prediction) -> None:
    for form in ("x0", "eps", "v", "y", "t", "x_t"):
        torch.testing.assert_close(getattr(got, form), getattr(want, form), atol=1e-13, rtol=0)


def by_hand(d: Denoiser, x: Tensor, t: Tensor, cond: Cond, scale: Any) -> dict[str, Tensor]:
    conditional, unconditional = d(x, t, cond), d(x, t, null(cond))
    forms = ("x0", "eps", "v")
    pairs = {form: (getattr(conditional, form), getattr(unconditional, form)) for form in forms}
    return {form: u + scale * (c - u) for form, (c, u) in pairs.items()}


@pytest.mark.parametrize(("schedule", "row"), [(LinearFlow(), "flow_prediction"), (EDM(), "edm"), (EDM(), "sample")])
@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
def test_one_batched_call_equals_two(schedule: Schedule, row: str, scale: float) -> None:
    """In every form, for each is affine in each other at a fixed x_t."""
    d = denoiser(schedule, row)
    x, t, cond = inputs()
    pred = guided(d, scale)(x, t, cond)
    assert d.network.calls == [8]
    for form, want in by_hand(d, x, t, cond, scale).items():
        torch.testing.assert_close(getattr(pred, form), want, atol=1e-10, rtol=0)
    assert pred.t.shape == pred.a.shape == pred.b.shape == (4,)


def test_scale_zero_is_the_null_condition_and_one_the_condition() -> None:
    d = denoiser()
    x, t, cond = inputs()
    assert_same(Guided(d, 0.0)(x, t, cond), d(x, t, null(cond)))
    assert_same(Guided(d, 1.0)(x, t, cond), d(x, t, cond))
    assert guided(d, 1) is d and guided(d, 1.0) is d


def test_the_interval_includes_its_ends_and_leaves_the_rest_unguided() -> None:
    d = denoiser()
    x, t, cond = inputs()
    pred = guided(d, 3.0, (0.7, 1.1))(x, t, cond)
    scale = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(pred.v, by_hand(d, x, t, cond, scale)["v"], atol=1e-12, rtol=0)
    assert d.network.calls[0] == 8


def test_other_conditions_are_kept() -> None:
    d = denoiser()
    x, t, cond = inputs()
    cond["scale"] = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    pred = guided(d, 2.0)(x, t, cond)
    torch.testing.assert_close(pred.x0, by_hand(d, x, t, cond, 2.0)["x0"], atol=1e-12, rtol=0)


def test_gradients_reach_x_t_and_the_network() -> None:
    d = denoiser()
    x, t, cond = inputs()
    weight = d.network.embedding.weight
    x.requires_grad_(True)
    got = torch.autograd.grad(guided(d, 2.5)(x, t, cond).x0.square().sum(), (x, weight))
    want = torch.autograd.grad(by_hand(d, x, t, cond, 2.5)["x0"].square().sum(), (x, weight))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-12, rtol=0)
        assert float(w.abs().sum()) > 0
    assert float(got[1][NULL].abs().sum()) > 0


def test_a_teacher_without_a_null_condition_is_refused_unless_scale_is_one() -> None:
    d = Denoiser(Network(), LinearFlow(), OUTPUTS["flow_prediction"])
    with pytest.raises(UserError, match=r"guidance_scale: 2\.0.*null"):
        guided(d, 2.0)
    assert guided(d, 1.0) is d


def test_it_stands_in_for_a_denoiser_in_a_solver() -> None:
    d = denoiser()
    x, _, cond = inputs()
    grid = torch.tensor([math.pi / 2, 0.8, 0.0], dtype=torch.float64)
    model = guided(d, 2.0)
    assert model.schedule is d.schedule
    got = solve(ddim_step, model, x, grid, cond)
    for t, s in ((grid[0], grid[1]), (grid[1], grid[2])):
        forms = by_hand(d, x, t.expand(4), cond, 2.0)
        x = torch.cos(s) * forms["x0"] + torch.sin(s) * forms["eps"]
    torch.testing.assert_close(got, x, atol=1e-12, rtol=0)
