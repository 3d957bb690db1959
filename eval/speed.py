"""`diffdistill speed DIR...`: how long images take, of students and other models against their teacher.

End to end, from prompts or classes and noise to images in the host's memory, text encoding and decoding included. The
models take turns, a draw each, so that a machine whose load drifts is the same for all.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffdistill.environment import environment
from diffdistill.errors import UserError, first_line
from diffdistill.eval.attention import attention, require_xformers
from diffdistill.eval.evaluate import model_folder, models_in
from diffdistill.eval.models import any_pipeline, check_dtype, family_or_none, pixel_sampler, stock_call
from diffdistill.eval.report import check_writable, markdown_table, text_table, with_notes, write_json, write_text
from diffdistill.families import Family, StudentRecord, describe, is_student, load_pipeline, local_folder, read_record
from diffdistill.rng import image_generators

COLUMNS = (
    *("model", "run", "steps", "passes", "batch", "pixels", "p50 ms", "p90 ms", "p99 ms", "images/s"),
    *("speed-up", "peak MB", "compile s"),
)
LATENT_STEPS = 50  # of a stock pipeline whose call names no number
WARM_UP = 2
NETWORKS = ("unet", "transformer", "transformer_2")
SIZE = ("height", "width", "num_frames")
PROMPTS = (
    "a lighthouse on a cliff in a storm, oil painting",
    "a red bicycle leaning against a white wall",
    "two cats asleep on a windowsill",
    "a map of an island that does not exist, ink on old paper",
)


@dataclass(frozen=True)
class Asked:
    """What is measured; `resolutions` None is each model's own."""

    batch_sizes: Sequence[int] = (1, 4)
    resolutions: Sequence[int | None] = (None,)
    teacher: str | None = None
    teacher_steps: int | None = None
    guidance_scale: float | None = None  #: of teachers, in the normal form: 1 is none
    attention: str = "auto"
    compiled: bool = False
    repeats: int = 20
    dtype: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Plan:
    """A model as it is to be loaded; `against` is the place of its teacher in the list of plans."""

    path: Path
    name: str
    scale: float = 1.0
    size: tuple[tuple[str, int], ...] = ()  #: what a teacher is drawn at, that of its student
    null_class: int | None = None
    against: int | None = None


@dataclass(frozen=True)
class Subject:
    """A model that is loaded: `draw(batch, pixels a side)` gives images (B, ..., H, W, C)."""

    name: str
    steps: int | None
    scale: float
    against: int | None
    parts: Any  #: the pipeline, or the network of a pixel model
    networks: list[nn.Module]  #: whose passes are counted, and which are compiled
    draw: Callable[[int, int | None], Any]
    weights_mb: float | None  #: on a GPU


@dataclass
class Run:
    """A subject at one batch and resolution, eager or compiled; `seconds` stays empty where memory did not suffice."""

    subject: Subject
    place: int  #: of the subject
    compiled: list[Callable[..., Any]] | None = None  #: calls of its networks
    passes: float | None = None
    pixels: str | None = None
    peak_mb: float | None = None
    compile_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    out_of_memory: bool = False


def speed(folders: Sequence[str], asked: Asked, out: str) -> list[dict[str, Any]]:
    """Prints the table, writes speed.md and speed.json, and returns the rows."""
    into = Path(out)
    check_dtype(asked.dtype, asked.device)
    if asked.attention == "xformers":
        require_xformers({asked.device.type})
    plans = _plans(folders, asked)
    for plan in plans:
        for resolution in asked.resolutions:
            _check_resolution(plan, resolution)
    check_writable(into)
    subjects = [_load(plan, asked) for plan in plans]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for subject in subjects:
            stack.enter_context(attention(subject.parts, asked.attention))
        for batch in asked.batch_sizes:
            for resolution in asked.resolutions:
                rows += _rows(_measured(subjects, batch, resolution, asked), batch)
    notes = _notes(subjects, asked)
    told = {
        "device": asked.device.type,
        "dtype": asked.dtype,
        "attention": asked.attention,
        "repeats": asked.repeats,
        "warm_up": WARM_UP,
        "environment": environment(),
        "notes": notes,
        "columns": COLUMNS,
        "rows": rows,
    }
    write_json(told, into / "speed.json")
    columns = [c for c in COLUMNS if c != "compile s" or asked.compiled]
    write_text(with_notes([markdown_table(rows, columns)], notes), into / "speed.md")
    print(text_table(rows, columns))
    print("\n".join(notes))
    print(f"table: {into / 'speed.md'}, {into / 'speed.json'}")
    return rows


# -- what is measured --------------------------------------------------------------------------------------


