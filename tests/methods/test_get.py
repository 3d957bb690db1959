"""GET: the exact checks hold, known mistakes are caught, and its student gives the same images without diffdistill."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from diffdistill import UserError, distill, evaluate, load_student, load_teacher, make_pairs
from diffdistill.commands.cli import main
from diffdistill.exact.checks import run_checks
from diffdistill.families import load_pipeline
from diffdistill.families._equilibrium import SOURCE, Equilibrium
from diffdistill.methods import get
from diffdistill.methods.checks.get import verify
from diffdistill.methods.get import GET, Config
from diffdistill.players import equilibrium, generators
from diffdistill.players.equilibrium import EquilibriumTransformer
from diffdistill.players.sampler import Sampler
from diffdistill.scaffold.method import Outcome
from diffdistill.training.assemble import make_game
from tests.methods.short_runs import same_when_resumed, trains, with_pairs
from tests.scaffold.straight import EDM_, EPS, FLOW, KINDS, VP, Plain, agree_alone, batch_of, fold, in_double, scatter
from tests.stranger import stranger

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL: dict[str, Any] = {
    "images": GET.images,
    "start": Sampler.start,
    "turn": GET.student_turn,
    "weights": generators.output_weights,
    "image": EquilibriumTransformer.image,
    "injected": EquilibriumTransformer.injected,
    "step": EquilibriumTransformer.step,
    "positions": equilibrium.positions,
}
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "images of the first iteration alone": (GET, "images", lambda self, *at: REAL["images"](self, *at)[:1]),
    "images of other noise": (GET, "images", lambda self, z, cond: REAL["images"](self, z.roll(1, 0), cond)),
    "the noise is not scaled": (Sampler, "start", lambda self, z: (80 * z, REAL["start"](self, z)[1])),
    "a sum over pairs": (GET, "student_turn", lambda self, step, b: Outcome(b.size * REAL["turn"](self, step, b).loss)),
    "the output is taken for the image": (generators, "output_weights", lambda *of: (0.0, 1.0)),
    "the output's sign": (generators, "output_weights", lambda *of: tuple(-w for w in REAL["weights"](*of))),
    "the image is turned": (EquilibriumTransformer, "image", lambda self, z: REAL["image"](self, z.flip(1))),
    "no class in f": (EquilibriumTransformer, "injected", lambda self, x, c: REAL["injected"](self, x, c * 0)),
    "f has one block": (
        EquilibriumTransformer,
        "step",
        lambda self, z, u: self.equilibrium[0](z, u[0]),
    ),
    "nothing is injected": (
        EquilibriumTransformer,
        "step",
        lambda self, z, u: REAL["step"](self, z, [0 * v for v in u]),
    ),
    "f is damped": (EquilibriumTransformer, "step", lambda self, z, u: (z + REAL["step"](self, z, u)) / 2),
    "the same size for all": (get, "equilibrium_student", lambda teacher, size: None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "the same size for all":
        monkeypatch.setattr("diffdistill.methods.checks.get.fitting", lambda *of: {"width": 64, "heads": 1, "patch": 1})
    else:
        monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())


SMALL: dict[str, Any] = {"width": 8, "heads": 2, "depth": 1, "equilibrium_depth": 2, "iterations": 3}


@pytest.mark.parametrize("options", [{}, {"distance": "l2", "correction": 0.5}, {"correction": 0.0}])
@pytest.mark.parametrize("plain", KINDS.values())
def test_a_turn_is_its_straight_line(plain: Plain, options: dict[str, Any]) -> None:
    with double():
        method = GET(plain.teacher(), Config(**SMALL, **options))
        scatter(method.student, 20)
        batch, network = batch_of(images=False, pairs=True), method.student.network
        c, pair = method.config, batch.paired

        def expected() -> dict[str, Tensor]:
            x_t, t = plain.start(plain.levels(1)[0], pair.z)
            u = network.injected(fold(plain.native(t)[3]) * x_t, pair.cond["class_labels"])
            z, errors = torch.zeros(len(pair.z), 9, 8), []
            for _ in range(3):
                for block, part in zip(network.equilibrium, u, strict=True):
                    z = block(z, part)
                gap = plain.std * (network.image(z) - pair.x0)
                errors.append((gap.square() if c.distance == "l2" else gap.abs()).mean())
            loss = c.correction**2 * errors[0] + c.correction * errors[1] + errors[2]
            return {"loss": loss, "regression": errors[2]}

        agree_alone(method, 3, batch, expected)


@pytest.mark.parametrize("plain", [VP, EPS, EDM_, FLOW])
def test_what_its_sampler_draws_is_the_last_image(plain: Plain) -> None:
    with double():
        method = GET(plain.teacher(), Config(**SMALL))
        scatter(method.student, 20)
        pair = batch_of(images=False, pairs=True).paired
        drawn = method.sampler().one_step(pair.z, pair.cond)
        network, own = method.student.network, plain.teacher().denoiser.output
        assert method.student.output.name == ("sample" if plain in (VP, EPS) else own.name), "x0 itself where it can be"
        x_t, t = plain.start(plain.levels(1)[0], pair.z)
        read = fold(plain.native(t)[3]) * x_t
        image = network.image(network.states(network.injected(read, pair.cond["class_labels"]))[-1])
        assert torch.allclose(drawn, image, atol=1e-10) and torch.equal(drawn, method.images(pair.z, pair.cond)[-1])


# -- a student ---------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {"method": "get", "batch_size": 4, "sample_every": 0, "device": "cpu", **SMALL}
LOUD = {"student_lr": 0.01, "ema": 0.0, "optimizer": "muon"}

STOCK = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

folder, out, call = sys.argv[1:]
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
drawn = [torch.Generator().manual_seed(k) for k in range(6)]
images = torch.as_tensor(pipeline(**json.loads(call), generator=drawn, output_type="np", num_inference_steps=1).images)
save_file({"images": images.contiguous()}, out)
pipeline.save_pretrained(out + ".again")
assert "diffdistill" not in sys.modules
"""
CLASSES = [9, 0, 4, 5, 2, 7]


