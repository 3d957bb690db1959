"""From outside the package: a network that diffusers does not know, data, a method and a family of one's own."""

import json
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import diffdistill.methods.diff_instruct
from diffdistill import (
    EDM,
    DiscreteVP,
    Example,
    LinearFlow,
    Run,
    Teacher,
    TrigFlow,
    UserError,
    distill,
    export,
    load_student,
    load_teacher,
)
from diffdistill.commands.cli import main
from diffdistill.core.schedule import Schedule
from diffdistill.families import FAMILIES
from diffdistill.rng import image_generators

Teachers = Callable[[str], Path]
SHORT = {"steps": 2, "batch_size": 4, "log_every": 1, "device": "cpu"}


class PointNetwork(nn.Module):
    """A velocity of points in the plane, or of 1x4x4 pictures, with a condition if it is given."""

    def __init__(self, size: int = 2, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size + 2, width), nn.SiLU(), nn.Linear(width, size))

    def forward(self, x: Tensor, time: Tensor, side: Tensor | None = None) -> Tensor:
        side = torch.zeros(len(x)) if side is None else side
        inputs = torch.cat([x.flatten(1), time[:, None].to(x) / 1000, side[:, None].to(x)], 1)
        return self.layers(inputs).view_as(x)


class Labelled(nn.Module):
    """A network of 4 classes and a fifth label that means none."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.table = PointNetwork(16), nn.Embedding(5, 16)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        return self.body(x, time) + self.table(class_labels).view_as(x)


class Sides:
    """One's own examples: points, and on which side they lie."""

    def __len__(self) -> int:
        return 12

    def get(self, indices: Tensor) -> Example:
        x0 = torch.stack([indices.float(), -indices.float()], 1) / 6 - 1
        return Example(x0, {"side": (indices > 5).float()})


def draw(run: Run, cond: dict[str, Tensor] | None = None, shape: tuple[int, ...] = (2,)) -> Tensor:
    return run.sampler()(shape, cond or {}, image_generators(0, range(4)))


@pytest.mark.parametrize(
    ("schedule", "predicts"),
    [
        (LinearFlow(), "flow_prediction"),
        (TrigFlow(), "v_prediction"),
        (EDM(), "edm"),
        (DiscreteVP(torch.linspace(0.999, 0.01, 50)), "epsilon"),
    ],
)
def test_the_student_is_weights_and_a_record_and_loads_to_the_same_samples(
    schedule: Schedule, predicts: Any, tmp_path: Path
) -> None:
    teacher = Teacher.around(PointNetwork(), (2,), schedule, predicts)
    run = distill("consistency", teacher=teacher, data=torch.randn(16, 2), out=tmp_path / "run", **SHORT)
    assert {p.name for p in run.student.iterdir()} == {"network.safetensors", "diffdistill.json", "README.md"}
    samples = draw(run)
    for network in (PointNetwork(), teacher):
        sampler, student = load_student(run.student, network=network)
        assert torch.equal(sampler(student.shape, {}, image_generators(0, range(4))), samples)
    assert not torch.equal(samples, teacher.denoiser.network.layers[0].weight[:4, :2]) and samples.isfinite().all()
    again = export(run.folder, out=tmp_path / "again", teacher=teacher)
    assert (again / "network.safetensors").read_bytes() == (run.student / "network.safetensors").read_bytes()
    assert "load_student" in (run.student / "README.md").read_text()


def test_a_resumed_run_is_given_its_objects_again(tmp_path: Path) -> None:
    def parts() -> dict[str, Any]:
        torch.manual_seed(1)
        return {"teacher": Teacher.around(PointNetwork(), (2,), TrigFlow(), "v_prediction"), "data": Sides()}

    def weights(run: Run) -> bytes:
        return (run.student / "network.safetensors").read_bytes()

    shared = {"options": {"update_ratio": 1, "student_lr": 1e-2}, "lr_schedule": "constant", **SHORT}
    whole = distill("dmd2", **parts(), out=tmp_path / "whole", **(shared | {"steps": 4}))
    part = distill("dmd2", **parts(), out=tmp_path / "part", **shared)
    assert yaml.safe_load((part.folder / "config.yaml").read_text())["teacher"] == "python:Teacher"
    with pytest.raises(UserError, match="teacher: it was an object of type Teacher; give it again in Python"):
        distill(resume=part.folder, steps=4)
    with pytest.raises(UserError, match="data: the run began with 'python:Sides', and Tensor was given"):
        distill(resume=part.folder, steps=4, **(parts() | {"data": torch.zeros(12, 2)}))
    assert weights(part) != weights(whole)
    assert weights(distill(resume=part.folder, steps=4, **parts())) == weights(whole)


