"""Early warnings in words, of the lines of metrics.jsonl: what goes wrong while there is time to change it.

A function of the lines alone, of which it keeps a few numbers: a resumed run reads the lines before and warns as it
would have without a stop.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from diffdistill.training.looks import REMEDIES, STILL, WORSE, Measures, faults

LAGGING, BEHIND = 0.99, 1.2  # of the fake score's lag: it knows no more than the teacher, and less
FAR = 0.1  # of the distance of a student that is not yet the teacher, and of what has moved
LARGE, GROWN = 0.05, 10.0  # of a step, in weights, and of a gradient, in what it was at first
REACH = 0.02  # of the weights, in all steps together
BETTER = 0.98  # what counts as an improvement
PATIENCE_OF_JUDGE, PATIENCE_OF_LOOKS = 5, 20
_OTHERS = ("nothing moved", "no nearer", "getting worse")  # which a look says where a tenth of the steps is done


class Diagnosis:
    """`add(line)` gives the warnings that a line of metrics.jsonl is a reason for, each kind once in a run."""

    def __init__(self, steps: int, before: Measures, relearns: bool = False, options: Collection[str] = REMEDIES):
        """`options`: the method's, of which alone something is advised."""
        self.steps, self.before, self.relearns, self.options = steps, before, relearns, options
        self.said: set[str] = set()
        self.rows: dict[str, int] = {}  # of each kind, how many lines in a row had its signs
        self.norms: dict[str, float] = {}  # of each player, its first gradient
        self.best, self.best_at, self.best_step, self.looks = float("inf"), 0, 0, 0
        self.judgings = 0  # since the best

    def add(self, line: Mapping[str, Any]) -> list[str]:
        """In words, each with what to change; the line's figures are those of `training.figures`."""
        signs: dict[str, str] = {}
        step = int(line["step"])
        if "judge/best step" in line:
            signs |= self._judged(line, step)
        for name, value in line.items():
            if name.endswith("/grad_norm"):
                self.norms.setdefault(name.split("/")[0], float(value))
        if "look/distance" in line:
            signs |= self._seen(line, step)
        new = [f"{kind}: {text}" for kind, text in signs.items() if kind not in self.said]
        self.said |= set(signs)
        return new

    def _judged(self, line: Mapping[str, Any], step: int) -> dict[str, str]:
        best = int(line["judge/best step"])
        self.judgings = 0 if best == step else self.judgings + 1
        if self.judgings < PATIENCE_OF_JUDGE or step - best < self.steps / 10:
            return {}
        text = (
            f"the best judging is of step {best}, {self.judgings} judgings ago; stop here, or take lower learning rates"
        )
        return {"no longer improving": text}

    def _seen(self, line: Mapping[str, Any], step: int) -> dict[str, str]:
        """Of a line with figures."""
        measures = Measures(*(float(line[f"look/{name}"]) for name in Measures._fields))
        signs = {}
        relearns = self.relearns and step < self.steps / 10
        for fault in faults(measures, self.before, first=True, relearns=relearns, options=self.options):
            kind, _, text = fault.partition(": ")
            if kind not in _OTHERS:
                signs[kind] = text
        signs |= self._rates(line, measures)
        lag = float(line.get("fake_score/lag", 0))
        if lag > LAGGING and measures.distance > FAR and measures.moved > FAR:
            signs["lagging fake score"] = (
                f"on the student's samples, which are not the teacher's yet, its loss is {lag:.2f} of the teacher's; "
                "take a higher --fake-score-lr, or more of its steps, --update-ratio"
            )
        lasting = {}
        for kind, text in signs.items():
            self.rows[kind] = self.rows.get(kind, 0) + 1
            if self.rows[kind] >= (3 if kind.startswith("lagging") else 2):
                lasting[kind] = text
        self.rows = {kind: self.rows[kind] for kind in signs}
        return lasting | self._stalled(measures.distance, step)

    def _rates(self, line: Mapping[str, Any], measures: Measures) -> dict[str, str]:
        sizes = {k.split("/")[0]: float(v) for k, v in line.items() if k.endswith("/step_size")}
        if not sizes:
            return {}
        if measures.distance > WORSE or float(line.get("fake_score/lag", 0)) > BEHIND:
            high = max(sizes, key=lambda player: sizes[player])
            if sizes[high] > LARGE:
                why = f"a step moves a weight of {high} by {sizes[high]:.0%} of its size"
                return {"learning rate too high": f"{why}, and it gets worse; take a lower {_option(high)}"}
            for player, first in self.norms.items():
                norm = float(line.get(f"{player}/grad_norm", 0))
                if norm > GROWN * first > 0:
                    why = f"the gradient of {player} is {norm / first:.0f} times what it was at first"
                    return {"learning rate too high": f"{why}, and it gets worse; take a lower {_option(player)}"}
        student, middle = next(iter(sizes)), 0.1 <= int(line["step"]) / self.steps <= 0.5  # neither warm-up nor end
        if middle and measures.moved < STILL and sizes[student] * self.steps < REACH:
            reach = f"all {self.steps} steps together move a weight of {student} by {sizes[student] * self.steps:.1g}"
            return {"learning rate too low": f"{reach} of its size at most; take a higher {_option(student)}"}
        return {}

    def _stalled(self, distance: float, step: int) -> dict[str, str]:
        """Of a run that is not judged; a distance that is not lower in half of the looks so far."""
        self.looks += 1
        if distance < BETTER * self.best:
            self.best, self.best_at, self.best_step = distance, self.looks, step
        if self.looks < PATIENCE_OF_LOOKS or self.looks < 2 * self.best_at:
            return {}
        text = f"samples have come no nearer to the teacher's since step {self.best_step} of {step}"
        return {"no longer improving": f"{text}; stop here, or take lower learning rates"}


def _option(player: str) -> str:
    return f"--{player.rstrip('_0123456789').replace('_', '-')}-lr"
