"""The files around the code: they can be read, agree with one another, and name what exists."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffdistill.catalogue import method_names
from diffdistill.commands.cli import parser_of
from diffdistill.commands.table import COMMANDS
from diffdistill.version import __version__

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS.append(ROOT / "docs" / "examples" / "README.md")
SCRIPTS = sorted((ROOT / "docs" / "examples").glob("*.sh"))
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]


def read(path: Path) -> dict[str, Any]:
    """A YAML file whose top is a mapping."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == __version__
    assert {"message", "title", "authors"} <= citation.keys()
    assert f"license = {citation['license']}\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first and first[1] == __version__


def test_the_workflow_runs_targets_of_the_makefile() -> None:
    jobs = read(GITHUB / "workflows" / "tests.yml")["jobs"]
    rows = jobs["tests"]["strategy"]["matrix"]["include"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    commands = [run for run in runs if "${{" not in run] + [row["command"] for row in rows]
    assert "${{ matrix.command }}" in runs
    for command in commands:
        make, target, *settings = command.split()
        assert make == "make" and target in makefile_targets() and settings in ([], ["CONSTRAINTS="])
    # As setup.cfg and constraints.txt say: 3.10 is the oldest, and the pinned versions need 3.11.
    pinned = {row["python"]: "CONSTRAINTS=" not in row["command"] for row in rows}
    assert pinned == {"3.10": False, "3.11": True, "3.13": True}


def test_hooks_run_what_make_lint_runs() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"].split() for hook in repository["hooks"]]
    assert [entry[:2] for entry in entries] == [[".venv/bin/ruff", "check"], [".venv/bin/ruff", "format"]]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in fields)
    names = [field["id"] for field in fields]
    assert len(names) == len(set(names))


def test_the_other_templates_are_there() -> None:
    assert read(GITHUB / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": True}
    assert "make test" in (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not missing


def commands_in(path: Path) -> list[list[str]]:
    """The command lines of diffdistill in a document's blocks, a script or a notebook, without their comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("diffdistill ")]


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=lambda path: path.name)
def test_the_commands_that_it_shows_are_taken(path: Path) -> None:
    for name, *rest in commands_in(path):
        if name == "COMMAND":
            continue
        assert name in COMMANDS, name
        method = next((b for a, b in pairwise(rest) if a == "--method"), None)
        own = method if COMMANDS[name].distills and method in method_names() else None
        _, unknown = parser_of(name, own)[0].parse_known_args(rest)
        assert not unknown, (name, unknown)
    assert commands_in(path) or path not in SCRIPTS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_that_it_names_exist(path: Path) -> None:
    names = re.findall(r"tests/[\w/]+\.py", path.read_text(encoding="utf-8"))
    assert not [name for name in names if not (ROOT / name).is_file()]
