"""What every test gets: two threads (unless told otherwise), no network, a fixed seed."""

import gc
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="every cell of a matrix, not only a few of each row")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--whole"):
        left_out = [item for item in items if item.get_closest_marker("whole")]
        items[:] = [item for item in items if not item.get_closest_marker("whole")]
        config.hook.pytest_deselected(items=left_out)


def pytest_configure() -> None:
    # A seventh of the tests' seconds went into looking for garbage among what is imported.
    gc.disable()
    import torch

    import diffdistill.families  # noqa: F401

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    # One for all tests and the processes that they start, and nobody's own.
    os.environ["DIFFDISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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
    from diffdistill.commands.teacher import new_teacher
    from diffdistill.config import TeacherConfig
    from diffdistill.data.images import open_data
    from diffdistill.families import TeacherRecord
    from diffdistill.pipelines.export import save_pipeline
    from diffdistill.pipelines.schedulers import teacher_scheduler

    root = tmp_path_factory.mktemp("teachers")

    def make(parameterization: str) -> Path:
        folder = root / parameterization
        if not folder.exists():
            config = TeacherConfig(parameterization=parameterization, widths="8,16", layers=1, dropout=0.1)
            teacher = new_teacher(config, open_data("digits"))
            scheduler = teacher_scheduler(parameterization)
            save_pipeline(folder, "unet2d", teacher.denoiser.network, scheduler, TeacherRecord(10), "")
        return folder

    return make


@pytest.fixture
def reaches_the_gaussian(tmp_path: Path) -> Callable[..., None]:
    """(method class, its Config, **FitConfig): through the real trainer, with a fake score that learns, an affine
    student ends within 2% of the teacher's Gaussian."""
    import torch

    from diffdistill.config import FitConfig
    from diffdistill.core.denoiser import Denoiser
    from diffdistill.exact.analytic import AffineGenerator, LearnedGaussian, gaussian_teacher
    from diffdistill.scaffold.method import Batch
    from diffdistill.training.trainer import Trainer, accelerator_for

    def check(method: type, config: object, **fit: object) -> None:
        mean, std = torch.tensor([0.8, -0.5]), torch.tensor([0.5, 1.4])
        teacher = gaussian_teacher(mean.tolist(), std.double())
        generator = AffineGenerator(torch.zeros(2), torch.ones(2))
        schedule, row = teacher.denoiser.schedule, teacher.denoiser.output
        players = {
            "student": Denoiser(generator, schedule, row),
            "fake_score": Denoiser(LearnedGaussian(2), schedule, row),
        }
        settings = FitConfig(batch_size=256, max_grad_norm=0, sample_every=0, device="cpu", **fit)  # type: ignore
        accelerator = accelerator_for(settings, tmp_path)
        trainer = Trainer(
            method(teacher, config, **players),
            lambda step: Batch(256, (2,), {}, None, accelerator.device, (0, step, 0)),
            settings,
            tmp_path,
            accelerator,
        )
        trainer.fit()
        with trainer.evaluating():
            assert torch.allclose(generator.mean.detach().float(), mean, rtol=0.02, atol=0), generator.mean
            assert torch.allclose(generator.scale.detach().abs().float(), std, rtol=0.02, atol=0), generator.scale

    return check
