"""`--offload`: what is not used is not on the device, and the training has the same bits."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill import Teacher, UserError, distill
from diffdistill.catalogue import describe_method, method_names
from diffdistill.config import FitConfig
from diffdistill.core import divided
from diffdistill.core.schedule import LinearFlow
from diffdistill.scaffold.method import Batch
from diffdistill.training.offload import Offload, settled
from diffdistill.training.trainer import Interrupted, Trainer, accelerator_for
from tests.scaffold.straight import VP
from tests.training.test_accumulate import OPTIONS, SIZE, batch_of, score
from tests.training.test_trainer import metrics, options, same, student

STEPS = 4


def test_weights_that_lie_in_their_file_get_a_beginning_of_their_own(tmp_path: Path) -> None:
    """They begin where the file's header ends, and sums round by that: the same teacher would give other bits."""
    save_file({"weight": torch.randn(4, 3), "bias": torch.randn(4)}, tmp_path / "layer", {"said": "of any length"})
    layer = nn.Linear(3, 4, device="meta")
    layer.load_state_dict(load_file(tmp_path / "layer"), assign=True)
    parameters, values = list(layer.parameters()), [p.detach().clone() for p in layer.parameters()]
    assert any(p.data_ptr() % 64 for p in parameters)
    settled(layer, torch.device("cpu"))
    for p, parameter, value in zip(layer.parameters(), parameters, values, strict=True):
        assert p is parameter and torch.equal(p, value) and p.data_ptr() % 64 == 0


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divided, "PIECE", 600)


def trainer_of(name: str, teacher: Teacher, own: dict[str, Any], out: Path, **fit: Any) -> Trainer:
    module = describe_method(name).load()
    method = module.METHOD(teacher, module.Config(**own))
    method.reward = score
    config = FitConfig(**{"batch_size": SIZE, "steps": STEPS, "ema": 0.5, "device": "cpu", "sample_every": 0} | fit)

    def batch(step: int) -> Batch:
        return batch_of(step) if teacher.num_classes else replace(batch_of(step), cond={}, pair=None)

    return Trainer(method, batch, config, out, accelerator_for(config, out), beside=[teacher.denoiser])


def trained(name: str, out: Path, **fit: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    torch.manual_seed(0)
    trainer, logs = trainer_of(name, VP.teacher(), OPTIONS.get(name, {}), out, **fit), dict[str, float]()
    for step in range(STEPS):
        logs |= {f"{step} {key}": float(value) for key, value in trainer.iteration().items()}
    with trainer.offload.on_host():
        assert trainer.average is not None
        values = {f"average {key}": value.clone() for key, value in trainer.average.state().items()}
        for role, module in {**trainer.method.players, **trainer.method.state}.items():
            values |= {f"{role} {key}": value.clone() for key, value in module.state_dict().items()}
    return values, logs


@pytest.mark.parametrize("name", method_names())
def test_every_method_trains_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, logs = trained(name, tmp_path)
    for kind, parts in (("optimizer", 1), ("model", 1), ("group", 2)):
        values, logged = trained(name, tmp_path, offload=kind, accumulate=parts)
        if parts == 1:
            assert values.keys() == whole.keys() and logged == logs
            assert all(torch.equal(values[key], value) for key, value in whole.items()), kind
        else:
            plain, plain_logs = trained(name, tmp_path, accumulate=parts)
            assert logged == plain_logs
            assert all(torch.equal(values[key], value) for key, value in plain.items()), kind


class Blocks(nn.Module):
    """Between two layers, blocks of one size; `bias` is the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(9, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16)) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(16))
        self.write = nn.Linear(16, 9)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.read(x.flatten(1)) * time[:, None]
        for block in self.blocks:
            h = h + block(h)
        return self.write(h + self.bias).view_as(x)


class Watched(TorchDispatchMode):
    """The most bytes that lie in the storages of some tensors when an operator runs."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]):
        super().__init__()
        self.tensors, self.most = tensors, 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.most = max(self.most, size(self.tensors()))
        return result


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def blocks_trainer(kind: str, out: Path, **fit: Any) -> tuple[Trainer, list[nn.Module]]:
    teacher = Teacher.around(Blocks(), (1, 3, 3), LinearFlow(), "flow_prediction")
    trainer = trainer_of("sid", teacher, {}, out, offload=kind, **fit)
    players = [player.network for player in trainer.method.players.values()]  # type: ignore[union-attr]
    return trainer, [teacher.denoiser.network, *players]  # type: ignore[list-item]


WHOLE = 4 * sum(p.numel() for p in Blocks().parameters())
BLOCK = 4 * (2 * 16 * 17)
ROOT = 4 * 16  # what the roots hold themselves


@pytest.mark.parametrize(("kind", "most"), [("none", 3 * WHOLE), ("model", WHOLE), ("group", BLOCK + 3 * ROOT)])
def test_one_network_or_one_block_is_there(kind: str, most: int, tmp_path: Path) -> None:
    """In passes, also in those back through networks that are not trained, in steps and in averages."""
    trainer, networks = blocks_trainer(kind, tmp_path)
    weights = [p for network in networks for p in network.parameters()]
    assert kind == "none" or size(weights) <= 3 * ROOT, "before the first step nothing is there"
    with Watched(lambda: weights) as seen:
        for _ in range(STEPS):
            trainer.iteration()
    assert seen.most == most


@pytest.mark.parametrize("kind", ["none", "optimizer", "model", "group"])
def test_moments_and_averages_are_there_a_piece_at_a_time(kind: str, tmp_path: Path) -> None:
    trainer, _ = blocks_trainer(kind, tmp_path)
    trainer.iteration()
    optimizers, average = trainer.optimizers.values(), trainer.average
    assert average is not None

    def moments() -> list[Tensor]:
        states = (state for optimizer in optimizers for state in optimizer.state.values())
        return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]

    at_rest = size(moments()) + size(average.averages)
    with Watched(moments) as seen, Watched(lambda: average.averages) as averages:
        trainer.iteration()
    if kind == "none":
        assert (at_rest, seen.most, averages.most) == (5 * WHOLE, 4 * WHOLE, WHOLE)
    else:
        largest = 4 * 16 * 16  # a matrix, beside which nothing fits into a piece
        assert at_rest == 0 and seen.most == 2 * largest and averages.most == largest


