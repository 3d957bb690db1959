"""Pairs and encoded prompts of a teacher that Python gives as an object."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import Example, LinearFlow, Teacher, UserError, distill, encode, load_teacher, make_pairs
from diffdistill.data.encoded import open_encoded
from diffdistill.data.examples import ClassLabels
from diffdistill.data.pairs import fingerprint, open_pairs
from diffdistill.training.inputs import inputs_of
from tests.data.encoding import contents, options

SHORT = {"count": 6, "sampling_steps": 2, "batch_size": 4, "device": "cpu"}


class Points(nn.Module):
    """A velocity of points in the plane, which depends on the side if it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, time: Tensor, side: Tensor | None = None) -> Tensor:
        side = torch.zeros(len(x)) if side is None else side
        return self.layer(torch.cat([x, time[:, None].to(x) / 1000, side[:, None]], 1))


class Sides:
    """Conditions in turn: 0, 1, 2."""

    def __len__(self) -> int:
        return 3

    def get(self, indices: Tensor) -> Example:
        return Example(cond={"side": indices.float()})


def around(**more: Any) -> Teacher:
    torch.manual_seed(0)
    return Teacher.around(Points(), (2,), LinearFlow(), "flow_prediction", **more)


def test_pairs_of_a_network_of_ones_own_train_dmd(tmp_path: Path) -> None:
    folder = make_pairs(teacher=around(), out=tmp_path / "pairs", **SHORT)
    pair = open_pairs(folder).get(torch.arange(6)).pair
    assert pair is not None and pair.z.shape == pair.x0.shape == (6, 2) and not pair.cond
    shared = {"steps": 1, "batch_size": 4, "device": "cpu", "data": torch.randn(8, 2)}
    run = distill("dmd", teacher=around(), pairs=folder, out=tmp_path / "run", **shared)
    assert run.sampler()((2,), {}, [torch.Generator().manual_seed(0)]).isfinite().all()
    other = Teacher.around(Points(), (2,), LinearFlow(), "flow_prediction")
    with pytest.raises(UserError, match="was made with another teacher"):
        distill("dmd", teacher=other, pairs=folder, out=tmp_path / "other", **shared)


def test_conditions_take_turns_and_are_what_the_network_sees(tmp_path: Path) -> None:
    teacher = around(cond={"side": torch.ones(1)})
    six = torch.arange(6)
    pair = open_pairs(make_pairs(teacher=teacher, conditions=Sides(), out=tmp_path / "a", **SHORT)).get(six)
    assert pair.cond["side"].tolist() == [0, 1, 2, 0, 1, 2]
    assert make_pairs(teacher=teacher, conditions=Sides(), out=tmp_path / "a", **SHORT) == tmp_path / "a"

    class Others(Sides):
        def get(self, indices: Tensor) -> Example:
            return Example(cond={"side": 2 - indices.float()})

    turned = open_pairs(make_pairs(teacher=teacher, conditions=Others(), out=tmp_path / "b", **SHORT)).get(six)
    assert pair.pair is not None and turned.pair is not None
    same = (pair.pair.x0 == turned.pair.x0).all(1)
    assert torch.equal(pair.pair.z, turned.pair.z) and same.tolist() == [False, True, False, False, True, False]
    with pytest.raises(UserError, match="holds pairs made with conditions"):
        make_pairs(teacher=teacher, conditions=Others(), out=tmp_path / "a", **SHORT)


def test_what_pairs_of_an_object_cannot_be(tmp_path: Path) -> None:
    sided = around(cond={"side": torch.ones(1)})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher": sided}, "conditions: Points is conditioned on side; give examples whose cond has them"),
        (
            {"teacher": sided, "conditions": ClassLabels(3)},
            r"takes {'side': \(\)}, and the examples have {'class_labels'",
        ),
        ({"teacher": sided, "conditions": [1.0]}, "conditions: give an object with __len__"),
        ({"teacher": around(), "conditions": Sides()}, "conditions: Points takes none, and the examples have"),
        ({"teacher": sided, "prompts": tmp_path}, "prompts: Points is a network alone"),
        ({"teacher": around(), "null_class": 3}, "null_class: it is for a teacher that is given by name"),
        ({"teacher": Points()}, "teacher: Points is no teacher; give a folder"),
        ({"conditions": Sides()}, "conditions: they are for a teacher as an object"),
    ]
    for values, says in cases:
        with pytest.raises(UserError, match=says) as error:
            make_pairs(out=tmp_path / "pairs", **(SHORT | values))
        assert not (tmp_path / "pairs").exists() and len(str(error.value)) < 280


def test_the_schedule_of_ones_own_network_tells_two_teachers_apart() -> None:
    def teacher(time_scale: float) -> Teacher:
        torch.manual_seed(0)
        return Teacher.around(Points(), (2,), LinearFlow(time_scale=time_scale), "flow_prediction")

    assert fingerprint(teacher(1.0)) == fingerprint(teacher(1.0)) != fingerprint(teacher(2.0))
    one, two = (inputs_of({}, teacher=teacher(scale))["fingerprints"] for scale in (1.0, 2.0))
    assert one["teacher's weights"] == two["teacher's weights"]
    assert one["teacher's scheduler"] != two["teacher's scheduler"]


def test_encode_and_pairs_of_a_teacher_that_was_loaded(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    values = options(teacher, prompts, tmp_path / "by name", resolution=32)
    by_name = encode(**values)
    loaded = load_teacher(teacher, resolution=32)  # not its own size
    rest = {name: value for name, value in values.items() if name not in ("teacher", "resolution", "out")}
    made = encode(teacher=loaded, out=tmp_path / "by object", **rest)
    assert contents(made) == contents(by_name) and open_encoded(made).settings == open_encoded(by_name).settings
    short = SHORT | {"count": 2}
    named = make_pairs(teacher=teacher, prompts=made, out=tmp_path / "a", **short)
    objects = [
        make_pairs(teacher=loaded, prompts=made, out=tmp_path / "b", **short),
        make_pairs(teacher=loaded, conditions=open_encoded(made), out=tmp_path / "c", **short),
    ]
    assert all(contents(folder) == contents(named) for folder in objects) and loaded.denoiser.null is None
    with pytest.raises(UserError, match=r"conditions: .* is conditioned on prompts; give examples"):
        make_pairs(teacher=loaded, out=tmp_path / "d", **short)
    with pytest.raises(UserError, match="resolution: samples of this size are"):
        encode(teacher=loaded, out=tmp_path / "e", resolution=16, **rest)


def test_a_network_alone_encodes_nothing(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="teacher: Points is a network alone, without text encoder"):
        encode(teacher=around(), prompts=prompts, out=tmp_path / "out")
    with pytest.raises(UserError, match="teacher: 'digits' works on pixels"):
        encode(teacher=load_teacher("digits"), prompts=prompts, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
