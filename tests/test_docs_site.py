"""The docs site has a place for everything that there is; its links lead somewhere. mkdocs itself is `make docs`."""

import ast
import dataclasses
import html
import inspect
import posixpath
import re
import sys
from pathlib import Path

import pytest

import diffdistill
from diffdistill.catalogue import describe_method, method_names, recipes
from diffdistill.commands.table import COMMANDS, GROUPS
from diffdistill.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import build_site
    finally:
        sys.path.remove(str(ROOT / "docs"))
    written: dict[str, str] = build_site.write_sources(tmp_path_factory.mktemp("site"))
    return written


def test_every_command_is_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_on_its_page(pages: dict[str, str], name: str) -> None:
    page, command = pages[f"commands/{name}.md"], COMMANDS[name]
    for field in dataclasses.fields(command.options):
        written = field.name.upper() if field.name in command.positional else f"--{field.name.replace('_', '-')}"
        assert re.search(rf"<code>{re.escape(written).replace('_', '&#95;')}[ <]", page), field.name
    assert f"[{name}]({name}.md)" in pages["commands/index.md"]


@pytest.mark.parametrize("name", method_names())
def test_a_method_has_its_page(pages: dict[str, str], name: str) -> None:
    info, page = describe_method(name), pages[f"methods/{name}.md"]
    for field in dataclasses.fields(info.config):
        assert f"<code>--{field.name.replace('_', '-')} " in page, field.name
    for preset in info.presets:
        assert f"**{preset}**" in page
    assert html.escape(info.about.paper, quote=False) in page and page.count("\n| ") > len(info.about.equations)
    assert f"[{name}]({name}.md)" in pages["methods/index.md"]


def test_every_family_recipe_and_public_name_has_its_place(pages: dict[str, str]) -> None:
    for family in FAMILIES.values():
        assert all(name in pages[f"families/{family.name}.md"] for name in family.class_names)
    assert all(f"<code>{name}".replace("_", "&#95;") in pages["recipes.md"] for name in recipes())
    listed = "\n".join(pages[f"python/{part}.md"] for part in ("index", "classes"))
    names = set(re.findall(r"^::: diffdistill\.\S*?(\w+)$", listed, re.MULTILINE))
    assert names == set(diffdistill.__all__) - {"__version__"}


@pytest.mark.parametrize("name", sorted(set(diffdistill.__all__) - {"__version__"}))
def test_a_docstring_names_the_arguments_that_there_are(name: str) -> None:
    """mkdocs, which is strict, stops at any other."""
    public = getattr(diffdistill, name)
    members = [public, *(m for k, m in vars(public).items() if k[0] != "_")] if inspect.isclass(public) else [public]
    for each in filter(callable, members):
        told = re.search(r"^Args:\n((?: +.*\n?|\n)*)", inspect.getdoc(each) or "", re.MULTILINE)
        listed = re.findall(r"^    (\S.*?):", told[1], re.MULTILINE) if told else []
        assert set(listed) <= {word.lstrip("*") for word in inspect.signature(each).parameters}, each


def test_a_method_on_the_board_shows_its_lines(pages: dict[str, str]) -> None:
    assert re.search(r"^\| consistency \| 1 \| 0\.1505 ", pages["methods/consistency.md"], re.MULTILINE)


def anchors(text: str) -> set[str]:
    """As mkdocs makes them of headings, for the letters that ours have."""
    heads = re.findall(r"^#{1,6} (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head.replace("`", "")).strip().lower()) for head in heads}


def test_links_lead_somewhere(pages: dict[str, str]) -> None:
    bad = []
    for name, text in pages.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"(?<!\!)\[[^\[\]]*\]\(([^()\s]+)\)", prose):
            file, _, anchor = target.partition("#")
            if "://" in target:
                continue
            place = posixpath.normpath(posixpath.join(posixpath.dirname(name), file)) if file else name
            if (ROOT / "docs" / place).suffix == ".png" and (ROOT / "docs" / place).is_file():
                continue
            if place not in pages or (anchor and anchor not in anchors(pages[place])):
                bad.append(f"{name}: {target}")
    assert not bad


def messages() -> list[str]:
    """Every text of the package's code, with `…` for what is put in, and neighbours joined as Python does."""
    texts = []
    for folder in ("diffdistill", "methods", "pipelines", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


def test_the_lines_that_troubleshooting_quotes_are_the_codes_own() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    quoted = [line for part in sections[1:4] for line in re.findall(r"^\| `([^`]+)`", part, re.MULTILINE)]
    assert len(quoted) >= 25
    known = messages()
    for line in quoted:
        # What is put in may be another text, such as the name before a colon: the longest part is looked for.
        longest = max(line.removeprefix("warning: ").split("…"), key=len).strip(" :;,()'")
        assert len(longest) > 6
        assert any(longest in each for each in known), line
