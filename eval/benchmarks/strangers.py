"""Teachers of a stranger's kind, each distilled by several methods with the defaults alone in a fixed time.

    python -m diffdistill.eval.benchmarks.strangers --images mnist.npz --out runs/strangers --docs docs/strangers.md

Each teacher is made by a plain loop of diffusers and saved as a stock pipeline: an epsilon DDPM with linear betas that
clips its samples, linear flow matching, and EDM's preconditioning. A method gets as many steps as fit the minutes,
measured over a few, its pairs included. The one-step student is judged against the teacher's own 8 and 50 steps, on
the same noise. What is there already is not done again, so that a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor

from diffdistill.data.images import open_data
from diffdistill.data.progress import slow, speaking
from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.eval.choice import held_out
from diffdistill.eval.judge import Judge, JudgeOptions, Score, score
from diffdistill.eval.ladder import ladder_models
from diffdistill.eval.metrics.bootstrap import interval
from diffdistill.eval.protocol import load
from diffdistill.eval.report import markdown_table, text_table, write_between, write_json, write_text
from diffdistill.files import atomic_folder
from diffdistill.options import nearest
from diffdistill.pictures import save_png, side_by_side
from diffdistill.training.metrics import metrics_lines

TEACHER_STEPS = (8, 50)
METHODS = ("dmd2", "consistency", "sid", "dmd", "lcm")
COLUMNS = (
    "teacher", "model", "steps", "minutes", "training steps", "frechet distance", "to 8 steps", "95% of it",
    "recall", "to 50 steps", "ahead",
)  # fmt: skip
LEAST_RECALL = 0.7  # of the teacher's in 50 steps
MEASURED = 12  # steps of the short run whose seconds a step say how many fit
MARGIN = 0.95  # of the time: pictures, checkpoints and the export take the rest


@dataclass(frozen=True)
class Settings:
    """What is made, trained and judged."""

    images: str
    out: Path
    teachers: Sequence[str] = ("ddpm", "flow", "edm")
    methods: Sequence[str] = METHODS
    minutes: float = 20.0  #: of each training
    threads: int = 2
    count: int | None = None  #: images that are judged; default: the protocol's
    teacher_steps: int = 4000  #: of a teacher's training
    widths: Sequence[int] = (32, 64, 64)
    steps: int | None = None  #: of each training, in place of what fits the minutes
    pairs: int | None = None  #: for `dmd`, made in two of the teacher's steps, in place of the defaults'
    seed: int = 0
    judge_only: bool = False  #: the students that are there


# -- the teachers ------------------------------------------------------------------------------------------

Loss = Callable[[UNet2DModel, Tensor], Tensor]
"""Of a batch of images (B, C, H, W) in [-1, 1]."""


def ddpm_loss(scheduler: DDPMScheduler) -> Loss:
    """Ho et al. 2020 (arXiv:2006.11239), eq. 14."""

    def loss(network: UNet2DModel, x: Tensor) -> Tensor:
        noise, t = torch.randn_like(x), torch.randint(scheduler.config.num_train_timesteps, (len(x),))
        return (network(scheduler.add_noise(x, noise, t), t).sample - noise).square().mean()

    return loss


def flow_loss(network: UNet2DModel, x: Tensor) -> Tensor:
    """Lipman et al. 2022 (arXiv:2210.02747), eq. 23, with the noise at time 1000."""
    noise, s = torch.randn_like(x), torch.rand(len(x), 1, 1, 1)
    return (network((1 - s) * x + s * noise, 1000 * s.flatten()).sample - (noise - x)).square().mean()


def edm_loss(network: UNet2DModel, x: Tensor, data_std: float = 0.5) -> Tensor:
    """Karras et al. 2022 (arXiv:2206.00364), eq. 8 and table 1."""
    sigma = torch.exp(1.2 * torch.randn(len(x), 1, 1, 1) - 1.2)
    total = (sigma**2 + data_std**2).sqrt()
    c_skip, c_out = data_std**2 / total**2, sigma * data_std / total
    noisy = x + sigma * torch.randn_like(x)
    made = network(noisy / total, (sigma.log() / 4).flatten()).sample
    return (made - (x - c_skip * noisy) / c_out).square().mean()


def _kinds() -> dict[str, tuple[Any, Any, Loss]]:
    """Kind of teacher -> scheduler, pipeline, loss."""
    ddpm = DDPMScheduler()  # linear betas, epsilon, clip_sample
    return {
        "ddpm": (ddpm, DDPMPipeline, ddpm_loss(ddpm)),
        "flow": (FlowMatchEulerDiscreteScheduler(), ConsistencyModelPipeline, flow_loss),
        "edm": (EDMEulerScheduler(sigma_data=0.5), ConsistencyModelPipeline, edm_loss),
    }


def make_teacher(kind: str, settings: Settings) -> Path:
    """The folder of a stock pipeline, trained by a plain loop unless it is there."""
    folder = settings.out / "teachers" / kind
    if (folder / "model_index.json").is_file():
        return folder
    scheduler, pipeline, loss = _kinds()[kind]
    data = open_data(settings.images)
    torch.manual_seed(settings.seed)
    network = _network(data.shape, settings.widths)
    average = copy.deepcopy(network).eval()
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    steps = settings.teacher_steps
    with speaking(f"the {kind} teacher"):
        for step in slow(range(steps), steps, "step"):
            done = step / steps
            warm, cool = min(1, (step + 1) / 100), max(0.02, (1 + math.cos(math.pi * done)) / 2)
            optimizer.param_groups[0]["lr"] = 1e-3 * warm * cool
            x = data.get(torch.randint(len(data), (64,))).images
            optimizer.zero_grad()
            loss(network, x).backward()
            optimizer.step()
            with torch.no_grad():
                decay = min(0.999, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, "model_index.json") as partial:
        pipeline(average, scheduler).save_pretrained(partial)
    return folder


def _network(shape: Sequence[int], widths: Sequence[int]) -> UNet2DModel:
    """Attention at the lowest resolution alone."""
    plain = len(widths) - 1
    return UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=tuple(widths),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
    )


# -- the trainings -----------------------------------------------------------------------------------------


def train_student(kind: str, method: str, teacher: Path, settings: Settings) -> dict[str, Any]:
    """Trains a student unless it is there; seconds, with those of pairs, and training steps."""
    run = settings.out / "runs" / f"{kind}-{method}"
    note = run.with_suffix(".json")
    if note.is_file():
        return dict(json.loads(note.read_text()))
    if run.exists():  # it was stopped: what it took so far nobody knows
        shutil.rmtree(run)
    options = ["--method", method, "--teacher", str(teacher), "--data", settings.images]
    seconds = 0.0
    if method == "dmd":
        pairs = settings.out / "pairs" / kind
        if pairs.exists():
            shutil.rmtree(pairs)
        few = [] if settings.pairs is None else ["--count", str(settings.pairs), "--sampling-steps", "2"]
        seconds = _run(["pairs", "--teacher", str(teacher), "--out", str(pairs), *few], settings)
        options += ["--pairs", str(pairs)]
    steps = settings.steps or fitting_steps(options, 60 * settings.minutes - seconds, settings)
    own = ["--steps", str(steps), "--seed", str(settings.seed), "--out", str(run)]
    seconds += _run(["train", *options, *own], settings)
    cost = {"seconds": round(seconds, 1), "training steps": steps}
    write_json(cost, note)
    return cost


def fitting_steps(options: Sequence[str], seconds: float, settings: Settings) -> int:
    """How many training steps fit into so many seconds: measured over a short run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        short = ["--steps", str(MEASURED), "--log-every", "2", "--sample-every", "0", "--out", str(run)]
        _run(["train", *options, *short], settings, silent=True)
        taken = [float(values["seconds_per_step"]) for _, values in metrics_lines(run / "metrics.jsonl")]
    return max(1, int(MARGIN * seconds / statistics.median(taken[1:])))


