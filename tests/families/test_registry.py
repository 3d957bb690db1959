"""A family from outside the package: its teachers load, are distilled, and their students are its pipelines again."""

import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from diffdistill import UserError, distill, load_student, load_teacher
from diffdistill.families import FAMILIES, Family, describe, diffusers_class, family_of, register_family
from diffdistill.players.sampler import Sampler
from diffdistill.rng import image_generators

# Samples (2, 8) of a network and a pipeline that are not in diffusers; it takes the time as a fraction.
TOY = textwrap.dedent("""
    import torch
    from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from torch import nn

    from diffdistill.core.denoiser import Denoiser
    from diffdistill.families import Family, schedule_of
    from diffdistill.players.teacher import Teacher


    class ToyNetwork(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, length: int = 8):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(length + 1, 32), nn.SiLU(), nn.Linear(32, length))

        def forward(self, x, time):
            return self.layers(torch.cat([x, time.to(x)[:, None, None].expand(-1, x.shape[1], 1)], 2))


    class ToyPipeline(DiffusionPipeline):
        def __init__(self, network: ToyNetwork, scheduler: DDIMScheduler):
            super().__init__()
            self.register_modules(network=network, scheduler=scheduler)


    def call(network, x, time, cond):
        return network(x, time / 1000)


    def teacher(network, source):
        denoiser = Denoiser(network, *schedule_of(source.scheduler), call=call)
        return Teacher(denoiser, (2, network.config.length), None, "toy", "", source.scheduler)


    FAMILY = Family("toy", "a toy", (ToyPipeline,), "network", ToyNetwork, "none", teacher, loads_lora=False)
""")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def toy(tmp_path: Path) -> tuple[Family, Path]:
    """The family, registered from its file, and the folder of a teacher."""
    (tmp_path / "toy.py").write_text(TOY)
    family = register_family(tmp_path / "toy.py")
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    parts = {"network": diffusers_class(family.network)(length=8), "scheduler": scheduler}
    diffusers_class(family.pipelines[0])(**parts).save_pretrained(tmp_path / "teacher")
    return family, tmp_path / "teacher"


def test_a_family_from_a_file_is_trained_and_exported(tmp_path: Path) -> None:
    family, folder = toy(tmp_path)
    assert FAMILIES["toy"] is family and load_teacher(folder).shape == describe(folder).shape == (2, 8)
    student = distill(
        teacher=str(folder), steps=2, batch_size=2, student_lr=1e-2, update_ratio=1, sample_every=0, device="cpu",
        out=str(tmp_path / "run"),
    ).student  # fmt: skip
    sampler, described = load_student(student)
    made = sampler(described.shape, {}, image_generators(0, range(2)))
    untrained = Sampler(load_teacher(folder).denoiser, sampler.levels)
    assert made.shape == (2, 2, 8) and described.family == "toy"
    assert float((made - untrained((2, 8), {}, image_generators(0, range(2)))).abs().max()) > 1e-4


def test_a_family_may_be_registered_again_but_not_under_a_name_of_ours(tmp_path: Path) -> None:
    family, _ = toy(tmp_path)
    assert register_family(family) is family and next(iter(FAMILIES)) == "toy"
    with pytest.raises(UserError, match=r"^family: 'sdxl' is the name of a family of diffdistill; choose another"):
        register_family(FAMILIES["sdxl"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("FAMILIE = 1", "does not define FAMILY"),
        ("FAMILY = 'mine'", "does not define FAMILY"),
        ("import no_such_module_at_all", r"cannot be imported \(ModuleNotFoundError: No module named"),
        (None, "is no Python file; give one that defines FAMILY"),
    ],
)
def test_a_file_that_is_no_family_says_so(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"^family: .*{says}") as error:
        register_family(str(path))
    assert "\n" not in str(error.value)


def test_a_class_in_two_families_is_read_by_the_one_from_outside(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    assert family_of(tmp_path)[0].name == "unet2d"
    register_family(replace(FAMILIES["unet2d"], name="mine", pipelines=("DDPMPipeline",)))
    assert family_of(tmp_path)[0].name == "mine"
