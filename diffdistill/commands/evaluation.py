"""The commands that draw and judge, as they are until each of them has its options in a dataclass."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from diffdistill.errors import UserError
from diffdistill.options import coerce, nearest


def sample(
    folder: str | PathLike[str],
    *,
    prompts: Sequence[str] | None = None,
    count: int | None = None,
    classes: Sequence[int] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    out: str | PathLike[str] = "samples.png",
    trace: bool = False,
) -> Path:
    """Draw images from a teacher or student folder (or a hub id, or 'digits') as one PNG; returns its path.

    Options are those of `diffdistill sample`. Raises UserError for whatever cannot be used.
    """
    from diffdistill.eval.sample import sample_picture

    return sample_picture(fspath(folder), prompts, count, classes, steps, guidance_scale, seed, fspath(out), trace)


def evaluate(
    folder: str | PathLike[str],
    *,
    protocol: str | None = None,
    teacher: str | PathLike[str] | None = None,
    teacher_steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    data: str = "digits",
    count: int | None = None,
    seed: int | None = None,
    out: str | PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """Compare a student with its teacher at several numbers of steps, or judge any model by a protocol.

    Returns the rows of the table, which is also printed and written. Raises UserError for whatever cannot be used.
    """
    into = None if out is None else fspath(out)
    if protocol is None:
        from diffdistill.eval.evaluate import evaluate_run

        source = None if teacher is None else fspath(teacher)
        return evaluate_run(fspath(folder), source, list(teacher_steps), data, count, seed or 0, into)
    from diffdistill.eval.scoring import evaluate_protocol

    report = evaluate_protocol(fspath(folder), _judged_by(protocol, count, seed), into)
    return [] if report is None else report["rows"]


def compare(
    folders: Sequence[str | PathLike[str]],
    *,
    protocol: str,
    count: int | None = None,
    seed: int | None = None,
    out: str | PathLike[str] = "runs/compare",
) -> list[dict[str, Any]]:
    """Judge several models by one protocol; returns the rows of the table, which is also printed and written."""
    from diffdistill.eval.compare import compare

    report = compare([fspath(folder) for folder in folders], _judged_by(protocol, count, seed), fspath(out))
    return [] if report is None else report["rows"]


def speed(
    folders: Sequence[str | PathLike[str]],
    *,
    batch_sizes: Sequence[int] = (1, 4),
    repeats: int = 20,
    device: str = "auto",
    out: str | PathLike[str] = "runs/speed",
) -> list[dict[str, Any]]:
    """Time models against their teacher; returns the rows of the table, which is also printed and written."""
    from diffdistill.environment import use_machine
    from diffdistill.eval.speed import Asked, speed

    asked = Asked(batch_sizes=batch_sizes, repeats=repeats, device=use_machine(device))
    return speed([fspath(folder) for folder in folders], asked, fspath(out))


def _judged_by(protocol: str, count: int | None, seed: int | None) -> Any:
    from diffdistill.eval.models import Wanted
    from diffdistill.eval.protocol import load
    from diffdistill.eval.scoring import Asked

    return Asked(load(protocol, count=count, seed=seed), Wanted())


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    sample = command("sample", "draw images from a teacher or student folder as one PNG")
    sample.add_argument("folder", help="a run, the folder of a student or a teacher, a hub id, or 'digits'")
    sample.add_argument("--prompt", action="append", metavar="TEXT", help="of a text-to-image model; may be repeated")
    sample.add_argument("--count", default=None, metavar="N", help="images (default: 64; latent models: 4)")
    sample.add_argument("--classes", metavar="A,B,..", help="class labels, repeated as needed (default: all in turn)")
    sample.add_argument("--steps", metavar="N", help="sampling steps of a teacher (default: 16); a student has its own")
    sample.add_argument("--guidance-scale", metavar="X", help="of a teacher (default: 1, none)")
    sample.add_argument(
        "--seed", default="0", metavar="N", help="image i is drawn from seed 1000000 * N + i (default: 0)"
    )
    sample.add_argument("--trace", action="store_true", help="of a latent model: what it expects after each step")
    sample.add_argument("--out", default="samples.png", metavar="FILE", help="the picture (default: samples.png)")

    evaluate = command("eval", "compare a student with its teacher at several numbers of steps, or judge a teacher")
    evaluate.add_argument("folder", help="a run, a folder of runs, or the folder of a student or a teacher")
    evaluate.add_argument("--teacher", help="a student's teacher (default: the one it was distilled from)")
    evaluate.add_argument("--teacher-steps", metavar="A,B,..", help="(default: 1,2,4,8,16,32)")
    evaluate.add_argument("--data", help="the real images compared with: digits, shapes (default: digits)")
    evaluate.add_argument("--count", metavar="N", help="images a row (default: as many as the data have; shapes: 500)")
    evaluate.add_argument("--seed", metavar="N", help="of the samples (default: 0)")
    evaluate.add_argument("--out", metavar="DIR", help="where the table and pictures go (default: FOLDER/eval)")
    _protocol_arguments(evaluate, required=False)
    evaluate.add_argument("--save-reference", metavar="FILE", help="with --protocol: statistics of the real images")

    compare = command("compare", "judge several models by one protocol: table, differences, picture, same-noise grid")
    compare.add_argument("folder", nargs="+", help="runs, pipelines' folders or hub ids, or folders of images")
    _protocol_arguments(compare, required=True)
    compare.add_argument("--count", metavar="N", help="images of each (default: the protocol's)")
    compare.add_argument("--seed", metavar="N", help="of the samples (default: the protocol's)")
    compare.add_argument("--out", default="runs/compare", metavar="DIR", help="(default: runs/compare)")

    speed = command("speed", "time models against their teacher: latency, throughput, network passes, memory")
    speed.add_argument("folder", nargs="+", help="runs, a folder of runs, pipelines' folders or hub ids, or 'digits'")
    speed.add_argument("--teacher", metavar="DIR", help="(default: the one that each student was distilled from)")
    speed.add_argument(
        "--teacher-steps", metavar="N", help="of models without their own (default: their pipeline's; pixel models: 16)"
    )
    speed.add_argument(
        "--guidance-scale", metavar="X", help="of teachers, 1: none (default: as their student was trained with)"
    )
    speed.add_argument("--batch-sizes", default="1,4", metavar="A,B,..", help="(default: 1,4)")
    speed.add_argument("--resolutions", metavar="A,B,..", help="pixels a side (default: the models' own)")
    speed.add_argument("--attention", default="auto", metavar="auto|sdpa|xformers|math", help="(default: auto)")
    speed.add_argument("--compile", action="store_true", help="also with torch.compile of the denoising network")
    speed.add_argument("--repeats", default="20", metavar="N", help="draws that are timed (default: 20)")
    speed.add_argument("--dtype", default="float32", metavar="float32|bfloat16|float16", help="(default: float32)")
    speed.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="(default: auto)")
    speed.add_argument("--out", default="runs/speed", metavar="DIR", help="(default: runs/speed)")

    board = command("bench", "train and judge every method on the same teacher, budget, seeds and evaluation")
    board.add_argument("--suite", default="digits", metavar="NAME", help="digits or mnist (default: digits)")
    board.add_argument("--methods", metavar="A,B,..", help="METHOD or METHOD:PRESET (default: all for the suite)")
    board.add_argument("--seeds", default="0,1,2", metavar="A,B,..", help="(default: 0,1,2)")
    board.add_argument("--budget", metavar="N", help="network passes of a batch in a training (default: the suite's)")
    board.add_argument("--teacher", metavar="DIR", help="(default: the suite's)")
    board.add_argument("--data", metavar="DATA", help="the real images (default: the suite's)")
    board.add_argument("--jobs", metavar="N", help="trainings at a time, one thread each (default: one a core; GPU: 1)")
    board.add_argument("--out", default="runs/bench", metavar="DIR", help="(default: runs/bench)")


def _protocol_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_argument_group("protocols", "what is drawn, compared with what and measured how")
    add = group.add_argument
    add("--protocol", metavar="NAME", required=required, help="see `diffdistill protocols`; or a .yaml file")
    add("--reference", metavar="DATA", help="the real images, or a file of their statistics (default: the protocol's)")
    add("--prompts", metavar="FILE", help="a prompt a line (default: the protocol's)")
    add("--weights", action="append", metavar="KEY=PATH", help="a feature network's weights; may be repeated")
    add("--steps", metavar="N", help="sampling steps of a teacher; a student has its own")
    add("--guidance-scale", metavar="X", help="of a teacher, in its pipeline's units (default: off)")
    add("--attention", metavar="auto|sdpa|xformers|math", help="(default: auto)")
    add(
        "--batch-size",
        metavar="N",
        help="images drawn together, on which the last bits depend (default: the protocol's)",
    )
    add("--dtype", metavar="float32|bfloat16|float16", help="of the model (default: float32)")
    add("--device", metavar="auto|cpu|cuda", help="(default: auto)")
    add("--threads", metavar="N", help="CPU threads, on which the last bits depend (default: 1)")
    add("--trust-remote-code", action="store_true", help="run the pipeline that a folder carries as code")
    add("--bootstrap", metavar="N", help="replicates of the intervals; 0: none (default: 200, wide features 20)")


def _whole(name: str, value: str, at_least: int = 0) -> int:
    return coerce(name, value, int, {"at_least": at_least})


def _whole_or_none(name: str, value: str | None, at_least: int = 0) -> int | None:
    return None if value is None else _whole(name, value, at_least)


def _whole_list(name: str, value: str, at_least: int = 0) -> list[int]:
    return [coerce(name, part, int, {"at_least": at_least}) for part in value.split(",")]


def _sample(args: argparse.Namespace) -> int:
    from diffdistill.eval.sample import sample_picture

    classes = None if args.classes is None else _whole_list("classes", args.classes)
    scale = coerce("guidance_scale", args.guidance_scale, float | None, {"at_least": 0})
    count, seed = _whole_or_none("count", args.count, 1), _whole("seed", args.seed)
    steps = _whole_or_none("steps", args.steps, 1)
    print(sample_picture(args.folder, args.prompt, count, classes, steps, scale, seed, args.out, args.trace))
    return 0


def _sampled(args: argparse.Namespace) -> dict[str, Any]:
    """How models are drawn, of `eval --protocol`, `compare` and `speed`."""
    from diffdistill.data.shards import device_for

    def choice(name: str, *known: str) -> str:  # the first is the default
        return coerce(name, getattr(args, name) or known[0], typing.Literal[known], {})

    return {
        "guidance_scale": coerce("guidance_scale", args.guidance_scale, float | None, {"at_least": 0}),
        "attention": choice("attention", "auto", "sdpa", "xformers", "math"),
        "dtype": choice("dtype", "float32", "bfloat16", "float16"),
        "device": device_for(choice("device", "auto", "cpu", "cuda")),
    }


def _asked(args: argparse.Namespace) -> Any:
    """The protocol and what is asked besides, of `eval --protocol` and `compare`."""
    import torch

    from diffdistill.eval.models import Wanted
    from diffdistill.eval.protocol import load
    from diffdistill.eval.scoring import Asked

    weights = {}
    for given in args.weights or ():
        key, _, path = given.partition("=")
        if not path:
            raise UserError(f"weights: {given!r} is not KEY=PATH, as in inception=pt_inception-2015-12-05-6726825d.pth")
        weights[key] = path
    count = _whole_or_none("count", args.count, 10)
    seed, batch = _whole_or_none("seed", args.seed), _whole_or_none("batch_size", args.batch_size, 1)
    protocol = load(args.protocol, count=count, seed=seed, batch=batch)
    torch.set_num_threads(_whole("threads", args.threads or "1", 1))
    steps = _whole_or_none("steps", args.steps, 1)
    wanted = Wanted(steps=steps, trust_remote_code=args.trust_remote_code, **_sampled(args))
    bootstrap = _whole_or_none("bootstrap", args.bootstrap)
    kept = getattr(args, "save_reference", None)
    return Asked(protocol, wanted, args.reference, args.prompts, weights, bootstrap, args.device or "auto", kept)


def _compare(args: argparse.Namespace) -> int:
    from diffdistill.eval.compare import compare

    compare(args.folder, _asked(args), args.out)
    return 0


def _speed(args: argparse.Namespace) -> int:
    from diffdistill.eval.speed import Asked, speed

    asked = Asked(
        batch_sizes=_whole_list("batch_sizes", args.batch_sizes, 1),
        resolutions=[None] if args.resolutions is None else _whole_list("resolutions", args.resolutions, 1),
        teacher=args.teacher,
        teacher_steps=_whole_or_none("teacher_steps", args.teacher_steps, 1),
        compiled=args.compile,
        repeats=_whole("repeats", args.repeats, 1),
        **_sampled(args),
    )
    speed(args.folder, asked, args.out)
    return 0


def _eval(args: argparse.Namespace) -> int:
    if args.protocol is not None:
        from diffdistill.eval.scoring import evaluate_protocol

        for name, other in (("teacher", "compare"), ("teacher_steps", "--steps"), ("data", "--reference")):
            if getattr(args, name) is not None:
                raise UserError(f"{name}: that is for an evaluation without --protocol; see {other}")
        evaluate_protocol(args.folder, _asked(args), args.out)
        return 0
    from diffdistill.eval.evaluate import evaluate_run

    only = ("reference", "prompts", "weights", "steps", "guidance_scale", "attention", "batch_size", "dtype", "device")
    for name in (*only, "threads", "trust_remote_code", "bootstrap", "save_reference"):
        if getattr(args, name):
            raise UserError(f"{name}: that is for an evaluation by a protocol; give --protocol")
    steps = _whole_list("teacher_steps", args.teacher_steps or "1,2,4,8,16,32", 1)
    count, seed = _whole_or_none("count", args.count, 100), _whole("seed", args.seed or "0")
    evaluate_run(args.folder, args.teacher, steps, args.data or "digits", count, seed, args.out)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from diffdistill.eval.bench import SUITES, bench

    suite = coerce("suite", args.suite, str, {})
    if suite not in SUITES:
        raise UserError(f"suite: {suite!r} is not known; {nearest(suite, SUITES)}")
    bench(
        suite,
        methods=args.methods.split(",") if args.methods else None,
        seeds=_whole_list("seeds", args.seeds),
        budget=_whole_or_none("budget", args.budget, 1),
        out=Path(args.out),
        teacher=args.teacher,
        data=args.data,
        jobs=_whole_or_none("jobs", args.jobs, 1),
    )
    return 0


RUN = {"sample": _sample, "eval": _eval, "compare": _compare, "speed": _speed, "bench": _bench}
