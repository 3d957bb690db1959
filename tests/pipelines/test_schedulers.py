"""The stock scheduler of a student takes the student's levels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from diffdistill.core.schedule import student_levels
from diffdistill.families import FAMILIES, load_teacher
from diffdistill.pipelines.schedulers import student_scheduler
from diffdistill.players.sampler import STEPS, Sampler
from tests.players.tiny import BUILDERS, SIZES


@pytest.mark.parametrize("renoise", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image", "z_image", "sana", "wan", "wan_unipc"])
def test_the_schedulers_row_is_the_students(name: str, steps: int, renoise: bool, tmp_path: Path) -> None:
    """Wan's own scheduler is UniPC with flow sigmas; a student's is not."""
    pipeline = BUILDERS[name.removesuffix("_unipc")]()
    if name == "wan_unipc":
        pipeline.scheduler = UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        )
    pipeline.save_pretrained(tmp_path)
    size = SIZES[name.removesuffix("_unipc")]
    teacher = load_teacher(tmp_path, resolution=size, frames=5 if "wan" in name else None)
    levels = student_levels(teacher.denoiser.schedule, steps)
    sampler = Sampler(teacher.denoiser, levels.tolist(), STEPS["renoise" if renoise else "ddim"])
    scheduler = student_scheduler(teacher, sampler)
    sigmas = {"sigmas": np.linspace(1, 1 / steps, steps)} if FAMILIES[teacher.family].flow_grid == "given" else {}
    scheduler.set_timesteps(steps, **sigmas)
    assert torch.allclose(scheduler.sigmas[:-1].double(), levels, atol=1e-6)
