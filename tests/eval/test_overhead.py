"""The benchmark of what the trainer costs: the bare passes are those that a step of the method makes."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffdistill.eval.benchmarks import overhead

GAMES = {label: (name, options) for label, name, options, _ in overhead.games(["scm", "sana_sprint", "lcm"])}


@pytest.mark.parametrize(
    ("label", "tangents", "layers"),
    [("scm, exact JVP", 1, 0), ("sana_sprint, exact JVP", 1, 1), ("lcm", 0, 0)],
)
def test_jacobian_products_and_layers_are_counted_as_such(
    label: str, tangents: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[overhead.Call] = []

    class Watched(overhead.Bare):
        def __init__(self, method: Any, owned: Any, fit: Any, turns: Any) -> None:
            super().__init__(method, owned, fit, turns)
            recorded.extend(call for _, calls in turns[0] for call in calls)

    monkeypatch.setattr(overhead, "Bare", Watched)
    name, options = GAMES[label]
    row = overhead.measure(label, name, options, milliseconds=0, batch=2, cycles=1, steps=1)
    products = [call for call in recorded if call.tangent]
    assert len(products) == tangents
    assert not any(call.grad or call.layers for call in products)
    assert any(call.grad and not call.tangent for call in recorded)
    assert bool([call for call in recorded if call.layers]) == bool(layers)
    assert row["passes"] == sum(call.size for call in recorded if isinstance(call.network, overhead.Denoiser)) / 2


def test_a_small_run_says_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overhead.json"
    overhead.main(
        ["--methods", "mean_flow", "--milliseconds", "0", "--batch-size", "2", "--cycles", "1", f"--out={out}"]
    )
    (row,) = json.loads(out.read_text())["rows"]
    assert row["game"] == "mean_flow, exact JVP" and set(row) == set(overhead.COLUMNS)
    assert row["overhead"] == pytest.approx(row["cycle ms"] / row["bare cycle ms"])
    assert "mean_flow, exact JVP: " in capsys.readouterr().out