def stock(folder: Path, out: Path, **call: Any) -> Tensor:
    """Six images of a process that has no diffdistill."""
    done = stranger(STOCK, folder, out, json.dumps(call), cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return load_file(out)["images"]


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["vp", "edm", "flow"])
def test_stock_diffusers_draws_the_same_images_without_diffdistill(
    kind: str, tiny_teacher: Teachers, tmp_path: Path, one_thread: None
) -> None:
    run = distill(**RUN, **LOUD, **with_pairs(tmp_path, tiny_teacher(kind)), steps=40, out=str(tmp_path / "run"))
    folder, call = run.student, {"batch_size": 6, "class_labels": CLASSES}
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    source = (folder / "unet" / "equilibrium.py").read_text()
    assert source == SOURCE and "diffdistill." not in source and "import diffdistill" not in source
    theirs = stock(folder, tmp_path / "images", **call)
    here = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    drawn = [torch.Generator().manual_seed(k) for k in range(6)]
    same = here(**call, generator=drawn, output_type="np", num_inference_steps=1).images
    assert torch.equal(theirs, torch.as_tensor(same)), "to the bit"
    assert torch.equal(theirs, stock(tmp_path / "images.again", tmp_path / "again", **call)), (
        "and saved again by diffusers"
    )
    sampler, described = load_student(folder)
    generators_ = [torch.Generator().manual_seed(k) for k in range(6)]
    ours = sampler(described.shape, {"class_labels": torch.tensor(CLASSES)}, generators_)
    assert float(ours.std()) > 0.002, "it has learned something"
    assert float((theirs.permute(0, 3, 1, 2) - (ours / 2 + 0.5).clamp(0, 1)).abs().max()) < 1e-5
    assert isinstance(load_pipeline(folder).unet, Equilibrium), "and our own loading runs none of the folder's code"


def damaged(place: Path, labels: int | None, said: str) -> None:
    """With so many labels in the config the student is refused as it is loaded."""
    config = place / "config.json"
    before = config.read_text()
    whole = json.loads(before)
    whole["arguments"]["labels"] = labels
    config.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=said):
        load_teacher(place.parent, weights=False)
    config.write_text(before)


def test_the_commands_make_judge_and_sample_one(tiny_teacher: Teachers, tmp_path: Path) -> None:
    folder, pairs, run = tiny_teacher("vp"), tmp_path / "pairs", tmp_path / "run"
    make_pairs(teacher=str(folder), count=8, sampling_steps=2, device="cpu", out=str(pairs))
    size = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    usual = ["--batch-size", "4", "--sample-every", "0", "--device", "cpu"]
    main(["train", "--method", "get", "--teacher", str(folder), "--pairs", str(pairs), "--steps", "2", *usual, *size,
          "--out", str(run)])  # fmt: skip
    main(["sample", str(run / "student"), "--count", "4", "--device", "cpu", "--out", str(tmp_path / "samples")])
    report = evaluate(run / "student", count=100, teacher_steps=[1], bootstrap=0)
    assert report.rows[-1]["model"] == "student"


def test_a_teacher_without_classes_has_a_student_without(tmp_path: Path) -> None:
    from diffdistill.commands.teacher import new_teacher
    from diffdistill.config import TeacherConfig
    from diffdistill.data.images import open_data
    from diffdistill.families import TeacherRecord
    from diffdistill.pipelines.export import save_pipeline
    from diffdistill.pipelines.schedulers import teacher_scheduler

    network: Any = new_teacher(TeacherConfig(widths="8,8", layers=1), open_data("digits")).denoiser.network
    network.class_embedding = None
    network.register_to_config(num_class_embeds=None)
    save_pipeline(tmp_path / "teacher", "unet2d", network, teacher_scheduler("vp"), TeacherRecord(None), "")
    run = distill(**RUN, **LOUD, **with_pairs(tmp_path, tmp_path / "teacher"), steps=40, out=str(tmp_path / "run"))
    sampler, described = load_student(run.student)
    drawn = sampler(described.shape, {}, [torch.Generator().manual_seed(k) for k in range(6)])
    images = stock(run.student, tmp_path / "images", batch_size=6).permute(0, 3, 1, 2)
    assert float((images - (drawn / 2 + 0.5).clamp(0, 1)).abs().max()) < 1e-5
    damaged(run.student / "unet", 11, "11 labels, and those of its pipeline are .* and 0 classes")