def test_moments_of_a_new_optimizer_are_stored_as_those_before(tmp_path: Path) -> None:
    trainer = trainer_of("progressive", VP.teacher(), OPTIONS["progressive"], tmp_path, offload="optimizer")
    before = trainer.optimizers["student"]
    for _ in range(STEPS):
        trainer.iteration()
    optimizer = trainer.optimizers["student"]
    assert optimizer is not before and optimizer.state, "another stage has begun"
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert size(moments) == 0 < sum(moment.numel() for moment in moments)


def test_moments_of_a_resumed_run_are_stored_before_its_first_step(tmp_path: Path) -> None:
    before, _ = blocks_trainer("model", tmp_path)
    before.iteration()
    before.save()
    trainer, _ = blocks_trainer("model", tmp_path)
    trainer.resume()
    states = [state for optimizer in trainer.optimizers.values() for state in optimizer.state.values()]
    moments = [value for state in states for value in state.values() if value.ndim]
    assert size(moments) == 0 < sum(moment.numel() for moment in moments)


@pytest.mark.parametrize("kind", ["model", "group"])
def test_a_run_is_looked_at_judged_stopped_and_resumed_as_without(
    kind: str, tiny_teacher: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"ema": 0.9, "judge_every": 2, "judge_count": 100, "figures_every": 2, "gan_weight": 0.1}
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    distill(**options(tiny_teacher("vp"), plain, **more))
    monkeypatch.setattr(Trainer, "began", property(lambda self: -math.inf, lambda self, value: None), raising=False)
    with pytest.raises(Interrupted):
        distill(**options(tiny_teacher("vp"), moved, **more), offload=kind, max_hours=1.0)
    monkeypatch.undo()
    distill(resume=moved, max_hours=0.0)
    assert same(student(plain), student(moved))
    assert metrics(plain) == metrics(moved)
    for picture in sorted((plain / "samples").iterdir()):
        assert picture.read_bytes() == (moved / "samples" / picture.name).read_bytes(), picture.name


def test_what_cannot_go_together_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    teacher = Teacher.around(Blocks(), (1, 3, 3), LinearFlow(), "flow_prediction")
    teacher.denoiser.network = torch.compile(teacher.denoiser.network, backend="eager")  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"offload: a network under torch\.compile cannot come and go; use none or"):
        Offload("group", [teacher.denoiser], torch.device("cpu"))
    Offload("optimizer", [teacher.denoiser], torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="offload: model does not move what FSDP divides over processes; use none"):
        accelerator_for(FitConfig(offload="model", device="cpu"), tmp_path, may_divide=True)
