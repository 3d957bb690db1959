"""Imports point one way (DESIGN: the scaffold), third parties stay where they belong, `--help` stays fast."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A module imports from its own layer, without a cycle, and from those above it in this list.
LAYERS = [
    {"errors", "version", "rng", "files", "environment", "shards", "shapes"},
    {"schedule", "prediction"},
    {"denoiser", "lora", "guidance", "losses", "matching", "halving", "ode", "times", "distances", "adapter_networks"},
    {"families", "players", "analytic", "method", "config", "checkpoint", "verify"}
    | {"adapters", "guidance_adapters", "chains", "data", "data_folder", "data_hub", "data_webdataset"},
    {"trainer"},
    {"methods", "pipelines"},
    {"eval"},
    {"run", "teacher", "text_teacher", "pairs", "encode", "end_to_end"},
    {"cli", "eval.bench", "eval.memory", "eval.scoring", "eval.compare"},
    {"__init__", "__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
METHODS_MAY_USE = (
    LAYERS[1]
    | LAYERS[2]
    | {"errors", "rng", "players", "adapters", "guidance_adapters", "chains", "analytic", "method", "config", "verify"}
)
PURE_TORCH = {"schedule", "prediction", "losses", "matching", "halving", "ode", "times"}
ONLY_IN = {
    "diffusers": {"families", "pipelines", "eval", "eval.memory"},
    "peft": {"lora"},
    "accelerate": {"trainer", "checkpoint", "eval.scoring"},
    "datasets": {"data_hub"},
}
HEAVY = {"torch", "diffusers", "numpy", "accelerate", "peft", "PIL", "transformers"}
LIGHT = {"__init__", "__main__", "cli", "config", "errors", "version"}


def find_modules() -> dict[str, ast.Module]:
    """Name below `diffdistill` -> syntax tree; a folder's own file is `"__init__"`, `"methods.__init__"`."""
    folders = {"": "diffdistill", "methods.": "methods", "pipelines.": "pipelines", "eval.": "eval"}
    return {
        prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts): ast.parse(path.read_bytes())
        for prefix, folder in folders.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


MODULES = find_modules()


def top(name: str) -> str:
    """The part that has a layer: a module of diffdistill/, or a mapped folder."""
    return name if name in LAYER else name.split(".")[0]


