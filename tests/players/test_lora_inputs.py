"""Inputs of their own for LoRA players, the time to jump to and the guidance scale: trained, copied, exported."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import load_teacher
from diffdistill.core.denoiser import Denoiser, Extra
from diffdistill.core.schedule import student_levels
from diffdistill.players.lora import LoraNetwork, LoraSettings, lora_weights, merged
from diffdistill.players.sampler import DDIM, Renoise, Sampler, Step
from diffdistill.players.scale_input import guidance_input, plain_network
from diffdistill.players.teacher import Teacher, trainable
from diffdistill.players.two_times import second_times
from diffdistill.scaffold.tangent import two_time_player
from tests.scaffold.straight import scatter

Teachers = Callable[[str], Path]


def lora_teacher(folder: Path) -> Teacher:
    return replace(load_teacher(folder), lora={"student": LoraSettings(2, 6.0)})


def points(teacher: Teacher, n: int = 4) -> tuple[Tensor, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(n, *teacher.shape)
    return x, torch.linspace(0.4, 1.5, n, dtype=torch.float64), teacher.sample_cond(n)


def base_of(player: Denoiser) -> LoraNetwork:
    assert isinstance(player.network, LoraNetwork)
    return player.network


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_a_second_time_is_the_players_own(parameterization: str, tiny_teacher: Teachers) -> None:
    teacher = lora_teacher(tiny_teacher(parameterization))
    x, t, cond = points(teacher)
    same = teacher.denoiser(x, t, cond).y
    first, second = (two_time_player(teacher, 2, None).eval() for _ in range(2))
    for r in (t, t / 2, 0 * t):
        assert torch.equal(first(x, t, cond, Extra(r=r)).y, same), "it starts as the teacher"
    scatter(first, 1)
    third = copy.deepcopy(first)
    near, far = (first(x, t, cond, Extra(r=r)).y for r in (t / 2, 0 * t))
    assert not torch.allclose(near, far, atol=1e-3)
    assert torch.equal(third(x, t, cond, Extra(r=0 * t)).y, far), "a copy is another player of the same base"
    scatter(third, 2)
    assert torch.equal(first(x, t, cond, Extra(r=0 * t)).y, far)
    assert torch.equal(second(x, t, cond, Extra(r=0 * t)).y, same) and torch.equal(teacher.denoiser(x, t, cond).y, same)
    assert all(part.given is None for part in second_times(base_of(first))), "nothing of a call stays"
    trained = trainable({"student": first})["student"]
    assert {id(p) for p in trained} == {id(p) for p in first.parameters()}
    assert not {id(p) for p in trained} & {id(p) for n, p in teacher.denoiser.named_parameters() if ".lora_" not in n}


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
@pytest.mark.parametrize(("step", "steps"), [(DDIM(), 1), (DDIM(), 3), (Renoise(), 3)])
def test_a_second_time_is_exported_whole_and_as_lora_alone(
    parameterization: str, step: Step, steps: int, tiny_teacher: Teachers
) -> None:
    teacher = lora_teacher(tiny_teacher(parameterization))
    student = two_time_player(teacher, steps, None).eval()
    scatter(student, 1)
    sampler = Sampler(student, student_levels(student.schedule, steps).tolist(), step)
    network = sampler.network(teacher.shape, teacher.sample_cond(steps))
    assert isinstance(network, LoraNetwork)
    plain, alone = plain_network(network), merged(LoraNetwork(network.base, network.adapter))
    stock = teacher.denoiser.network.state_dict()
    assert plain.state_dict().keys() == {name.replace(".base_layer", "") for name in stock if ".lora_" not in name}
    # As stock diffusers adds it: B A, scaled by nothing.
    weights = lora_weights(network)
    assert len({value.shape[0] for name, value in weights.items() if "lora_A" in name}) == 1, "of one rank"
    for name in [name.removesuffix(".lora_A.weight") for name in weights if "lora_A" in name]:
        down, up = (weights[f"{name}.lora_{part}.weight"] for part in "AB")
        layer: Any = alone.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(dict(load_teacher(tiny_teacher(parameterization)).denoiser.network.named_parameters())[
                f"{name}.weight"
            ] + (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape))  # fmt: skip
    x, _, cond = points(teacher)
    views = [student.with_network(other, None) for other in (plain, alone)]
    for view in views:
        view.extra_call = None
    for k, level in enumerate(sampler.levels):
        t = student.schedule.angle(level).expand(4)
        expected = sampler.predict(x, t, k, cond).y
        assert not torch.allclose(teacher.denoiser(x, t, cond).y, expected, atol=1e-2)
        tight = isinstance(step, Renoise) or steps == 1
        assert torch.allclose(views[0](x, t, cond).y, expected, atol=1e-4 if tight else 2e-2)  # a grid's rounding
        assert torch.allclose(views[1](x, t, cond).y, expected, atol=2e-4)


def test_a_guidance_scale_is_the_players_own(tiny_teacher: Teachers) -> None:
    teacher = lora_teacher(tiny_teacher("vp"))
    x, t, cond = points(teacher)
    same = teacher.denoiser(x, t, cond).y
    student = guidance_input(teacher.player("student"), default=2.0).eval()
    scales = [torch.full((4,), scale) for scale in (2.0, 5.0)]
    assert torch.equal(student(x, t, cond, Extra(scales[0])).y, same)
    scatter(student, 1)
    two, five = (student(x, t, cond, Extra(scale)).y for scale in scales)
    assert not torch.allclose(two, five, atol=1e-3)
    assert all(part.given is None for part in base_of(student).inputs.values()), "nothing of a call stays"
    for player in (student, copy.deepcopy(student)):
        assert torch.allclose(player(x, t, cond).y, two, atol=1e-5)
    assert torch.equal(teacher.denoiser(x, t, cond).y, same)
    plain = student.with_network(plain_network(student.network), None)
    plain.extra_call = None
    assert torch.allclose(plain(x, t, cond).y, two, atol=1e-5) and not base_of(student).alone


def test_inputs_beside_a_half_precision_base_are_float32(tiny_teacher: Teachers) -> None:
    teacher = lora_teacher(tiny_teacher("vp"))
    teacher.denoiser.bfloat16()
    student = two_time_player(teacher, 1, None)
    scaled = guidance_input(teacher.player("student"), default=2.0)
    assert {p.dtype for player in (student, scaled) for p in player.parameters()} == {torch.float32}
    x, t, cond = points(teacher)
    assert bool(student(x, t, cond, Extra(r=0 * t)).y.isfinite().all())
    assert plain_network(student.network).state_dict().keys()
