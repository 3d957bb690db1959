"""Wan 2.2 A14B: a teacher of two networks, each for a part of the noise, and its students."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffdistill import UserError, distill, encode, export, make_pairs, sample
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.experts import Experts
from diffdistill.core.guidance import guided
from diffdistill.core.jvp import jvp
from diffdistill.core.schedule import sampling_grid
from diffdistill.data.encoded import open_encoded
from diffdistill.data.pairs import open_pairs
from diffdistill.eval.ladder import _rungs, ladder_models
from diffdistill.eval.models import SamplingOptions, open_model, teacher_images
from diffdistill.eval.protocol import load
from diffdistill.families import load_student, load_teacher, student_record, with_null
from diffdistill.pipelines.merged import merged_teacher
from diffdistill.players.lora import LoraSettings, lora_view
from diffdistill.training.assemble import make_game
from diffdistill.training.sharding import shard
from tests.players.test_player_kinds import METHODS
from tests.players.tiny import apart, drawn_by_a_stranger, ours
from tests.tiny_b import wan

SIZE: dict[str, Any] = {"resolution": 16, "frames": 5}
NETWORKS = ("transformer", "transformer_2")
RUNS = (
    ("consistency", "lora"),
    ("dmd2", "full"),
    ("dmd2", "lora"),
    ("sid", "lora"),
    ("progressive", "full"),
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with the shift of 3 are at 1 and 0.75, one for each network."""
    made = tmp_path_factory.mktemp("two")
    wan(boundary=0.8).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def prompts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prompts")
    for i in range(2):
        (root / "videos" / f"{i}").mkdir(parents=True)
        (root / "videos" / f"{i}.txt").write_text(f"video {i}")
        for j in range(5):
            Image.new("RGB", (16, 16), (60 * i, 200 - 50 * i, 50 * j)).save(root / "videos" / f"{i}" / f"{j}.png")
    return encode(teacher=folder, **SIZE, data=root / "videos", out=root / "encoded")


def options(folder: Path, prompts: Path, method: str, kind: str) -> dict[str, Any]:
    roles = "student,fake_score" if method in ("dmd2", "sid") else "student"
    lora = {"lora": roles, "lora_rank": 2, "lora_alpha": 6.0, "student_lr": 0.1} if kind == "lora" else {}
    shared = {"student_lr": 1e-3, "warmup_steps": 0, "batch_size": 2, "steps": 2, "sample_every": 0, "device": "cpu"}
    return {"method": method, "teacher": folder, "prompts": prompts, **SIZE, **shared, **METHODS[method], **lora}


