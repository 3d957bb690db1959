"""Players: who is trained, averaged and sampled, and how."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.ode import ddim_step, solve
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, TrigFlow
from diffdistill.exact.analytic import GaussianMixture
from diffdistill.players.average import MovingAverage
from diffdistill.players.discriminator import DiscriminatorHead
from diffdistill.players.sampler import STEPS, Sampler
from diffdistill.players.teacher import Teacher, frozen, only_trains, trainable, trainable_copy


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Elementwise(nn.Module):
    """A float64 network whose samples cannot touch each other; keeps its inputs and times."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.seen.append((x.detach(), time))
        shift = 0.0 if class_labels is None else class_labels[:, None]
        return self.gain * torch.tanh(x) + time[:, None] / 1000 + shift


# -- who is trained --------------------------------------------------------------------------------------------


def test_only_trains_leaves_gradients_to_one_and_lets_them_through_the_others() -> None:
    student, critic, head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)
    players = {"student": student, "critic": critic, "head": head}
    parameters = trainable(players)
    for active, own in players.items():
        only_trains(active, parameters)
        for module in (student, critic, head):
            module.zero_grad()
        head(critic(student(torch.ones(1, 2)))).sum().backward()
        for module in (student, critic, head):
            assert (module.weight.grad is not None) == (module is own)


def test_trainable_copy_shares_nothing_and_frozen_is_the_module_itself() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    teacher = frozen(Denoiser(network, DiscreteVP.from_config({}), OUTPUTS["epsilon"]))
    assert teacher.network is network and not network.training
    assert not any(p.requires_grad for p in teacher.parameters())
    student = trainable_copy(teacher)
    assert all(p.requires_grad for p in student.parameters()) and student.network.training
    assert not network.training and not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    assert not any(torch.equal(p, q) for p, q in zip(student.network.parameters(), network.parameters(), strict=True))


def test_sample_conditions_have_the_shapes_of_what_the_teacher_takes() -> None:
    denoiser = Denoiser(Elementwise(), TrigFlow(), OUTPUTS["v_prediction"])
    assert Teacher(denoiser, (2,), 3).sample_cond(4)["class_labels"].tolist() == [0, 0, 0, 0]
    assert Teacher(denoiser, (2,)).sample_cond(4) == {}
    prompt = {"text": torch.randn(1, 7, 5), "lengths": torch.tensor([3])}
    cond = Teacher(denoiser, (2,), example_cond=prompt).sample_cond(4)
    assert cond["text"].shape == (4, 7, 5) and cond["lengths"].tolist() == [3, 3, 3, 3]


# -- features and the discriminator ------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 3)
        self.ran: list[str] = []

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for name in ("first", "middle", "last"):
            x = getattr(self, name)(x)
            self.ran.append(name)
        return x


def test_features_are_those_of_the_layer_and_the_rest_is_not_run() -> None:
    network = Layers()
    denoiser = Denoiser(network, LinearFlow(), OUTPUTS["flow_prediction"], feature_layer="middle")
    x = torch.randn(2, 3, requires_grad=True)
    t = torch.tensor([0.3, 1.2], dtype=torch.float64)
    features = denoiser.features(x, t, {})
    assert network.ran == ["first"]  # left from within `middle`
    scale = LinearFlow().native(t).scale.float()[:, None]
    want = network.middle(network.first(scale * x))
    torch.testing.assert_close(features, want)
    got = torch.autograd.grad(features.square().sum(), (x, network.first.weight, network.middle.weight))
    for g, w in zip(
        got, torch.autograd.grad(want.square().sum(), (x, network.first.weight, network.middle.weight)), strict=True
    ):
        torch.testing.assert_close(g, w)
    # The way out is closed again.
    network.ran.clear()
    assert denoiser(x, t, {}).y.shape == (2, 3) and network.ran == ["first", "middle", "last"]


def test_features_of_a_half_precision_network_are_float32() -> None:
    denoiser = Denoiser(Layers().bfloat16(), LinearFlow(), OUTPUTS["flow_prediction"], feature_layer="middle")
    features = denoiser.features(torch.randn(2, 3, dtype=torch.bfloat16), torch.tensor([0.3, 1.2]).double(), {})
    assert features.dtype == torch.float32


