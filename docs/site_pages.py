"""The generated pages: what methods, recipes, families, commands and public names say of themselves, as Markdown."""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffdistill
from diffdistill.catalogue import MethodInfo, describe_method, method_names, recipes
from diffdistill.commands.cli import parser_of
from diffdistill.commands.table import COMMANDS, EXIT_CODES, GROUPS
from diffdistill.families import FAMILIES, NOT_YET
from diffdistill.families._family import Family

ROOT = Path(__file__).resolve().parents[1]
INSIDE = {
    "What a method is": ("scaffold", "What methods are written on."),
    "The normal form": ("core", "Networks in the normal form, and pure functions on them."),
    "Evaluation": ("eval/metrics", "Metrics."),
}
KINDS = {
    "distribution": "the teacher's distribution: another image for the same noise is as good",
    "trajectory": "the teacher's own map from noise to image",
    "guidance": "the guided teacher's answer, in one pass instead of two",
    "preference": "what is preferred of a student's own samples, in as many steps",
    "restoration": "the image that a smaller or poorer one was made of, which it reads",
}


# -- methods, recipes, families ------------------------------------------------------------------------------


def methods() -> dict[str, str]:
    """A page for each method from its file, and a list of them."""
    infos = [describe_method(name) for name in method_names()]
    board = board_rows()
    rows = [
        [f"[{info.name}]({info.name}.md)", escaped(title_of(info)), escaped(info.about.paper), escaped(info.about.data)]
        for info in infos
    ]
    parts = ["# Methods", "What a student is to repeat of its teacher tells the kinds apart."]
    for kind, what in KINDS.items():
        of_kind = [row for row, info in zip(rows, infos, strict=True) if info.about.kind == kind]
        parts += [
            f"## {kind.capitalize()}",
            f"{what.capitalize()}.",
            grid(["method", "", "paper", "learns from"], of_kind),
        ]
    pages = {"methods/index.md": "\n\n".join(parts) + "\n"}
    return pages | {f"methods/{info.name}.md": method_page(info, board) for info in infos}


def title_of(info: MethodInfo) -> str:
    """The first line of its docstring."""
    return info.doc.splitlines()[0].strip().rstrip(".")


def method_page(info: MethodInfo, board: Mapping[str, list[str]]) -> str:
    """What its file, its presets, its checks, the board and the recipes say of it."""
    about = info.about
    facts = [
        ["paper", escaped(about.paper)],
        ["learns from", escaped(about.data)],
        ["needs", ", ".join(about.needs) or "a teacher alone"],
        ["its student repeats", KINDS[about.kind]],
    ]
    facts += [[f"<code>{option_name(k)}</code>", f"{escaped(v)}, unless given"] for k, v in about.defaults.items()]
    parts = [f"# {info.name}", prose(info.doc), grid(["about it", ""], facts)]
    parts += [f"```\ndiffdistill train --method {info.name} --teacher MODEL --out runs/mine\n```"]
    if info.presets:
        parts += ["## Presets", *(preset_part(name, preset) for name, preset in info.presets.items())]
    parts += ["## Options", "Besides those of [every training](../commands/train.md).", own_options(info)]
    parts += ["## Equations", "Each with the functions that hold it."]
    parts += [grid(["equation", "where"], [[escaped(k), code(v)] for k, v in about.equations.items()])]
    parts += ["## Checks", checks_part(info)]
    if rows := board.get(info.name):
        parts += [
            "## On the board",
            "Of [the results](../results.md#every-method-on-one-budget), which say how.",
            *rows,
        ]
    if known := [f"`{r.name}` ({r.makes})" for r in recipes().values() if r.method == info.name]:
        parts += ["## Recipes", "Settings published for one model: " + "; ".join(map(escaped, known)) + "."]
    return "\n\n".join(parts) + "\n"


def preset_part(name: str, preset: Any) -> str:
    """A preset: its source and its options."""
    values = " ".join(f"{option_name(k)} {'?' if v is None else v}" for k, v in preset.options.items())
    return f"**{escaped(name)}**: {escaped(preset.source)}\n\n```\n{values}\n```"


def own_options(info: MethodInfo) -> str:
    """The options that a training has by this method alone."""
    shared = {action.dest for action in parser_of("train")[0]._actions}
    parser, _ = parser_of("train", info.name)
    return option_table(action for action in parser._actions if action.dest not in shared)


