"""The scoreboard: every method on the same teacher, budget, seeds and evaluation (`diffdistill bench`).

The budget is counted in network passes, which do not depend on the machine: a forward pass of the batch is 1, a
backward pass through weights and input 2 more, through the input alone 1 more. A method takes as many training
steps as fit. Each training is a process of its own, so that its peak memory is its own; on a CPU each has one
thread and as many run at a time as there are cores, which is quicker than one with all of them. What is done is not
repeated, and a stopped training resumes. Every student, whatever its training's seed, is judged on the noise of all
seeds, as the teacher is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from threading import Lock
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffdistill.catalogue import MethodInfo, describe_method, method_names
from diffdistill.config import run_options
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.schedule import student_levels
from diffdistill.data.images import Data, open_data
from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.eval.evaluate import DigitJudge, Draw, device, draw_all, on_device, teacher_images
from diffdistill.eval.features.digit_classifier import DigitClassifier
from diffdistill.eval.features.digit_classifier import train as train_classifier
from diffdistill.eval.report import markdown_table, text_table, write_json, write_text
from diffdistill.families import load_teacher
from diffdistill.files import atomic_write
from diffdistill.pictures import save_png, side_by_side
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.teacher import Teacher, only_trains, trainable
from diffdistill.scaffold.method import Batch, Method, Pair
from diffdistill.training.assemble import Game, load_run, make_game

SHOWN_STEPS = (1, 2, 4)
MOST_IMAGES = 10000
COLUMNS = (
    *("method", "steps", "frechet distance", "+-", "kernel distance x1000", "precision", "recall"),
    *("class agreement %", "diversity", "training s", "peak MB", "passes", "least", "seeds"),
)


@dataclass(frozen=True)
class Suite:
    """What all methods share; a preset named `preset` in a method's file says the rest."""

    preset: str
    teacher: str
    data: str
    budget: int
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    overrides: dict[str, Any] = field(default_factory=dict)


SUITES = {
    "digits": Suite("digits", "digits", "digits", budget=4000),
    "mnist": Suite("digits", "", "", budget=60000, overrides={"student_level": None}),
}


@dataclass(frozen=True)
class Entry:
    """One training: a method, one of its presets for the suite, a seed."""

    info: MethodInfo
    preset: str
    seed: int

    @property
    def name(self) -> str:
        return self.info.name + self.preset.removeprefix("digits").replace("-", " ")

    @property
    def folder(self) -> str:
        return f"{self.name.replace(' ', '-')}-seed{self.seed}"


def entries(suite: Suite, methods: Sequence[str] | None, seeds: Sequence[int]) -> list[Entry]:
    """All trainings, seed by seed; a method is all its presets for the suite, or METHOD:PRESET is that one.

    Raises UserError for a method without such a preset.
    """
    found = []
    for seed in seeds:
        for wanted in methods or method_names():
            name, _, preset = wanted.partition(":")
            info = describe_method(name)
            if info.name in method_names() and name != info.name:
                raise UserError(f"methods: {name!r} has the name of a method of ours; give the file another")
            presets = [p for p in info.presets if p == preset or (not preset and p.split("-")[0] == suite.preset)]
            if not presets and methods:
                raise UserError(f"methods: {info.name} has no preset {preset or suite.preset!r}")
            found += [Entry(info, preset, seed) for preset in presets]
    return list({entry.folder: entry for entry in found}.values())


# -- the budget --------------------------------------------------------------------------------------------


def passes_per_step(game: Game, steps: int = 12) -> tuple[float, float]:
    """Network passes of a training step, each counted once for a batch, and the same with backward passes."""
    method, teacher, size = game.method, game.teacher, game.config.batch_size
    denoisers: dict[int, nn.Module] = {}
    for module in (teacher.denoiser, *method.players.values(), *method.state.values()):
        # Denoisers, not their networks: two of them may share one.
        denoisers |= {id(m): m for m in module.modules() if isinstance(m, Denoiser)}
    forward = backward = 0.0

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal forward, backward
        share = len(args[0]) / size
        forward += share
        if torch.is_grad_enabled():
            weights = any(p.requires_grad for p in module.parameters())
            backward += share * (2.0 if weights else 1.0 if args[0].requires_grad else 0.0)

    handles = [m.register_forward_pre_hook(count) for m in denoisers.values()]
    owned = trainable(method.players)
    try:
        for step in range(steps + 1):
            if step == 1:  # the first step may hold what is done once
                forward = backward = 0.0
            for turn in method.turns(step):
                only_trains(turn.player, owned)
                turn.loss(_any_batch(method, teacher, size, step))
    finally:
        for handle in handles:
            handle.remove()
    return forward / steps, (forward + backward) / steps