def _plans(folders: Sequence[str], asked: Asked) -> list[Plan]:
    """Teachers first, each once for a guidance scale and size; then the models in the order given."""
    teachers: dict[tuple[str, float, tuple[tuple[str, int], ...]], Plan] = {}
    models: list[tuple[Plan, tuple[Any, ...] | None]] = []
    own = 1.0 if asked.guidance_scale is None else asked.guidance_scale
    for folder in folders:
        for model in models_in(folder) or [model_folder(folder)]:
            path = _pipeline_folder(model)
            found = read_record(path)
            record = found if isinstance(found, StudentRecord) else None
            source = asked.teacher or (None if record is None else record.teacher)
            key = None
            if source is not None:
                imitated = 1.0 if record is None else record.guidance.scale
                scale = imitated if asked.guidance_scale is None else asked.guidance_scale
                call = {} if record is None or record.call is None else record.call
                size = tuple((k, v) for k, v in call.items() if k in SIZE)
                null_class = None if record is None else record.teacher_null_class
                key = (str(source), float(scale), size)
                teachers.setdefault(key, Plan(_pipeline_folder(source), "", scale, size, null_class))
            models.append((Plan(path, _name(model), own), key))
    keys, plans = list(teachers), list[Plan]()
    for (source, scale, _), plan in teachers.items():
        name = "teacher" if len({k[0] for k in keys}) == 1 else f"teacher {source}"
        name = name if scale == 1 else f"{name}, guidance {scale:g}"
        plans.append(Plan(plan.path, name, scale, plan.size, plan.null_class, len(plans)))
    for plan, key in models:
        if plan.path.resolve() not in {teacher.path.resolve() for teacher in teachers.values()}:
            against = None if key is None else keys.index(key)
            plans.append(replace(plan, against=against))
    names = [plan.name for plan in plans]
    return [p if names.count(p.name) == 1 else _renamed(p) for p in plans]


def _renamed(plan: Plan) -> Plan:
    return replace(plan, name=f"{plan.name} ({', '.join(f'{k} {v}' for k, v in plan.size) or plan.path})")


def _pipeline_folder(model: str | Path) -> Path:
    path = local_folder(str(model_folder(str(model))))
    if not (path / "model_index.json").is_file():
        raise UserError(f"speed: {str(model)!r} holds no pipeline (model_index.json), nor runs with students")
    return path


def _name(model: Path) -> str:
    return (model.parent if model.name in ("student", "teacher") else model).resolve().name


def _frames(path: Path) -> int | None:
    record = read_record(path)
    return record.frames if isinstance(record, StudentRecord) else None


def _check_resolution(plan: Plan, resolution: int | None) -> None:
    family = family_or_none(plan.path)
    if resolution is None or family is None:
        return
    if family.autoencoder is not None:
        describe(plan.path, resolution, _frames(plan.path))
    elif resolution != (own := describe(plan.path).shape[-1]):
        raise UserError(f"resolution: {resolution} is not the {own} that {plan.name} makes, a pixel model; use {own}")


def _load(plan: Plan, asked: Asked) -> Subject:
    family, before = family_or_none(plan.path), _allocated_mb(asked.device)
    pixels = family is not None and family.autoencoder is None
    parts, networks, steps, draw = _pixel_model(plan, asked) if pixels else _stock_pipeline(family, plan, asked)
    for part in networks:
        part.eval()
    weights = None if before is None else (_allocated_mb(asked.device) or 0.0) - before
    return Subject(plan.name, steps, plan.scale, plan.against, parts, networks, torch.no_grad()(draw), weights)


Loaded = tuple[Any, list[nn.Module], int | None, Callable[[int, int | None], Any]]


def _pixel_model(plan: Plan, asked: Asked) -> Loaded:
    sample, teacher, steps = pixel_sampler(plan.path, asked.teacher_steps, plan.scale, plan.null_class)
    denoiser = teacher.denoiser.to(asked.device, getattr(torch, asked.dtype))

    def draw(batch: int, resolution: int | None) -> Any:
        cond = {}
        if teacher.num_classes is not None:
            cond = {"class_labels": torch.arange(batch, device=asked.device) % teacher.num_classes}
        return sample(cond, image_generators(0, range(batch))).float().cpu().movedim(1, -1).numpy()

    return denoiser.network, [denoiser.network], steps, draw


