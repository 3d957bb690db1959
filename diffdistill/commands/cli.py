"""The command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from diffdistill.catalogue import describe_method, method_names
from diffdistill.config import EncodeConfig, PairsConfig, TeacherConfig, TrainConfig
from diffdistill.errors import UserError
from diffdistill.options import coerce, nearest, read_yaml
from diffdistill.version import __version__


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (verify failed), 2 (bad input), 130 (interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser(argv)
        known, unknown = parser.parse_known_args(argv)
        if unknown:
            _refuse_unknown(parser, known.command, unknown)
        if known.command is None:
            parser.print_help()
            return 0
        return _COMMANDS[known.command](known)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            print(f"diffdistill: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a lost mount
        print(f"diffdistill: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffdistill: interrupted", file=sys.stderr)
        return 130


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="diffdistill",
        allow_abbrev=False,
        description="Distill a pretrained diffusion model into a generator that needs one to four steps.",
    )
    parser.add_argument("--version", action="version", version=f"diffdistill {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, help: str, **kw: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False, **kw)

    train = command("train", "distill a teacher into a few-step student, and export it")
    _config_arguments(train)
    train.add_argument("--preset", metavar="NAME", help="the method's named settings, e.g. its paper's; see `methods`")
    _options(train, TrainConfig, "options of every training")
    if argv[:1] == ["train"]:
        info = describe_method(_method_of(argv))
        _options(train, info.config, f"options of {info.name} ({info.about.paper})")

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

    command("protocols", "list the protocols of eval and compare")

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

    export = command("export", "save a run's student from a checkpoint as a diffusers folder")
    export.add_argument("run", help="a run folder made by train")
    export.add_argument("--step", metavar="N", help="the checkpoint's step (default: the last)")
    export.add_argument("--out", metavar="DIR", help="the folder to make (default: RUN/student)")

    diversity = command("diversity", "save a student of several steps with its teacher, which takes the first of them")
    diversity.add_argument("student", help="a run, or the folder of a Stable Diffusion student of two steps or more")
    diversity.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    diversity.add_argument("--teacher", metavar="DIR", help="(default: the one the student was distilled from)")
    diversity.add_argument(
        "--base-steps", default="20", metavar="N", help="the teacher's, from noise to image; 0: none"
    )
    diversity.add_argument(
        "--base-guidance", default="7", metavar="X", help="the teacher's guidance scale (default: 7)"
    )

    teacher = command("teacher", "train a teacher from data and save it as a diffusers folder")
    _config_arguments(teacher)
    _options(teacher, TeacherConfig, "options")

    pairs = command("pairs", "make noise-image pairs of a teacher, for the methods that want them")
    pairs.add_argument("--config", metavar="FILE", help="a YAML file of options; the command line overrides it")
    _options(pairs, PairsConfig, "options")

    encode = command("encode", "encode prompts, or images with captions, once for the training of a latent teacher")
    encode.add_argument("--config", metavar="FILE", help="a YAML file of options; the command line overrides it")
    _options(encode, EncodeConfig, "options")

    command("families", "list the families of diffusers pipelines that can be distilled")

    methods = command("methods", "list the methods, or describe one: its options, presets and equations")
    methods.add_argument("method", nargs="?", help="a method's name or file")

    board = command("bench", "train and judge every method on the same teacher, budget, seeds and evaluation")
    board.add_argument("--suite", default="digits", metavar="NAME", help="digits or mnist (default: digits)")
    board.add_argument("--methods", metavar="A,B,..", help="METHOD or METHOD:PRESET (default: all for the suite)")
    board.add_argument("--seeds", default="0,1,2", metavar="A,B,..", help="(default: 0,1,2)")
    board.add_argument("--budget", metavar="N", help="network passes of a batch in a training (default: the suite's)")
    board.add_argument("--teacher", metavar="DIR", help="(default: the suite's)")
    board.add_argument("--data", metavar="DATA", help="the real images (default: the suite's)")
    board.add_argument("--jobs", metavar="N", help="trainings at a time, one thread each (default: one a core; GPU: 1)")
    board.add_argument("--out", default="runs/bench", metavar="DIR", help="(default: runs/bench)")

    verify = command("verify", "check a method against closed forms, and train it on a teacher known exactly")
    verify.add_argument("method", nargs="?", help="a method's name or file")
    verify.add_argument("--all", action="store_true", help="every method")
    verify.add_argument("--exact", action="store_true", help="closed forms only, no training (seconds)")
    verify.add_argument("--json", metavar="FILE", help="also write the rows there")
    return parser


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


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a YAML file of options; the command line overrides it")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder from its last checkpoint")


def _options(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(cls)
    # All strings here: config.coerce gives the types, the same for the command line and for YAML.
    for f in dataclasses.fields(cls):
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        group.add_argument(
            f"--{f.name.replace('_', '-')}",
            dest=f"option.{f.name}",
            default=argparse.SUPPRESS,
            metavar=_metavar(hints[f.name]),
            help=text,
        )


def _metavar(hint: Any) -> str:
    kinds = [k for k in typing.get_args(hint) or (hint,) if k is not type(None)]
    if typing.get_origin(kinds[0]) is typing.Literal:
        kinds = list(typing.get_args(kinds[0]))
    names = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
    return "|".join(names.get(k, str(k)) if isinstance(k, type) else str(k) for k in kinds)


def _method_of(argv: Sequence[str]) -> str:
    """The method that a `train` command line means, needed before its options are known."""
    first = _Parser(add_help=False, allow_abbrev=False)
    for name in ("--method", "--config", "--resume"):
        first.add_argument(name)
    given, _ = first.parse_known_args(list(argv[1:]))
    if given.method:
        return given.method
    file = f"{given.resume}/config.yaml" if given.resume else given.config
    values = read_yaml(file) if file else {}
    return str(values.get("method", TrainConfig.method))


def _refuse_unknown(parser: argparse.ArgumentParser, command: str | None, unknown: Sequence[str]) -> NoReturn:
    name = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    chosen = subparsers.choices[command] if command else parser
    known = [o for a in chosen._actions for o in a.option_strings if o.startswith("--")]
    raise UserError(f"{name}: no such option of {command or 'diffdistill'}; {nearest(name, known)}")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Options from the YAML file, overridden by the command line."""
    values = read_yaml(args.config) if args.config else {}
    if getattr(args, "preset", None) is not None:
        values["preset"] = args.preset
    return values | {k.removeprefix("option."): v for k, v in vars(args).items() if k.startswith("option.")}