def test_a_latent_student_keeps_its_pipeline(tmp_path: Path) -> None:
    from tests.tiny_a import dit

    made = dit()
    made.save_pretrained(tmp_path / "teacher")
    run = distill(**RUN, **LOUD, **with_pairs(tmp_path, tmp_path / "teacher"), steps=3, out=str(tmp_path / "run"))
    last = made.transformer.config.num_embeds_ada_norm - 1
    call = {"class_labels": [0, last, 0, last, 1, 1], "guidance_scale": 1.0}
    images = stock(run.student, tmp_path / "images", **call)
    alone = stock(run.student, tmp_path / "alone", **call | {"class_labels": [0, last] * 3})
    assert torch.allclose(images[:4], alone[:4], atol=1e-5) and not torch.allclose(images[4:], alone[4:], atol=1e-5)
    assert isinstance(load_pipeline(run.student).transformer, Equilibrium)
    damaged(run.student / "transformer", None, f"0 labels, and those of its pipeline are .* and {last + 1} classes")
    damaged(run.student / "transformer", 2, f"2 labels, and those of its pipeline are .* and {last + 1} classes")


def test_a_resumed_run_has_the_same_bits_and_a_student_goes_on(tiny_teacher: Teachers, tmp_path: Path) -> None:
    options = {**RUN, **with_pairs(tmp_path, tiny_teacher("edm"))}
    same_when_resumed(tmp_path, **options)
    student = tmp_path / "run" / "student"
    begun = make_game(options | {"start": str(student), "steps": 1}).method.players["student"]
    held = load_student(student)[0].denoiser
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), held.parameters(), strict=True))
    assert begun.training and all(p.requires_grad for p in begun.parameters())
    trains(tmp_path / "more", **options, start=str(student))


def test_the_size_follows_from_the_samples_or_the_options(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    network: Any = GET(teacher, Config()).student.network
    assert network.described | {"of_input": 0, "of_image": 0} == {
        "shape": [1, 8, 8], "labels": 11, "width": 64, "depth": 6, "equilibrium_depth": 3, "heads": 1, "patch": 1,
        "iterations": 6, "ratio": [6, 4], "of_input": 0, "of_image": 0,
    }  # fmt: skip
    network = GET(teacher, Config(width=24, patch=4, equilibrium_ratio=2, heads=3, depth=1)).student.network
    assert network(torch.randn(2, 1, 8, 8), class_labels=torch.tensor([1, 2])).shape == (2, 1, 8, 8)
    assert len(network.blocks) == 1 and network.blocks[0].heads == 3 and network.read.in_features == 16
    assert network.equilibrium[0].mlp[0].out_features == 48 and network.blocks[0].mlp[0].out_features == 96
    with pytest.raises(ValueError, match="class_labels: none are given"):
        network(torch.randn(2, 1, 8, 8))


def test_what_it_cannot_do_is_one_line(tiny_teacher: Teachers, tmp_path: Path) -> None:
    folder = tiny_teacher("vp")
    options = {**RUN, **with_pairs(tmp_path, folder), "steps": 1, "out": str(tmp_path / "run")}
    for more, said in (
        ({"patch": 3}, r"patch: 3 does not divide the sides of samples \(1, 8, 8\); give one of \[1, 2, 4, 8\]"),
        ({"heads": 3}, "width: 8 is no multiple of 4 and of heads, 3"),
        ({"width": 6, "heads": 1}, "width: 6 is no multiple of 4"),
        ({"student": str(folder)}, "student: the student is a network of its own kind"),
        ({"start": str(folder)}, "start: the student to begin as is no equilibrium transformer; give a student of get"),
        ({"lora": "student"}, "lora: get has no player 'student' that can be LoRA"),
        ({"layout": "comfyui"}, "layout: a student of a network of ours is saved as a whole diffusers folder"),
        ({"iterations": 0}, "iterations: 0"),
    ):
        with pytest.raises(UserError, match=said):
            distill(**options | more)
    with pytest.raises(UserError, match="pairs: get with these options needs noise-image pairs; make them with"):
        distill(**{k: v for k, v in options.items() if k != "pairs"})
    with pytest.raises(
        UserError, match="method: a student of get is saved as a diffusers pipeline, and this teacher has"
    ):
        own = KINDS["vp"].teacher()
        distill(**{k: v for k, v in options.items() if k not in ("teacher", "pairs")}, teacher=own, pairs=tmp_path)
