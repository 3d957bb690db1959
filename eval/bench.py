"""The scoreboard: every method on the same teacher, budget, seeds and evaluation.

On a CPU each training has one thread and as many run at a time as there are cores, which is quicker than one with all
of them. What is done is not repeated, and a stopped training resumes. Every student, whatever its training's seed, is
judged on the noise of all seeds, as the teacher is. Samples are compared with the suite's reference, which are images
that neither teacher nor students learned from, or with all images of the data where there are no others.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from diffdistill.data.images import Data, open_data
from diffdistill.data.pairs import make_pairs
from diffdistill.data.processes import Processes
from diffdistill.data.progress import rate_and_rest
from diffdistill.errors import UserError
from diffdistill.eval.board import COLUMNS, write_board
from diffdistill.eval.budget import DERIVED, PAIR_STEPS, PAIRS, Entry, TrainingPlan, entries, planned
from diffdistill.eval.features.classifiers import classifier_measure
from diffdistill.eval.features.digit_classifier import DigitClassifier
from diffdistill.eval.features.digit_classifier import train as train_classifier
from diffdistill.eval.features.measure import Measure
from diffdistill.eval.judge import Judge, JudgeOptions, score
from diffdistill.eval.models import Draw, SamplingOptions, pixel_model, teacher_images
from diffdistill.eval.protocol import load as load_protocol
from diffdistill.eval.report import text_table, write_json
from diffdistill.eval.suites import Suite
from diffdistill.eval.trainings import students, train
from diffdistill.families import load_teacher
from diffdistill.files import atomic_write
from diffdistill.players.teacher import Teacher

MOST_IMAGES = 10000
SEEDS = (100, 101, 102)
"""Of trainings and noise. The presets for digits were chosen by what came of other seeds, 0, 1 and 2 among them."""


_BETWEEN_BOARDS = 60.0
"""Seconds. Its pictures take some, and of what was done before there may be forty entries at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class BenchOptions:
    """What is trained and judged; None is the suite's."""

    methods: Sequence[str] | None = None  #: METHOD or METHOD:PRESET
    seeds: Sequence[int] = SEEDS
    budget: int | None = None
    teacher: str | None = None
    data: str | None = None
    reference: str | None = None  #: images that neither the teacher nor its students learn from
    jobs: int | None = None  #: trainings at a time; default: one a core, or one on a GPU
    device: str = "auto"
    attention: str = "auto"
    threads: int = 1  #: of each training, and of the evaluation


@dataclass(frozen=True)
class Board:
    """A scoreboard: a row for each method and number of steps."""

    rows: list[dict[str, Any]]
    out: Path  #: the folder with board.md, board.json and the pictures

    def __str__(self) -> str:
        """The table for a terminal."""
        return text_table(self.rows, COLUMNS)


class JudgedModel(NamedTuple):
    """Rows of one model at one number of steps, a row for each noise; a label and images for the picture."""

    rows: list[dict[str, Any]]
    label: str
    shown: Tensor


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Torch's work on a CPU keeps to so many threads inside; 0: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_board(suite: Suite, options: BenchOptions, out: Path) -> Board:
    """Trains and judges what is missing, writes the board at most once a minute and at the end, and returns it."""
    with threads_of_torch(options.threads):
        return _Bench(suite, options, out).run()