def test_lora_on_ones_own_network_is_saved_merged(tmp_path: Path) -> None:
    teacher = Teacher.around(PointNetwork(width=32), (2,), LinearFlow(), "flow_prediction")
    before = {name: value.clone() for name, value in teacher.denoiser.network.state_dict().items()}
    options = {"student_lr": 1e-2}
    run = distill("dmd2", teacher=teacher, lora="student", lora_rank=2, options=options, out=tmp_path / "run", **SHORT)
    samples = draw(run)
    sampler, _ = load_student(run.student, network=PointNetwork(width=32))
    assert torch.equal(sampler((2,), {}, image_generators(0, range(4))), samples)
    kept = {name.replace(".base_layer", ""): value for name, value in teacher.denoiser.network.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in before.items())


def test_conditions_of_ones_own(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watched(PointNetwork):
        def forward(self, x: Tensor, time: Tensor, side: Tensor | None = None) -> Tensor:
            assert side is not None
            seen.append(side)
            return super().forward(x, time, side)

    cond = {"side": torch.zeros(1)}
    teacher = Teacher.around(Watched(), (2,), LinearFlow(), "flow_prediction", cond=cond)
    seen.clear()
    distill("dmd2", teacher=teacher, data=Sides(), out=tmp_path / "run", **SHORT)
    assert {float(v) for v in torch.cat(seen)} == {0.0, 1.0}, "the examples' conditions are those of the training"


def test_classes_and_guidance_of_ones_own_network(tmp_path: Path) -> None:
    teacher = Teacher.around(Labelled(), (1, 4, 4), LinearFlow(), "flow_prediction", num_classes=4, null=4)
    assert teacher.denoiser.null is not None
    assert torch.equal(teacher.denoiser.null({"class_labels": torch.arange(3)})["class_labels"], torch.tensor([4] * 3))
    run = distill(
        "dmd2", teacher=teacher, options={"guidance_scale": 2.0}, sample_every=1, out=tmp_path / "run", **SHORT
    )
    assert draw(run, {"class_labels": torch.arange(4)}, (1, 4, 4)).shape == (4, 1, 4, 4)
    assert (run.folder / "samples" / "step-00000002.png").is_file()


def test_a_tensor_is_data_to_train_on(
    tiny_teacher: Teachers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = torch.randn(16, 1, 8, 8).clamp(-1, 1), torch.arange(16) % 10
    shared: dict[str, Any] = {"method": "consistency", "teacher": tiny_teacher("vp"), "sample_every": 0, **SHORT}
    runs = [
        distill(data=data, out=tmp_path / name, **shared)
        for name, data in (("a", (images, labels)), ("b", (-images, labels)), ("c", images))
    ]
    a, b, c = ((run.student / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for run in runs)
    assert len({a, b, c}) == 3, "other data, another student"
    assert "the tensor has no labels, so that the teacher's 'no class' is distilled" in capsys.readouterr().err
    distill(**(shared | {"method": "dmd2"}), data=images, out=tmp_path / "d")
    assert "dmd2 with these options learns from the teacher alone and reads none" in capsys.readouterr().err
    for wrong, says in (
        (torch.randn(16, 3, 8, 8), r"samples of shape \(3, 8, 8\); the teacher's are \(1, 8, 8\)"),
        (torch.randn(16, 1, 8, 8).long(), "holds no samples; give floats"),
        ((images, labels[:3]), "the condition 'class_labels' has 3 entries for 16 samples"),
        ((images, labels + 5), "has 15 classes; the teacher knows 10"),
        (torch.randn(3, 1, 8, 8), "batch_size 4 is larger than the data"),
        (3, "data: int is no data"),
    ):
        with pytest.raises(UserError, match=says):
            distill(data=wrong, out=tmp_path / "e", **shared)  # type: ignore[arg-type]
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"predicts": "noise"}, "predicts: 'noise' is not one of sample, epsilon"),
        ({"shape": (3,)}, r"teacher: PointNetwork cannot be called as network\(x \(2, 3\), time \(2,\)\): "),
        ({"num_classes": 3}, r"teacher: PointNetwork cannot be called as .*class_labels=\.\.\)"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_at_once(settings: dict[str, Any], says: str) -> None:
    arguments = {"shape": (2,), "schedule": TrigFlow(), "predicts": "v_prediction"}
    with pytest.raises(UserError, match=says) as error:
        Teacher.around(PointNetwork(), **(arguments | settings))
    assert "\n" not in str(error.value)


def test_what_cannot_be_done_with_such_a_network_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Teacher.around(PointNetwork(), (2,), TrigFlow(), "v_prediction")
    run = distill("dmd2", teacher=teacher, out=tmp_path / "run", **SHORT)
    own = Teacher.around(
        PointNetwork(), (2,), TrigFlow(), "v_prediction", call=lambda net, x, time, cond: net(x, time / 2)
    )
    called = distill("dmd2", teacher=own, out=tmp_path / "called", **SHORT)
    assert torch.equal(draw(called), Run(called.folder, own).sampler()((2,), {}, image_generators(0, range(4))))
    for act, says in (
        (lambda: load_student(run.student), "network: .* is a student of PointNetwork, which is not in diffusers"),
        (lambda: load_student(run.student, network=PointNetwork(width=8)), "holds the weights of another network"),
        (lambda: load_student(called.student, network=PointNetwork()), "give the Teacher instead of its network"),
        (lambda: load_teacher(run.student), "holds a network that is not in diffusers"),
        (lambda: run.evaluate(), "judge what its sampler\\(\\) draws"),
        (lambda: distill(teacher=teacher, resolution=8, out=tmp_path / "a"), "resolution: it is for a teacher that is"),
        (lambda: distill(teacher=PointNetwork(), out=tmp_path / "a"), "teacher: PointNetwork is no teacher"),  # type: ignore
        (lambda: distill("consistency", teacher=teacher, data="digits", out=tmp_path / "a"), "are no images"),
        (lambda: distill("consistency", teacher=teacher, out=tmp_path / "a"), "data: consistency with these options"),
        (lambda: distill("adapter_guidance", teacher=teacher, out=tmp_path / "a", data=torch.randn(9, 2)), "."),
    ):
        with pytest.raises(UserError, match=says) as error:
            act()
        assert "\n" not in str(error.value)
    assert main(["export", str(run.folder)]) == 2 and main(["sample", str(run.student)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "teacher: it was an object of type Teacher" in lines[-2] and "not in diffusers" in lines[-1]


# -- a method of one's own ---------------------------------------------------------------------------------


class Mine(diffdistill.methods.diff_instruct.METHOD):
    """A method as a class, with its options inside."""

    @dataclass(frozen=True)
    class Config(diffdistill.methods.diff_instruct.Config):
        word: str = "none"


def test_a_method_is_a_class_a_module_or_a_file(tiny_teacher: Teachers, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"teacher": tiny_teacher("vp"), "sample_every": 0, **SHORT}
    module: ModuleType = diffdistill.methods.diff_instruct
    file = shutil.copy(str(module.__file__), tmp_path / "my_method.py")
    students = []
    for name, method in (("name", "diff_instruct"), ("module", module), ("class", module.METHOD), ("file", Path(file))):
        run = distill(method, out=tmp_path / name, **shared)
        students.append((run.student / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert len(set(students)) == 1
    run = distill(Mine, options=Mine.Config(word="hello"), out=tmp_path / "mine", **shared)
    assert json.loads((run.student / "diffdistill.json").read_text())["options"]["word"] == "hello"
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["method"] == "python:Mine"
    resumed = distill(Mine, resume=run.folder, steps=3)
    assert resumed.metrics[-1]["step"] == 3
    with pytest.raises(UserError, match="word: the run began with 'hello', and options say 'bye'"):
        distill(Mine, resume=run.folder, options=Mine.Config(word="bye"))
    with pytest.raises(UserError, match="method: Linear is no method; give a name, a file, or a class with"):
        distill(nn.Linear, out=tmp_path / "no", **shared)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="wrod: no such option; did you mean 'word'"):
        distill(Mine, options={"wrod": "x"}, out=tmp_path / "no", **shared)


# -- a family of one's own ---------------------------------------------------------------------------------

FAMILY = """
    from dataclasses import replace

    from diffdistill.families import FAMILIES

    FAMILY = replace(FAMILIES["unet2d"], name="mine", pipelines=("DDPMPipeline", "MyPipeline"))
"""


def test_a_family_of_ones_own_reads_and_saves(tiny_teacher: Teachers, tmp_path: Path) -> None:
    file = tmp_path / "my_family.py"
    file.write_text(textwrap.dedent(FAMILY))
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher("vp"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "MyPipeline"}))
    argv = ["train", "--teacher", str(folder), "--steps", "1", "--batch-size", "4", "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "without")]) == 2
    before = dict(FAMILIES)
    try:
        assert main([*argv, "--out", str(tmp_path / "run"), "--family", str(file)]) == 0
        saved = json.loads((tmp_path / "run" / "student" / "model_index.json").read_text())
        assert saved["_class_name"] == "DDPMPipeline"
        (tmp_path / "empty.py").write_text("")
        assert main([*argv, "--out", str(tmp_path / "no"), "--family", str(tmp_path / "empty.py")]) == 2
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)
