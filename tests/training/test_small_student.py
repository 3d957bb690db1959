"""A student of another size than its teacher's: trained, resumed, exported, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from diffdistill import UserError, distill, load_teacher
from diffdistill.commands.teacher import new_teacher
from diffdistill.config import TeacherConfig
from diffdistill.data.images import open_data
from diffdistill.families import TeacherRecord
from diffdistill.pipelines.export import save_pipeline
from diffdistill.pipelines.schedulers import teacher_scheduler
from diffdistill.training.assemble import make_game
from tests.methods.short_runs import same_when_resumed, with_pairs

Teachers = Callable[[str], Path]
RUN: dict[str, Any] = {"data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu"}


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., str]:
    """The folder of an untrained network, by default of the sort of `tiny_teacher` and narrower."""

    def made(kind: str = "vp", classes: int | None = 10, widths: str = "8,8") -> str:
        folder = tmp_path / f"small-{kind}-{classes}-{widths.replace(',', '-')}"
        config = TeacherConfig(parameterization=kind, widths=widths, layers=1, label_dropout=0.1)  # type: ignore[arg-type]
        network: Any = new_teacher(config, open_data("digits")).denoiser.network
        record = TeacherRecord(10) if classes else TeacherRecord(None)
        if not classes:
            network.class_embedding = None
            network.register_to_config(num_class_embeds=None)
        save_pipeline(folder, "unet2d", network, teacher_scheduler(kind), record, "")  # type: ignore[arg-type]
        return str(folder)

    return made


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "consistency", "grid": "native", "grid_points": 4},
        {"method": "dmd2", "update_ratio": 1, "gan_weight": 0.01},
        {"method": "boot", "solver_steps": 4},
    ],
)
def test_the_student_alone_is_small_and_is_saved_so(
    options: dict[str, Any], tiny_teacher: Teachers, small: Callable[..., str], tmp_path: Path
) -> None:
    folder = tiny_teacher("vp")
    whole, other = load_teacher(folder), load_teacher(small())
    run = distill(**RUN, **options, teacher=str(folder), student=small(), steps=2, out=str(tmp_path / "run"))
    network = DiffusionPipeline.from_pretrained(run.student).unet
    assert size(network) == size(other.denoiser.network) < size(whole.denoiser.network)
    before = other.denoiser.network.state_dict()
    assert any(not torch.equal(before[name], value) for name, value in network.state_dict().items())
    images = DiffusionPipeline.from_pretrained(run.student)(batch_size=2, class_labels=[1, 2], output_type="np").images
    assert images.shape == (2, 8, 8, 1)


def test_slim_flow_makes_one_step_of_a_small_student(
    tiny_teacher: Teachers, small: Callable[..., str], tmp_path: Path
) -> None:
    """In both stages, the second of which is guided by a network of the student's size."""
    student = small()
    stages = {"anneal_steps": 2, "reflow_steps": 2, "distill_steps": 1}
    given = {k: v for k, v in RUN.items() if k != "data"} | {"student": student}
    given |= with_pairs(tmp_path, tiny_teacher("vp"))
    game = make_game({**given, "method": "slim_flow", **stages, "out": ""})
    begun = load_teacher(student).denoiser.network
    assert size(game.method.state["stage"].previous) == size(begun)  # type: ignore[arg-type, union-attr]
    run = distill(**given, method="slim_flow", **stages, out=str(tmp_path / "run"))
    network = DiffusionPipeline.from_pretrained(run.student).unet
    assert size(network) == size(begun)
    moved = network.state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in begun.state_dict().items())


def test_it_begins_as_it_was_and_the_others_as_the_teacher(tiny_teacher: Teachers, small: Callable[..., str]) -> None:
    game = make_game({**RUN, "method": "dmd2", "teacher": str(tiny_teacher("vp")), "student": small(), "out": ""})
    own = load_teacher(small()).denoiser.network.state_dict()
    student, fake_score = (game.method.players[role].network.state_dict() for role in ("student", "fake_score"))
    assert all(torch.equal(own[name], value) for name, value in student.items())  # type: ignore[union-attr]
    assert all(torch.equal(game.teacher.denoiser.network.state_dict()[n], v) for n, v in fake_score.items())  # type: ignore[union-attr]


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, small: Callable[..., str], tmp_path: Path) -> None:
    options = {"method": "consistency", "grid": "native", "grid_points": 4, "student": small()}
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), **RUN, **options)


def test_another_student_is_refused_when_the_run_goes_on(
    tiny_teacher: Teachers, small: Callable[..., str], tmp_path: Path
) -> None:
    options = {"method": "boot", "solver_steps": 2, "teacher": str(tiny_teacher("vp")), "out": str(tmp_path / "run")}
    distill(**RUN, **options, student=small(), steps=1)
    weights = Path(small()) / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    small_again = new_teacher(
        TeacherConfig(widths="8,8", layers=1, seed=1, label_dropout=0.1), open_data("digits")
    ).denoiser.network
    small_again.save_pretrained(Path(small()) / "unet")  # type: ignore[operator]
    with pytest.raises(UserError, match="student-weights"):
        distill(resume=tmp_path / "run", steps=2)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("flow", {}, "has another output than the teacher, flow_prediction for v_prediction"),
        ("none", {}, "has another number of classes than the teacher, None for 10"),
        ("vp", {"lora": "student"}, "lora: a student of its own .* is trained whole"),
        (
            "vp",
            {"method": "adapter_guidance"},
            "student: adapter_guidance trains adapters on the teacher's own",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str, options: dict[str, Any], message: str, tiny_teacher: Teachers, small: Callable[..., str]
) -> None:
    student = small(classes=None) if kind == "none" else small(kind)
    values = {**RUN, "method": "boot", "teacher": str(tiny_teacher("vp")), "student": student, "out": "", **options}
    with pytest.raises(UserError, match=message):
        make_game(values)


def test_a_small_student_has_no_mean_with_the_fake_score(
    tiny_teacher: Teachers, small: Callable[..., str], tmp_path: Path
) -> None:
    teacher = {"teacher": str(tiny_teacher("vp")), "student": small(), "out": str(tmp_path / "run")}
    with pytest.raises(UserError, match="alignment: student and fake score are networks of different kinds"):
        make_game(teacher | {"method": "dmd2", "alignment": 0.1})


def test_a_folder_that_is_none_is_said_of_its_own_option(tiny_teacher: Teachers, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^student: .*nowhere' is not a folder"):
        make_game({"teacher": str(tiny_teacher("vp")), "student": str(tmp_path / "nowhere"), "method": "dmd2"})


def test_a_student_begins_as_one_thing(tiny_teacher: Teachers, small: Callable[..., str]) -> None:
    teacher = {"teacher": str(tiny_teacher("vp")), "student": small(), "start": str(tiny_teacher("vp"))}
    with pytest.raises(UserError, match="start: --student says what the student begins as too; leave one of the two"):
        make_game(teacher | {"method": "dmd2"})