def _whole(name: str, value: str, at_least: int = 0) -> int:
    return coerce(name, value, int, {"at_least": at_least})


def _whole_or_none(name: str, value: str | None, at_least: int = 0) -> int | None:
    return None if value is None else _whole(name, value, at_least)


def _whole_list(name: str, value: str, at_least: int = 0) -> list[int]:
    return [coerce(name, part, int, {"at_least": at_least}) for part in value.split(",")]


# -- commands ----------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    from diffdistill.commands.distill import distill

    return _training("train", args, distill)


def _teacher(args: argparse.Namespace) -> int:
    from diffdistill.commands.teacher import train_teacher

    return _training("teacher", args, train_teacher)


def _pairs(args: argparse.Namespace) -> int:
    from diffdistill.data.pairs import make_pairs

    return _sharded(args, make_pairs, "use them with: diffdistill train --pairs")


def _encode(args: argparse.Namespace) -> int:
    from diffdistill.data.encoded import encode

    return _sharded(args, encode, "use it with: diffdistill train --prompts")


def _sharded(args: argparse.Namespace, make: Callable[..., Path], use: str) -> int:
    try:
        print(f"{use} {make(**_given(args))}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last whole shard", file=sys.stderr)
        return 130
    return 0


def _families(args: argparse.Namespace) -> int:
    from diffdistill.families import FAMILIES

    for family in FAMILIES.values():
        targets = ", ".join(family.lora_targets or ["all linear layers and convolutions"])
        print(f"{family.name:18} {family.models}")
        print(f"{'':18} pipelines: {', '.join(family.class_names)}; conditions: {family.conditions}")
        print(f"{'':18} network: {family.component}, {family.network}; LoRA: {targets}")
        print(f"{'':18} stock guidance: {family.stock_guidance}")
    return 0


