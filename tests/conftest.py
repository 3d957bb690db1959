"""What every test gets: two threads (unless told otherwise), no network, a fixed seed."""

import os
import random

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
