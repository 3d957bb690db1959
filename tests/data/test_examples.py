"""Whatever has `get` and `__len__` is data; batches of it have the right units and order."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import LinearFlow, UserError, distill, load_teacher
from diffdistill.config import FitConfig
from diffdistill.data.batches import batch_indices, batches, check_data
from diffdistill.data.examples import ClassLabels, Example, Examples, TensorExamples, as_examples
from diffdistill.data.images import open_data
from diffdistill.data.pairs import make_pairs, open_pairs
from diffdistill.players.teacher import Teacher
from diffdistill.rng import generator
from diffdistill.scaffold.method import Pair
from diffdistill.training.trainer import accelerator_for

CONFIG = FitConfig(batch_size=6, device="cpu")


class Numbered:
    """A user's own data: example i is filled with i and of class i % 10."""

    def __len__(self) -> int:
        return 20

    def get(self, indices: Tensor) -> Example:
        filled = indices.float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        cond = {"class_labels": indices % 10}
        return Example(filled, cond, Pair(-filled, filled, cond))


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[..., Any]:
    accelerator = accelerator_for(CONFIG, tmp_path)
    return lambda teacher, examples, **how: batches(CONFIG, teacher, examples, accelerator, **how)


@pytest.mark.parametrize("parameterization", ["vp", "edm"])
def test_ones_own_examples_come_in_shuffled_epochs_and_in_unit_variance(
    parameterization: str, tiny_teacher: Callable[[str], Path], drawn: Callable[..., Any], capsys: Any
) -> None:
    teacher = load_teacher(tiny_teacher(parameterization))
    check_data(teacher, Numbered())
    assert capsys.readouterr().err == "", "the first example's class is not the number of classes"
    batch = drawn(teacher, Numbered())
    for step in (0, 3, 9):
        order, x0 = batch_indices(20, 6, step, seed=0), batch(step).x0
        assert torch.equal(x0[:, 0, 0, 0] * teacher.denoiser.schedule.data_std, order.float())
        assert torch.equal(batch(step).cond["class_labels"], order % 10)
        assert torch.equal(batch(step).pair.z[:, 0, 0, 0], -order.float()) and x0.shape == (6, 1, 8, 8)


def test_a_tensor_is_data(tiny_teacher: Callable[[str], Path], drawn: Callable[..., Any]) -> None:
    images, labels = torch.randn(9, 1, 8, 8), torch.arange(9)
    batch = drawn(load_teacher(tiny_teacher("vp")), TensorExamples(images, {"class_labels": labels}))(0)
    order = batch_indices(9, 6, 0, seed=0)
    assert torch.equal(batch.x0, images[order]) and torch.equal(batch.cond["class_labels"], order)
    assert torch.equal(as_examples(images).get(torch.tensor([2, 0])).x0, images[[2, 0]])
    assert isinstance(Numbered(), Examples) and as_examples(open_data("digits")).get(torch.arange(2)).pair is None


@pytest.mark.parametrize("classes", [17, -1])
def test_a_class_that_the_teacher_lacks_is_said_where_it_comes(
    classes: int, tiny_teacher: Callable[[str], Path], drawn: Callable[..., Any]
) -> None:
    class Mistaken(Numbered):
        def get(self, indices: Tensor) -> Example:
            made = super().get(indices)
            return replace(made, cond={"class_labels": torch.where(indices == 19, classes, indices % 10)})

    teacher = load_teacher(tiny_teacher("vp"))
    check_data(teacher, Mistaken())
    batch = drawn(teacher, Mistaken())
    for step in range(4):  # more than an epoch
        if 19 in batch_indices(20, 6, step, seed=0):
            with pytest.raises(UserError, match=f"data: a sample has the class {classes}; the teacher's are 0 to 9"):
                batch(step)
        else:
            batch(step)


@pytest.mark.parametrize("wrong", [torch.arange(4), torch.zeros(3, 1, 8, 8, dtype=torch.uint8), [1, 2], "digits", None])
def test_what_is_no_data_is_said_to_be_none(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"^data: ") as error:
        as_examples(wrong)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="data: the condition 'class_labels' has 3 entries for 4 samples"):
        TensorExamples(torch.zeros(4, 1, 8, 8), {"class_labels": torch.zeros(3)})


