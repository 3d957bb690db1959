"""Distillation-DPO: its exact checks hold, known mistakes are caught, and a student begins as another and is tuned."""

import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffdistill import UserError, distill, export
from diffdistill.exact.checks import run_checks
from diffdistill.families import student_record
from diffdistill.methods.checks.distillation_dpo import verify
from diffdistill.methods.distillation_dpo import Config, DistillationDPO
from diffdistill.players.lora import is_lora
from diffdistill.scaffold.method import Need
from diffdistill.training.assemble import make_game
from tests import tiny_a
from tests.methods.short_runs import same_when_resumed
from tests.methods.test_wiring_matching import injected, mean
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
    fold,
    in_double,
    modes,
    nets,
    noised,
    normal,
    scatter,
    uniform,
)

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum("push towards the worse" in c.name for c in checks) == 6


REAL_PAIR, EQUAL = DistillationDPO.pair, {"better": 0.5, "worse": 0.5}
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the worse for the better": (DistillationDPO, "scored", lambda self, x, batch: -x[:, 0].detach()),
    "one weight for both": (DistillationDPO, "weights", property(lambda self: EQUAL, lambda *a: None)),
    "both sides are one": (
        DistillationDPO,
        "pair",
        lambda self, batch: (lambda pair, *rest: ({"better": pair["better"], "worse": pair["better"]}, *rest))(
            *REAL_PAIR(self, batch)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name], raising=False)
    assert any(not c.ok for c in verify())


def score(x: Tensor, batch: Any) -> Tensor:
    return x.detach().flatten(1).mean(1) * (1 + batch.cond["class_labels"])


