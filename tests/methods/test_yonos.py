"""YONOS: the exact checks hold, known mistakes are caught, it trains on two views of the data and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import Teacher, UserError, distill
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import LinearFlow
from diffdistill.data.encoded import encode
from diffdistill.data.examples import Example, TensorExamples, TwoViews
from diffdistill.data.images import open_data, reduced
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.yonos import verify
from diffdistill.methods.yonos import YONOS, Config
from diffdistill.rng import generator
from diffdistill.scaffold.method import Batch
from tests import tiny_d
from tests.methods.short_runs import same_when_resumed
from tests.scaffold.straight import CLASSES, VP, draw


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def test_a_turn_is_its_straight_line() -> None:
    """Times and noise of the batch, the guided teacher under its own conditions, the student under its own."""
    teacher, size = VP.teacher(), 6
    method = YONOS(teacher, Config(guidance_scale=2.0))
    x0, labels = torch.randn(size, 1, 3, 3, generator=draw("data", 0)), torch.arange(size) % CLASSES
    seen, told = {"class_labels": labels}, {"class_labels": labels.flip(0)}
    batch = Batch(size, (1, 3, 3), seen, x0, torch.device("cpu"), (3, 1, 0), teacher_cond=told)
    for p in method.student.parameters():
        p.data += 0.1
    (turn,) = method.turns(1)
    draws = {k: generator("cpu", 3, 1, 0, f"student/{k}") for k in ("t", "eps")}
    t = method.schedule.at_fraction(torch.rand(size, generator=draws["t"], dtype=torch.float64))
    eps = torch.randn(size, 1, 3, 3, generator=draws["eps"])
    cos, sin = (f(t).float().view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    x_t = cos * x0 + sin * eps
    target = guided(teacher.denoiser, 2.0)(x_t, t, told).v.detach()
    expected = (method.student(x_t, t, seen).v - target).square().mean()
    assert turn.player == "student" and torch.allclose(turn.loss(batch).loss, expected, rtol=1e-5)
    assert method.sampler().step.name == "ddim", "no fresh noise between steps"


class Beside(nn.Module):
    """A velocity of 8x8 images beside another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, image: Tensor) -> Tensor:
        return self.layers(torch.cat([x, image, time.to(x).view(-1, 1, 1, 1).expand_as(x)], 1))


def own_teacher() -> Teacher:
    denoiser = Denoiser(Beside(), LinearFlow(data_std=0.5, time_scale=1.0), OUTPUTS["flow_prediction"])
    return Teacher(denoiser, (1, 8, 8), example_cond={"image": torch.zeros(1, 1, 8, 8)})


def views() -> dict[str, TensorExamples]:
    images = open_data("digits").get(torch.arange(16)).images
    return {
        name: TensorExamples(images, {"image": reduced(images, k)}) for name, k in (("data", 4), ("teacher_data", 2))
    }


RUN: dict[str, Any] = {
    "steps": 2,
    "batch_size": 4,
    "sample_every": 0,
    "device": "cpu",
    "student_lr": 1e-2,
    "lr_schedule": "constant",
}


def test_a_network_of_ones_own_learns_from_two_views(tmp_path: Path) -> None:
    run = distill("yonos", teacher=own_teacher(), **views(), **RUN, out=tmp_path / "run")
    image = views()["data"].cond["image"][:2]
    drawn = run.sampler()((1, 8, 8), {"image": image}, [torch.Generator().manual_seed(k) for k in range(2)])
    assert drawn.shape == (2, 1, 8, 8) and bool(drawn.isfinite().all())
    whole = distill("yonos", teacher=own_teacher(), **views(), **RUN | {"steps": 3}, out=tmp_path / "whole")
    resumed = distill(resume=tmp_path / "run", teacher=own_teacher(), **views(), steps=3)
    for a, b in zip(whole.sampler().denoiser.parameters(), resumed.sampler().denoiser.parameters(), strict=True):
        assert torch.equal(a, b)
    other = views() | {"teacher_data": TensorExamples(views()["data"].x0, {"image": views()["data"].x0})}
    with pytest.raises(UserError, match="resume: changed since the run began: data"):
        distill(resume=tmp_path / "run", teacher=own_teacher(), **other, steps=4)


def test_what_is_missing_or_of_other_samples_is_one_line(tmp_path: Path) -> None:
    both = views()
    data, other = both["data"], both["teacher_data"]
    few = TensorExamples(other.x0[:5], {"image": other.cond["image"][:5]})
    bare = TensorExamples(data.x0, {"image": data.cond["image"][:, :, :4]})
    for wrong, message in (
        ({}, "teacher_data: yonos needs what its teacher sees of each sample; give --teacher-data"),
        ({"teacher_data": few}, "teacher_data: there are 5 for 16 samples; row i of both is one"),
        (
            {"teacher_data": TensorExamples(-other.x0, other.cond)},
            "teacher_data: its samples are not those of the data",
        ),
        ({"teacher_data": bare}, "teacher_data: its conditions are "),
        ({"teacher_data": data}, "teacher_data: its conditions are those of the data"),
        ({"teacher_data": "some/folder"}, "teacher_data: 'some/folder' is for a latent teacher; give examples"),
    ):
        with pytest.raises(UserError, match=message):
            distill("yonos", teacher=own_teacher(), data=data, **wrong, **RUN, out=tmp_path / "run")
    with pytest.raises(UserError, match="teacher_data: consistency reads none; leave it out"):
        distill("consistency", teacher=own_teacher(), **both, **RUN, out=tmp_path / "run")


def test_the_teachers_conditions_go_along_with_their_samples() -> None:
    both = TwoViews(**{k: v for k, v in zip(("student", "teacher"), views().values(), strict=True)})
    rows = torch.tensor([3, 1])
    got: Example = both.get(rows)
    assert torch.equal(got.cond["image"], both.student.get(rows).cond["image"])
    assert torch.equal(got.teacher_cond["image"], both.teacher.get(rows).cond["image"])
    batch = Batch(2, (1, 8, 8), got.cond, got.x0, torch.device("cpu"), (0, 0, 0), teacher_cond=got.teacher_cond)
    parts = [part.seen_by_teacher["image"] for part in batch.parts(2)]
    assert [len(part) for part in parts] == [1, 1] and torch.equal(torch.cat(parts), got.teacher_cond["image"])


def test_a_latent_teacher_that_reads_images_is_taught_a_greater_scale(tmp_path: Path) -> None:
    tiny_d.instruct_pix2pix().save_pretrained(tmp_path / "teacher")
    shared = {"teacher": str(tmp_path / "teacher"), "device": "cpu"}
    made = {
        k: str(encode(**shared, data=f"reduced:{k}:shapes:8", resolution=32, out=str(tmp_path / str(k))))
        for k in (2, 4)
    }
    options = {"method": "yonos", "prompts": made[4], "teacher_data": made[2], "batch_size": 2, "sample_every": 0}
    same_when_resumed(tmp_path, **shared, **options)
    with pytest.raises(UserError, match="teacher_data: its conditions are those of the data"):
        distill(**shared, **options | {"teacher_data": made[4]}, steps=1, out=str(tmp_path / "again"))
