"""A metric, a feature network, a protocol and a suite from outside the package."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from diffdistill import evaluate
from diffdistill.errors import UserError
from diffdistill.eval.budget import Entry, entries, planned
from diffdistill.eval.features import measure as measures
from diffdistill.eval.features.measure import Measure, module_measure
from diffdistill.eval.metrics import registry
from diffdistill.eval.metrics.registry import Inputs, Metric
from diffdistill.eval.suites import load_suite, suite_names


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "METRICS", dict(registry.METRICS))
    monkeypatch.setattr(measures, "_REGISTERED", dict(measures._REGISTERED))
    yield


class Brightness(nn.Module):
    """Mean and deviation of the pixels, (B, 2)."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float().flatten(1)
        return torch.stack([pixels.mean(1), pixels.std(1)], 1)


def brightness(key: str, device: torch.device, weights: str | None) -> Measure:
    return module_measure(Brightness(), key, "mean and deviation of the pixels, 8 bit", device)


def shift(inputs: Inputs) -> Sequence[float | None]:
    """How much brighter the drawn images are than the real ones, and their own brightness."""
    assert inputs.real is not None
    drawn = inputs.drawn.statistics().mean[0]
    return [float(drawn - inputs.real.statistics().mean[0]), float(drawn)]


def test_a_metric_and_a_feature_network_of_ones_own(
    protocol: Callable[..., str], tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    registry.register(Metric("shift", shift, needs="statistics", least=2, columns=("{name}", "{name} of the drawn")))
    measures.register("brightness", brightness)
    metrics = [
        {"name": "brighter by", "kind": "shift", "measure": "brightness", "scale": 2},
        {"name": "distance", "kind": "frechet", "measure": "brightness"},
    ]
    result = evaluate(tiny_teacher("v"), protocol=protocol(metrics=metrics), steps=1, out=tmp_path / "out")
    (row,) = result.rows
    plain = [{**metrics[0], "scale": 1}]
    (half,) = evaluate(tiny_teacher("v"), protocol=protocol(metrics=plain), steps=1, out=tmp_path / "half").rows
    assert row["brighter by"] == 2 * half["brighter by"] != 0
    assert row["brighter by of the drawn"] == 2 * half["brighter by of the drawn"]
    assert row["distance"] >= (row["brighter by"] / 2) ** 2
    assert "brighter by, distance: mean and deviation of the pixels, 8 bit" in result.notes


def test_names_that_exist_are_refused() -> None:
    with pytest.raises(UserError, match="metric: 'frechet' exists already"):
        registry.register(Metric("frechet", shift))
    for key in ("inception", "brightness"):
        with pytest.raises(UserError, match=f"measure: '{key}' exists already"):
            measures.register("brightness", brightness)
            measures.register(key, brightness)
        measures._REGISTERED.clear()


def test_a_metric_with_too_few_images_is_a_dash(
    protocol: Callable[..., str], tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    registry.register(Metric("many", shift, needs="images", least=100))
    metrics = [
        {"name": "many", "kind": "many", "measure": "digits"},
        {"name": "d", "kind": "frechet", "measure": "digits"},
    ]
    result = evaluate(tiny_teacher("v"), protocol=protocol(metrics=metrics), steps=1, out=tmp_path / "out")
    assert result.rows[0]["many"] is None and result.rows[0]["d"] > 0
    assert "many: none, it takes 100 images, and there are 60" in result.notes


SUITE = {
    "title": "mine", "preset": "digits", "teacher": "digits", "data": "digits", "protocol": "digits", "budget": 500,
    "teacher_steps": [1], "methods": {"progressive": {"passes": {"digits": 3}, "scales": ["stage_steps"]}},
}  # fmt: skip


def written(tmp_path: Path, **changes: object) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (SUITE | changes).items() if v is not None}))
    return str(path)


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    suite = load_suite(written(tmp_path))
    assert suite.name == "mine" and suite.teacher_steps == (1,)
    (entry,) = entries(suite, ["progressive"], [0])
    assert isinstance(entry, Entry)
    plan = planned(entry, suite, suite.budget, {})
    assert plan.values["steps"] == 100 and plan.values["stage_steps"] == 20
    (tmp_path / "more.yaml").write_text(f"extends: {tmp_path / 'mine.yaml'}\nbudget: 7\n")
    more = load_suite(str(tmp_path / "more.yaml"))
    assert (more.name, more.budget, more.methods) == ("more", 7, suite.methods)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": None}, "budget is missing"),
        ({"budget": "many"}, "budget: 'many' is not a whole number"),
        ({"teacher_steps": [0]}, "teacher_steps: 0 is not a whole number of at least 1"),
        ({"colour": 1}, "'colour' is no field"),
        ({"methods": {"dmd2": {"passses": {}}}}, "methods: dmd2: 'passses' is no field; did you mean"),
        ({"methods": {"dmd2": 4}}, "methods: dmd2: 4 is not a mapping"),
        ({"protocol": 3}, "protocol: 3 is not a text"),
    ],
)
def test_a_mistake_in_a_suite_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_suite(written(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_shipped_suites_are_whole() -> None:
    assert suite_names() == ["digits", "mnist"]
    assert all(load_suite(name).title for name in suite_names())
    with pytest.raises(UserError, match="suite: 'digit' is not known; did you mean 'digits'"):
        load_suite("digit")
