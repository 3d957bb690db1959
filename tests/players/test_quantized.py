"""`--teacher-bits`: a frozen base of few bits under players that learn, and a student on the teacher's own weights."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffdistill import UserError, distill, plan
from diffdistill.families import FAMILIES
from diffdistill.players.lora import merged
from diffdistill.players.quantized import quantizable, quantize, saved
from diffdistill.training.assemble import load_run
from tests.players.test_offload import logged, shared_out
from tests.players.test_player_kinds import options_for
from tests.training.test_trainer import same

Encoded = Callable[[str], tuple[Path, Path]]
LATENT = [n for n, family in FAMILIES.items() if family.autoencoder is not None]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "student").glob("[ut]*/diffusion_pytorch_model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_of_few_bits_give_nearly_the_same_with_a_gradient_and_take_less(bits: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 64)).requires_grad_(False).eval()
    x = torch.randn(8, 256, requires_grad=True)
    plain = network(x)
    (gradient,) = torch.autograd.grad(plain.square().sum(), x)
    before, less = sum(p.numel() * 4 for p in network.parameters()), saved(network, bits)
    quantize(network, bits, torch.float32)
    network.to("cpu")
    with torch.no_grad():
        network(x)  # after which there are gradients all the same
    y = network(x)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    limit = {8: 0.02, 4: 0.25}[bits]
    assert 0 < float((y - plain).norm() / plain.norm()) < limit
    assert 0 < float((got - gradient).norm() / gradient.norm()) < limit
    now = sum(p.numel() * p.element_size() for p in network.parameters())
    states = [m.weight.quant_state for m in network.modules() if hasattr(m, "weight") and bits == 4]
    now += sum(s.absmax.numel() + 4 * s.state2.absmax.numel() for s in states if s.nested)
    assert before - now == pytest.approx(less, rel=0.02)
    assert not quantizable(network)


@pytest.mark.parametrize(("name", "bits"), shared_out([4, 8], 1))
def test_a_lora_student_learns_on_it_and_is_merged_into_the_teachers_own_weights(
    name: str, bits: Any, encoded: Encoded, tmp_path: Path
) -> None:
    if name == "krea2":
        bits = 4  # the int8 kernel of bitsandbytes for a CPU takes no inputs of four dimensions
    folder, prompts = encoded(name)
    options = options_for(folder, prompts, name, "dmd2", "lora") | {"lr_schedule": "constant", "log_every": 1}
    distill(**options, teacher_bits=bits, out=str(tmp_path / "whole"))
    distill(**options | {"steps": 1}, teacher_bits=bits, out=str(tmp_path / "run"))
    distill(resume=tmp_path / "run", steps=2)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "run")
    distill(**options, out=str(tmp_path / "plain"))
    assert logged(tmp_path / "whole") != logged(tmp_path / "plain")
    network = load_run(tmp_path / "run")[0].method.players["student"].network
    expected, got = merged(network).state_dict(), weights(tmp_path / "run")  # type: ignore[arg-type]
    (file,) = folder.glob("[ut]*/diffusion_pytorch_model.safetensors")
    teacher = load_file(file)
    assert all(torch.equal(value, expected[key]) for key, value in got.items())
    changed = [key for key, value in teacher.items() if not torch.equal(value, got[key])]
    assert 0 < len(changed) < len(teacher), "what has no LoRA is the teacher's, to the bit"


def test_whole_players_of_a_teacher_of_few_bits_begin_as_the_teacher_was(encoded: Encoded, tmp_path: Path) -> None:
    folder, prompts = encoded("sd3")
    options = options_for(folder, prompts, "sd3", "dmd2", "full") | {"student_lr": 1e-7, "fake_score_lr": 1e-7}
    distill(**options, teacher_bits=8, offload="optimizer", out=str(tmp_path / "run"))
    (file,) = folder.glob("transformer/diffusion_pytorch_model.safetensors")
    for key, value in load_file(file).items():
        assert (weights(tmp_path / "run")[key] - value).abs().max() < 1e-5, key


def test_a_plan_knows_it(encoded: Encoded) -> None:
    options = options_for(*encoded("sd3"), "sd3", "dmd2", "lora")
    kept = [plan(**options, **more).players[0].weights for more in ({}, {"teacher_bits": 8}, {"teacher_bits": 4})]
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"offload": "group"}, "offload: group does not move the layers of teacher_bits"),
        ({"judge_every": 2}, "judge_every: a training with teacher_bits is judged after it"),
        ({"method": "scm"}, "derivative: auto asks for one that layers of teacher_bits do not have"),
        ({"teacher_bits": 3}, "teacher_bits: 3 is not one of 4, 8"),
    ],
)
def test_what_does_not_go_with_it_is_refused(more: dict[str, Any], message: str, encoded: Encoded) -> None:
    options = options_for(*encoded("sd3"), "sd3", "dmd2", "lora") | {"teacher_bits": 4}
    own = ("update_ratio", "student_steps", "lora") if "method" in more else ()
    with pytest.raises(UserError, match=message):
        distill(**{name: value for name, value in (options | more).items() if name not in own})


def test_the_package_is_asked_for(encoded: Encoded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    options = options_for(*encoded("sd3"), "sd3", "dmd2", "lora") | {"out": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"pip install 'diffdistill\[quantized\]', or leave it out"):
        distill(**options, teacher_bits=4)
    assert not (tmp_path / "run" / "config.yaml").exists()