def _stock_pipeline(family: Family | None, plan: Plan, asked: Asked) -> Loaded:
    load = any_pipeline if family is None else load_pipeline
    pipeline = load(plan.path, device=asked.device, dtype=getattr(torch, asked.dtype))
    takes = inspect.signature(pipeline.__call__).parameters
    steps = asked.teacher_steps
    if steps is None and "num_inference_steps" in takes:
        steps = takes["num_inference_steps"].default
    call = stock_call(plan.path, family, steps if isinstance(steps, int) else LATENT_STEPS, None)
    if plan.scale != 1 and not is_student(plan.path):
        call |= _guided(family, plan.scale, takes)
    call |= {name: value for name, value in plan.size if name in takes}
    classes = describe(plan.path).num_classes if family is not None and "class_labels" in takes else None

    def draw(batch: int, resolution: int | None) -> Any:
        what: dict[str, Any] = {"batch_size": batch}
        if "prompt" in takes:
            what = {"prompt": [PROMPTS[i % len(PROMPTS)] for i in range(batch)]}  # anew: some pipelines write into it
        elif "class_labels" in takes:
            what = {"class_labels": [i % (classes or 1) for i in range(batch)]}
        if "negative_prompt" in call:
            what["negative_prompt"] = [call["negative_prompt"]] * batch
        if resolution is not None:
            if "height" not in takes:
                raise UserError(f"resolution: {resolution} was given, and {plan.name}'s pipeline takes no size")
            what |= {"height": resolution, "width": resolution}
        got = pipeline(**call | what, generator=image_generators(0, range(batch)), output_type="np")
        images = getattr(got, "images", getattr(got, "frames", None))
        if not isinstance(images, np.ndarray):
            raise UserError(f"speed: {plan.name} makes neither images nor videos")
        return images

    networks = [part for name in NETWORKS if isinstance(part := getattr(pipeline, name, None), nn.Module)]
    return pipeline, networks, call.get("num_inference_steps"), draw


def _guided(family: Family | None, scale: float, takes: Any) -> dict[str, Any]:
    """u + scale (c - u) in the words of the stock pipeline."""
    if "true_cfg_scale" in takes:  # which acts only where a negative prompt is given
        return {"true_cfg_scale": scale, "negative_prompt": ""}
    if "guidance_scale" not in takes:
        raise UserError(f"guidance_scale: {scale:g} was given, and the pipeline takes none; use 1")
    return {"guidance_scale": scale - 1 if family is not None and family.stock_guidance.startswith("c + ") else scale}


# -- measuring ---------------------------------------------------------------------------------------------


def _measured(subjects: Sequence[Subject], batch: int, resolution: int | None, asked: Asked) -> list[Run]:
    with ExitStack() as stack:
        if asked.compiled:
            torch.compiler.reset()  # what other sizes have compiled counts against a limit
            # Beyond the limit torch would run eagerly without a word.
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True))
        runs: list[Run] = []
        for place, subject in enumerate(subjects):
            for compiled in (False, True) if asked.compiled else (False,):
                run = Run(subject, place, _compile(subject.networks) if compiled else None)
                _warm_up(run, batch, resolution, asked)
                runs.append(run)
        for repeat in range(asked.repeats):
            first = repeat % len(runs)
            for run in runs[first:] + runs[:first]:
                if not run.out_of_memory:
                    with _guarded(run, batch, resolution, asked):
                        run.seconds.append(_seconds(run, batch, resolution, asked))
    return runs


def _compile(networks: Sequence[nn.Module]) -> list[Callable[..., Any]]:
    """The compiled calls of the networks, which stay as they are."""
    calls = []
    for network in networks:
        network.compile(dynamic=False)
        assert network._compiled_call_impl is not None
        calls.append(network._compiled_call_impl)
        network._compiled_call_impl = None
    return calls


def _warm_up(run: Run, batch: int, resolution: int | None, asked: Asked) -> None:
    taken, before = [], _graphs()
    with _guarded(run, batch, resolution, asked):
        with _counting(run, batch) if run.compiled is None else ExitStack():
            taken.append(_seconds(run, batch, resolution, asked))
        compiled = _graphs() > before
        taken += [_seconds(run, batch, resolution, asked) for _ in range(WARM_UP - 1)]
        if compiled:
            run.compile_seconds = max(taken[0] - taken[-1], 0.0)


def _graphs() -> int:
    """What torch.compile has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def _guarded(run: Run, batch: int, resolution: int | None, asked: Asked) -> Iterator[None]:
    """What a draw raises as one line; with too little memory on a GPU the run has no figures."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        run.out_of_memory, run.peak_mb = True, None
        run.seconds.clear()
        torch.cuda.empty_cache()
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        told = first_line(error)
        size = "" if resolution is None else f" of {resolution} pixels"
        how = f"{asked.dtype}{', compiled' if run.compiled else ''}"
        raise UserError(f"speed: {run.subject.name} does not draw {batch} images{size} in {how} ({told})") from error


