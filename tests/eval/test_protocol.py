"""Protocol files: those shipped say what they must, and a mistake in one's own is named."""

from pathlib import Path

import pytest
import yaml

from diffdistill.errors import UserError
from diffdistill.eval.judge import DRAWN
from diffdistill.eval.protocol import load, names


@pytest.mark.parametrize("name", names())
def test_shipped_ones_are_whole(name: str) -> None:
    protocol = load(name)
    assert protocol.name == name and protocol.title
    # Data that are not in the package: the reader is told where they come from.
    for data in (protocol.reference, protocol.prompts):
        assert data in (None, "digits", *DRAWN) or protocol.fetch
    # Every published figure stands under a metric of the protocol, with its source.
    assert {p.metric for p in protocol.published} <= {m.name for m in protocol.metrics}
    assert all("abstract" in p.source or "Table" in p.source for p in protocol.published)
    if any(m.metric.compares for m in protocol.metrics):
        assert protocol.reference or protocol.is_open
    # FID is the name of one network's distance only, with its resize.
    called = {"inception": "FID", "inception-clean": "clean FID"}
    for m in protocol.metrics:
        assert ("FID" in m.name) == (m.kind == "frechet" and m.measure in called), m
        assert "FID" not in m.name or m.name == called[m.measure]


def test_published_figures_are_of_the_protocol_as_it_stands() -> None:
    protocol = load("cifar10")
    assert (protocol.count, protocol.seed) == (50000, 0) and protocol.published  # EDM's
    assert load("cifar10", count=50000, seed=0, batch=7).published == protocol.published
    assert not load("cifar10", count=1000).published and not load("cifar10", seed=1).published


GOOD = {
    "title": "mine", "conditions": ["none"], "count": 20, "resolution": 8, "channels": 1, "reference": "digits",
    "metrics": [{"name": "distance", "kind": "frechet", "measure": "digits"}],
}  # fmt: skip


def written(tmp_path: Path, **changes: object) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (GOOD | changes).items() if v is not None}))
    return str(path)


def test_ones_own(tmp_path: Path) -> None:
    protocol = load(written(tmp_path), count=30)
    assert protocol.name == "mine" and protocol.count == 30 and protocol.metrics[0].reads == "digits.features"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": None}, "count is missing"),
        ({"count": "many"}, "count: 'many' is not a whole number"),
        ({"colour": 1}, "'colour' is no field"),
        ({"conditions": "none"}, "conditions: 'none' is no list"),
        ({"published": 5}, "published: 5 is no list"),
        ({"seed": [0]}, r"seed: \[0\] is not a whole number"),
        ({"metrics": [{"name": "d", "kind": "frechet", "measure": "digits", "k": [5]}]}, r"k: \[5\] is not a whole"),
        ({"seed": -1}, "seed: -1 is negative"),
        ({"conditions": ["text"]}, "conditions: 'text' is not one of"),
        ({"metrics": []}, "metrics: there is none"),
        ({"metrics": [{"name": "d", "kind": "fid", "measure": "digits"}]}, "kind 'fid' is not known"),
        ({"metrics": [{"name": "d", "kind": "mean", "measure": "digits"}]}, "names no column"),
        ({"metrics": ["FID"]}, "'FID' is not a mapping"),
        ({"channels": 4}, "channels: 4 is neither"),
        ({"resize": "box"}, "resize: 'box' is not one of"),
        ({"reference": None}, "reference is missing"),
        ({"conditions": ["classes"]}, "classes is missing"),
        ({"conditions": ["prompts"]}, "prompts is missing"),
        ({"batch": 0}, "batch: 0 is not 1 or more"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(written(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match="'cifar' is not known; did you mean"):
        load("cifar")