class Straight:
    """The turns of a step, line by line."""

    def __init__(self, options: dict[str, Any], plain: Plain):
        self.plain, self.c = plain, Config(**options)
        self.method: Any = DistillationDPO(plain.teacher(), self.c)
        self.method.reward = score
        for seed, player in enumerate(self.method.players.values()):
            scatter(player, 20 + seed)
        teacher = getattr(self.method.teacher, "denoiser", self.method.teacher)
        scores = (self.method.scores[role] for role in ("better", "worse"))
        self.teacher, self.student, *fakes = nets(teacher, self.method.student, *scores)
        self.fakes = dict(zip(("better", "worse"), fakes, strict=True))
        self.batch = batch_of(KEY)
        self.labels = self.batch.cond["class_labels"]

    def x0(self, net: Any, x_t: Tensor, t: Tensor) -> Tensor:
        return self.plain.x0_eps(net, x_t, t, class_labels=self.labels)[0]

    def samples(self) -> dict[str, Tensor]:
        levels = self.plain.levels(self.c.student_steps, self.c.student_level)
        k = int(torch.randint(len(levels), (), generator=draw(*KEY[:2], "student/level"))) if len(levels) > 1 else 0
        both = []
        for name in ("a", "b"):
            x_t, t = self.plain.start(levels[0], normal(f"{name} z", KEY))
            for j in range(1, k + 1):
                with torch.no_grad():
                    x0 = self.x0(self.student, x_t, t)
                t = torch.full((SIZE,), self.plain.angle(levels[j]), dtype=torch.float64)
                x_t = noised(x0, t, normal(f"{name} z {j}", KEY))
            both.append(self.x0(self.student, x_t, t))
        self.rewards = [x.detach().flatten(1).mean(1) * (1 + self.labels) for x in both]
        first = fold(self.rewards[0] >= self.rewards[1])
        assert 0 < int(first.sum()) < SIZE, "some"
        return {"better": torch.where(first, both[0], both[1]), "worse": torch.where(first, both[1], both[0])}

    def student_turn(self) -> dict[str, Tensor]:
        pair, c = self.samples(), self.c
        self.kept = {role: x.detach() for role, x in pair.items()}
        u = uniform("student/t", KEY)
        u = c.time_shift * u / (1 - u + c.time_shift * u)
        t, eps = self.plain.at(c.time_low + (c.time_high - c.time_low) * u), normal("student/eps", KEY)
        a, b = self.rewards
        values = {"loss": torch.zeros(()), "reward": (a + b).mean() / 2, "reward gap": (a - b).abs().mean()}
        for role, weight in (("better", c.better_weight), ("worse", c.worse_weight)):
            x, x_t = pair[role], noised(pair[role], t, eps)
            with torch.no_grad():
                teacher = self.plain.guided(self.teacher, x_t, t, self.labels, float(c.guidance_scale))[0]
                fake = self.x0(self.fakes[role], x_t, t)
                size = mean((x - teacher).abs())
                grad = fold(1 / size if c.normalise else torch.tan(t) ** -2) * (fake - teacher)
            unit = self.plain.std if c.normalise else 1.0
            values["loss"] = values["loss"] + weight * unit * injected(x, grad)
            values[f"{role} gap"] = (mean((fake - teacher).abs()) / size).mean()
        return values

    def score_turn(self, role: str) -> dict[str, Tensor]:
        u = uniform(f"{role}/t", KEY)
        t = self.plain.at(self.c.time_shift * u / (1 - u + self.c.time_shift * u))
        x, eps = self.kept[role], normal(f"{role}/eps", KEY)
        x0, noise = self.plain.x0_eps(self.fakes[role], noised(x, t, eps), t, class_labels=self.labels)
        cos, sin = fold(torch.cos(t)), fold(torch.sin(t))
        loss = ((cos * noise - sin * x0) - (cos * eps - sin * x)).square().mean()
        return {"loss": loss, "denoising": loss}


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"guidance_scale": 2.5, "time_shift": 3.0}, FLOW),
        ({"student_level": 9.0, "normalise": False, "better_weight": 1.0, "worse_weight": -1.0}, VP),
        ({"student_steps": 3, "time_low": 0.2, "time_high": 0.7}, EDM_),
    ],
)
def test_the_turns_are_their_straight_lines(options: dict[str, Any], plain: Plain) -> None:
    with double():
        straight = Straight(options | {"update_ratio": 2}, plain)
        method = straight.method
        assert [turn.player for turn in method.turns(3)] == ["better", "worse"]
        turns = method.turns(4)
        assert [turn.player for turn in turns] == ["student", "better", "worse"] and method.needs == {Need.REWARD}
        for player in method.players.values():
            player.train()
        parts = {"student": straight.student, **straight.fakes}
        calls = modes({name: net.dropout for name, net in parts.items()}, lambda: turns[0].loss(straight.batch))
        assert {who for who, _ in calls} == set(parts) and not any(dropping for _, dropping in calls)
        agree(method, turns[0], straight.batch, straight.student_turn)
        scatter(method.student, 40)  # both scores learn the samples of the student's turn
        for turn, role in zip(turns[1:], ("better", "worse"), strict=True):
            agree(method, turn, straight.batch, lambda role=role: straight.score_turn(role))
        fresh = Straight(options | {"update_ratio": 2}, plain)
        fresh.kept = {role: x.detach() for role, x in fresh.samples().items()}
        agree(fresh.method, fresh.method.turns(3)[1], fresh.batch, lambda: fresh.score_turn("worse"))
        rates = Straight({"student_lr": 0.1, "fake_score_lr": 0.2}, plain).method
        assert [rates.optimizer(role).lr for role in rates.players] == [0.1, 0.2, 0.2]


RUN: dict[str, Any] = {"batch_size": 8, "sample_every": 0, "device": "cpu", "log_every": 1}