def checks_part(info: MethodInfo) -> str:
    """What `verify` does with the method."""
    said = f"`diffdistill verify {info.name}` checks it" + (", `--exact` without training." if info.plane else ".")
    text = prose(info.checks.__doc__ or "") if info.checks.__name__ != info.name else ""
    plane = [
        [escaped(name), code(" ".join(f"{k}={v}" for k, v in o.items()))] for name, o in (info.plane or {}).items()
    ]
    trained = ["Trained on a teacher that is known exactly:", grid(["training", "options"], plane)] if plane else []
    return "\n\n".join([said, text, *trained])


def board_rows() -> dict[str, list[str]]:
    """The lines of the board in docs/results.md by method, as tables."""
    tables: dict[str, list[str]] = {}
    head: list[str] = []
    for line in (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head or set("".join(cells)) <= set("-: "):
            head.append(line)
        elif head[0].startswith("| method"):
            tables.setdefault(cells[0].split(",")[0].split(":")[0], []).append("\n".join([*head, line]))
    return {name: [merged(rows)] for name, rows in tables.items()}


def merged(tables: Sequence[str]) -> str:
    """Tables with one head, as one."""
    return "\n".join([*tables[0].splitlines()[:2], *(table.splitlines()[-1] for table in tables)])


def recipe_list() -> str:
    """All recipes."""
    rows = [
        [code(r.name), escaped(r.title), f"[{r.method}](methods/{r.method}.md)", escaped(r.makes), escaped(r.data)]
        for r in recipes().values()
    ]
    head = ["recipe", "model", "method", "makes", "learns from"]
    text = (
        "Settings that are published for a model, each value with its source: `diffdistill recipes NAME` prints them."
    )
    return f"# Recipes\n\n{text}\n\n```\ndiffdistill train --recipe NAME\n```\n\n{grid(head, rows)}\n"


def families() -> dict[str, str]:
    """A page for each family of pipelines, and a list with those that are not there yet."""
    rows = [[f"[{f.name}]({f.name}.md)", escaped(f.models), f.conditions] for f in FAMILIES.values()]
    missing = [[escaped(m.models), escaped(m.reason)] for m in NOT_YET]
    parts = [
        "# Families",
        grid(["family", "models", "conditions"], rows),
        "## Not there yet",
        grid(["models", "why"], missing),
    ]
    parts += ["[Adding a family](../contributing.md#adding-a-family) says how one comes to be."]
    return {"families/index.md": "\n\n".join(parts) + "\n"} | {
        f"families/{family.name}.md": family_page(family) for family in FAMILIES.values()
    }


def family_page(family: Family) -> str:
    """What the entry of a family says."""
    text = family.text
    facts = [
        ["models", escaped(family.models)],
        ["pipelines of diffusers", code(", ".join(family.class_names))],
        [
            "network",
            code(
                f"{family.component}: {family.network if isinstance(family.network, str) else family.network.__name__}"
            ),
        ],
        ["conditions", family.conditions],
        ["samples", "videos" if family.videos else "images"],
        ["in a latent space", "no" if family.autoencoder is None else "yes"],
        ["the stock pipeline's guidance", code(family.stock_guidance)],
        ["usual layers of LoRA", code(", ".join(family.lora_targets or ["all linear layers and convolutions"]))],
        ["a LoRA alone loads in diffusers", "yes" if family.loads_lora else "no"],
        ["a student is one file for `from_single_file`", "yes" if family.single_file else "no"],
    ]
    if text is not None and text.negative is not None:
        facts.append(["without a negative prompt", code(repr(text.negative))])
    if text is not None and text.advised is not None:
        facts.append(["its makers draw with", code(f"--negative-prompt {text.advised!r}")])
    of_family = [[code(r.name), escaped(r.makes)] for r in recipes().values() if r.family == family.name]
    parts = [
        f"# {family.name}",
        prose(sys.modules[f"diffdistill.families.{family.name}"].__doc__ or ""),
        grid(["about it", ""], facts),
    ]
    parts += ["```\ndiffdistill family-check MODEL\n```", "checks a folder of yours against the stock pipeline."]
    if of_family:
        parts += ["## Recipes", grid(["recipe", "makes"], of_family)]
    return "\n\n".join(parts) + "\n"


# -- commands and Python -------------------------------------------------------------------------------------


def command_line() -> dict[str, str]:
    """A page for each command with all of its options, and a list."""
    parts = [
        "# Commands",
        "`diffdistill COMMAND --help` prints the same; options may stand in a YAML file, `--config FILE`.",
    ]
    for title, names in GROUPS.items():
        rows = [[f"[{name}]({name}.md)", escaped(COMMANDS[name].help)] for name in names]
        parts += [f"## {title.capitalize()}", grid(["command", ""], rows)]
    parts += ["## Exit codes", grid(["code", "meaning"], [[str(k), escaped(v)] for k, v in EXIT_CODES.items()])]
    pages = {"commands/index.md": "\n\n".join(parts) + "\n"}
    return pages | {f"commands/{name}.md": command_page(name) for names in GROUPS.values() for name in names}


def command_page(name: str) -> str:
    """A command: usage and options, group by group."""
    parser, _ = parser_of(name)
    command = COMMANDS[name]
    places = "".join(f" {place.upper()}" for place in command.positional)
    parts = [f"# {name}", f"{escaped(command.help).capitalize()}.", f"```\ndiffdistill {name}{places} [options]\n```"]
    if command.distills:
        parts.append("A [method](../methods/index.md) has options of its own besides.")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            title = {"options": "Every command's", "positional arguments": "Arguments"}.get(
                str(group.title), group.title
            )
            parts += [f"## {title}", option_table(actions)]
    return "\n\n".join(parts) + "\n"


def option_table(actions: Iterable[argparse.Action]) -> str:
    """Options of a parser: how they are written, and their help."""
    rows = []
    for action in actions:
        name = ", ".join(action.option_strings) or str(action.metavar)
        value = f" {action.metavar}" if action.option_strings and action.metavar else ""
        rows.append([code(name + value), escaped((action.help or "").replace("%%", "%"))])
    return grid(["option", ""], rows) if rows else "It has none."


def python_names() -> dict[str, str]:
    """The public names, and what methods, families and metrics are written on."""
    places = {name: f"diffdistill.{module}.{name}" for name, module in diffdistill._MODULES.items()}
    places["UserError"] = "diffdistill.errors.UserError"
    functions = [name for name in diffdistill.__all__ if name in places and name[0].islower()]
    classes = [name for name in diffdistill.__all__ if name in places and name[0].isupper()]
    text = "Whatever the command line does, Python does with names or objects, as `diffdistill.distill(..)`."
    pages = {
        "python/index.md": listed("Functions", text, (places[name] for name in functions)),
        "python/classes.md": listed("Classes", "Also from `diffdistill` itself.", (places[name] for name in classes)),
    }
    records = (
        "catalogue.About",
        "catalogue.Preset",
        "families.Family",
        "families.Text",
        "eval.metrics.registry.Metric",
    )
    pages["python/records.md"] = listed(
        "Records", "What methods, families and metrics say of themselves.", (f"diffdistill.{name}" for name in records)
    )
    for title, (folder, what) in INSIDE.items():
        where = ROOT / folder if (ROOT / folder).is_dir() else ROOT / "diffdistill" / folder
        modules = [path.stem for path in sorted(where.glob("*.py")) if not path.stem.startswith("_")]
        prefix = f"diffdistill.{folder.replace('/', '.')}"
        pages[f"python/{folder.replace('/', '_')}.md"] = listed(title, what, (f"{prefix}.{name}" for name in modules))
    return pages


def listed(title: str, text: str, names: Iterable[str]) -> str:
    """A page of mkdocstrings' directives."""
    return f"# {title}\n\n{text}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"


# -- Markdown ------------------------------------------------------------------------------------------------


def escaped(value: object) -> str:
    """A text for a cell of a table or a line: nothing in it is markup but its backticks."""
    parts = " ".join(str(value).split()).split("`")
    words = [html.escape(part, quote=False).replace("|", "&#124;").replace("*", "&#42;") for part in parts[::2]]
    coded = [code(part) for part in parts[1::2]]
    return "".join(word + each for word, each in zip(words, [*coded, ""], strict=False))


def code(value: object) -> str:
    """A text as code, wherever it stands."""
    text = html.escape(str(value), quote=False)
    for sign in "|*_":
        text = text.replace(sign, f"&#{ord(sign)};")
    return f"<code>{text}</code>"


def prose(doc: str) -> str:
    """A docstring as Markdown: its first line stands alone, lists begin a paragraph, formulas stay as they are."""
    lines: list[str] = []
    for line in doc.strip().splitlines():
        if line.startswith("- ") and lines and lines[-1] and not lines[-1].startswith(("- ", "  ")):
            lines.append("")
        lines.append(line if line.startswith("    ") else re.sub(r"<(?=[\w/!])", "&lt;", line))
    return "\n".join(lines)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def option_name(field: str) -> str:
    """The option of a field."""
    return f"--{field.replace('_', '-')}"