def test_features_need_a_layer_and_leave_no_hook_behind_an_error() -> None:
    t = torch.tensor([0.3, 1.2], dtype=torch.float64)
    with pytest.raises(ValueError, match="feature_layer"):
        Denoiser(Layers(), LinearFlow(), OUTPUTS["sample"]).features(torch.randn(2, 3), t, {})
    network = Layers()
    with pytest.raises(RuntimeError):
        Denoiser(network, LinearFlow(), OUTPUTS["sample"], feature_layer="middle").features(torch.randn(2, 9), t, {})
    assert not network.middle._forward_hooks


@pytest.mark.parametrize(("channels", "size"), [(8, 4), (16, 2), (32, 4), (64, 4), (64, 8), (96, 16)])
def test_discriminator_head_reads_every_sample_for_itself(channels: int, size: int) -> None:
    head = DiscriminatorHead(channels, size)
    features = torch.randn(3, channels, size, size, requires_grad=True)
    logits = head(features)
    assert logits.shape == (3,)
    torch.testing.assert_close(logits[1:2], head(features[1:2]), atol=1e-5, rtol=1e-4)
    assert float(logits.detach().std()) > 1e-3
    grad = torch.autograd.grad(logits[0], features)[0]
    assert float(grad[0].norm()) > 1e-2 and float(grad[1:].norm()) == 0
    # Not a step function: a small change of a feature moves the logit as its gradient says.
    d = torch.randn_like(features[:1])
    moved = (head(features[:1] + 1e-2 * d) - head(features[:1] - 1e-2 * d)) / 2e-2
    assert float(moved.detach()) == pytest.approx(float((grad[:1] * d).sum()), rel=0.05, abs=0.01)


# -- few-step sampling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EDM(), LinearFlow(), LinearFlow(data_std=0.5), DiscreteVP.from_config({})])
def test_one_step_is_one_call_of_the_denoiser(schedule: Any) -> None:
    student = Denoiser(Elementwise(), schedule, OUTPUTS["edm" if isinstance(schedule, EDM) else "v_prediction"])
    level = schedule.init_level
    sampler = Sampler(student, [level])
    x = sampler((6,), {}, generators(3, 4))
    z = torch.stack([torch.randn(6, generator=g) for g in generators(3, 4)]).double()
    t = schedule.angle(level)
    want = student(z * schedule.init_scale(float(t)), t.expand(2), {}).x0
    torch.testing.assert_close(x, want.detach() * schedule.data_std, atol=0, rtol=0)
    assert not x.requires_grad
    inside = sampler.one_step(z, {})
    torch.testing.assert_close(inside, want, atol=0, rtol=0)
    assert float(torch.autograd.grad(inside.square().sum(), list(student.parameters()))[0].abs()) > 0


def test_conditions_reach_the_sampler() -> None:
    student = Denoiser(Elementwise(), TrigFlow(), OUTPUTS["sample"])
    plain, shifted = (
        Sampler(student, [1.5])((4,), {"class_labels": labels}, generators(0, 1))
        for labels in (torch.tensor([0, 0]), torch.tensor([0, 2]))
    )
    torch.testing.assert_close(shifted - plain, torch.tensor([[0.0] * 4, [2.0] * 4], dtype=torch.float64))


@pytest.mark.parametrize("renoise", [True, False])
def test_sample_i_depends_on_generator_i_alone(renoise: bool) -> None:
    student = Denoiser(Elementwise(), LinearFlow(), OUTPUTS["flow_prediction"])
    sampler = Sampler(student, [1.0, 0.7, 0.3], STEPS["renoise" if renoise else "ddim"])
    together = sampler((5,), {}, generators(10, 11, 12))
    for i, seed in enumerate((10, 11, 12)):
        assert torch.equal(together[i : i + 1], sampler((5,), {}, generators(seed)))
    assert torch.equal(together[[2, 0]], sampler((5,), {}, generators(12, 10)))
    assert not torch.equal(together[0], together[1])