def test_data_that_are_not_the_teachers_are_refused(tiny_teacher: Callable[[str], Path]) -> None:
    teacher, labels = load_teacher(tiny_teacher("vp")), {"class_labels": torch.arange(12)}
    for examples, says in (
        (TensorExamples(torch.zeros(12, 3, 8, 8)), r"has samples of shape \(3, 8, 8\); the teacher's are \(1, 8, 8\)"),
        (TensorExamples(torch.zeros(12, 1, 8, 8)), "has no labels and the teacher has 10 classes"),
        (TensorExamples(torch.zeros(12, 1, 8, 8), labels), "has 12 classes; the teacher knows 10"),
        (TensorExamples(torch.zeros(0, 1, 8, 8)), "there are no examples"),
        (open_data("digits", channels=3), r"'digits' has samples of shape \(3, 8, 8\)"),
    ):
        with pytest.raises(UserError, match=f"^data: .*{says}"):
            check_data(teacher, examples)


class Sided(nn.Module):
    """A network of two dimensions that takes a side."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, time: Tensor, side: Tensor) -> Tensor:
        return self.layer(torch.cat([x, side[:, None]], 1))


@pytest.mark.parametrize(
    ("method", "data", "says"),
    [
        ("consistency", torch.zeros(8, 2), "of conditions the TensorExamples has nothing; the teacher takes side"),
        ("consistency", TensorExamples(torch.zeros(8, 2), {"sid": torch.ones(8)}), "has sid; the teacher takes side"),
        ("consistency", TensorExamples(torch.zeros(8, 2), {"side": torch.ones(8, 3)}),
         r"has 'side' of shape \(3,\) for a sample; the teacher's is \(\)"),
        ("dmd2", TensorExamples(torch.zeros(8, 2), {"side": torch.ones(8), "other": torch.ones(8)}),
         r"time \(2,\), side=.., other=..\): .*unexpected keyword argument 'other'"),
        ("dmd2", torch.zeros(8, 2), r"none say the conditions that the teacher takes \(side\); give"),
        ("dmd2", None, r"none say the conditions that the teacher takes \(side\); give examples that have them"),
    ],
)  # fmt: skip
def test_conditions_of_ones_own_network_are_those_of_the_data(
    method: str, data: Any, says: str, tmp_path: Path
) -> None:
    teacher = Teacher.around(Sided(), (2,), LinearFlow(time_scale=1.0), "flow_prediction", cond={"side": torch.ones(1)})
    given = {} if data is None else {"data": data}
    with pytest.raises(UserError, match=says):
        distill(method, teacher=teacher, steps=1, batch_size=4, out=tmp_path / "run", **given)


def test_without_data_classes_are_drawn_uniformly(
    tiny_teacher: Callable[[str], Path], drawn: Callable[..., Any]
) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    batch = drawn(teacher, None)
    assert batch(0).x0 is None and not torch.equal(batch(0).cond["class_labels"], batch(1).cond["class_labels"])
    expected = torch.randint(10, (6,), generator=generator("cpu", *batch(5).key, "condition"))
    assert torch.equal(batch(5).cond["class_labels"], expected)
    labels = ClassLabels(3).draw(3000, torch.Generator().manual_seed(0)).cond["class_labels"]
    assert labels.dtype == torch.int64 and int(labels.bincount(minlength=3).min()) > 900 and int(labels.max()) == 2
    unconditional: Teacher = replace(teacher, num_classes=None)
    assert drawn(unconditional, None)(0).cond == drawn(unconditional, Numbered())(0).cond == {}


def test_labels_are_dropped_at_the_rate_and_nowhere_else(
    tiny_teacher: Callable[[str], Path], drawn: Callable[..., Any]
) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    plain, dropping = drawn(teacher, Numbered()), drawn(teacher, Numbered(), label_dropout=0.25)
    before = torch.cat([plain(step).cond["class_labels"] for step in range(300)])
    after = torch.cat([dropping(step).cond["class_labels"] for step in range(300)])
    dropped = after == 10
    assert torch.equal(after[~dropped], before[~dropped]) and abs(float(dropped.float().mean()) - 0.25) < 0.04
    assert torch.equal(dropping(7).x0, plain(7).x0)


def test_pairs_are_examples_with_an_order_of_their_own(
    tiny_teacher: Callable[[str], Path], drawn: Callable[..., Any], tmp_path: Path
) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    options = {"teacher": str(tiny_teacher("vp")), "count": 10, "sampling_steps": 1, "device": "cpu"}
    pairs = open_pairs(make_pairs(**options, out=str(tmp_path / "pairs")))
    alone, beside = drawn(teacher, pairs)(0), drawn(teacher, Numbered(), pairs=pairs)(0)
    assert alone.x0 is None and torch.equal(alone.cond["class_labels"], alone.pair.cond["class_labels"])
    assert torch.equal(alone.cond["class_labels"], batch_indices(10, 6, 0, seed=0))
    assert not torch.equal(beside.pair.cond["class_labels"], alone.cond["class_labels"])
