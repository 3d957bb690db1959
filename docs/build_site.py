"""The pages of the docs site, generated from the code's own records, and the site built of them: `make docs`.

`python docs/build_site.py FOLDER` writes the sources into FOLDER/src and FOLDER/mkdocs.yml; with `--build` mkdocs makes
FOLDER/html of them, strictly: a link or an anchor that leads nowhere is an error. Nothing generated is committed. A new
method, family, command, option or public name gets its place by being there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from site_pages import command_line, families, methods, python_names, recipe_list

ROOT = Path(__file__).resolve().parents[1]
PICTURES = (".png", ".svg")
NOTEBOOKS = {
    "first_steps": "First steps",
    "reading_the_curves": "Reading the curves",
    "choosing_a_method": "Choosing a method",
    "your_own_network": "Your own network and data",
    "your_own_renderer": "A scene of your own",
    "text_to_image": "Text to image",
    "write_your_own_method": "Write your own method",
    "what_methods_do": "What methods do, in the plane",
}
"""Titles in their order; a notebook that is not here comes last, by its own name."""

GUIDE = {
    "Methods at a glance": "methods.md",
    "Examples": "examples.md",
    "Text to image": "text_to_image.md",
    "Training": "training.md",
    "Reading the curves": "curves.md",
    "Evaluation": "evaluation.md",
    "Inference": "inference.md",
    "Troubleshooting": "troubleshooting.md",
}
EVIDENCE = {
    "Results": "results.md",
    "Text-to-image results": "demo_text.md",
    "Strangers' teachers": "strangers.md",
    "Super-resolution": "super_resolution.md",
    "Performance": "performance.md",
    "Verification": "verification.md",
    "Fidelity": "fidelity.md",
}
Nav = list[Any]


def write_sources(folder: Path) -> dict[str, str]:
    """Write FOLDER/src and FOLDER/mkdocs.yml; returns the pages by their paths in src."""
    pages: dict[str, str] = {"index.md": documents("site/index.md"), "contributing.md": documents("../CONTRIBUTING.md")}
    pages["changelog.md"] = documents("../CHANGELOG.md")
    written = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    pages |= {name: documents(name) for name in written}
    pages["examples.md"] = examples()
    pages |= methods() | families() | command_line() | python_names() | notebooks()
    pages["recipes.md"] = recipe_list()
    source = folder / "src"
    shutil.rmtree(source, ignore_errors=True)
    for name, text in pages.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    for picture in (ROOT / "docs").iterdir():
        if picture.suffix in PICTURES:
            shutil.copyfile(picture, source / picture.name)
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings(pages), sort_keys=False), encoding="utf-8")
    _lay_package_out(folder / "package" / "diffdistill")
    return pages


def _lay_package_out(package: Path) -> None:
    """The package with the folders that are mapped into it, as links: mkdocstrings reads source."""
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for part in [*(ROOT / "diffdistill").iterdir(), *(ROOT / name for name in ("eval", "methods", "pipelines"))]:
        (package / part.name).symlink_to(part)


def settings(pages: Mapping[str, str]) -> dict[str, Any]:
    """What mkdocs is told. No font and no script comes from elsewhere."""

    def below(part: str) -> Nav:
        return [name for name in pages if name.startswith(f"{part}/")]

    placed = {
        "index.md",
        "contributing.md",
        "changelog.md",
        "design.md",
        "recipes.md",
        *GUIDE.values(),
        *EVIDENCE.values(),
    }
    others = [name for name in pages if "/" not in name and name not in placed]
    nav: Nav = [
        {"What do you want?": "index.md"},
        {"Guide": [*({k: v} for k, v in GUIDE.items()), {"Notebooks": below("notebooks")}, *others]},
        {"Methods": [*below("methods"), {"Recipes": "recipes.md"}]},
        {"Families": below("families")},
        {"Commands": below("commands")},
        {"Python": below("python")},
        {"Evidence": [{k: v} for k, v in EVIDENCE.items()]},
        {
            "Adding to it": [
                {"How": "contributing.md"},
                {"Why the code is as it is": "design.md"},
                {"Changelog": "changelog.md"},
            ]
        },
    ]
    python = {"docstring_style": "google", "show_source": False, "show_root_heading": True, "heading_level": 2}
    python |= {"members_order": "source", "separate_signature": True, "show_root_full_path": False, "filters": ["!^_"]}
    schemes = [
        {"media": f"(prefers-color-scheme: {scheme})", "scheme": name, "primary": "indigo",
         "toggle": {"icon": "material/brightness-6", "name": "light or dark"}}
        for scheme, name in (("light", "default"), ("dark", "slate"))
    ]  # fmt: skip
    features = ["navigation.indexes", "navigation.top", "navigation.tabs", "content.code.copy", "search.highlight"]
    return {
        "site_name": "diffdistill",
        "docs_dir": "src",
        "site_dir": "html",
        "use_directory_urls": False,  # so that it can be read from a folder
        "theme": {"name": "material", "font": False, "features": features, "palette": schemes},
        "plugins": [
            "search",
            {"mkdocstrings": {"handlers": {"python": {"paths": ["package"], "options": python}}}},
        ],
        "markdown_extensions": ["tables", "attr_list", "pymdownx.superfences", {"toc": {"permalink": True}}],
        "validation": {
            "nav": {"omitted_files": "warn", "not_found": "warn", "absolute_links": "warn"},
            "links": {"not_found": "warn", "anchors": "warn", "absolute_links": "warn", "unrecognized_links": "warn"},
        },
        "nav": nav,
    }


# -- documents and notebooks ---------------------------------------------------------------------------------


def documents(name: str) -> str:
    """A document of docs/ or above it, with its links as they are on the site."""
    path = ROOT / "docs" / name
    return linked(path.read_text(encoding="utf-8"), path.parent)


def linked(text: str, folder: Path, up: str = "") -> str:
    """A text whose links are relative to a folder, with those of the site; `up` leads from its page to its root."""

    def link(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        file, hash_, anchor = target.partition("#")
        if not file or "://" in file:
            return match[0]
        path = (folder / file).resolve()
        if not path.exists():  # a generated page
            return match[0]
        place = site_path(path.relative_to(ROOT))
        return f"[{words}]({up}{place}{hash_}{anchor})" if place else words

    return re.sub(r"\[([^\[\]]*)\]\(([^()\s]+)\)", link, text)


def examples() -> str:
    """The examples to copy, in one page."""
    kinds = {".sh": "bash", ".py": "python"}
    files = [path for path in sorted((ROOT / "docs" / "examples").iterdir()) if path.suffix in kinds]
    parts = [f"## {path.name}\n\n```{kinds[path.suffix]}\n{path.read_text(encoding='utf-8')}```" for path in files]
    return "\n\n".join([documents("examples/README.md").rstrip(), *parts]) + "\n"


def site_path(path: Path) -> str | None:
    """Where a file of the repository is on the site; None if it is not."""
    if path.parts[0] == "docs":
        return path.name if len(path.parts) == 2 else None
    if path.suffix == ".ipynb":
        return f"notebooks/{path.stem}.md"
    return {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}.get(
        str(path)
    )


def notebooks() -> dict[str, str]:
    """Each notebook as a page, without what it prints."""
    folder = ROOT / "notebooks"
    there = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    order = [name for name in NOTEBOOKS if name in there] + [name for name in there if name not in NOTEBOOKS]
    pages = {}
    for name in order:
        parts = [f"*The notebook `notebooks/{name}.ipynb`, without what it prints and draws.*"]
        for cell in json.loads(there[name].read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else linked(source, folder, "../"))
        title = parts.pop(1) if parts[1].startswith("# ") else f"# {name}"
        pages[f"notebooks/{name}.md"] = "\n\n".join([title, *parts]) + "\n"
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    """Write the sources, and build the site; the exit code of mkdocs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--build", action="store_true", help="build FOLDER/html too")
    given = parser.parse_args(argv)
    pages = write_sources(given.folder)
    print(f"{len(pages)} pages in {given.folder / 'src'}")
    if not given.build:
        return 0
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(given.folder / "mkdocs.yml")]
    done = subprocess.run(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    if done.returncode == 0:
        print(f"site: {given.folder / 'html' / 'index.html'}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