def test_each_sample_goes_to_the_network_for_its_time(folder: Path, prompts: Path) -> None:
    """Also with guidance, as LoRA, for a discriminator and under a derivative."""
    teacher, data = load_teacher(folder, **SIZE), open_encoded(prompts)
    denoiser, cond = teacher.denoiser, data.get(torch.tensor([0, 1, 1, 0])).cond
    networks = denoiser.network
    assert isinstance(networks, Experts) and networks.boundary == 800
    with_null(denoiser, data.null)
    sigma = torch.tensor([0.3, 0.9, 0.8, 0.79], dtype=torch.float64)  # the boundary is the first network's
    t, x = denoiser.schedule.angle(sigma), torch.randn(4, *teacher.shape)
    native = denoiser.schedule.native(t)
    scaled, time = native.scale.float().view(4, 1, 1, 1, 1) * x, native.time.float()
    with torch.no_grad():
        outputs = [networks.get_submodule(name)(scaled, time, **cond)[0] for name in NETWORKS]
        for i, (one, other) in enumerate([(1, 0), (0, 1), (0, 1), (1, 0)]):
            y = denoiser(x, t, cond).y[i]
            assert apart(y, outputs[one][i]) < 1e-5 and apart(y, outputs[other][i]) > 1e-2
        assert networks.chosen is None
    lora = lora_view(denoiser, LoraSettings(2, targets=("to_q",)))
    for part in lora.parameters():
        torch.nn.init.normal_(part)

    def tangent(x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        ones = torch.ones_like(x), torch.ones_like(t)
        return jvp(lambda x, t: denoiser(x, t, cond).y, (x, t), ones)[1]

    for each in (lambda *at: guided(denoiser, 5.0)(*at).x0, lambda *at: lora(*at).x0, denoiser.features, tangent):
        with torch.no_grad():
            whole = each(x, t, cond)
            alone = [each(x[i], t[i], {k: v[i] for k, v in cond.items()}) for i in torch.arange(4).split(1)]
        assert apart(whole, torch.cat(alone)) < 1e-4, each


@pytest.fixture(scope="module")
def trained(folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """method, kind of player -> a run of two steps."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def train(method: str, kind: str) -> Path:
        distill(**options(folder, prompts, method, kind), out=root / f"{method}-{kind}")
        return root / f"{method}-{kind}"

    return train


def test_the_stranger_gets_the_students_videos(
    trained: Callable[[str, str], Path], folder: Path, prompts: Path, tmp_path: Path
) -> None:
    data = open_encoded(prompts)
    cond, shape = data.get(torch.tensor([1])).cond, tuple(data.settings["shape"])
    jobs, expected = [], []
    for method, kind in RUNS:
        run = trained(method, kind)
        image, two, student = ours(run, cond, shape), method != "sid", run / "student"
        assert apart(image, ours(run, cond, shape, trained=False)) > 1e-2, (method, kind)
        index = json.loads((student / "model_index.json").read_text())
        # A student of one step never asks the second network, and is one.
        assert (student / NETWORKS[1]).exists() == two == (index[NETWORKS[1]] != [None, None])
        assert index["boundary_ratio"] == (0.8 if two else None)
        card = (student / "README.md").read_text()
        assert ("load_into_transformer_2=True" in card) == (two and kind == "lora")
        assert "from_single_file" not in card or not two
        for base in ["", *([str(folder)] if kind == "lora" else [])]:
            what = {"prompt": "video 1"}
            jobs.append({"student": str(student), "base": base, "what": what, "type": "latent", "two": two})
            expected.append(image)
    for job, got, image in zip(jobs, drawn_by_a_stranger(jobs, tmp_path), expected, strict=True):
        assert apart(got.reshape(image.shape), image) < 1e-3, job


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_student_that_leaves_parts_to_its_teacher(
    kind: str, trained: Callable[[str, str], Path], prompts: Path
) -> None:
    run = trained("dmd2", kind)
    form: dict[str, Any] = {"export": "lora"} if kind == "lora" else {"parts": "reference"}
    alone = export(run, out=run / "alone", **form)
    assert not (alone / "vae").exists()
    cond = open_encoded(prompts).get(torch.tensor([0, 1])).cond
    drawn = []
    for student in (run / "student", alone):
        sampler, described = load_student(student)
        drawn.append(sampler(described.shape, cond, [torch.Generator().manual_seed(i) for i in range(2)]))
    assert apart(*drawn) < 1e-5
    second = "load_into_transformer_2=True" if kind == "lora" else "transformer=network, transformer_2=network_2"
    assert second in (alone / "README.md").read_text()


def test_a_student_of_phases_is_an_expert_for_each(folder: Path, prompts: Path, tmp_path: Path) -> None:
    """Each is trained in its own phase, and the training resumes to the same bits."""
    usual = {k: v for k, v in options(folder, prompts, "dmd2", "full").items() if k != "method"}
    usual |= {"method": "phased_dmd", "lr_schedule": "constant", "update_ratio": 1, "offload": "model"}
    whole = distill(**{**usual, "steps": 4}, out=tmp_path / "whole").student
    distill(**{**usual, "steps": 3, "offload": "none"}, out=tmp_path / "run")
    again = distill(resume=tmp_path / "run", steps=4).student
    for name in NETWORKS:
        before, first, other = (load_file(place / name / WEIGHTS) for place in (folder, whole, again))
        assert all(torch.equal(first[key], other[key]) for key in first)
        assert any(not torch.equal(before[key], first[key]) for key in first), name


def test_a_student_of_one_network_learns_from_two(folder: Path, prompts: Path, tmp_path: Path) -> None:
    wan(seed=3).save_pretrained(tmp_path / "one")
    student = distill(
        **options(folder, prompts, "dmd2", "full"), student=tmp_path / "one", out=tmp_path / "run"
    ).student
    index = json.loads((student / "model_index.json").read_text())
    assert index["transformer_2"] == [None, None] and index["boundary_ratio"] is None
    alone = export(tmp_path / "run", out=tmp_path / "run" / "alone", parts="reference")
    assert "transformer=network, transformer_2=None, boundary_ratio=None" in (alone / "README.md").read_text()
    for each in (student, alone):
        assert not isinstance(load_student(each)[0].denoiser.network, Experts)


def by_hand(
    denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor, cond: Cond, first: float, second: float
) -> torch.Tensor:
    """Predictions with the scales of sigmas from 0.8 on, and below."""
    above = (denoiser.schedule.native(t).time >= 800).view(-1, 1, 1, 1, 1)
    return torch.where(above, *(guided(denoiser, scale)(x, t, cond).x0 for scale in (first, second)))


def test_each_network_has_its_own_scale_of_guidance(folder: Path, prompts: Path) -> None:
    """Of the teacher, and of what a method guides like it; a fake score with a scale of its own is left alone."""
    usual = {**options(folder, prompts, "dmd2", "full"), "guidance_scale": 5.0, "guidance_scale_2": 2.0}
    sigma = torch.tensor([0.3, 0.9, 0.8, 0.79], dtype=torch.float64)
    cond = open_encoded(prompts).get(torch.tensor([0, 1, 1, 0])).cond
    cases: list[tuple[str, dict[str, Any]]] = [
        ("swiftbrush", {"lora": "fake_score", "lora_rank": 2, "lora_targets": "to_q"}),
        ("disback", {"path_length": 2, "record_every": 1, "track_every": 1, "steps": 4}),
        ("sid", {"fake_score_guidance": 3.0}),
    ]
    for name, own in cases:
        shared = {key: value for key, value in usual.items() if key not in METHODS["dmd2"]}
        method: Any = make_game({**shared, **own, "method": name}).method
        plain = load_teacher(folder, **SIZE).denoiser
        with_null(plain, open_encoded(prompts).null)
        t, x = plain.schedule.angle(sigma), torch.randn(4, *load_teacher(folder, **SIZE).shape)
        expected = [(method.teacher, 5.0, 2.0)]
        expected += [(method.guided_fake_score, 5.0, 2.0)] if name == "swiftbrush" else []
        expected += [(method.targets[0], 5.0, 2.0)] if name == "disback" else []
        expected += [(method.evaluated[0], 3.0, 3.0)] if name == "sid" else []
        with torch.no_grad():
            for denoise, *scales in expected:
                assert apart(denoise(x, t, cond).x0, by_hand(plain, x, t, cond, *scales)) < 1e-4, name


def test_pairs_and_rows_of_the_teacher_have_both_scales(folder: Path, prompts: Path, tmp_path: Path) -> None:
    both: dict[str, Any] = {"guidance_scale": 5.0, "guidance_scale_2": 2.0}
    made = make_pairs(teacher=folder, prompts=prompts, count=2, sampling_steps=4, **both, out=tmp_path / "pairs")
    pair = open_pairs(made).get(torch.tensor([1]))
    teacher, data = load_teacher(folder, **SIZE), open_encoded(prompts)
    with_null(teacher.denoiser, data.null)
    assert pair.pair is not None
    x, cond = pair.pair.z, data.get(torch.tensor([1])).cond
    grid = sampling_grid(teacher.denoiser.schedule, 4)
    assert (teacher.denoiser.schedule.native(grid[:-1]).time >= 800).tolist() == [True, True, False, False]
    for scale, t, s in zip((5.0, 5.0, 2.0, 2.0), grid[:-1].split(1), grid[1:].split(1), strict=True):
        with torch.no_grad():
            x = guided(teacher.denoiser, scale)(x, t, cond).at(s)
    assert apart(pair.pair.x0, x) < 1e-4
    with pytest.raises(UserError, match=r"made with guidance_scale_2 2\.0, and None is asked for"):
        make_pairs(teacher=folder, prompts=prompts, count=2, sampling_steps=4, guidance_scale=5.0, out=made)
    run = distill(**options(folder, prompts, "dmd2", "full"), **both, out=tmp_path / "run")
    record = student_record(run.student)
    assert (record.guidance.scale, record.guidance.second) == (5.0, 2.0)
    for model, sampling in ((folder, SamplingOptions(**both)), (run.student, SamplingOptions())):
        drawn, _, rungs = _rungs(model, sampling, folder if model is not folder else None, (4,))
        assert rungs[0].name == "teacher, guidance 5 and 2" and rungs[0].call["guidance_scale_2"] == 2
    with_null(drawn.denoiser, data.null)
    mine, once = (
        teacher_images(teacher, 4, 5.0, cond, [torch.Generator().manual_seed(3)], second=second)
        for second in (2.0, None)
    )
    row = rungs[0].draw(cond, [torch.Generator().manual_seed(3)])
    assert apart(row, mine) < 1e-6 and apart(once, mine) > 1e-2


def test_a_second_scale_that_does_not_go_is_one_line(folder: Path, prompts: Path, tmp_path: Path) -> None:
    wan(seed=3).save_pretrained(tmp_path / "one")
    (tmp_path / "a.txt").write_text("video 1\nvideo 2\n")
    of_one = encode(teacher=tmp_path / "one", prompts=tmp_path / "a.txt", **SIZE, out=tmp_path / "encoded")
    usual, shapes = options(folder, prompts, "dmd2", "full"), load("shapes")
    both: dict[str, Any] = {"guidance_scale": 5.0, "guidance_scale_2": 2.0}
    one = {"teacher": tmp_path / "one", "prompts": of_one}
    for make in (
        lambda: distill(**{**usual, **both, **one}, out=tmp_path / "run"),
        lambda: distill("dmd2", teacher="digits", **both, out=tmp_path / "run"),
        lambda: make_pairs(**one, **both, out=tmp_path / "pairs"),
        lambda: sample(tmp_path / "one", prompt="video 1", **both, out=tmp_path / "a.png"),
        lambda: sample("digits", **both, out=tmp_path / "a.png"),
        lambda: ladder_models(tmp_path / "one", SamplingOptions(**both), None, (2,), shapes),
        lambda: open_model("digits", SamplingOptions(**both)),
    ):
        with pytest.raises(
            UserError, match=r"^guidance_scale_2: 2 is for the second network of a model of two"
        ) as error:
            make()
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    alone = {"guidance_scale_2": 2.0}
    for make in (
        lambda: distill(**usual, **alone, out=tmp_path / "run"),
        lambda: make_pairs(teacher=folder, prompts=prompts, **alone, out=tmp_path / "pairs"),
        lambda: sample(folder, prompt="video 1", **alone, out=tmp_path / "a.png"),
        lambda: ladder_models(folder, SamplingOptions(**alone), None, (2,), shapes),
    ):
        with pytest.raises(UserError, match=r"^guidance_scale_2: 2 needs a guidance_scale above 1, and"):
            make()
    with pytest.raises(UserError, match=r"^guidance_scale_2: 2 is one number, and guidance_spread draws them"):
        distill("pcm", teacher="digits", **both, guidance_spread=1.0, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"transformer_2": [None, None]}, "model_index.json has boundary_ratio 0.8 and no transformer_2, so that no"),
        ({"boundary_ratio": None}, "model_index.json has transformer_2 and no boundary_ratio, so that no network is"),
        ({"boundary_ratio": 875}, "boundary_ratio in model_index.json is 875, with which one of the networks is for"),
    ],
)
def test_noise_that_no_network_is_for_is_one_line(index: dict[str, Any], message: str, tmp_path: Path) -> None:
    wan(boundary=0.8).save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    with pytest.raises(UserError, match=f"^teacher: {re.escape(message)}") as error:
        load_teacher(tmp_path, **SIZE)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_what_two_networks_cannot_is_one_line(folder: Path, prompts: Path, tmp_path: Path) -> None:
    from diffdistill import prune

    with pytest.raises(UserError, match="launcher: FSDP does not divide a network that is two"):
        shard([load_teacher(folder, **SIZE, weights=False).denoiser], torch.device("cpu"))
    usual = {k: v for k, v in options(folder, prompts, "sid", "lora").items() if k not in ("method", "lora")}
    with pytest.raises(UserError, match="a student of two takes no second time"):
        distill("mean_flow", **usual, mode="distillation", out=tmp_path / "a")
    with pytest.raises(UserError, match="layout: a student of two networks is two files for ComfyUI"):
        distill("sid", **usual, lora="student,fake_score", layout="comfyui", out=tmp_path / "b")
    with pytest.raises(UserError, match="its network is two, each for a part of the noise, and one alone is made"):
        prune(folder, prompts=prompts, keep=0.5, out=tmp_path / "c")
    with pytest.raises(UserError, match="teacher_lora: the base has two networks, and a LoRA does not say which"):
        merged_teacher(str(folder), [(tmp_path / "x.safetensors", 1.0)], tmp_path / "d")