def import_nodes(tree: ast.AST, at_start: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import; with `at_start` only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif at_start and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from import_nodes(ast.Module(node.orelse, []), at_start)
        else:
            yield from import_nodes(node, at_start)


def own_module(name: str, known: set[str]) -> str:
    """The module that `name`, dotted and below diffdistill, is or lies in."""
    while name:
        for found in (name, f"{name}.__init__"):
            if found in known:
                return found
        if name in LAYER:  # a module yet to be written
            return name
        name = name.rpartition(".")[0]
    return "__init__"


def targets(module: str, tree: ast.AST, known: set[str], at_start: bool = False) -> set[tuple[str, str]]:
    """What `module` imports: `("diffdistill", module)`, or `("torch", "nn")` for a third party."""
    names = set()
    for node in import_nodes(tree, at_start):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            package = ["diffdistill", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    found = {(package, below) for package, _, below in (name.partition(".") for name in names)}
    return {(p, own_module(below, known)) if p == "diffdistill" else (p, below) for p, below in found}


def violations(module: str, tree: ast.AST, known: set[str]) -> list[str]:
    """What `module` imports and should not, one line each."""
    if top(module) not in LAYER:
        return [f"{module} is new: give it a layer in tests/test_imports.py"]
    found = []
    for package, below in sorted(targets(module, tree, known)):
        if package in ONLY_IN and top(module) not in ONLY_IN[package]:
            found.append(f"{module} imports {package}, which belongs in {sorted(ONLY_IN[package])}")
        elif package not in {"diffdistill", "torch", *sys.stdlib_module_names} and module in PURE_TORCH:
            found.append(f"{module} imports {package}, but is pure torch")
        elif package != "diffdistill":
            continue
        elif top(below) not in LAYER:
            found.append(f"{module} imports {below}, which has no layer in tests/test_imports.py")
        elif top(module) == "methods" and top(below) not in METHODS_MAY_USE:
            found.append(f"{module} imports {below}: a method imports the cores, and no other method")
        elif LAYER[top(below)] > LAYER[top(module)]:
            found.append(f"{module} imports {below}, which lies in a higher layer")
    return found


def test_imports_point_one_way() -> None:
    assert not [line for name, tree in MODULES.items() for line in violations(name, tree, set(MODULES))]


def test_no_cycles() -> None:
    TopologicalSorter(
        {
            name: {below for package, below in targets(name, tree, set(MODULES)) if package == "diffdistill"}
            for name, tree in MODULES.items()
        }
    ).prepare()  # raises CycleError, which names the cycle


def test_help_is_fast() -> None:
    """No chain of imports that run at start-up leads from a light module to a heavy package."""
    chains = {name: name for name in MODULES if name in LIGHT}
    todo, found = list(chains), []
    while todo:
        name = todo.pop()
        for package, below in sorted(targets(name, MODULES[name], set(MODULES), at_start=True)):
            if package in HEAVY:
                found.append(f"{chains[name]} -> {package}")
            elif package == "diffdistill" and below in MODULES and below not in chains:
                chains[below] = f"{chains[name]} -> {below}"
                todo.append(below)
    assert not found, "import it inside the function that needs it"


def test_eval_is_not_imported_by_its_bare_name() -> None:
    """`from diffdistill import eval` shadows the builtin: `import diffdistill.eval as ...`."""
    tests = {path.name: ast.parse(path.read_bytes()) for path in (ROOT / "tests").rglob("*.py")}
    found = [
        f"{name}:{node.lineno}"
        for name, tree in [*MODULES.items(), *tests.items()]
        for node in import_nodes(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or node.module == "diffdistill")
        if "eval" in {alias.name for alias in node.names}
    ]
    assert not found


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("denoiser", "from diffdistill.schedule import Schedule", False),
        ("denoiser", "from .schedule import Schedule", False),
        ("denoiser", "def f():\n    from . import trainer", True),
        ("ode", "from .denoiser import Cond", False),
        ("schedule", "from diffdistill.denoiser import Denoiser", True),
        ("schedule", "import diffdistill.denoiser as d", True),
        ("schedule", "from diffdistill import __version__", True),
        ("schedule", "import numpy", True),
        ("schedule", "import math, torch.nn", False),
        ("lora", "from peft import LoraConfig", False),
        ("denoiser", "from peft import LoraConfig", True),
        ("trainer", "import diffusers", True),
        ("trainer", "from diffdistill.methods import dmd", True),
        ("pipelines.export", "import diffusers.utils", False),
        ("methods.dmd", "from diffdistill.losses import pseudo_huber", False),
        ("methods.dmd", "from diffdistill.methods.sid import loss", True),
        ("methods.dmd", "from .sid import loss", True),
        ("methods.dmd", "from diffdistill.trainer import Trainer", True),
        ("methods.dmd", "from ..families import family", True),
        ("run", "import diffdistill.methods.dmd", False),
        ("novel", "", True),
    ],
)
def test_violations_are_seen(module: str, source: str, caught: bool) -> None:
    known = {"__init__", "methods.__init__", "methods.dmd", "methods.sid", "pipelines.export"}
    assert bool(violations(module, ast.parse(source), known)) == caught


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("import torch", True),
        ("try:\n    import torch\nexcept ImportError:\n    pass", True),
        ("class A:\n    import torch", True),
        ("def f():\n    import torch", False),
        ("if TYPE_CHECKING:\n    import torch", False),
        ("if typing.TYPE_CHECKING:\n    pass\nelse:\n    import torch", True),
    ],
)
def test_imports_at_start_are_seen(source: str, caught: bool) -> None:
    assert (("torch", "") in targets("cli", ast.parse(source), set(), at_start=True)) == caught
