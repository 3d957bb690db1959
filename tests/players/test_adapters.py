"""LoRA and the guidance input start as the network they adapt, train nothing else, and fold back into stock weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from diffdistill import UserError, load_teacher
from diffdistill.core.denoiser import Denoiser, Extra
from diffdistill.core.guidance import guide
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.players.average import MovingAverage
from diffdistill.players.lora import lora
from diffdistill.players.scale_input import TakesScale, guidance_input, plain_network
from diffdistill.players.teacher import Teacher, frozen, trainable_copy

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.linspace(0.1, 1.5, 5, dtype=torch.float64)
COND = {"class_labels": torch.tensor([0, 3, 9, 10, 1])}


@pytest.fixture
def teacher(tiny_teacher: Callable[[str], Path]) -> Teacher:
    return load_teacher(tiny_teacher("vp"))


def shaken(denoiser: Denoiser) -> Denoiser:
    """The denoiser with noise on every trainable parameter, in evaluation mode."""
    with torch.no_grad():
        for p in denoiser.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return denoiser.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def test_lora_starts_as_the_base_and_trains_only_its_own_weights(teacher: Teacher) -> None:
    layers = sum(isinstance(m, nn.Linear | nn.Conv2d) for m in teacher.denoiser.network.modules())
    before = {name: p.detach().clone() for name, p in teacher.denoiser.network.named_parameters()}
    before_lora = teacher.denoiser(X, T, COND).y
    player = lora(teacher.denoiser, 3).train()
    assert player.training
    trained = {name for name, p in player.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(trained) == len(list(player.parameters())) == 2 * layers
    assert torch.equal(player.eval()(X, T, COND).y, teacher.denoiser(X, T, COND).y)
    player.train()
    optimizer = torch.optim.AdamW([p for p in player.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # A has a gradient only once B is not zero
        optimizer.zero_grad()
        player(X, T, COND).y.square().mean().backward()
        optimizer.step()
    base = {name.replace(".base_layer", ""): p for name, p in teacher.denoiser.network.named_parameters()}
    assert all(torch.equal(p, base[name]) for name, p in before.items())
    assert torch.equal(teacher.denoiser(X, T, COND).y, before_lora)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in player.parameters() if p.requires_grad)
    assert relative(player.eval()(X, T, COND).y, teacher.denoiser(X, T, COND).y) > 1e-3


def test_lora_is_a_function_of_the_seed_and_survives_copies_and_state_dicts(teacher: Teacher) -> None:
    torch.manual_seed(3)
    first = lora(teacher.denoiser, 2)
    torch.manual_seed(3)
    second = lora(teacher.denoiser, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    shaken(first)
    second.load_state_dict(first.state_dict())
    for twin in (second, copy.deepcopy(first)):
        assert torch.equal(twin.eval()(X, T, COND).y, first(X, T, COND).y)
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in first.parameters()]
    assert all("lora_" in name for name in MovingAverage(first, 0.9).parameters)


def test_lora_scale_is_alpha_over_rank(teacher: Teacher) -> None:
    base = teacher.denoiser.network.conv_in.weight
    player = shaken(lora(teacher.denoiser, 2, 8.0, ["conv_in"]))
    matrices = player.network.matrices
    a, b = matrices["conv_in|lora_A"].weight, matrices["conv_in|lora_B"].weight
    expected = base + 4 * torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    assert torch.allclose(plain_network(player.network).conv_in.weight, expected, atol=1e-6)


def test_lora_targets_are_layers_by_name(teacher: Teacher) -> None:
    player = lora(teacher.denoiser, 2, targets=["conv1", "time_embedding.linear_1"])
    adapted = {name.split("|lora_")[0].replace("|", ".") for name in player.network.matrices}
    assert "time_embedding.linear_1" in adapted
    assert all(name.endswith((".conv1", "linear_1")) for name in adapted)


def test_half_precision_teachers_get_float32_adapters(teacher: Teacher) -> None:
    player = lora(copy.deepcopy(teacher.denoiser).bfloat16(), 2)
    assert {p.dtype for p in player.parameters()} == {torch.float32}


def test_lora_adapts_a_float64_network_in_float64(teacher: Teacher) -> None:
    player = lora(copy.deepcopy(teacher.denoiser).double(), 2)
    assert {p.dtype for p in player.parameters()} == {torch.float64}


def test_the_scale_is_an_input_that_starts_without_effect(teacher: Teacher) -> None:
    player = guidance_input(teacher.player("student"), default=2.0).eval()
    scaled = Extra(torch.tensor([1.0, 2.0, 5.0, 9.5, 14.0], dtype=torch.float64))
    expected = teacher.denoiser(X, T, COND).y
    assert torch.equal(player(X, T, COND, scaled).y, expected)
    assert torch.equal(player(X, T, COND).y, expected)
    shaken(player)
    out = player(X, T, COND, scaled).y
    at_default, absent = player(X, T, COND, Extra(torch.full((5,), 2.0))).y, player(X, T, COND).y
    assert torch.equal(at_default, absent)
    changed = (out - absent).flatten(1).norm(dim=1) > 1e-4
    assert changed.tolist() == [True, False, True, True, True]  # each sample by its own scale
    assert torch.equal(copy.deepcopy(player)(X, T, COND, scaled).y, out)
    with pytest.raises(ValueError, match="no second input"):
        teacher.denoiser(X, T, COND, scaled)


def test_the_default_scale_is_part_of_the_state(teacher: Teacher) -> None:
    a, b = (
        guidance_input(teacher.player("student"), default=2.0),
        guidance_input(teacher.player("student"), default=7.0),
    )
    b.load_state_dict(a.state_dict())
    assert float(b.network.class_embedding.default) == 2.0


def test_guidance_of_a_scaled_network_keeps_the_scale_in_both_halves(teacher: Teacher) -> None:
    player = shaken(guidance_input(teacher.player("student")))
    scaled, null = Extra(torch.full((5,), 4.0)), {"class_labels": torch.full((5,), 10)}
    c, u = player(X, T, COND, scaled).y, player(X, T, null, scaled).y
    got = guide(player, X, T, COND, torch.full((5,), 3.0, dtype=torch.float64), scaled).y
    assert relative(got, u + 3 * (c - u)) < 1e-5


def test_features_tell_scales_apart_and_vary_slowly() -> None:
    """A scale that was not trained on lies between its neighbours: no frequency is a lookup key."""
    table = nn.Embedding(3, 8)
    scales = torch.arange(1.0, 15.0, 0.25)
    phase = scales[:, None] * TakesScale(table, 1.0).frequencies
    features = torch.cat([phase.sin(), phase.cos()], 1)
    distance = torch.cdist(features, features)
    assert float((distance + 10 * torch.eye(len(scales))).min()) > 0.1
    between = (features[:-2] + features[2:]) / 2
    assert float((between - features[1:-1]).norm(dim=1).max()) < 0.2 * float(features.norm(dim=1).min())


@pytest.mark.parametrize("kind", ["lora", "scale", "both"])
def test_the_plain_network_is_stock_and_computes_the_same(teacher: Teacher, kind: str) -> None:
    teacher.denoiser.double()
    player = teacher.player("student")
    if kind != "lora":
        player = guidance_input(player, default=3.0)
    if kind != "scale":
        player = lora(player, 3)
    shaken(player)  # folding is exact; in float32 the sum of two matrices rounds
    state = {name: value.clone() for name, value in player.state_dict().items()}
    base = {name: value.clone() for name, value in teacher.denoiser.network.state_dict().items()}
    plain = plain_network(player.network)
    assert type(plain) is type(teacher.denoiser.network)
    assert plain.state_dict().keys() == {n.replace(".base_layer", "") for n in base if ".lora_" not in n}
    assert not [name for name in vars(plain) if "peft" in name]
    stock = trainable_copy(teacher.denoiser).double()
    stock.network.load_state_dict(plain.state_dict())
    x = X.double()
    got, expected = frozen(stock)(x, T, COND).y, player(x, T, COND).y
    assert relative(got, expected) < 1e-12
    assert relative(got, teacher.denoiser(x, T, COND).y) > 1e-2
    assert all(torch.equal(value, state[name]) for name, value in player.state_dict().items())
    assert all(torch.equal(value, base[name]) for name, value in teacher.denoiser.network.state_dict().items())


def test_a_network_without_adapters_is_its_own_plain_network(teacher: Teacher) -> None:
    assert plain_network(teacher.denoiser.network) is teacher.denoiser.network


def test_what_cannot_be_adapted_is_refused_in_one_line(teacher: Teacher) -> None:
    analytic = gaussian_teacher([0.0], 1.0).denoiser
    for make, words in (
        (lambda: lora(analytic, 2), "lora: the teacher's GaussianMixture has no linear layer"),
        (lambda: lora(teacher.denoiser, 2, targets=["to_x"]), "lora: .* has no layer called to_x"),
        (lambda: guidance_input(analytic), "guidance_input: GaussianMixture has no layer to which the guidance scale"),
    ):
        with pytest.raises(UserError, match=words) as error:
            make()
        assert "\n" not in str(error.value)
