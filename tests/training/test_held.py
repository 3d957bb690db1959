"""Between turns and steps a training holds moments, averages and what a later turn reads, and nothing else."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from diffdistill.catalogue import describe_method, method_names
from diffdistill.config import FitConfig
from diffdistill.core.weightless import Weightless
from diffdistill.scaffold.method import Batch, Turn
from diffdistill.scaffold.segments import SegmentMethod
from diffdistill.training.trainer import Trainer, accelerator_for
from tests.scaffold.straight import VP
from tests.training.test_accumulate import OPTIONS, SHAPE, SIZE, batch_of, score

SAMPLES = 4 * SIZE * torch.Size(SHAPE).numel()
STEPS = 3  # at the last of them every player has moved


@pytest.fixture(autouse=True)
def nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "to", lambda module, *args: module)  # which tensors without values do not take


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", method_names())
def test_what_a_turn_leaves(name: str, tmp_path: Path) -> None:
    module, teacher = describe_method(name).load(), VP.teacher()
    method = module.METHOD(teacher, module.Config(**OPTIONS.get(name, {})))
    method.reward = score
    fit = FitConfig(batch_size=SIZE, accumulate=2, steps=STEPS, ema=0.5, device="cpu", sample_every=0)
    empty = Weightless()
    empty.bare([teacher.denoiser, *method.players.values(), *method.state.values()])
    bared = {id(buffer) for part in method.state.values() for buffer in part.buffers()}
    starts: list[tuple[int, int]] = []  # the step, and what is held as a turn begins
    with empty:
        trainer = Trainer(method, batch_of, fit, tmp_path, accelerator_for(fit, tmp_path))
        take = trainer.take

        def watched(turn: Turn, batch: Batch) -> dict[str, Tensor]:
            starts.append((trainer.step, empty.held))
            return take(turn, batch)

        trainer.take = watched  # type: ignore[method-assign]
        for _ in range(STEPS):
            trainer.iteration()
        state = [buffer for part in method.state.values() for buffer in part.buffers()]
    assert trainer.average is not None
    moments = sum(2 * size(parameters) for parameters in trainer.parameters.values())
    made = [buffer for buffer in state if isinstance(buffer, FakeTensor) and id(buffer) not in bared]
    needed = moments + size(trainer.average.averages) + size(made)
    first = {step: held for step, held in reversed(starts)}
    numbers = 128  # one or two of a sample, as the errors that an adaptive weight learns from
    assert needed <= first[STEPS - 1] <= needed + numbers < needed + SAMPLES
    later = [held - needed for step, held in starts if step == STEPS - 1]
    many = method.trained(batch_of(0)).size // SIZE if isinstance(method, SegmentMethod) else 1  # of each sample
    said = "an activation of the network is four times the samples"
    assert max(later) <= 2 * many * SAMPLES + numbers < 4 * many * SAMPLES, said
