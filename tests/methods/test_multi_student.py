"""MSD: its exact checks hold, a turn is its straight line, and stock diffusers draws by the class what we do."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill, load_student
from diffdistill.commands.teacher import new_teacher
from diffdistill.config import TeacherConfig
from diffdistill.core.experts import ClassExperts
from diffdistill.data.images import open_data
from diffdistill.exact.checks import run_checks
from diffdistill.families import TeacherRecord, load_pipeline, load_teacher
from diffdistill.families._by_class import ByClass
from diffdistill.methods.checks.multi_student import verify
from diffdistill.methods.multi_student import Config, MultiStudent
from diffdistill.pipelines.export import save_pipeline
from diffdistill.pipelines.schedulers import teacher_scheduler
from diffdistill.scaffold import matching
from diffdistill.training.assemble import make_game
from tests.methods.short_runs import same_when_resumed
from tests.methods.test_wiring_matching import GAN, Straight
from tests.scaffold.straight import CLASSES, EDM_, FLOW, VP, Plain, agree, in_double
from tests.stranger import stranger

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL = matching.dmd_loss
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "all are the first's": (ClassExperts, "rows", lambda self, t, c: [(self.names[0], torch.arange(len(t)))]),
    "the scores are swapped": (matching, "dmd_loss", lambda x, t, e, c, p, q, n: REAL(x, t, e, c, q, p, n)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())


class Parted(Straight):
    """Each sample by itself, in the network of its class."""

    def __init__(self, options: dict[str, Any], plain: Plain):
        super().__init__("multi_student", options, plain)
        self.student, self.fake = (self.of_class(player) for player in (self.student, self.fake))

    def of_class(self, networks: Any, hidden: bool = False) -> Any:
        def called(x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
            made = []
            for k, label in enumerate(class_labels.tolist()):
                network = getattr(networks, f"part_{0 if label == CLASSES else label * self.c.students // CLASSES}")
                one = network.hidden if hidden else network
                made.append(one(x[k : k + 1], time[k : k + 1], class_labels=class_labels[k : k + 1]))
            return torch.cat(made)

        called.hidden = lambda *args, **kwargs: self.of_class(networks, True)(*args, **kwargs)  # type: ignore[attr-defined]
        return called

    def _multi_student(self, x: Tensor, t: Tensor, x_t: Tensor) -> dict[str, Tensor]:
        return self._dmd2(x, t, x_t)


@pytest.mark.parametrize("students", [2, 3])
@pytest.mark.parametrize("plain", [VP, FLOW, EDM_])
def test_a_turn_is_its_straight_line(plain: Plain, students: int) -> None:
    with double():
        straight = Parted({**GAN, "students": students, "guidance_scale": 2.5}, plain)
        student, fake = straight.method.turns(0)
        agree(straight.method, student, straight.batch, straight.student_turn)
        agree(straight.method, fake, straight.batch, straight.fake_turn)


RUN: dict[str, Any] = {
    "method": "multi_student",
    "batch_size": 4,
    "sample_every": 0,
    "device": "cpu",
    "update_ratio": 1,
}

STOCK = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

folder, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
drawn = [torch.Generator().manual_seed(k) for k in range(6)]
call = {"generator": drawn, "output_type": "np", "class_labels": [9, 0, 4, 5, 2, 7], "num_inference_steps": 1}
call |= json.loads(out.split("|")[1])
images = torch.as_tensor(pipeline(**call).images).permute(0, 3, 1, 2)
save_file({"images": images.contiguous()}, out.split("|")[0])
pipeline.save_pretrained(out.split("|")[0] + ".again")
"""


def stock(folder: Path, place: Path, **call: Any) -> Tensor:
    """Six images of a process that has no diffdistill."""
    from safetensors.torch import load_file

    done = stranger(STOCK, folder, f"{place / 'images'}|{json.dumps(call)}", cwd=place)
    assert done.returncode == 0, done.stderr
    return load_file(place / "images")["images"]


def ours(folder: Path) -> Tensor:
    sampler, described = load_student(folder)
    generators = [torch.Generator().manual_seed(k) for k in range(6)]
    cond = {"class_labels": torch.tensor([9, 0, 4, 5, 2, 7])}
    return (sampler(described.shape, cond, generators) / 2 + 0.5).clamp(0, 1)