class _Bench:
    """What all trainings and evaluations of a board share."""

    def __init__(self, suite: Suite, options: BenchOptions, out: Path) -> None:
        self.suite, self.options, self.out = suite, options, out
        source, images = options.teacher or suite.teacher, options.data or suite.data
        if not source or not images:
            raise UserError(f"teacher, data: the suite {suite.name!r} has none of its own; give --teacher and --data")
        self.budget = options.budget or suite.budget
        self.processes = Processes(options.device, options.threads)
        self.teacher = load_teacher(source)
        reference = options.reference or suite.reference or images
        shared = {
            "suite": suite.name, "teacher": source, "data": images, "reference": reference, "budget": self.budget,
            "attention": options.attention,
        }  # fmt: skip
        _same_board(out / "suite.json", shared)
        self.compared = f"Compared with the images of {reference}"
        self.compared += ", which training read too: none are held out." if reference == images else "."
        self.judge = board_judge(suite, self.teacher, images, reference, options, out, self.processes)
        self.judge.processes = self.processes.alone()  # each process judges models of its own
        self.teacher.denoiser.to(self.judge.device)
        self.shared: dict[str, Any] = {
            "teacher": source, "data": images, "pairs": str(out / "pairs"), "threads": options.threads,
            "device": options.device, "attention": options.attention,
        }  # fmt: skip
        self.in_process = Lock()

    def run(self) -> Board:
        """The board; of several processes each does its share of the entries first, and all but the first have none."""
        suite, options = self.suite, self.options
        chosen = entries(suite, options.methods, options.seeds)
        plans: dict[str, TrainingPlan] = {}
        for entry in chosen:
            if entry.name in plans:
                continue
            try:
                plans[entry.name] = planned(entry, suite, self.budget, self.shared)
            except UserError as error:
                if options.methods or suite.preset != DERIVED:
                    raise
                print(f"{entry.info.name} is left out: {error}", flush=True)
        chosen = [entry for entry in chosen if entry.name in plans]
        if any("pairs" in plan.values for plan in plans.values()):
            source, pairs = self.shared["teacher"], self.shared["pairs"]
            make_pairs(
                teacher=source, out=pairs, count=PAIRS, sampling_steps=PAIR_STEPS,
                device=options.device, attention=options.attention,
            )  # fmt: skip
        if self.processes.count > 1:
            self.share(chosen[self.processes.rank :: self.processes.count], plans)
            self.processes.wait()
            if self.processes.rank > 0:
                return Board([], self.out)
        return self.board(chosen, plans)

    def share(self, chosen: Sequence[Entry], plans: Mapping[str, TrainingPlan]) -> None:
        """Train and judge these entries; `board` finds all of it."""
        with self.at_a_time() as pool:
            for entry, _ in zip(chosen, pool.map(lambda e: self.work(e, plans[e.name]), chosen), strict=True):
                print(f"{entry.folder} is done", flush=True)

    def board(self, chosen: Sequence[Entry], plans: Mapping[str, TrainingPlan]) -> Board:
        """Train and judge what is missing of these entries, and write the board now and then."""
        results: list[dict[str, Any]] = []
        pictures: dict[str, Tensor] = {}

        def collect(judged: Iterable[JudgedModel]) -> None:
            for rows, label, shown in judged:
                results.extend(rows)
                pictures.setdefault(label, shown)

        began = written = time.perf_counter()
        print(f"{len(chosen)} trainings of at most {self.budget} passes each, and the teacher, are judged", flush=True)
        with self.at_a_time() as pool:
            own = [pool.submit(self.alone, partial(self.judged_teacher, n)) for n in self.suite.teacher_steps]
            waiting = [pool.submit(self.work, entry, plans[entry.name]) for entry in chosen]
            collect(future.result() for future in own)
            for done, (entry, future) in enumerate(zip(chosen, waiting, strict=True), 1):
                collect(future.result())
                if time.perf_counter() - written > _BETWEEN_BOARDS:
                    self.write(results, pictures)
                    written = time.perf_counter()
                if self.processes.count == 1:  # it was said before
                    rest = rate_and_rest(done / (time.perf_counter() - began), len(chosen) - done, "training")
                    print(f"{entry.folder} is done, {done}/{len(chosen)}  {rest}", flush=True)
        return Board(self.write(results, pictures), self.out)

    @contextmanager
    def at_a_time(self) -> Iterator[ThreadPoolExecutor]:
        """As many trainings as the options say, by default one a core or GPU; none begins after a failure."""
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.processes.count > 1 else 1
        jobs = self.options.jobs or (1 if self.judge.device.type == "cuda" else max(1, _cores() // beside))
        with ThreadPoolExecutor(jobs) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is running ends first
                raise

    def write(self, results: list[dict[str, Any]], pictures: dict[str, Tensor]) -> list[dict[str, Any]]:
        """The board of what is done so far; its rows."""
        return write_board(self.suite.name, results, pictures, self.budget, self.compared, self.out)

    def alone(self, judge: Callable[[], T]) -> T:
        """What that gives, while no other model is made or judged.

        While diffusers loads a network, every network that another thread makes has no weights, for good if that
        thread loads one too.
        """
        with self.in_process:
            return judge()

    def judged_teacher(self, steps: int, scale: float = 1.0) -> JudgedModel:
        """The rows of the teacher in so many steps, with that guidance."""
        key = "teacher" if scale == 1 else f"teacher, guidance {scale:g}"
        return self.judged(key, steps, None, partial(teacher_images, self.teacher, steps, scale))

    def judged(self, key: str, steps: int, seed: int | None, draw: Draw, **more: Any) -> JudgedModel:
        """The rows of a model, those that are there already as they are."""
        rows = []
        model = pixel_model(key, "board", draw, self.teacher, steps, {}, self.judge.sampling)
        for noise in self.options.seeds:
            file = self.out / "rows" / f"{key}-{steps}-seed{seed}-noise{noise}.json".replace(" ", "-")
            if not file.exists():
                row = {"method": key, "steps": steps, "seed": seed, "noise": noise}
                with tempfile.TemporaryDirectory() as folder:
                    values = score(model, self.judge.with_seed(noise), Path(folder), quiet=True).values
                write_json({**row, **values, **more}, file)
            rows.append(json.loads(file.read_text()))
        shown = self.judge.with_seed(self.options.seeds[0]).shown(model)
        return JudgedModel(rows, f"{key}, {steps} step{'s' if steps > 1 else ''}", shown)

    def work(self, entry: Entry, plan: TrainingPlan) -> list[JudgedModel]:
        """Trains one entry, beside others, and judges its students, alone."""
        cost = train(entry, self.suite, plan.values | {"seed": entry.seed}, self.out / "runs")
        return self.alone(lambda: list(self.judged_students(entry, plan, cost)))

    def judged_students(self, entry: Entry, plan: TrainingPlan, cost: Mapping[str, Any]) -> Iterator[JudgedModel]:
        """The judged students of a trained entry, and their guided teacher."""
        for sampler in students(entry, self.suite, self.out / "runs", self.judge.device):
            steps = len(sampler.levels)
            if plan.scale != 1:  # one pass a step against the guided teacher's two
                yield self.judged_teacher(steps, plan.scale)
            yield self.judged(
                entry.name, steps, entry.seed, partial(sampler, self.teacher.shape),
                **{"training s": cost["seconds"], "peak MB": cost["peak_mb"], "training steps": plan.values["steps"]},
                passes=plan.passes, least=self.suite.method(entry.info.name).passes.get(entry.preset),
            )  # fmt: skip


class _First:
    """The first real images of a data set."""

    def __init__(self, data: Data, count: int) -> None:
        self.data, self.count = data, count
        self.name, self.shape, self.num_classes = data.name, data.shape, data.num_classes
        self.fingerprint = f"{data.fingerprint} {count}"

    def __len__(self) -> int:
        return self.count

    def get(self, indices: Tensor) -> Any:
        return self.data.get(indices)


def board_judge(
    suite: Suite, teacher: Teacher, images: str, reference: str, options: BenchOptions, out: Path, processes: Processes
) -> Judge:  # fmt: skip
    """The suite's protocol on the data: with the shipped classifier of 8x8 digits, else one trained on the data.

    As many images are drawn as there are in the data, or in the reference if it has more.
    """
    protocol = load_protocol(suite.protocol)
    channels, side = teacher.shape[:2]
    data, real = (open_data(spec, resolution=side, channels=channels) for spec in (images, reference))
    count = min(max(len(data), len(real)), MOST_IMAGES)
    measures: dict[str, Measure] = {}
    device = torch.device("cpu")
    network = _classifier(data, out, processes)
    if network is not None:
        key = protocol.measures[0]
        measures[key] = classifier_measure(key, device, network, f"classifier trained on {data.name}")
    protocol = replace(
        protocol, count=count, resolution=data.shape[-1], channels=data.shape[0], reference=reference,
        classes=teacher.num_classes, conditions=["classes", "none"], published=[],
    )  # fmt: skip
    judge_options = JudgeOptions(
        protocol, reference=reference, bootstrap=0, device=options.device, threads=options.threads,
        sampling=SamplingOptions(attention=options.attention),
    )  # fmt: skip
    shown: Any = _First(real, min(count, len(real)))
    return Judge(judge_options, data=shown, measures=measures)


def _classifier(data: Data, out: Path, processes: Processes) -> DigitClassifier | None:
    """None for the digits, whose classifier is shipped; else one trained on the data, once."""
    if tuple(data.shape) == (1, 8, 8):
        return None
    if data.num_classes is None:
        raise UserError(f"data: {data.name!r} has no labels, by which the board's feature network is trained")
    file = out / "classifier.safetensors"
    if processes.rank == 0 and not file.exists():
        real = data.get(torch.arange(len(data)))
        assert real.labels is not None
        trained = train_classifier(real.images, real.labels, 0, epochs=5, classes=data.num_classes)
        atomic_write(file, save(trained.state_dict()))
    processes.wait()
    network = DigitClassifier(data.shape, data.num_classes)
    network.load_state_dict(load_file(file))
    return network.eval().requires_grad_(False)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _same_board(file: Path, settings: dict[str, Any]) -> None:
    """UserError if the folder's rows are of another suite, teacher, data, reference or budget than those chosen."""
    made = json.loads(file.read_text()) if file.exists() else settings
    for name, value in settings.items():
        was_made_with = made.get(name, value)
        if was_made_with != value:
            was = f"{file.parent} was made with {was_made_with!r}"
            raise UserError(f"{name}: {value!r} is not the board's, {was}; choose another --out")
    write_json(settings, file)