def _run(arguments: Sequence[str], settings: Settings, silent: bool = False) -> float:
    """Seconds of a command of diffdistill in a process of its own, which says where it is; UserError where it fails."""
    command = [sys.executable, "-m", "diffdistill", *arguments, "--threads", str(settings.threads)]
    started, said = time.perf_counter(), subprocess.DEVNULL if silent else None
    done = subprocess.run(command, stdout=said, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"strangers: {' '.join(arguments[:3])} failed ({last})")
    return time.perf_counter() - started


# -- the judging -------------------------------------------------------------------------------------------


def benchmark(settings: Settings) -> list[dict[str, Any]]:
    """Makes, trains and judges what is missing; writes table.md, results.json and a picture after each teacher."""
    for name in settings.teachers:
        if name not in _kinds():
            raise UserError(f"teachers: {name!r} is not known; {nearest(name, list(_kinds()))}")
    torch.set_num_threads(settings.threads)
    protocol = load("mnist", count=settings.count)
    reference = held_out(settings.images)
    judge = Judge(JudgeOptions(protocol, reference=reference, device="cpu", threads=settings.threads))
    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, Tensor]] = []
    for kind in settings.teachers:
        for row, images in _judged(kind, settings, judge):
            rows.append(row)
            shown.append((f"{kind}: {row['model']}", images))
            print(text_table(rows[-1:], COLUMNS), flush=True)
        _write(rows, shown, settings, judge)
    return rows


