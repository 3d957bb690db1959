"""PSO: its exact checks hold, known mistakes are caught, a turn is its straight line, and a student keeps its steps."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill
from diffdistill.catalogue import describe_method
from diffdistill.commands.cli import main
from diffdistill.exact.checks import run_checks
from diffdistill.families import load_teacher, student_record
from diffdistill.methods import pso
from diffdistill.methods.checks.pso import verify
from diffdistill.methods.pso import PSO, Config
from diffdistill.players.sampler import Gamma, Renoise
from diffdistill.scaffold.method import Need
from tests.methods.short_runs import same_when_resumed
from tests.scaffold.straight import (
    EDM_,
    FLOW,
    KEY,
    SIZE,
    VP,
    Plain,
    agree,
    batch_of,
    draw,
    in_double,
    modes,
    nets,
    noised,
    normal,
    scatter,
)

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL_LOSS, REAL_RATIO = pso.pso_loss, PSO.log_ratio
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the worse is preferred": (pso, "pso_loss", lambda a, b, better, *rest: REAL_LOSS(b, a, better, *rest)),
    "nothing is clipped": (pso, "pso_loss", lambda *a: REAL_LOSS(*a[:4], 0.999)),
    "beta is ignored": (pso, "pso_loss", lambda *a: REAL_LOSS(*a[:3], 50.0, a[4])),
    "the ratio is the other way round": (PSO, "log_ratio", lambda *a: -REAL_RATIO(*a)),
    "the spread is twice as large": (Renoise, "spread", lambda self, r, s: 2 * torch.sin(s)),
    "gamma's spread is all of the noise": (Gamma, "spread", lambda self, r, s: torch.sin(s)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    if MUTANTS[name][0] is pso:
        monkeypatch.setattr("diffdistill.methods.checks.pso.pso_loss", MUTANTS[name][2])
    assert any(not c.ok for c in verify())


def score(x: Tensor, batch: Any) -> Tensor:
    return x.detach().flatten(1).mean(1) * (1 + batch.cond["class_labels"])


class Straight:
    """A turn, line by line."""

    def __init__(self, options: dict[str, Any], plain: Plain):
        self.plain, self.c = plain, Config(**options)
        self.method: Any = PSO(plain.teacher(), self.c)
        self.method.reward = score
        scatter(self.method.student, 20)
        self.reference, self.student = nets(self.method.reference, self.method.student)
        self.batch = replace(batch_of(KEY), losers=torch.randn(SIZE, 1, 3, 3, generator=draw(7)))
        self.labels = self.batch.cond["class_labels"]
        self.levels = plain.levels(self.c.student_steps)

    def x0(self, net: Any, x_t: Tensor, level: float) -> Tensor:
        t = torch.full((SIZE,), self.plain.angle(level), dtype=torch.float64)
        return self.plain.x0_eps(net, x_t, t, class_labels=self.labels)[0]

    def way(self, name: str) -> tuple[list[Tensor], Tensor]:
        x, path = self.plain.start(self.levels[0], normal(f"{name} z", KEY))[0], []
        with torch.no_grad():
            for k, level in enumerate(self.levels):
                if k:
                    t = torch.full((SIZE,), self.plain.angle(level), dtype=torch.float64)
                    x = noised(self.x0(self.student, x, self.levels[k - 1]), t, normal(f"{name} z {k}", KEY))
                path.append(x)
            return path, self.x0(self.student, x, self.levels[-1])

    def turn(self) -> dict[str, Tensor]:
        shown = {}
        if self.c.preferences == "reward":
            (first, end), (second, other) = self.way("a"), self.way("b")
            a, b = (x.flatten(1).mean(1) * (1 + self.labels) for x in (end, other))
            better, shown = torch.sign(a - b), {"reward": (a + b).mean() / 2, "gap": (a - b).abs().mean()}
        else:
            angles = [torch.full((SIZE,), self.plain.angle(level), dtype=torch.float64) for level in self.levels]
            first, second = (
                [noised(x, t, normal(f"z {k}", KEY)) for k, t in enumerate(angles)]
                for x in (self.batch.x0, self.batch.losers)
            )  # type: ignore[misc]
            better = torch.ones(SIZE)
        losses, margins = [], []
        for k in range(len(self.levels) - 1):
            a, b = (self.ratio(path[k], path[k + 1], k) for path in (first, second))
            low, high = torch.log(torch.tensor([1 - self.c.clip, 1 + self.c.clip], dtype=torch.float64))
            clipped = [ratio.clamp(low, high) for ratio in (a, b)]
            losses.append(torch.log1p(torch.exp(-self.c.beta * better * (clipped[0] - clipped[1]))).mean())
            margins.append((better * (a - b)).mean())
        return {"loss": sum(losses) / len(losses), "margin": sum(margins) / len(margins), **shown}  # type: ignore[dict-item]

    def ratio(self, x_t: Tensor, x_s: Tensor, k: int) -> Tensor:
        s = torch.tensor(self.plain.angle(self.levels[k + 1]))
        own, theirs = (torch.cos(s) * self.x0(net, x_t, self.levels[k]) for net in (self.student, self.reference))
        return (((x_s - theirs) ** 2 - (x_s - own) ** 2) / (2 * torch.sin(s) ** 2)).flatten(1).mean(1)


@pytest.mark.parametrize("preferences", ["reward", "pairs"])
@pytest.mark.parametrize("plain", [VP, FLOW, EDM_])
def test_a_turn_is_its_straight_line(preferences: str, plain: Plain) -> None:
    with double():
        straight = Straight({"preferences": preferences, "student_steps": 3, "beta": 4.0, "clip": 0.6}, plain)
        assert straight.method.needs == ({Need.REWARD} if preferences == "reward" else {Need.IMAGES, Need.LOSERS})
        (turn,) = straight.method.turns(3)
        assert turn.player == "student"
        agree(straight.method, turn, straight.batch, straight.turn)
        straight.method.student.train()
        calls = modes({"student": straight.student.dropout}, lambda: turn.loss(straight.batch))
        assert calls and not any(dropping for _, dropping in calls)


def test_a_student_without_several_steps_of_noise_is_refused(tiny_teacher: Teachers, tmp_path: Path) -> None:
    run: dict[str, Any] = {"teacher": str(tiny_teacher("vp")), "batch_size": 4, "steps": 1, "device": "cpu"}
    for more, message in (
        ({}, "levels: the teacher, the student to be tuned, says no levels; give --levels, as 999,749"),
        ({"student_steps": 1}, "teacher: a student of one step has no likelihoods"),
    ):
        with pytest.raises(UserError, match=message):
            distill(
                "pso", **run, reward=lambda images, labels: images.mean((1, 2, 3)), options=more, out=tmp_path / "no"
            )


RUN: dict[str, Any] = {"batch_size": 8, "sample_every": 0, "device": "cpu", "log_every": 1}


def test_a_student_is_tuned_at_its_own_levels_and_resumes_to_the_same_bits(
    tiny_teacher: Teachers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"student_steps": 3, "update_ratio": 1}
    first = distill("dmd2", teacher=tiny_teacher("vp"), options=options, steps=1, **RUN, out=tmp_path / "first").student
    capsys.readouterr()
    (tmp_path / "ink.py").write_text("def ink(images, labels):\n    return images.mean((1, 2, 3))\n")
    reward = f"{tmp_path / 'ink.py'}:ink"
    same_when_resumed(tmp_path, method="pso", teacher=str(first), reward=reward, student_lr=1e-3, **RUN)
    assert "is itself a student" not in capsys.readouterr().err
    record, before = student_record(tmp_path / "run" / "student"), student_record(first)
    assert (record.levels, record.move, record.method) == (before.levels, "renoise", "pso")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"student/margin", "student/reward", "student/gap"} <= {key for line in lines for key in line}


def test_it_makes_what_the_reward_likes(tiny_teacher: Teachers, tmp_path: Path) -> None:
    """From samples of an untrained network; brighter ones are to become likelier."""
    options = {"student_steps": 2, "clip": 0.3}
    run = RUN | {"batch_size": 32, "steps": 30, "lr_schedule": "constant", "ema": 0.0, "student_lr": 1e-3}
    distill(
        "pso", teacher=tiny_teacher("flow"), options=options, **run, out=tmp_path / "run",
        reward=lambda images, labels: images.mean((1, 2, 3)),
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["student/reward"] for line in lines if "student/reward" in line]
    margins = [line["student/margin"] for line in lines if "student/margin" in line]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.02 and margins[-1] > 0.01


def test_a_level_beside_those_of_the_folder_is_refused(tiny_teacher: Teachers) -> None:
    teacher = replace(load_teacher(tiny_teacher("vp")), levels=(999.0, 749.0))
    assert PSO(teacher, Config(student_level=999.0)).levels == (999.0, 749.0)
    with pytest.raises(UserError, match="student_level: the student to be tuned begins at 999; give student_steps"):
        PSO(teacher, Config(student_level=600.0))


def test_given_pairs_are_noised_as_the_sampler_would(tiny_teacher: Teachers) -> None:
    """What a step keeps of the noise, from a prediction that is the image, is no distance from its mean."""
    teacher = replace(load_teacher(tiny_teacher("vp")), levels=(999.0, 749.0, 499.0), move="gamma 0.3")
    method = PSO(teacher, Config(preferences="pairs"))
    x0 = torch.randn(4, 1, 64, 64, dtype=torch.float64)
    batch = replace(batch_of(KEY), size=4, shape=(1, 64, 64), x0=x0, losers=-x0, total=4, key=(0, 0, 0))
    path, _, _ = method.noised(batch)
    images = torch.cat([x0, -x0])
    for k, level in enumerate(method.levels[1:]):
        t, s = (method.schedule.angle(method.levels[j]) for j in (k, k + 1))
        r = method.sampler().leads(k)
        eps = (path[k] - torch.cos(t) * images) / torch.sin(t)
        kept = torch.cos(s) / torch.cos(r)
        rest = path[k + 1] - kept * (torch.cos(r) * images + torch.sin(r) * eps)
        assert float(rest.std() / method.step.spread(r, s)) == pytest.approx(1, abs=0.02), level
        noise = (path[k + 1] - torch.cos(s) * images) / torch.sin(s)
        assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_pairs_are_given_as_two_folders_or_tensors(
    tiny_teacher: Teachers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = torch.arange(12) % 10
    better, worse = torch.rand(2, 12, 1, 8, 8) * 2 - 1
    options = {"preferences": "pairs", "student_steps": 2}
    run = RUN | {"teacher": str(tiny_teacher("edm")), "steps": 1}
    distill("pso", **run, data=(better, labels), losers=worse, options=options, out=tmp_path / "tensors")
    with pytest.raises(UserError, match="losers: there are 5 for 12 that are better; row i of both is a pair"):
        distill("pso", **run, data=(better, labels), losers=worse[:5], options=options, out=tmp_path / "few")
    with pytest.raises(UserError, match="losers: pso needs pairs, the better by --data or --prompts; give the worse"):
        distill("pso", **run, data=(better, labels), options=options, out=tmp_path / "none")
    with pytest.raises(UserError, match="losers: pso with these options reads none; leave it out"):
        distill(
            "pso",
            **run,
            losers=worse,
            reward=lambda *a: torch.zeros(8),
            options={"student_steps": 2},
            out=tmp_path / "no",
        )
    import numpy as np

    np.savez(
        tmp_path / "a.npz", images=(better.permute(0, 2, 3, 1) * 127.5 + 127.5).byte().numpy(), labels=labels.numpy()
    )
    np.savez(
        tmp_path / "b.npz",
        images=(worse.permute(0, 2, 3, 1) * 127.5 + 127.5).byte().numpy(),
        labels=(labels + 1).numpy() % 10,
    )
    command = [
        "train",
        "--method",
        "pso",
        "--preferences",
        "pairs",
        "--student-steps",
        "2",
        "--teacher",
        run["teacher"],
    ]
    files = [
        "--data",
        str(tmp_path / "a.npz"),
        "--losers",
        str(tmp_path / "b.npz"),
        "--batch-size",
        "4",
        "--steps",
        "1",
    ]
    assert main([*command, *files, "--device", "cpu", "--out", str(tmp_path / "files")]) == 2
    assert "losers: their class_labels differ from those of the better ones" in capsys.readouterr().err
    files[3] = str(tmp_path / "a.npz")
    assert main([*command, *files, "--device", "cpu", "--out", str(tmp_path / "files")]) == 0
    inputs = json.loads((tmp_path / "files" / "inputs.json").read_text())
    assert " over 12 of " in inputs["fingerprints"]["data"]


def test_the_presets_are_of_the_authors() -> None:
    preset = describe_method("pso").presets["sdxl-dmd2-4step"].options
    assert (preset["beta"], preset["clip"], preset["lora_rank"]) == (50.0, 0.1, 16)
