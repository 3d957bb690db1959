"""What every test gets: two threads (unless told otherwise), no network, a fixed seed."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

# Set before anything imports torch or huggingface_hub, which read these once; child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    WANDB_MODE="offline",
)


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _seed() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """parameterization -> the folder of an untrained class-conditional teacher of 8x8 digits, with dropout."""
    from diffdistill.config import TeacherConfig
    from diffdistill.data import open_data
    from diffdistill.pipelines.export import save_pipeline, teacher_scheduler
    from diffdistill.teacher import new_teacher

    root = tmp_path_factory.mktemp("teachers")

    def make(parameterization: str) -> Path:
        folder = root / parameterization
        if not folder.exists():
            config = TeacherConfig(parameterization=parameterization, widths="8,16", layers=1, dropout=0.1)
            teacher = new_teacher(config, open_data("digits"))
            scheduler = teacher_scheduler(parameterization)
            save_pipeline(folder, "unet2d", teacher.denoiser.network, scheduler, {"null_class": 10}, "")
        return folder

    return make
