"""What `eval` and `compare` share: their options as those of the judge."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from diffdistill.config import JudgeConfig
from diffdistill.data.processes import Processes
from diffdistill.environment import use_machine
from diffdistill.errors import UserError
from diffdistill.eval.choice import Wishes, choose, facts_of
from diffdistill.eval.judge import JudgeOptions
from diffdistill.eval.models import ModelLike, SamplingOptions
from diffdistill.eval.own_samples import own_samples
from diffdistill.eval.protocol import load
from diffdistill.players.teacher import Teacher


def judge_options(
    config: JudgeConfig,
    model: ModelLike,
    data: str | None = None,
    teacher: str | os.PathLike[str] | Teacher | None = None,
) -> JudgeOptions:
    """Options of the judge; what the user leaves open is chosen to fit the model, which the notes of the table say.

    `data` are real images of an evaluation without a protocol, `teacher` a student's in place of its own.
    """
    weights = {}
    for text in config.weights:
        key, _, path = text.partition("=")
        if not path:
            raise UserError(f"weights: {text!r} is not KEY=PATH, as in inception=pt_inception-2015-12-05-6726825d.pth")
        weights[key] = path
    sampling = SamplingOptions(
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        guidance_scale_2=config.guidance_scale_2,
        negative_prompt=config.negative_prompt,
        dtype=config.dtype,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )
    shared: dict[str, Any] = {
        "sampling": sampling,
        "prompts": config.prompts,
        "weights": weights,
        "bootstrap": config.bootstrap,
        "device": config.device,
        "threads": config.threads,
    }
    wishes = Wishes(
        config.protocol, config.reference, data, config.prompts, config.count, config.seed, config.batch_size
    )
    if config.protocol is not None and not (protocol := load(config.protocol, **wishes.overrides)).is_open:
        return JudgeOptions(protocol, reference=config.reference, **shared)
    use_machine(config.device)  # before anything is read
    choice = choose(facts_of(model), wishes)
    if choice.own:
        processes = Processes(config.device, config.threads)
        at = SamplingOptions(device=processes.device, attention=config.attention)
        choice = replace(choice, data=own_samples(model, choice, at, processes, teacher))
    return choice.options(**(shared | ({"prompts": None} if choice.captions is not None else {})))