def _training(command: str, args: argparse.Namespace, start: Callable[..., Path]) -> int:
    from diffdistill.training.trainer import Interrupted

    values = _given(args)
    if "resume" in values:
        raise UserError("resume: give it on the command line, not in a config file")
    try:
        folder = start(resume=args.resume, **values)
    except Interrupted as stopped:
        print(f"stopped; resume with: diffdistill {command} --resume {stopped}", file=sys.stderr)
        return 130
    print(f"saved {folder}")
    if command == "train":
        print(f"compare it with its teacher: diffdistill eval {folder.parent}")
    return 0


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


def _protocols(args: argparse.Namespace) -> int:
    from diffdistill.eval.protocol import load, names

    for protocol in map(load, names()):
        what = ", ".join(metric.name for metric in protocol.metrics)
        print(f"{protocol.name:14} {protocol.title}")
        print(f"{'':14} {what}; for models of {' or '.join(protocol.conditions)}")
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


def _export(args: argparse.Namespace) -> int:
    from diffdistill.commands.distill import export_run

    print(f"saved {export_run(args.run, step=_whole_or_none('step', args.step), out=args.out)}")
    return 0


def _diversity(args: argparse.Namespace) -> int:
    from diffdistill.eval.evaluate import model_folder
    from diffdistill.pipelines.diversity import write_diversity

    steps = _whole("base_steps", args.base_steps)
    scale = coerce("base_guidance", args.base_guidance, float, {"at_least": 0})
    print(f"saved {write_diversity(model_folder(args.student), args.out, args.teacher, steps, scale)}")
    return 0


def _methods(args: argparse.Namespace) -> int:
    if args.method is None:
        infos = [describe_method(name) for name in method_names()]
        for info in infos:
            print(f"{info.name:22} {info.doc.splitlines()[0]}")
            print(f"{'':22} {info.about.paper}; data: {info.about.data}")
        return 0
    info = describe_method(args.method)
    print(info.doc.strip(), f"\npaper: {info.about.paper}", f"data:  {info.about.data}", "\nequations:", sep="\n")
    for equation, where in info.about.equations.items():
        print(f"  {equation}\n      {where}")
    print("\noptions:")
    for f in dataclasses.fields(info.config):
        print(f"  --{f.name.replace('_', '-'):22} {f.metadata['help']} (default: {f.default})")
    print("\npresets:")
    for name, preset in info.presets.items():
        print(f"  {name:22} {'  '.join(f'{k}={v}' for k, v in preset.options.items())}")
        print(f"  {'':22} source: {preset.source}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from diffdistill.exact.checks import run_checks

    if bool(args.method) == args.all:
        raise UserError("verify: name one method, or give --all")
    rows, failed = [], 0
    for name in method_names() if args.all else [args.method]:
        info = describe_method(name)
        verify = info.verify
        checks = run_checks(verify) if verify else []
        if verify is None:
            print(
                f"note: {info.name} has no verify(), in its file or in checks/{info.name}.py beside it: nothing exact"
            )
        if info.plane is not None and not args.exact:
            from diffdistill.exact.plane import checks as end_to_end

            checks += end_to_end(info)
        print(f"{info.name}: {info.about.paper}")
        print(f"  {'':4} {'expected':>12} {'got':>12} {'error':>9} {'limit':>9}  check")
        for c in checks:
            sign = "<=" if c.kind == "equal" else "> "
            verdict = "ok" if c.ok else "FAIL"
            print(f"  {verdict:4} {c.expected:12.6g} {c.got:12.6g} {c.error:9.1e} {sign}{c.tolerance:7.0e}  {c.name}")
            rows.append({"method": info.name, **dataclasses.asdict(c), "ok": c.ok})
            failed += not c.ok
        print(f"  {len(checks) - sum(not c.ok for c in checks)} of {len(checks)} hold\n")
    if args.json:
        from diffdistill.files import atomic_write

        atomic_write(args.json, json.dumps(rows, indent=2) + "\n")
    return 1 if failed else 0


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


_COMMANDS = {
    "train": _train,
    "sample": _sample,
    "eval": _eval,
    "compare": _compare,
    "protocols": _protocols,
    "speed": _speed,
    "export": _export,
    "diversity": _diversity,
    "teacher": _teacher,
    "pairs": _pairs,
    "encode": _encode,
    "families": _families,
    "methods": _methods,
    "verify": _verify,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main())