def _judged(kind: str, settings: Settings, judge: Judge) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The rows of one teacher and its students, with images from the same noise."""
    teacher = make_teacher(kind, settings)
    measured = settings.out / "measured"
    own = []
    for model in ladder_models(teacher, judge.sampling, None, TEACHER_STEPS, judge.protocol):
        result = score(model, judge, measured / f"{kind}-{model.steps}", quiet=True)
        own.append(result)
        yield _row(kind, replace(result, model=f"teacher, {model.steps} steps"), own), _first(result)
    for method in settings.methods:
        if settings.judge_only and not (settings.out / "runs" / f"{kind}-{method}.json").is_file():
            continue
        cost = train_student(kind, method, teacher, settings)
        student = settings.out / "runs" / f"{kind}-{method}" / "student"
        model = ladder_models(student, judge.sampling, teacher, (), judge.protocol)[-1]
        result = score(model, judge, measured / f"{kind}-{method}", quiet=True)
        row = _row(kind, replace(result, model=method), own)
        row |= {"minutes": round(cost["seconds"] / 60, 1), "training steps": cost["training steps"]}
        yield row, _first(result)


def _first(result: Score) -> Tensor:
    assert result.shown is not None
    return result.shown[:12]


def _row(kind: str, result: Score, teacher: Sequence[Score]) -> dict[str, Any]:
    """A row of the table; the distance over that of the teacher's 8 steps, and the recall over that of its 50.

    The interval of the ratio is over images drawn anew, for both models those of the same noise.
    """
    distance, recall = result.values["frechet distance"], result.values.get("recall")
    row: dict[str, Any] = {
        "teacher": kind, "model": result.model, "steps": result.steps, "frechet distance": distance, "recall": recall,
    }  # fmt: skip
    if len(teacher) < len(TEACHER_STEPS) or distance is None:
        return row
    few, many = (each.values for each in teacher)
    if few["frechet distance"]:
        ratio = row["to 8 steps"] = distance / few["frechet distance"]
        if result.model != teacher[0].model:
            ratios = result.replicates["frechet distance"] / teacher[0].replicates["frechet distance"]
            row["95% of it"] = "{:.2f} to {:.2f}".format(*interval(ratios, ratio))
    if recall is not None and many.get("recall"):
        row["to 50 steps"] = recall / (many["recall"] or 1.0)
    if not result.model.startswith("teacher"):
        ahead = row.get("to 8 steps", 1.0) < 1 and row.get("to 50 steps", 0.0) >= LEAST_RECALL
        row["ahead"] = "yes" if ahead else "no"
    return row


def _write(rows: list[dict[str, Any]], shown: list[tuple[str, Tensor]], settings: Settings, judge: Judge) -> None:
    reference = None if judge.reference is None else judge.reference.about
    about = {
        "protocol": judge.protocol.name, "count": judge.protocol.count, "reference": reference,
        "minutes": settings.minutes, "threads": settings.threads, "seed": settings.seed, "environment": environment(),
    }  # fmt: skip
    write_json({"rows": rows, **about}, settings.out / "results.json")
    write_text(markdown_table(rows, COLUMNS), settings.out / "table.md")
    save_png(side_by_side(shown, scale=1 if max(judge.protocol.pixels) > 16 else 3), settings.out / "images.png")


def write_docs(page: Path, settings: Settings) -> None:
    """Puts the table of the benchmark, how it was made and its picture between the marks of a page."""
    results = json.loads((settings.out / "results.json").read_text())
    made = results["environment"]
    lines = [
        f"{results['minutes']:g} minutes for each student, threads: {results['threads']} ({made['platform']}, torch "
        f"{made['torch']}, commit {made['commit']}, seed {results['seed']}); {results['count']} images against "
        f"{results['reference']}.",
        "",
        markdown_table(results["rows"], COLUMNS),
        f"![One row for each model, from the same noise]({page.stem}.png)",
    ]
    write_between(page, "\n".join(lines))
    shutil.copyfile(settings.out / "images.png", page.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--images", required=True, help="28x28 grey digits with a test split, such as mnist.npz")
    parser.add_argument("--teachers", default="ddpm,flow,edm", help="kinds of teachers, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, separated by commas")
    parser.add_argument("--minutes", type=float, default=20.0, help="time of each training, with its pairs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each training and of the evaluation")
    parser.add_argument("--count", type=int, help="images that are judged; default: the protocol's")
    parser.add_argument("--teacher-steps", type=int, default=4000, help="steps of each teacher's training")
    parser.add_argument("--widths", default="32,64,64", help="channels of the teachers' levels, separated by commas")
    parser.add_argument("--steps", type=int, help="steps of each training; default: as many as fit the minutes")
    parser.add_argument("--pairs", type=int, help="for a trial of dmd: so many pairs, of two of the teacher's steps")
    parser.add_argument("--seed", type=int, default=0, help="of the teachers and of the trainings")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/strangers"), help="the folder; one that is there goes on"
    )
    parser.add_argument(
        "--judge-only", action="store_true", help="train nothing, and judge the students that are there"
    )
    parser.add_argument("--docs", type=Path, help="a page whose marked part becomes the table and picture")
    options = vars(parser.parse_args(argv))
    page = options.pop("docs")
    for name in ("teachers", "methods", "widths"):
        options[name] = tuple(options[name].split(","))
    settings = Settings(**options | {"widths": tuple(map(int, options["widths"]))})
    try:
        rows = benchmark(settings)
        if page is not None:
            write_docs(page, settings)
    except UserError as error:
        print(f"strangers: {error}", file=sys.stderr)
        return 2
    print(text_table(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