def test_a_student_begins_as_another_at_its_level_and_resumes_to_the_same_bits(
    tiny_teacher: Teachers, tmp_path: Path
) -> None:
    teacher = str(tiny_teacher("vp"))
    options = {"update_ratio": 1, "student_level": 600.0}
    first = distill("dmd2", teacher=teacher, options=options, steps=1, student_lr=0.01, **RUN, out=tmp_path / "first")
    (tmp_path / "ink.py").write_text("def ink(images, labels):\n    return images.mean((1, 2, 3))\n")
    run = RUN | {"method": "distillation_dpo", "teacher": teacher, "reward": f"{tmp_path / 'ink.py'}:ink"}
    same_when_resumed(tmp_path, **run, start=str(first.student), student_lr=1e-9)
    record = student_record(tmp_path / "run" / "student")
    assert (record.levels, record.method) == ((600.0,), "distillation_dpo")
    file = "unet/diffusion_pytorch_model.safetensors"
    begun, ended, other = (load_file(Path(p) / file) for p in (first.student, tmp_path / "run" / "student", teacher))
    near, far = (max(float((ended[k] - v[k]).abs().max()) for k in ended) for v in (begun, other))
    assert near < 1e-6 < far
    game = make_game({"method": "pcm", "teacher": teacher, "start": str(first.student)})
    assert game.method.student.schedule.t_max == game.teacher.denoiser.schedule.t_max  # its folder's own ends at 600
    shutil.rmtree(first.folder)  # which a run does not need again
    export(tmp_path / "run", out=tmp_path / "again")
    distill(resume=tmp_path / "run", steps=5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("start", "^start: .* has no model_index.json"),
        ("lora", "start: a LoRA student begins as the teacher"),
        ("noise", "start: .*edm' has another noise schedule than the teacher"),
    ],
)
def test_a_start_that_cannot_be_is_refused(option: str, message: str, tiny_teacher: Teachers, tmp_path: Path) -> None:
    other, teacher = str(tiny_teacher("edm")), str(tiny_teacher("vp"))
    more = {"lora": "student"} if option == "lora" else {}
    with pytest.raises(UserError, match=message):
        start = str(tmp_path) if option == "start" else other
        distill("dmd2", teacher=teacher, start=start, **more, **RUN, steps=1, out=tmp_path / "run")


def test_both_scores_may_be_lora(tmp_path: Path) -> None:
    tiny_a.unet2d_ddim().save_pretrained(tmp_path / "teacher")
    options = {"method": "distillation_dpo", "teacher": str(tmp_path / "teacher"), "lora_rank": 2}
    game = make_game(options | {"lora": "student,better,worse"})
    assert all(is_lora(game.method.players[role].network) for role in ("student", "better", "worse"))


def test_a_start_of_other_steps_is_said(
    tiny_teacher: Teachers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = str(tiny_teacher("flow"))
    run = RUN | {"teacher": teacher, "steps": 1, "data": "digits"}
    first = distill("perflow", **run, options={"windows": 2, "student_steps": 2}, out=tmp_path / "first")
    for method, said in (("reflow", False), ("dmd2", True)):
        capsys.readouterr()
        game = make_game({"method": method, "teacher": teacher, "start": str(first.student)})
        assert ("goes from level to level by 'ddim'" in capsys.readouterr().err) is said
        assert game.method.sampler().levels == student_record(first.student).levels


def test_the_authors_weights_lead_away_from_what_the_reward_likes(tiny_teacher: Teachers, tmp_path: Path) -> None:
    """One step, and the reward is brightness: theirs make samples darker."""
    run = RUN | {"batch_size": 16, "steps": 20, "lr_schedule": "constant", "ema": 0.0, "teacher": tiny_teacher("flow")}
    rates = {"student_lr": 2e-3, "fake_score_lr": 5e-3, "update_ratio": 1, "beta1": 0.0}
    moved = {}
    for name, weights in (("ours", (0.0, 1.0)), ("published", (1.0, -1.0))):
        options = rates | dict(zip(("better_weight", "worse_weight"), weights, strict=True))
        distill(
            "distillation_dpo", **run, options=options, out=tmp_path / name,
            reward=lambda images, labels: images.mean((1, 2, 3)),
        )  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        rewards = [line["student/reward"] for line in lines if "student/reward" in line]
        moved[name] = sum(rewards[-5:]) / 5 - rewards[0]
    assert moved["published"] < -0.05 < moved["ours"], moved