@contextmanager
def _counting(run: Run, batch: int) -> Iterator[None]:
    """Counts the passes of the subject's networks for an image: calls, by how many samples each takes."""
    if not run.subject.networks:
        yield
        return
    samples = 0

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal samples
        samples += len((*args, *kwargs.values())[0])  # (B, ...), or a list of B

    with ExitStack() as stack:
        for network in run.subject.networks:
            stack.callback(network.register_forward_pre_hook(count, with_kwargs=True).remove)
        yield
    run.passes = samples / batch


def _seconds(run: Run, batch: int, resolution: int | None, asked: Asked) -> float:
    """Seconds of one draw, and into the run the most memory and the size of the images."""
    networks, gpu = run.subject.networks, asked.device.type == "cuda"
    for network, call in zip(networks, run.compiled or (), strict=run.compiled is not None):
        network._compiled_call_impl = call
    held = _allocated_mb(asked.device)
    try:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            first.record()
            images = run.subject.draw(batch, resolution)
            last.record()
            torch.cuda.synchronize()
            seconds = first.elapsed_time(last) / 1000
        else:
            started = time.perf_counter()
            images = run.subject.draw(batch, resolution)
            seconds = time.perf_counter() - started
    finally:
        for network in networks:
            network._compiled_call_impl = None
    if held is not None and run.subject.weights_mb is not None:
        peak = run.subject.weights_mb + torch.cuda.max_memory_allocated() / 2**20 - held
        run.peak_mb = max(peak, run.peak_mb or 0.0)
    frames = f"{images.shape[1]} x " if images.ndim == 5 else ""
    run.pixels = f"{frames}{images.shape[-3]}x{images.shape[-2]}"
    return seconds


def _allocated_mb(device: torch.device) -> float | None:
    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else None


def percentile(values: Sequence[float], q: float) -> float:
    """The nearest rank: the least of the values that at least q of them do not exceed."""
    return sorted(values)[max(math.ceil(q * len(values)), 1) - 1]


def _rows(runs: Sequence[Run], batch: int) -> list[dict[str, Any]]:
    """A row for each run; its speed-up is over the teacher's run of the same kind."""
    median = {(r.place, r.compiled is None): percentile(r.seconds, 0.5) for r in runs if r.seconds}
    passes = {r.place: r.passes for r in runs if r.compiled is None}
    rows = []
    for run in runs:
        row: dict[str, Any] = {
            "model": run.subject.name,
            "run": "eager" if run.compiled is None else "compiled",
            "steps": run.subject.steps,
            "passes": _plain(passes[run.place]),
            "batch": batch,
            "pixels": run.pixels,
        }
        if run.seconds:
            for q in (50, 90, 99):
                row[f"p{q} ms"] = 1000 * percentile(run.seconds, q / 100) / batch
            row["images/s"] = batch * len(run.seconds) / sum(run.seconds)
            teacher = (
                median.get((run.subject.against, run.compiled is None)) if run.subject.against is not None else None
            )
            row["speed-up"] = None if teacher is None else teacher / percentile(run.seconds, 0.5)
        row |= {"peak MB": run.peak_mb, "compile s": run.compile_seconds, "seconds a batch": run.seconds}
        rows.append(row)
    return rows


def _plain(passes: float | None) -> float | int | None:
    return int(passes) if passes is not None and passes == int(passes) else passes


def _notes(subjects: Sequence[Subject], asked: Asked) -> list[str]:
    told = environment()
    teachers = [f"{s.name}, {s.steps} steps" for i, s in enumerate(subjects) if s.against == i]
    where = told["gpu"] if asked.device.type == "cuda" else f"CPU, {told['cpu_threads']} threads"
    notes = [
        f"{where}, {told['platform']}, torch {told['torch']}, diffusers {told['diffusers']}, {asked.dtype}, attention "
        f"{asked.attention}, commit {told['commit']}",
        "end to end: from prompts or classes and noise to images in the host's memory, text encoding and decoding "
        "included",
        f"ms: a batch's time by its images; nearest-rank percentiles of {asked.repeats} draws after {WARM_UP} to warm "
        "up, the models in turn" + ("; p99 of fewer than 100 is the slowest" if asked.repeats < 100 else ""),
        "passes: of the denoising network for an image; guidance makes two of one",
    ]
    if teachers:
        notes.append(f"speed-up: p50 against that of its teacher ({'; '.join(teachers)}), same batch and kind of run")
    if asked.device.type == "cuda":
        notes.append("peak MB: of GPU memory, the model's weights and the most that a draw adds")
    else:
        notes.append("peak MB: measured on GPUs only")
    if asked.compiled:
        notes.append(
            "compile s: the first draw less the next, with torch's cache on disk as it was; none for a model that runs "
            "what was compiled for one of the same architecture"
        )
    return notes
