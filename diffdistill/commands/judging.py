"""What `eval` and `compare` share: their options as those of the judge."""

from __future__ import annotations

from diffdistill.config import JudgeConfig
from diffdistill.errors import UserError
from diffdistill.eval.judge import JudgeOptions
from diffdistill.eval.models import SamplingOptions
from diffdistill.eval.protocol import load

DEFAULT_PROTOCOL = "digits"


def judge_options(config: JudgeConfig, protocol: str | None = None, reference: str | None = None) -> JudgeOptions:
    """Options of the judge; `protocol` and `reference` are what holds where the user names none."""
    weights = {}
    for text in config.weights:
        key, _, path = text.partition("=")
        if not path:
            raise UserError(f"weights: {text!r} is not KEY=PATH, as in inception=pt_inception-2015-12-05-6726825d.pth")
        weights[key] = path
    name = config.protocol or protocol or DEFAULT_PROTOCOL
    return JudgeOptions(
        protocol=load(name, count=config.count, seed=config.seed, batch=config.batch_size),
        sampling=SamplingOptions(
            steps=config.steps,
            guidance_scale=config.guidance_scale,
            dtype=config.dtype,
            attention=config.attention,
            trust_remote_code=config.trust_remote_code,
        ),
        reference=config.reference or reference,
        prompts=config.prompts,
        weights=weights,
        bootstrap=config.bootstrap,
        device=config.device,
        threads=config.threads,
    )