def _any_batch(method: Method, teacher: Teacher, size: int, step: int) -> Batch:
    draw = torch.Generator().manual_seed(step)
    cond, x = teacher.random_cond(size, draw), torch.randn(size, *teacher.shape, generator=draw)
    pair = Pair(torch.randn(x.shape, generator=draw), x, cond) if method.needs_pairs else None
    return Batch(size, teacher.shape, cond, x if method.needs_data else None, x.device, (0, step, 0), pair)


class Plan(NamedTuple):
    """A preset's training within the budget."""

    values: dict[str, Any]  #: all options but the seed
    passes: float  #: a step
    scale: float  #: of guidance


def planned(entry: Entry, suite: Suite, budget: int, shared: dict[str, Any]) -> Plan:
    """As many training steps as the budget allows."""
    info, preset = entry.info, dict(entry.info.presets[entry.preset])
    method = info.name if info.name in method_names() else str(info.path.resolve())  # a user's own is a file
    known = {k: v for k, v in suite.overrides.items() if k in preset}
    values = preset | known | shared | {"method": method}
    game = make_game(values)
    if not game.method.needs_pairs:
        values.pop("pairs", None)
    passes, units = passes_per_step(game)
    steps = max(1, round(budget / units))
    # Options that count training steps, a stage's say, keep their share of the whole.
    for name in info.scales:
        values[name] = max(1, preset[name] * steps // preset["steps"])
    return Plan(values | {"steps": steps}, passes, float(game.options().get("guidance_scale", 1.0)))


# -- one training ------------------------------------------------------------------------------------------


def train(entry: Entry, values: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train (or resume) in a process of its own; seconds and peak memory are kept beside the run."""
    run, note = out / entry.folder, out / f"{entry.folder}.json"
    before = json.loads(note.read_text()) if note.exists() else {"seconds": 0.0, "peak_mb": 0.0}
    if (run / "config.yaml").exists():
        made = run_options(run)
        for name in values:
            if made[name] != values[name]:
                was = f"{name} {made[name]!r}, not {values[name]!r}"
                raise UserError(f"out: {str(run)!r} was made with {was}; choose another --out")
    if before.get("done"):
        return before
    command = [sys.executable, "-m", "diffdistill.commands.cli", "train"]
    if (run / "config.yaml").exists():
        command += ["--resume", str(run)]
    else:
        keep = {"sample_every": 0, "keep_checkpoints": 100, "out": str(run)}
        stage = [values[name] for name in entry.info.scales]
        keep["checkpoint_every"] = stage[-1] if stage else 0
        for name, value in (values | keep).items():
            command += [f"--{name.replace('_', '-')}", str(value)]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    told = child.stderr.read()
    child.wait()
    after = {
        "seconds": before["seconds"] + time.perf_counter() - started,
        "peak_mb": max(before["peak_mb"], *_peaks(run / "metrics.jsonl")),
        "done": child.returncode == 0,
    }
    write_json(after, note)
    if child.returncode:
        last = told.strip().splitlines()[-1] if told.strip() else f"exit code {child.returncode}"
        raise UserError(f"bench: {entry.folder} failed ({last})")
    return after


def _peaks(metrics: Path) -> list[float]:
    """Of the processes that have trained so far."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line)["peak_memory_mb"] for line in lines] or [0.0]


def students(entry: Entry, out: Path) -> Iterator[FewStepSampler]:
    """The samplers of a run, one for each number of steps that it can make."""
    from diffdistill.training.checkpoint import checkpoints

    run = out / entry.folder
    last: dict[int, int] = {}
    for path in checkpoints(run / "checkpoints"):
        step = int(path.name.split("-")[1])
        last[len(load_run(run, step)[0].method.sampler().levels)] = step
    for step in last.values():
        sampler = load_run(run, step)[0].method.sampler()
        sampler.denoiser.to(device())
        yield sampler
        if entry.info.any_steps:
            schedule = sampler.denoiser.schedule
            for n in SHOWN_STEPS:
                if n != len(sampler.levels):
                    yield FewStepSampler(
                        sampler.denoiser, student_levels(schedule, n).tolist(), renoise=sampler.renoise
                    )


# -- the board ---------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """Rows of one model at one number of steps, a row for each noise; a label and images for the picture."""

    rows: list[dict[str, Any]]
    label: str
    shown: Tensor


class Evaluation:
    """The same images' noise and classes for everything that is evaluated with a seed."""

    def __init__(self, teacher: Teacher, data: Data, out: Path):
        self.teacher, self.count = teacher, min(len(data), MOST_IMAGES)
        self.judge = DigitJudge(data, _classifier(data, out), self.count)
        real = data.get(torch.arange(self.count))
        self.labels = real.labels if teacher.num_classes is not None else None
        self.real_diversity = self.diversity(real.images)

    def diversity(self, images: Tensor) -> float:
        """Mean distance of two images of a class in the judge's features, over the classes."""
        features = self.judge.features(images)
        if self.labels is None:
            return float(torch.pdist(features).mean())
        each = [torch.pdist(features[self.labels == c]).mean() for c in self.labels.unique()]
        return float(torch.stack(each).mean())

    def __call__(self, draw: Draw, seed: int) -> dict[str, Any]:
        images = draw_all(draw, self.labels, self.count, seed).images
        return {**self.judge(images, self.labels), "diversity": self.diversity(images) / self.real_diversity}

    def shown(self, draw: Draw, seed: int) -> Tensor:
        """Twenty images, two of each of ten classes."""
        classes = None if self.teacher.num_classes is None else torch.arange(20) % self.teacher.num_classes
        return draw_all(draw, classes, 20, seed).images


def _classifier(data: Data, out: Path) -> DigitClassifier | None:
    """None for the digits, whose classifier is shipped; else one trained on the data, once."""
    if tuple(data.shape) == (1, 8, 8):
        return None
    if data.num_classes is None:
        raise UserError(f"data: {data.name!r} has no labels, by which the board's feature network is trained")
    file = out / "classifier.safetensors"
    if not file.exists():
        real = data.get(torch.arange(len(data)))
        assert real.labels is not None
        trained = train_classifier(real.images, real.labels, 0, epochs=5, classes=data.num_classes)
        atomic_write(file, save(trained.state_dict()))
    network = DigitClassifier(data.shape, data.num_classes)
    network.load_state_dict(load_file(file))
    return network.eval().requires_grad_(False)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _same_board(file: Path, given: dict[str, Any]) -> None:
    """UserError if the folder's rows are of another suite, teacher, data or budget than those given now."""
    made = json.loads(file.read_text()) if file.exists() else given
    for name, value in given.items():
        if made[name] != value:
            was = f"{file.parent} was made with {made[name]!r}"
            raise UserError(f"{name}: {value!r} is not the board's, {was}; choose another --out")
    write_json(given, file)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's work on a CPU keeps to one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def bench(
    suite_name: str,
    *,
    methods: Sequence[str] | None,
    seeds: Sequence[int],
    budget: int | None,
    out: Path,
    teacher: str | None = None,
    data: str | None = None,
    jobs: int | None = None,
) -> list[dict[str, Any]]:
    """`diffdistill bench`: trains and judges what is missing, writes the board after every entry, returns its rows.

    `jobs` trainings run at a time, each with one thread; default: one a core, or one on a GPU.
    """
    suite = SUITES[suite_name]
    source, images = teacher or suite.teacher, data or suite.data
    if not source or not images:
        raise UserError(f"teacher, data: the suite {suite_name!r} has none of its own; give --teacher and --data")
    jobs = jobs or (1 if torch.cuda.is_available() else _cores())
    budget = budget or suite.budget
    judged = on_device(load_teacher(source))
    _same_board(out / "suite.json", {"suite": suite_name, "teacher": source, "data": images, "budget": budget})
    evaluation = Evaluation(judged, open_data(images, resolution=judged.shape[1], channels=judged.shape[0]), out)
    shared = {"teacher": source, "data": images, "pairs": str(_pairs(source, out)), "threads": 1}
    chosen = entries(suite, methods, seeds)
    plans: dict[str, Plan] = {}
    for entry in chosen:
        if entry.name not in plans:
            plans[entry.name] = planned(entry, suite, budget, shared)
    guided_teacher = Lock()
    results: list[dict[str, Any]] = []
    pictures: dict[str, Tensor] = {}

    def judge(key: str, steps: int, seed: int | None, draw: Draw, **more: Any) -> Judged:
        rows = []
        for noise in seeds:
            file = out / "rows" / f"{key}-{steps}-seed{seed}-noise{noise}.json".replace(" ", "-")
            if not file.exists():
                row = {"method": key, "steps": steps, "seed": seed, "noise": noise}
                write_json({**row, **evaluation(draw, noise), **more}, file)
            rows.append(json.loads(file.read_text()))
        return Judged(rows, f"{key}, {steps} step{'s' if steps > 1 else ''}", evaluation.shown(draw, seeds[0]))

    def work(entry: Entry) -> Iterator[Judged]:
        values, passes, scale = plans[entry.name]
        told = train(entry, values | {"seed": entry.seed}, out / "runs")
        for sampler in students(entry, out / "runs"):
            steps = len(sampler.levels)
            if scale != 1 and steps > 4:  # one pass a step against the teacher's two
                with guided_teacher:
                    yield judge(
                        f"teacher, guidance {scale:g}", steps, None, partial(teacher_images, judged, steps, scale)
                    )
            yield judge(
                entry.name, steps, entry.seed, partial(sampler, judged.shape),
                **{"training s": told["seconds"], "peak MB": told["peak_mb"], "training steps": values["steps"]},
                passes=passes, least=entry.info.passes.get(entry.preset),
            )  # fmt: skip

    def collect(judged: Iterable[Judged]) -> None:
        for rows, label, shown in judged:
            results.extend(rows)
            pictures.setdefault(label, shown)

    with ThreadPoolExecutor(jobs) as pool:
        own = [
            pool.submit(judge, "teacher", n, None, partial(teacher_images, judged, n, 1.0)) for n in suite.teacher_steps
        ]
        waiting = [pool.submit(lambda entry: list(work(entry)), entry) for entry in chosen]
        try:
            collect(future.result() for future in own)
            for entry, future in zip(chosen, waiting, strict=True):
                collect(future.result())
                write_board(suite_name, results, pictures, budget, out)
                print(f"{entry.folder} is done", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what is running ends first
            raise
    rows = write_board(suite_name, results, pictures, budget, out)
    print(text_table(rows, COLUMNS))
    print(f"board: {out / 'board.md'}, {out / 'board.json'}, {out / 'quality.png'}, {out / 'samples.png'}")
    return rows


def _pairs(teacher: str, out: Path) -> Path:
    """Pairs for the methods that want them, made once."""
    from diffdistill.data.pairs import make_pairs

    folder = out / "pairs"
    make_pairs(teacher=teacher, out=str(folder), count=2000, sampling_steps=32)
    return folder


def averaged(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method and number of steps: means over training seeds and noise, deviation over the former.

    The teacher has no training seed; its deviation is over noise.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        same = groups.setdefault((result["method"], result["steps"]), [])
        if (result["seed"], result["noise"]) not in [(r["seed"], r["noise"]) for r in same]:
            same.append(result)
    rows = []
    for (method, steps), same in groups.items():
        by = "noise" if same[0]["seed"] is None else "seed"
        kinds = sorted({r[by] for r in same})
        row: dict[str, Any] = {"method": method, "steps": steps, "seeds": len(kinds)}
        for column in COLUMNS:
            numbers = [r[column] for r in same if isinstance(r.get(column), (int, float))]
            if column not in row and numbers:
                row[column] = fmean(numbers)
        distances = [fmean(r["frechet distance"] for r in same if r[by] == kind) for kind in kinds]
        row["+-"] = stdev(distances) if len(distances) > 1 else None
        rows.append(row)
    return sorted(rows, key=lambda r: (not r["method"].startswith("teacher"), r["steps"], r["frechet distance"]))


def write_board(
    suite: str, results: Sequence[dict[str, Any]], pictures: dict[str, Tensor], budget: int, out: Path
) -> list[dict[str, Any]]:
    """board.json, board.md, quality.png and samples.png."""
    rows = averaged(results)
    report = {"suite": suite, "budget": budget, "environment": environment()}
    report |= {"columns": COLUMNS, "rows": rows, "results": list(results)}
    write_json(report, out / "board.json")
    write_text(markdown_table(rows, COLUMNS), out / "board.md")
    if pictures:
        save_png(side_by_side(list(pictures.items()), scale=4), out / "samples.png")
    quality_picture(rows, out / "quality.png")
    return rows


def quality_picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Fréchet distance against steps, both logarithmic, one line a method."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("bench: the picture needs matplotlib; pip install 'diffdistill[eval]'") from None
    import io

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["method"] for row in rows))
    for i, name in enumerate(sorted(names, key=lambda name: (not name.startswith("teacher"), name))):
        points = sorted((r["steps"], r["frechet distance"]) for r in rows if r["method"] == name)
        style: dict[str, Any] = {"color": "black", "linewidth": 2, "linestyle": "-" if name == "teacher" else "none"}
        if not name.startswith("teacher"):
            style = {"color": colormaps["tab20"](i % 20), "linewidth": 1}
        axes.plot(*zip(*points, strict=True), marker="osD^vP*X"[i % 8], markersize=6, label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="Fréchet distance (lower is better)")
    axes.set_xticks([1, 2, 4, 8, 16, 32], [str(n) for n in (1, 2, 4, 8, 16, 32)])
    axes.legend(fontsize=7, ncols=2)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    atomic_write(path, file.getvalue())