def test_stock_diffusers_draws_by_the_class_what_we_do(tiny_teacher: Teachers, tmp_path: Path) -> None:
    run = distill(
        **RUN,
        teacher=str(tiny_teacher("flow")),
        students=3,
        steps=3,
        student_lr=0.01,
        ema=0.0,
        out=str(tmp_path / "run"),
    )
    folder = run.student
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    images = ours(folder)
    assert float((stock(folder, tmp_path, batch_size=6) - images).abs().max()) < 1e-4
    # Saved again by stock diffusers it is the same, and of three networks that have gone their own ways.
    assert float((stock(tmp_path / "images.again", tmp_path, batch_size=6) - images).abs().max()) < 1e-4
    network: Any = load_student(folder)[0].denoiser.network
    assert isinstance(network, ClassExperts) and network.parts[:10] == (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)
    first = [next(part.parameters()) for part in network.children()]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_a_latent_student_keeps_its_pipeline(tmp_path: Path) -> None:
    from tests.tiny_a import dit

    made = dit()
    made.save_pretrained(tmp_path / "teacher")
    run = distill(
        **RUN, teacher=str(tmp_path / "teacher"), students=2, steps=2, student_lr=0.01, out=str(tmp_path / "run")
    )
    labels = made.transformer.config.num_embeds_ada_norm
    folder = run.student
    classes = [0, labels - 1, 0, labels - 1, 1, 1]
    images = stock(folder, tmp_path, class_labels=classes, guidance_scale=1.0)
    alone = stock(folder, tmp_path, class_labels=classes[:2] * 3, guidance_scale=1.0)
    assert isinstance(load_pipeline(folder).transformer, ByClass), "and our own loading runs none of its code"
    config = folder / "transformer" / "config.json"
    whole = json.loads(config.read_text())
    for wrong, said in (
        ({"parts": [0, 1]}, "says parts that are not"),
        ({"kind": "UNet2DModel"}, "holds a UNet2DModel"),
    ):
        config.write_text(json.dumps(whole | wrong))
        with pytest.raises(UserError, match=said):
            load_teacher(folder)
    assert torch.allclose(images[:2], alone[:2], atol=1e-5) and not torch.allclose(images[0], images[1], atol=1e-3)


def test_a_resumed_run_has_the_same_bits_and_its_students_go_on(tiny_teacher: Teachers, tmp_path: Path) -> None:
    teacher = {"teacher": str(tiny_teacher("vp")), "data": "digits", "gan_weight": 0.1}
    same_when_resumed(tmp_path, **RUN, **teacher, students=2, discriminator_depths=(0.3, 0.6))
    student = str(tmp_path / "run" / "student")
    networks = [load_student(student)[0].denoiser.network, make_game(RUN | teacher | {"students": 2, "start": student})
                .method.players["student"].network]  # fmt: skip
    weights = [torch.cat([p.flatten() for p in network.parameters()]) for network in networks]
    assert torch.equal(*weights), "the second stage begins as the first has ended"
    with pytest.raises(UserError, match="students: the student to begin as is 2 networks for other parts"):
        make_game(RUN | teacher | {"students": 5, "start": student})


def test_small_students_learn_the_teachers_output_first(tiny_teacher: Teachers, tmp_path: Path) -> None:
    """TSM is `guided` without a scale: its first stage is the error of the teacher's x0; DM begins K times as it."""
    config = TeacherConfig(widths="8,8", layers=1, label_dropout=0.1)
    network: Any = new_teacher(config, open_data("digits")).denoiser.network
    save_pipeline(tmp_path / "small", "unet2d", network, teacher_scheduler("vp"), TeacherRecord(10), "")
    shared = {"teacher": str(tiny_teacher("vp")), "student": str(tmp_path / "small"), "out": str(tmp_path / "run")}
    scores = {"guidance_min": 1.0, "guidance_max": 1.0, "start_steps": 4, "final_steps": 4}
    method: Any = make_game({**shared, **scores, "method": "guided", "data": "digits"}).method
    t, cond = torch.linspace(0.1, 1.4, 4).double(), {"class_labels": torch.arange(4)}
    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    student, teacher = method.student, method.teacher
    gap = (student.eval()(x_t, t, cond).x0 - teacher(x_t, t, cond).x0).square().flatten(1).mean(1)
    loss = (gap * (1 / torch.tan(t) ** 2).clamp(min=1)).mean()
    assert torch.allclose(method.one_pass(x_t, t, cond, torch.ones(4)).loss, loss.float(), rtol=1e-4)
    players: Any = make_game({**RUN, **shared, "students": 2}).method.players
    begun, scores_of = players["student"], players["fake_score"]
    own: Any = load_teacher(shared["teacher"]).denoiser.network
    for part in scores_of.network.children():
        assert [p.shape for p in part.parameters()] == [p.shape for p in own.parameters()], "as large as the teacher"
    ours = torch.cat([p.flatten() for p in network.parameters()])
    for part in begun.network.children():
        assert torch.equal(torch.cat([p.flatten() for p in part.parameters()]), ours)


def test_what_makes_no_sense_is_refused(tiny_teacher: Teachers, tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    with pytest.raises(UserError, match="students: 11 students part the classes, and the teacher has 10"):
        MultiStudent(teacher, Config(students=11))
    run = RUN | {"teacher": str(tiny_teacher("vp")), "steps": 1, "out": str(tmp_path / "run")}
    with pytest.raises(UserError, match="lora: each of several students is a network of its own, trained whole"):
        distill(**run, lora="student")
    with pytest.raises(UserError, match="layout: a student of a network of ours is saved as a whole diffusers folder"):
        distill(**run, layout="comfyui")
