"""What is said of a student that goes wrong: each of the faults by name, and nothing of one that goes well."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffdistill import distill
from diffdistill.core.schedule import TrigFlow
from diffdistill.families import load_teacher
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.training.looks import Look, faults


class Stripes(nn.Module):
    """The exact denoiser of pictures whose rows are constant, each a standard normal number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        c, s = (f(time).reshape(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
        mean = x.mean(-1, keepdim=True)
        return self.weight * (c * mean / (c**2 + s**2 / x.shape[-1])).expand_as(x)


def stripes(n: int) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(n, 1, 8, 1, generator=draw).expand(n, 1, 8, 8)


@pytest.fixture(scope="module")
def look() -> Look:
    teacher = Teacher.around(Stripes(), (1, 8, 8), TrigFlow(), "sample")
    return Look(teacher, Sampler(teacher.denoiser, [1.2]))


def test_nothing_is_said_of_a_student_that_draws_as_the_teacher(look: Look) -> None:
    m = look.measures(stripes(len(look.before)))
    assert m.distance < 0.3 and m.size == pytest.approx(1, abs=0.4)  # eight steps fall short of the data a little
    before = look.measures(look.before)
    assert not faults(m, before, first=True) and not faults(m, before, first=False)


@pytest.mark.parametrize(
    "fault, samples",
    [
        ("collapse", lambda look: stripes(1).expand_as(look.before)),
        ("blank", lambda look: torch.full_like(look.before, -1.0)),
        ("noise", lambda look: torch.randn_like(look.before)),
        ("saturation", lambda look: 2 * stripes(len(look.before))),
        ("divergence", lambda look: 10 * stripes(len(look.before))),
        ("divergence", lambda look: torch.full_like(look.before, torch.nan)),
        ("nothing moved", lambda look: look.before),
    ],
)
def test_a_fault_is_called_by_its_name_with_what_to_change(look: Look, fault: str, samples) -> None:
    said = faults(look.measures(samples(look)), look.measures(look.before), first=True)
    assert any(line.startswith(f"{fault}: ") for line in said), said
    assert all("take " in line and len(line) < 280 for line in said)


def test_only_options_of_the_method_are_advised(look: Look) -> None:
    m, before = look.measures(stripes(1).expand_as(look.before)), look.measures(look.before)
    for options in ([], ["student_level"], ["update_ratio"], ["student_level", "update_ratio"]):
        (said,) = (line for line in faults(m, before, first=True, options=options) if line.startswith("collapse"))
        assert ("--student-level" in said, "--update-ratio" in said) == tuple(
            name in options for name in ("student_level", "update_ratio")
        )


def test_a_guided_student_is_compared_with_the_guided_teacher() -> None:
    teacher = load_teacher("digits")
    sampler = Sampler(teacher.denoiser, [0.7])
    plain, strong = Look(teacher, sampler), Look(teacher, sampler, scale=4.0)
    assert torch.equal(plain.one, strong.one)
    assert strong.measures(strong.several).contrast == pytest.approx(1)
    assert plain.measures(strong.several).spread < 0.9, "guidance makes samples of a class alike"


def test_a_run_says_what_it_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rates that move nothing: said after a tenth of the run and at its end, on one line each, and kept."""
    run = distill("dmd2", teacher="digits", steps=10, batch_size=4, out=tmp_path / "run",
                  options={"student_lr": 1e-9, "fake_score_lr": 1e-9})  # fmt: skip
    said = capsys.readouterr()
    assert "the teacher's one pass at the student's level" in said.out and "look at step 1:" in said.out
    assert said.err.count("warning: nothing moved") == 2
    kept = [json.loads(line) for line in (run.folder / "looks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 10] and kept[0]["faults"][0].startswith("nothing moved")
    assert (run.folder / "samples" / "teacher.png").is_file()


def test_a_resumed_run_counts_from_the_beginning(tmp_path: Path) -> None:
    """What has moved is what has moved since training began, wherever it was stopped on the way."""
    options = {"teacher": "digits", "batch_size": 4, "sample_every": 0, "lr_schedule": "constant"}
    whole = distill("dmd2", **options, steps=4, out=tmp_path / "whole")
    part = distill("dmd2", **options, steps=2, out=tmp_path / "part")
    distill(resume=part.folder, steps=4)
    last = [json.loads((run.folder / "looks.jsonl").read_text().splitlines()[-1]) for run in (whole, part)]
    assert last[0] == last[1] and last[0]["step"] == 4 and last[0]["moved"] > 0


class OneImage(nn.Module):
    """What an image that is read leaves of a sample: always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1e-4))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        return image.expand_as(x) + self.weight * x


def test_samples_of_which_nothing_is_open_are_no_noise_where_they_differ_a_little() -> None:
    teacher = Teacher.around(OneImage(), (1, 8, 8), TrigFlow(), "sample")
    look = Look(teacher, Sampler(teacher.denoiser, [1.2]))
    before, noise = (
        look.measures(look.before),
        torch.randn(look.before.shape, generator=torch.Generator().manual_seed(0)),
    )
    little, much = (look.measures(look.several + size * noise) for size in (0.02, 3.0))
    assert not [line for line in faults(little, before, first=False) if line.startswith(("noise", "collapse"))]
    assert [line for line in faults(much, before, first=False) if line.startswith("noise")]
