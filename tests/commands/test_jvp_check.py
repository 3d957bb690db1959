"""`diffdistill jvp-check`: right networks pass, and of wrong ones the first module at fault is named."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffdistill
from diffdistill import LinearFlow, Teacher, UserError
from diffdistill.commands.cli import main
from diffdistill.exact.tangents import module_tangents
from diffdistill.methods.scm import SCM, Config
from tests.core.test_jvp import Opaque


class Wrong(Opaque):
    """Twice its input, with a tangent of three times."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return 3 * dx


class Layer(nn.Module):
    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Timed(nn.Module):
    """A pixel network of the flow's time in [0, 1000] with a block that a test chooses."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Sequential(nn.GroupNorm(2, 4), block)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x) * torch.sin(time).reshape(-1, 1, 1, 1).to(x)
        return self.last(self.dropout(self.block(h)))


def teacher(block: nn.Module) -> Teacher:
    torch.manual_seed(0)
    return Teacher.around(Timed(block), (1, 6, 6), LinearFlow(), "flow_prediction")


def test_a_right_network_passes_with_every_module() -> None:
    rows = diffdistill.jvp_check(teacher(nn.SiLU()))
    assert [row.name for row in rows] == ["first", "block.0", "block.1", "block", "dropout", "last", ""]
    assert all(row.ok for row in rows)
    assert all(row.double_vjp is not None and row.double_vjp < 1e-5 for row in rows)


@pytest.mark.parametrize(("function", "problem"), [(Wrong, ""), (Opaque, "Layer has no forward derivative")])
def test_the_first_module_at_fault_is_the_innermost(function: Any, problem: str) -> None:
    rows = diffdistill.jvp_check(teacher(Layer(function)))
    assert [row.name for row in rows if not row.ok] == ["block.1", "block", ""]
    first = next(row for row in rows if not row.ok)
    assert first.problem.startswith(problem) and bool(first.problem) == bool(problem)
    if not problem:
        assert first.double_vjp == pytest.approx(0.5) and first.differences == pytest.approx(0.5, abs=1e-3)


def test_dropout_falls_on_the_same_units_in_all_passes() -> None:
    network = teacher(nn.SiLU()).denoiser.network.train()
    x, time = torch.randn(2, 1, 6, 6), torch.tensor([300.0, 600.0])
    assert all(row.ok for row in module_tangents(network, lambda: network(x, time)))


def test_the_command_on_the_embedded_teacher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jvp-check", "digits", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "the network (UNet2DModel)" in out and "--derivative auto takes: central (they differ by" in out
    training = SCM(diffdistill.load_teacher("digits"), Config())
    assert f"auto takes: {training.kind} (" in out
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: Wrong.apply(x))
    assert main(["jvp-check", "digits", "--device", "cpu"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("the first that does not: ") and "(SiLU)" in last and "--derivative central" in last


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jvp-check", "/nowhere", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="teacher"):
        diffdistill.jvp_check("/nowhere")
