"""`diffdistill speed`: what is counted is right, what is written is whole, and bad input is said in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline
from torch import nn

from diffdistill import UserError, distill
from diffdistill.commands.cli import main
from diffdistill.eval import subjects, timing
from diffdistill.eval.speed import time_models
from diffdistill.eval.timing import SpeedOptions, percentile
from tests import tiny_a, tiny_b

QUICK = SpeedOptions(batch_sizes=(1, 2), repeats=2)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def student(tiny_teacher: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of a student of digits after two steps."""
    root = tmp_path_factory.mktemp("runs")

    def make(name: str, **options: Any) -> Path:
        distill(
            method="dmd2", update_ratio=1, teacher=str(tiny_teacher("vp")), steps=2, batch_size=4, sample_every=0,
            device="cpu", out=str(root / name), **options,
        )  # fmt: skip
        return root / name

    return make


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny pipeline; with `scale`, that of a "student" of it, which is the same network."""
    root = tmp_path_factory.mktemp("latent")
    builders = {**tiny_a.PIPELINES, **tiny_b.PIPELINES}

    def make(kind: str, scale: float | None = None, **call: Any) -> Path:
        folder = root / kind
        if not folder.exists():
            builders[kind]().save_pretrained(folder)
        if scale is None:
            return folder
        made = root / f"{kind}-{scale}"
        builders[kind]().save_pretrained(made)
        record = {
            "levels": [999.0],
            "renoise": True,
            "teacher": str(folder),
            "options": {"guidance_scale": scale},
            "call": {"num_inference_steps": 1, **call},
        }
        (made / "diffdistill.json").write_text(json.dumps(record))
        return made

    return make


def by_model(rows: Rows, batch: int = 2) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in rows if row["batch"] == batch}


def test_students_of_digits_against_their_teachers(student: Callable[..., Path], tmp_path: Path) -> None:
    """One pass a step, two where the teacher is guided; a teacher for each guidance that a student was trained with."""
    runs = [student("plain"), student("two", student_steps=2), student("guided", guidance_scale=3.0)]
    table = time_models([*map(str, runs)], QUICK, tmp_path)
    rows = table.rows
    by_name = by_model(rows)
    assert {name: (row["steps"], row["passes"]) for name, row in by_name.items()} == {
        "teacher": (16, 16),
        "teacher, guidance 3": (16, 32),
        "plain": (1, 1),
        "two": (2, 2),
        "guided": (1, 1),
    }
    for name, row in by_name.items():
        teacher = by_name["teacher, guidance 3" if "guid" in name else "teacher"]
        assert row["speed-up"] == pytest.approx(teacher["p50 ms"] / row["p50 ms"])
        taken = row["seconds a batch"]
        assert len(taken) == 2 and row["p50 ms"] == pytest.approx(1000 * min(taken) / 2)
        assert row["p99 ms"] == pytest.approx(1000 * max(taken) / 2)
        assert row["images/s"] == pytest.approx(2 * 2 / sum(taken))
        assert row["peak MB"] is None and row["pixels"] == "8x8"
    assert [row["batch"] for row in rows] == [1] * 5 + [2] * 5
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["rows"] == rows
    assert {"dtype": "float32", "device": "cpu", "attention": "auto"}.items() <= report.items()
    assert report["environment"]["torch"] == torch.__version__
    text, printed = (tmp_path / "speed.md").read_text(), str(table)
    for line in ("teacher, guidance 3, 16 steps", "peak MB: measured on GPUs only", "p99 of fewer than 100"):
        assert line in text and line in printed
    assert "compile s" not in text


@pytest.mark.parametrize(
    ("kind", "scale", "call"),
    [
        ("stable_diffusion", 1.0, {"guidance_scale": 1.0, "height": 32, "width": 32}),
        ("stable_diffusion", 5.0, {"guidance_scale": 1.0}),
        ("dit", 5.0, {"guidance_scale": 1.0}),
        ("z_image", 1.0, {"guidance_scale": 0.0, "height": 32, "width": 32}),
        ("z_image", 1.5, {"guidance_scale": 0.0, "height": 32, "width": 32}),
        ("qwen_image", 2.0, {"true_cfg_scale": 1.0, "height": 32, "width": 32}),
        ("wan", 2.0, {"guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": tiny_b.FRAMES}),
    ],
)
def test_a_latent_teacher_is_guided_as_its_student_was_and_of_its_size(
    latent: Callable[..., Path], kind: str, scale: float, call: dict[str, Any], tmp_path: Path
) -> None:
    options = SpeedOptions(batch_sizes=(2,), repeats=1, teacher_steps=3)
    one, other = time_models([str(latent(kind, scale, **call))], options, tmp_path).rows
    assert (one["steps"], one["passes"]) == (3, 3 if scale == 1 else 6), "Wan calls twice, the others once with both"
    assert (other["steps"], other["passes"]) == (1, 1)
    size = f"{call.get('height', 16)}x{call.get('width', 16)}"
    frames = f"{call['num_frames']} x " if "num_frames" in call else ""
    assert one["pixels"] == other["pixels"] == frames + size


def test_a_teacher_alone_takes_the_steps_of_its_pipeline(latent: Callable[..., Path], tmp_path: Path) -> None:
    for kind, steps in (("stable_diffusion", 50), ("sana", 20)):
        options = SpeedOptions(batch_sizes=(1,), resolutions=(32,), repeats=1)
        (row,) = time_models([str(latent(kind))], options, tmp_path).rows
        assert (row["model"], row["steps"], row["passes"], row["speed-up"]) == (kind, steps, steps, None)
    options = SpeedOptions(batch_sizes=(1,), repeats=1, guidance_scale=4.0, teacher_steps=2)
    assert time_models([str(latent("stable_diffusion"))], options, tmp_path).rows[0]["passes"] == 4


def test_resolutions_and_dtype_reach_the_pipeline(latent: Callable[..., Path], tmp_path: Path) -> None:
    folder, seen = latent("stable_diffusion"), []
    real = subjects.load_pipeline

    def spy(*args: Any, **kwargs: Any) -> Any:
        pipeline = real(*args, **kwargs)
        pipeline.unet.register_forward_pre_hook(lambda unet, args: seen.append(args[0].dtype))
        return pipeline

    options = SpeedOptions(batch_sizes=(1,), resolutions=(16, "16x32"), repeats=1, teacher_steps=1, dtype="bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "load_pipeline", spy)
        rows = time_models([str(folder)], options, tmp_path).rows
    assert [row["pixels"] for row in rows] == ["16x16", "16x32"]
    assert set(seen) == {torch.bfloat16}


def test_a_pipeline_that_cannot_be_distilled_is_timed(
    tmp_path: Path, student: Callable[..., Path], tiny_teacher: Callable[[str], Path]
) -> None:
    """Here against a teacher that is named; which may be among the models, once."""
    parts = tiny_a.stable_diffusion().components | {"requires_safety_checker": False}
    StableDiffusionPAGPipeline(**parts).save_pretrained(tmp_path / "pag")
    teacher = str(tiny_teacher("vp"))
    options = SpeedOptions(batch_sizes=(1,), repeats=1, teacher_steps=2, teacher=teacher)
    rows = time_models([teacher, str(tmp_path / "pag")], options, tmp_path / "out").rows
    assert [row["model"] for row in rows] == ["teacher", "pag"]
    assert rows[1]["speed-up"] == pytest.approx(rows[0]["p50 ms"] / rows[1]["p50 ms"])
    assert rows[1]["passes"] == 2 * 3, "its own guidance, and classifier-free guidance besides"


def test_the_models_take_turns_and_memory_that_does_not_suffice_has_no_figures(
    latent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order: list[str] = []
    real = timing._seconds

    def spy(run: timing.TimedRun, batch: int, resolution: int | None, options: SpeedOptions) -> float:
        order.append(run.subject.name)
        if run.subject.name == "teacher" and batch == 2:
            raise torch.cuda.OutOfMemoryError
        return real(run, batch, resolution, options)

    monkeypatch.setattr(timing, "_seconds", spy)
    options = SpeedOptions(batch_sizes=(1, 2), repeats=3, teacher_steps=1)
    rows = time_models([str(latent("dit", 1.0, guidance_scale=1.0))], options, tmp_path).rows
    a, b = "teacher", "dit-1.0"
    assert order[:10] == [a, a, b, b, a, b, b, a, a, b]
    short = by_model(rows)[a]
    assert {short.get(c) for c in ("passes", "p50 ms", "images/s", "speed-up", "peak MB")} == {None}
    assert by_model(rows)[b]["p50 ms"] > 0 and by_model(rows)[b]["speed-up"] is None
    assert "| teacher" in (tmp_path / "speed.md").read_text()


def test_compiled_runs_beside_eager_ones(
    student: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a compiler that only counts: the compiled call runs in the compiled rows alone, and passes stay counted."""
    calls: list[nn.Module] = []

    def compile(self: nn.Module, **options: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(self)
            return self._call_impl(*args, **kwargs)

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compile)
    options = SpeedOptions(batch_sizes=(1,), repeats=2, teacher_steps=3, compiled=True)
    rows = time_models([str(student("compiled"))], options, tmp_path).rows
    assert [(r["model"], r["run"], r["passes"]) for r in rows] == [
        ("teacher", "eager", 3),
        ("teacher", "compiled", 3),
        ("compiled", "eager", 1),
        ("compiled", "compiled", 1),
    ]
    assert len(calls) == (timing.WARM_UP + 2) * (3 + 1)
    for teacher, one in zip(rows[:2], rows[2:], strict=True):
        assert one["speed-up"] == pytest.approx(teacher["p50 ms"] / one["p50 ms"])
    assert [r["compile s"] for r in rows] == [None] * 4, "nothing was compiled"
    assert "compile s" in (tmp_path / "speed.md").read_text()


