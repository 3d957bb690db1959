"""The command line, which runs a command of the table (`table.py`).

Nothing heavy is imported before a command runs. Options come from a YAML file (`--config`), overridden by the command
line; both go through `options.build`, so that help, ranges and error messages are the same as in Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import io
import logging
import os
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from diffdistill.catalogue import describe_method, describe_recipe
from diffdistill.commands.former_names import todays_arguments, todays_values
from diffdistill.commands.table import COMMANDS, EXIT_CODES, GROUPS, Command
from diffdistill.config import DERIVED, EVERYTHING, TrainConfig
from diffdistill.errors import UserError, first_line, one_line
from diffdistill.options import Size, build, coerce, nearest, optional, read_yaml
from diffdistill.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, one of `EXIT_CODES`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are no UTF-8, as on standard error
    # Which peft imports where it is installed; on a CPU it warns of a kernel that it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    gc.disable()  # a fifth of the seconds that torch and diffusers take to be imported
    try:
        code = _run(argv)
        _leave_group()
        return code
    except KeyboardInterrupt:
        print("diffdistill: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        # Each of several processes says what ended it: the others often learn only that one is gone.
        rank, several = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") != "1"
        print(
            f"diffdistill: {one_line(f'rank {rank}: {message}' if several else message)}", file=sys.stderr, flush=True
        )
        return 2
    finally:
        gc.enable()


def _message(error: Exception) -> str | None:
    """What is said of an error instead of a traceback; None for a fault of ours."""
    if isinstance(error, UserError | OSError):  # of the latter a full disk, a lost mount
        return str(error)
    if isinstance(error, MemoryError):
        return "the memory does not suffice; try smaller batches or fewer samples"
    if "torch" in sys.modules and isinstance(error, RuntimeError):
        import torch

        text = first_line(error)
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text:
            return f"the memory does not suffice ({text}); try a smaller --batch-size"
        if isinstance(error, getattr(torch.distributed, "DistError", ())) or "gloo" in str(error):
            return f"another process of this run has ended ({text})"
    return None


def _leave_group() -> None:
    """Ends the group of processes, if there is one: a thread of it that still runs at exit aborts the process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _run(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        top = _top_parser()
        _, unknown = top.parse_known_args(argv)
        if unknown:
            _refuse_unknown(top, "diffdistill", unknown)
        top.print_help()
        return 0
    name = argv[0]
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command; {nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    parser, classes = parser_of(name, _method_of(argv[1:]) if command.distills else None)
    words = _with_true(argv[1:], classes) if command.positional else argv[1:]
    parsed, unknown = parser.parse_known_args(todays_arguments(words, _known(parser)) if command.distills else words)
    if unknown:
        _refuse_unknown(parser, name, unknown)
    values = _values(parsed)
    if command.distills:
        values = todays_values(values, _known(parser))
    if parsed.family:
        importlib.import_module("diffdistill.families").register_family(parsed.family)
    if parsed.teacher_config:
        importlib.import_module("diffdistill.families").read_files_with(parsed.teacher_config)
    module, _, function = command.function.partition(":")
    call = getattr(importlib.import_module(f"diffdistill.commands.{module}"), function)
    given = values if command.distills or command.resumes else build(command.options, values)
    for option in ("resume", "allow_change") if command.resumes else ():
        if option in values:
            raise UserError(f"{option}: give it on the command line, not in a config file")
        if getattr(parsed, option) is not None:
            values[option] = getattr(parsed, option)
    gc.enable()
    return call(given) or 0


# -- parsers -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    parser = _Parser(
        prog="diffdistill",
        usage="diffdistill COMMAND [options]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Distill a pretrained diffusion model into a generator that needs one to four steps.",
        epilog="\n\n".join(
            "\n".join([f"{title}:", *(f"  {name:{width}}{COMMANDS[name].help}" for name in names)])
            for title, names in GROUPS.items()
        )
        + "\n\n`diffdistill COMMAND --help` lists a command's options.\n\nexit codes:\n"
        + "\n".join(f"  {code:<{width}}{meaning}" for code, meaning in EXIT_CODES.items()),
    )
    parser.add_argument("--version", action="version", version=f"diffdistill {__version__}")
    return parser


def parser_of(name: str, method: str | None = None) -> tuple[argparse.ArgumentParser, list[type]]:
    """The parser of a command, with the options of a method besides, and the dataclasses that its options stand in."""
    command = COMMANDS[name]
    classes: list[type] = [command.options]
    usual: dict[str, Any] = {name: "from the teacher" for name in DERIVED} if command.distills else {}
    if method is not None:
        info = describe_method(method)
        classes.append(info.config)
        usual |= info.about.defaults
    return _parser(name, command, classes, usual), classes


def _parser(name: str, command: Command, classes: Sequence[type], usual: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The parser of a command; `usual` are defaults of the method that are others than the options' own."""
    parser = _Parser(prog=f"diffdistill {name}", description=f"{command.help}.", allow_abbrev=False)
    add = parser.add_argument
    add("--config", metavar="FILE", help="a YAML file of options; the command line overrides it")
    text = "configs for models that are one .safetensors file; default: those that diffusers has on the hub for it"
    add("--teacher-config", metavar="FOLDER_OR_ID", help=text)
    add("--family", metavar="FILE", help="a Python file that defines FAMILY, for pipelines that no family reads yet")
    if command.resumes:
        add("--resume", metavar="RUN", help="continue the run in this folder from its last checkpoint")
        text = (
            "with --resume: go on although what has this name in the line that refuses it (an option, teacher-weights, "
            "data, method, ..) is another than when the run began; may be repeated; without a name: whatever it is"
        )
        add("--allow-change", action="append", nargs="?", const=EVERYTHING, metavar="NAME", help=text)
    if command.distills:
        text = "the method's named settings, e.g. its paper's; see `diffdistill methods METHOD`"
        add("--preset", metavar="NAME", dest="option.preset", default=argparse.SUPPRESS, help=text)
        text = "a model's published settings, which say the method and the teacher too; see `diffdistill recipes`"
        add("--recipe", metavar="NAME", dest="option.recipe", default=argparse.SUPPRESS, help=text)
    for title, cls, fields in _groups(classes):
        hints = typing.get_type_hints(cls)
        group = parser.add_argument_group(title)
        for f in fields:
            _add_option(group, f, hints[f.name], usual.get(f.name, f.default), f.name in command.positional)
    return parser


def _groups(classes: Sequence[type]) -> Iterator[tuple[str, type, list[dataclasses.Field[Any]]]]:
    """Title, class and options of each group of help: those that one dataclass adds to its bases.

    Of two groups with an option of one name, it is the one's whose option the class has.
    """
    for cls in classes:
        fields = {f.name: f for f in dataclasses.fields(cls)}
        bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
        owner: dict[str, type] = {}
        for base in bases:
            inherited = {name for below in base.__mro__[1:] for name in vars(below).get("__annotations__", ())}
            owner |= {name: base for name in vars(base).get("__annotations__", ()) if name not in inherited}
        for base in sorted(bases, key=lambda base: base is not cls):  # what the command is about comes first
            own = [name for name in vars(base).get("__annotations__", ()) if owner[name] is base]
            title = (base.__doc__ or base.__name__).strip().splitlines()[0].rstrip(".")
            if own:
                yield title, cls, [fields[name] for name in own if name in fields]


def _add_option(group: Any, f: dataclasses.Field[Any], hint: Any, default: Any, positional: bool) -> None:
    # All strings here: options.coerce gives the types, the same for the command line and for YAML.
    kind, _ = optional(hint)
    several = typing.get_origin(kind) is tuple
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(f, default).replace("%", "%%")}
    if positional:
        group.add_argument(f"option.{f.name}", nargs="*" if several else "?", metavar=f.name.upper(), **settings)
        return
    if several and f.metadata.get("repeated"):
        settings["action"] = "append"
    bare = "true" if kind is bool else f.metadata.get("bare")
    if bare is not None:
        settings |= {"nargs": "?", "const": bare}
    name = f"--{f.name.replace('_', '-')}"
    group.add_argument(name, dest=f"option.{f.name}", metavar=_metavar(kind, f), **settings)


def _help(f: dataclasses.Field[Any], default: Any) -> str:
    """What an option's help says: its text, default and range."""
    words = {"above": "greater than", "at_least": "at least", "below": "less than", "at_most": "at most"}
    known = [f"{words[key]} {bound:g}" for key, bound in f.metadata.get("bounds", {}).items()]
    if isinstance(default, tuple):
        default = ",".join(map(str, default)) or "none"
    if default not in (None, dataclasses.MISSING) and (default != f.default or "default:" not in f.metadata["help"]):
        known.insert(0, f"default: {default!r}" if default == "" else f"default: {default}")
    text = f.metadata["help"]
    return f"{text} ({'; '.join(known)})" if known else text


def _metavar(kind: Any, f: dataclasses.Field[Any]) -> str:
    names: dict[Any, str] = {int: "N", float: "X", str: "TEXT", bool: "true|false", Size: "N|HxW"}
    if typing.get_origin(kind) is tuple:
        (member, *_) = typing.get_args(kind)
        one = names.get(member, "TEXT")
        return one if f.metadata.get("repeated") else f"{one},.."
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else [kind]
    return "|".join(names.get(k, str(k)) for k in choices)


def _with_true(argv: Sequence[str], classes: Sequence[type]) -> list[str]:
    """The arguments with `--flag` as `--flag=true` unless true or false follows: argparse would take what follows.

    And with `--allow-change` before a run as what it means without a name.
    """
    flags = {
        f"--{f.name.replace('_', '-')}"
        for cls in classes
        for f in dataclasses.fields(cls)
        if optional(typing.get_type_hints(cls)[f.name])[0] is bool
    }
    following = [*argv[1:], ""][: len(argv)]
    truths = ("true", "false", "yes", "no")

    def complete(word: str, after: str) -> str:
        if word in flags and after.lower() not in truths:
            return f"{word}=true"
        if word == "--allow-change" and os.path.exists(after):
            return f"{word}={EVERYTHING}"
        return word

    return [complete(word, after) for word, after in zip(argv, following, strict=True)]


def _method_of(argv: Sequence[str]) -> str:
    """The method that a command line of `train` or `plan` means, needed before its options are known."""
    first = _Parser(add_help=False, allow_abbrev=False)
    for name in ("--method", "--recipe", "--config", "--resume"):
        first.add_argument(name)
    parsed, _ = first.parse_known_args(list(argv))
    if parsed.method:
        return parsed.method
    file = f"{parsed.resume}/config.yaml" if parsed.resume else parsed.config
    values = read_yaml(file) if file else {}
    recipe = parsed.recipe or values.get("recipe")
    if recipe is not None and "method" not in values:
        return describe_recipe(coerce("recipe", recipe, str, {})).method
    return coerce("method", values.get("method", TrainConfig.method), str, {})


def _refuse_unknown(parser: argparse.ArgumentParser, command: str, unknown: Sequence[str]) -> NoReturn:
    name = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
    if not name.startswith("-"):
        raise UserError(f"{name}: {command} takes no such argument; see `diffdistill {command} --help`")
    raise UserError(f"{name}: no such option of {command}; {nearest(name, _known(parser))}")


def _known(parser: argparse.ArgumentParser) -> list[str]:
    return [o for a in parser._actions for o in a.option_strings if o.startswith("--") and o != "--help"]


def _values(parsed: argparse.Namespace) -> dict[str, Any]:
    """Options from the YAML file, overridden by the command line."""
    values = read_yaml(parsed.config) if parsed.config else {}
    return values | {k.removeprefix("option."): v for k, v in vars(parsed).items() if k.startswith("option.")}


if __name__ == "__main__":
    sys.exit(main())