def test_without_renoising_it_is_ddim() -> None:
    schedule = LinearFlow()
    student = Denoiser(Elementwise(), schedule, OUTPUTS["flow_prediction"])
    levels = [1.0, 0.6, 0.2]
    got = Sampler(student, levels, STEPS["ddim"])((5,), {}, generators(0, 1))
    z = torch.stack([torch.randn(5, generator=g) for g in generators(0, 1)]).double()
    grid = schedule.angle(torch.tensor([*levels, 0.0], dtype=torch.float64))
    torch.testing.assert_close(got, solve(ddim_step, student, z, grid, {}).detach(), atol=1e-14, rtol=0)


class Consistency(nn.Module):
    """The exact consistency function of N(mean, std^2), x_t -> x0; keeps its inputs."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.gaussian = GaussianMixture(torch.tensor([[mean]]), std)
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.seen.append((x, time))
        flat = x.reshape(-1, 1)
        t = time[:, None].expand_as(x).flatten()
        return self.gaussian.flow_map(flat, t, torch.zeros_like(t)).reshape(x.shape)


def test_renoised_levels_have_the_marginals_of_the_gaussian() -> None:
    """x_s = cos(s) x0 + sin(s) z is N(cos(s) m, cos(s)^2 std^2 + sin(s)^2) at every level."""
    mean, std, levels = 0.8, 0.3, [math.pi / 2, 1.1, 0.6, 0.2]
    network = Consistency(mean, std)
    sampler = Sampler(Denoiser(network, TrigFlow(), OUTPUTS["sample"]), levels)
    x = sampler((10_000,), {}, generators(0, 1, 2, 3))
    assert [float(t[0]) for _, t in network.seen] == levels
    for values, s in [*((v, s) for (v, _), s in zip(network.seen, levels, strict=True)), (x, 0.0)]:
        variance = math.cos(s) ** 2 * std**2 + math.sin(s) ** 2
        n = values.numel()
        assert abs(float(values.mean()) - math.cos(s) * mean) < 4 * (variance / n) ** 0.5
        assert abs(float(values.var()) / variance - 1) < 4 * (2 / n) ** 0.5
    # The noise of every level is new.
    normal = [v.flatten() - v.mean() for v, _ in network.seen]
    fresh = (normal[1] - math.cos(1.1) * std * normal[0]) / math.sin(1.1)
    assert abs(float(torch.corrcoef(torch.stack([normal[0], fresh]))[0, 1])) < 0.02


# -- moving average ----------------------------------------------------------------------------------------------


def parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def assert_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_moving_average_warms_up_and_never_exceeds_its_decay() -> None:
    module = nn.Linear(3, 2).double()
    average = MovingAverage(module, 0.3)
    want = parameters(module)
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        average.update(step)
        want = [decay * w + (1 - decay) * p for w, p in zip(want, parameters(module), strict=True)]
        for got, w in zip(average.state().values(), want, strict=True):
            torch.testing.assert_close(got, w, atol=1e-14, rtol=0)


def test_applied_swaps_the_average_in_and_the_bits_back() -> None:
    module = nn.Linear(3, 2)
    average = MovingAverage(module, 0.9)
    first = parameters(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.7).add_(0.123)
    own = parameters(module)
    average.update(1000)
    mean = [0.9 * a + 0.1 * b for a, b in zip(first, own, strict=True)]
    for _ in range(2):
        with average.applied():
            for p, m in zip(module.parameters(), mean, strict=True):
                torch.testing.assert_close(p.detach(), m)
        assert_bits(parameters(module), own)
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        raise RuntimeError("inside")
    assert_bits(parameters(module), own)
    # The optimizer still moves the module, and not the average.
    state = [a.clone() for a in average.state().values()]
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(module.weight, own[0])
    assert_bits(list(average.state().values()), state)


def test_state_of_a_moving_average_survives_a_round_trip() -> None:
    module: Any = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    average = MovingAverage(module, 0.9)
    with torch.no_grad():
        module[0].weight.add_(1.0)
    average.update(50)
    state = {name: value.clone() for name, value in average.state().items()}
    assert list(state) == [name for name, _ in module.named_parameters()]
    other = MovingAverage(module, 0.9)
    assert not torch.equal(other.state()["0.weight"], state["0.weight"])
    other.load(state)
    assert_bits(list(other.state().values()), list(state.values()))
    average.update(51)
    other.update(51)
    assert_bits(list(other.state().values()), list(average.state().values()))
    assert not torch.equal(other.state()["0.weight"], state["0.weight"])  # load copies
