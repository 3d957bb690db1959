"""Trainings of a few steps, for the tests that compare several processes with one.

    python -m tests.training.processes OUT

trains all of `CASES` in float64 and in float32 and leaves the weights in OUT, from the main process; started twice with
what torchrun sets in the environment it is two processes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffdistill.catalogue import describe_method
from diffdistill.config import FitConfig
from diffdistill.data.batches import batches
from diffdistill.data.examples import TensorExamples
from diffdistill.players.lora import LoraSettings
from diffdistill.training.trainer import Trainer, accelerator_for
from tests.scaffold.straight import CLASSES, SHAPE, VP, draw, scatter

TOGETHER, STEPS = 8, 4  # samples of a step in all processes

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one player": ("consistency", {}),
    "two players": ("sid", {}),
    "GAN": ("dmd2", {"gan_weight": 0.1, "update_ratio": 2}),
    "stages": ("progressive", {"start_steps": 4, "final_steps": 1, "stage_steps": 2}),
    "LoRA": ("dmd2", {"gan_weight": 0.0}),
    "JVP": ("scm", {"tangent_warmup": 2, "derivative": "exact"}),
    "data-free": ("diff_instruct", {}),
}


def trained(case: str, processes: int, out: Path) -> dict[str, Tensor]:
    """The weights and averages after a few steps, and what was logged, in torch's default type."""
    name, options = CASES[case]
    module = describe_method(name).load()
    torch.manual_seed(0)  # of the layers that begin at random
    teacher = VP.teacher()
    if case == "LoRA":
        teacher = replace(teacher, lora={role: LoraSettings(2) for role in ("student", "fake_score")})
    # In float32 Adam turns the rounding of a small gradient into a share of the learning rate.
    method = module.METHOD(teacher, module.Config(student_lr=1e-3, **options))
    for seed, player in enumerate(method.players.values()):  # as copies of each other they have next to no gradient
        scatter(player, 20 + seed)
    fit = FitConfig(
        batch_size=TOGETHER // processes, steps=STEPS, ema=0.5, device="cpu", sample_every=0, log_every=STEPS
    )
    accelerator = accelerator_for(fit, out)
    made = draw("images")
    images = torch.randn(21, *SHAPE, generator=made, dtype=torch.float64).to(torch.get_default_dtype())
    examples = None if case == "data-free" else TensorExamples(images, {"class_labels": torch.arange(21) % CLASSES})
    trainer = Trainer(method, batches(fit, teacher, examples, accelerator, 0.3), fit, out, accelerator)
    trainer.fit()
    assert trainer.average is not None
    values = {f"average {key}": value for key, value in trainer.average.state().items()}
    for role, player in {**method.players, **method.state}.items():
        values |= {f"{role} {key}": value for key, value in player.state_dict().items()}
    return {key: value.detach().clone().contiguous() for key, value in values.items()}


def main(processes: int, out: Path) -> None:
    """All cases in both types; the main process leaves them in `out`."""
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        for case in CASES:
            folder = out / f"{case} {dtype}"
            values = trained(case, processes, folder)
            if (folder / "metrics.jsonl").is_file():
                save_file(values, folder / "weights.safetensors")


if __name__ == "__main__":
    import os

    torch.set_num_threads(1)
    main(int(os.environ["WORLD_SIZE"]), Path(sys.argv[1]) / os.environ["RANK"])
