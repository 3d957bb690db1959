"""A student judged while it is trained: as `diffdistill eval` would judge it, always from the same noise."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from diffdistill.commands.export import export_student
from diffdistill.commands.judging import judge_options
from diffdistill.config import JudgeConfig, SavingConfig, TrainConfig
from diffdistill.errors import UserError
from diffdistill.eval.judge import Judge, score
from diffdistill.eval.models import open_model
from diffdistill.eval.protocol import Protocol, load
from diffdistill.options import build
from diffdistill.training.assemble import Game
from diffdistill.training.trainer import Accelerator

MOST = 500
"""Images of a judging, where the user has not said how many."""

_LOWER = {"frechet", "kernel", "kid", "cmmd", "root_mean_square"}  # kinds of metrics of which less is better
_SAVED = SavingConfig(export="merged", parts="link")


class JudgedInTraining:
    """(step) -> what a judging gives. The student is exported, drawn and measured, and its folder removed again.

    All processes of a training call it together. No random number of the training is drawn, and the number of threads
    stays as it is.
    """

    def __init__(self, game: Game, out: Path, accelerator: Accelerator):
        config: TrainConfig = game.config
        self.game, self.out, self.accelerator, self.every = game, out, accelerator, config.judge_every
        self.student, self.measured = out / ".judged", out / ".measured"
        values = {"protocol": config.judge_protocol, "count": config.judge_count}
        self.values = values | {"device": config.device, "attention": config.attention, "threads": 0, "bootstrap": 0}
        self.judge: Judge | None = None
        self.column, self.lower = "", True

    def __call__(self, step: int) -> tuple[dict[str, float], float | None]:
        """The values by 'judge/<heading>', and that of the metric that counts."""
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return self._judged(step)

    def _judged(self, step: int) -> tuple[dict[str, float], float | None]:
        if self.accelerator.is_main_process:
            self._clean()
            export_student(self.game, self.student, step, saving=_SAVED)
        self.accelerator.wait_for_everyone()
        try:
            if self.judge is None:
                self.judge = self._opened()
            row = score(open_model(self.student, self.judge.sampling), self.judge, self.measured, quiet=True)
            self.accelerator.wait_for_everyone()
        finally:
            if self.accelerator.is_main_process:
                self._clean()
        values = {f"judge/{name}": value for name, value in row.values.items() if value is not None}
        return values, row.values.get(self.column)

    def _opened(self) -> Judge:
        """The judge of the whole training, with its real images."""
        if self.values["count"] is None and self.values["protocol"] is not None:
            self.values["count"] = min(MOST, load(str(self.values["protocol"])).count)
        config = build(JudgeConfig, self.values)
        options = judge_options(config, self.student, teacher=self.game.teacher.source)
        if config.count is None and options.protocol.count > MOST:
            options = judge_options(replace(config, count=MOST), self.student, teacher=self.game.teacher.source)
        self.column, self.lower = counted(options.protocol, self.game.config.judge_by)
        return Judge(options)

    def _clean(self) -> None:
        for folder in (self.student, self.measured):
            shutil.rmtree(folder, ignore_errors=True)


def check_judged(game: Game, divided: bool = False) -> None:
    """UserError for options of a judging that cannot be followed, before anything is trained.

    `divided`: no process has the whole student.
    """
    config = game.config
    if not config.judge_every:
        return
    if divided:
        raise UserError(
            "judge_every: a student that FSDP divides is not judged while it trains; leave it out, and export and "
            "eval its checkpoints"
        )
    if game.family is None:
        raise UserError("judge_every: a student that is no diffusers pipeline is not judged; leave it out")
    if config.judge_protocol is not None:
        counted(load(config.judge_protocol), config.judge_by)


def counted(protocol: Protocol, name: str | None) -> tuple[str, bool]:
    """The heading of the value by which one student is better than another, and whether less is better."""
    kinds = {column: metric.kind for metric in protocol.metrics for column in metric.columns}
    if name is not None and name not in kinds:
        raise UserError(f"judge_by: {name!r} is no value of {protocol.name}; they are {', '.join(kinds)}")
    distances = [column for column, kind in kinds.items() if kind in _LOWER - {"root_mean_square"}]
    name = name or next(iter(distances or kinds))
    return name, kinds[name] in _LOWER
