"""How large the parts are and how much of a method stands in another: `python tests/sizes.py [CHECKOUT]`.

Exits with 1 if a limit is passed. Three counts:

1. Lines of each method's file, `methods/*.py`: none over 180, the median at most 130.
2. The share of a method that stands verbatim in another method's file: at most 10%. Counted are the lines of `Config`
   and of the class that `METHOD` names, stripped, without comments and docstrings. Left out are the first lines of
   `class` and `def`, and decorators, since `Method` dictates most of them, and lines of fewer than four characters,
   such as `)`. A line is shared if any counted line of another file is the same. On be8b073 this gives 418 of 873
   lines, 47.9%; with first lines and decorators it would be 551 of 1057, 52.1%.
3. Entries of `diffdistill/` (at most 20), Python files over 450 lines, and functions over 60 lines. `TABLES` names the
   long functions that are declarative tables.
"""

from __future__ import annotations

import ast
import io
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

METHOD_LINES, METHOD_MEDIAN, VERBATIM = 180, 130, 0.10
ENTRIES, FILE_LINES, FUNCTION_LINES = 20, 450, 60
TABLES: frozenset[str] = frozenset()
"""Functions that are one table, as `"diffdistill/commands/cli.py: parser"`."""


def method_files(root: Path) -> list[Path]:
    """The methods of a checkout, one file each."""
    return [path for path in sorted((root / "methods").glob("*.py")) if path.name != "__init__.py"]


def span(node: ast.stmt) -> range:
    """The numbers of the lines that a statement takes."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def counted_lines(source: str) -> list[str]:
    """The lines of `Config` and of the method's class that the second count looks at, in their order."""
    tree, lines = ast.parse(source), source.splitlines()
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    names = {"Config", *(ast.unparse(node.value) for node in assigned if ast.unparse(node.targets[0]) == "METHOD")}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    counted = []
    for node in tree.body:
        if not (isinstance(node, ast.ClassDef) and node.name in names):
            continue
        docstrings = {
            line
            for inner in ast.walk(node)
            if isinstance(inner, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner) is not None
            for line in span(inner.body[0])
        }
        counted += [lines[line - 1].strip() for line in span(node) if line not in docstrings]
    return [line for line in counted if len(line) >= 4 and not line.startswith(("@", "def ", "class "))]


def verbatim(sources: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Name of a method -> how many of its counted lines stand in another method too, and how many it has."""
    lines = {name: counted_lines(source) for name, source in sources.items()}
    shares = {}
    for name, own in lines.items():
        others = {line for other, theirs in lines.items() if other != name for line in theirs}
        shares[name] = (sum(line in others for line in own), len(own))
    return shares


def tracked(root: Path, pattern: str) -> list[str]:
    """The files that git tracks or would add, and that exist."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", pattern]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return sorted({path for path in listed.split("\0") if path and (root / path).is_file()})


def long_functions(path: str, source: str) -> list[str]:
    """One line for each function of a file that is longer than allowed and no table."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    sizes = {f"{path}: {node.name}": len(span(node)) for node in functions}
    return [f"{name}, {size} lines" for name, size in sizes.items() if size > FUNCTION_LINES and name not in TABLES]


def entries(root: Path) -> set[str]:
    """The modules and folders of `diffdistill/`."""
    return {path.split("/")[1] for path in tracked(root, "diffdistill")}


def excesses(root: Path) -> list[str]:
    """What is larger than allowed, one line each."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in method_files(root)}
    sizes = {name: len(source.splitlines()) for name, source in sources.items()}
    beyond = [f"methods/{name}: {size} lines, at most {METHOD_LINES}" for name, size in sizes.items()
              if size > METHOD_LINES]  # fmt: skip
    median, share = statistics.median(sizes.values()), total(verbatim(sources))
    if median > METHOD_MEDIAN:
        beyond.append(f"methods/: a median of {median:g} lines, at most {METHOD_MEDIAN}")
    if share > VERBATIM:
        beyond.append(f"methods/: {share:.1%} of the lines stand in another method, at most {VERBATIM:.0%}")
    if len(entries(root)) > ENTRIES:
        beyond.append(f"diffdistill/: {len(entries(root))} entries, at most {ENTRIES}")
    for path in tracked(root, "*.py"):
        source = (root / path).read_text(encoding="utf-8")
        if len(source.splitlines()) > FILE_LINES:
            beyond.append(f"{path}: {len(source.splitlines())} lines, at most {FILE_LINES}")
        beyond += [f"{line}, at most {FUNCTION_LINES}" for line in long_functions(path, source)]
    return beyond


def total(shares: dict[str, tuple[int, int]]) -> float:
    """The share of all methods together, of what `verbatim` counts in each."""
    return sum(shared for shared, _ in shares.values()) / sum(counted for _, counted in shares.values())


def main(root: Path) -> int:
    """Prints the counts and what is too large; returns the exit code."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in method_files(root)}
    sizes = {name: len(source.splitlines()) for name, source in sources.items()}
    shares = verbatim(sources)
    for name, (shared, counted) in shares.items():
        print(f"{name:28}{sizes[name]:5} lines; {shared:4} of {counted:4} stand in another method")
    print(
        f"{len(sizes)} methods: a median of {statistics.median(sizes.values()):g} lines, {max(sizes.values())} at most"
    )
    print(f"{total(shares):.1%} of their lines stand in another method; {len(entries(root))} entries in diffdistill/")
    beyond = excesses(root)
    print("\n".join(["", "Too large:", *beyond] if beyond else ["Nothing is too large."]))
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]))