@pytest.mark.slow
def test_torch_compiles(student: Callable[..., Path], tmp_path: Path) -> None:
    options = SpeedOptions(batch_sizes=(1,), repeats=2, teacher_steps=2, compiled=True)
    rows = time_models([str(student("torch-compiled"))], options, tmp_path).rows
    assert [r["compile s"] is not None for r in rows] == [False, True, False, False], "one architecture, compiled once"


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert [percentile(values, q / 100) for q in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert [percentile([3.0, 1.0, 2.0], q) for q in (0.0, 0.5, 0.99)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "speed: '{empty}' holds no pipeline (model_index.json), nor runs with students"),
        (["{empty}/none"], "teacher: '{empty}/none' is not a folder; give a diffusers folder, a hub id or 'digits'"),
        (["{sd}", "--batch-sizes", "1,0"], "batch_sizes: "),
        (["{sd}", "--repeats", "0"], "repeats: "),
        (
            ["{sd}", "--resolutions", "17"],
            "resolution: 17 is not a multiple of 8, which stable_diffusion needs; use 16",
        ),
        (
            ["digits", "--resolutions", "16"],
            "resolution: 16 is not the 8 that digits makes, a pixel model; use 8",
        ),
        (["{sd}", "--attention", "xformers"], "attention: xformers "),
        (["{sd}", "--attention", "fast"], "attention: "),
        (["{sd}", "--device", "cuda"], "device: 'cuda' was asked for and torch sees no GPU; use --device cpu or auto"),
        (["{sd}", "--dtype", "float16"], "dtype: float16 is for GPUs, and the models run on a CPU"),
        (["{sd}", "--dtype", "int8"], "dtype: "),
        (["{sd}", "--teacher-steps", "0"], "teacher_steps: "),
        (["{sd}", "--resolution", "16"], "--resolution: no such option of speed"),
        (["{code}"], "speed: "),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, latent: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "model_index.json").write_text('{"_class_name": ["own", "OwnPipeline"]}')
    where = {"empty": tmp_path / "empty", "code": tmp_path / "code", "sd": latent("stable_diffusion")}
    status = main(["speed", *(a.format(**where) for a in arguments), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1, lines
    assert lines[0].startswith("diffdistill: " + (message.format(**where) if message != "speed: " else ""))
    assert not (tmp_path / "out" / "speed.json").exists()


def test_what_a_draw_raises_is_one_line(
    latent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subjects, "PROMPTS", (0,))
    options = SpeedOptions(batch_sizes=(2,), resolutions=(16,), repeats=1, teacher_steps=1)
    start = "speed: stable_diffusion does not draw 2 images of 16 pixels in float32 ("
    with pytest.raises(UserError, match=f"^{re.escape(start)}[^\n]+\\)$"):
        time_models([str(latent("stable_diffusion"))], options, tmp_path)


def test_a_gpu_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    options = SpeedOptions(dtype="bfloat16", device=torch.device("cuda"))
    with pytest.raises(UserError, match=r"^dtype: Tesla V100 has no bfloat16; use float16 or float32$"):
        time_models(["digits"], options, tmp_path)
