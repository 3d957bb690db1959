"""The layer of a module is its folder; third parties stay where they belong; `--help` is fast."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A folder imports from itself and from those before it. GROUND are the modules of diffdistill/ itself.
FOLDERS = "GROUND core players scaffold families data training exact methods pipelines eval commands".split()  # noqa: SIM905
ONLY_IN = {
    "diffusers": {"families", "pipelines", "eval"},
    "peft": {"players"},
    "accelerate": {"data", "training", "eval"},
    "datasets": {"data"},
    "bitsandbytes": {"players", "training"},
    "imageio": {"data"},
}
HEAVY = {"torch", "diffusers", "numpy", "accelerate", "peft", "PIL", "transformers", "yaml"}
LIGHT = ("", "commands.cli", "catalogue", "config", "options", "errors", "version")


def modules() -> dict[str, ast.Module]:
    """Name below `diffdistill` -> syntax tree; that of a package is its folder's, "" for diffdistill itself."""
    folders = {"diffdistill": "", "methods": "methods.", "pipelines": "pipelines.", "eval": "eval."}
    return {
        (prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts))
        .removesuffix("__init__")
        .rstrip("."): ast.parse(path.read_bytes())
        for folder, prefix in folders.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


MODULES = modules()


def layer(name: str) -> int:
    """Of a module; diffdistill itself, whose public names are looked up lazily, is above all."""
    if name in ("", "__main__"):
        return len(FOLDERS)
    folder = name.split(".")[0]
    return FOLDERS.index(folder) if folder in FOLDERS else 0


def import_nodes(tree: ast.AST, at_start: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that runs, also inside functions; with `at_start` only those of importing the module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from import_nodes(ast.Module(node.orelse, []), at_start)
        elif not (at_start and isinstance(node, ast.FunctionDef)):
            yield from import_nodes(node, at_start)


def imported(module: str, tree: ast.AST, at_start: bool = False) -> set[str]:
    """Dotted names: `"diffdistill.core.ode"`, `"torch.nn"`."""
    names = set()
    for node in import_nodes(tree, at_start):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        package = ["diffdistill", *module.split(".")][: -node.level] if node.level else []
        base = ".".join([*package, *([node.module] if node.module else [])])
        names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[str]:
    """The modules of diffdistill among them, of which a name may be one or lie in one."""
    modules = set()
    for name in names:
        package, _, below = name.partition(".")
        while package == "diffdistill" and below not in MODULES:
            below = below.rpartition(".")[0]
        if package == "diffdistill":
            modules.add(below)
    return modules


def violations(module: str, tree: ast.AST) -> list[str]:
    """What `module` imports and should not, one line each."""
    names, folder = imported(module, tree), module.split(".")[0]
    outside = {name.split(".")[0] for name in names}
    wrong = [
        f"{module} imports {package}"
        for package in ONLY_IN
        if package in outside - {folder} and folder not in ONLY_IN[package]
    ]
    if folder == "core":
        wrong += [f"{module} imports {package}: core is pure torch" for package in outside & (HEAVY - {"torch"})]
    wrong += [f"{module} imports {below}, which lies above it" for below in ours(names) if layer(below) > layer(module)]
    if module.startswith("methods.") and ".checks" not in module:
        wrong += [
            f"{module} imports {below}: a method imports no other, nor what trains or checks it"
            for below in ours(names)
            if layer(below) > FOLDERS.index("scaffold") or below.startswith("methods.")
        ]
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    assert not violations(module, MODULES[module])


def test_no_cycles() -> None:
    graph = {name: ours(imported(name, tree)) - {name, ""} for name, tree in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_help_is_fast() -> None:
    """No chain of imports that run at start-up leads from a light module to a heavy package."""
    chains, todo, heavy = {name: name for name in LIGHT}, list(LIGHT), []
    while todo:
        name = todo.pop()
        names = imported(name, MODULES[name], at_start=True)
        heavy += [f"{chains[name]} -> {package}" for package in HEAVY & {n.split(".")[0] for n in names}]
        for below in ours(names) - chains.keys():
            chains[below] = f"{chains[name]} -> {below}"
            todo.append(below)
    assert not heavy, "import it inside the function that needs it"


def test_scripts_of_before_the_layers_go_on() -> None:
    """A module that lay directly in the package has its first name still, and is the same module."""
    lines = [
        "from diffdistill.shapes import draw_many",
        "from diffdistill.encode import all_prompts",
        "from diffdistill.data_folder import open_folder",
        "import diffdistill.schedule, diffdistill.core.schedule",
        "assert diffdistill.schedule is diffdistill.core.schedule",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT)
    for module in ("diffdistill", "diffdistill.cli"):
        command = [sys.executable, "-m", module, "--version"]
        assert subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    found = importlib.util.find_spec("diffdistill.cli")
    assert found is not None and Path(str(found.origin)) == ROOT / "diffdistill" / "commands" / "cli.py"
    assert importlib.util.find_spec("diffdistill.nothing") is None


def test_eval_is_not_imported_by_its_bare_name() -> None:
    """`from diffdistill import eval` shadows the builtin: `import diffdistill.eval as ...`."""
    tests = {str(path): ast.parse(path.read_bytes()) for path in (ROOT / "tests").rglob("*.py")}
    nodes = [(name, node) for name, tree in [*MODULES.items(), *tests.items()] for node in import_nodes(tree)]
    assert not [
        f"{name}:{node.lineno}"
        for name, node in nodes
        if isinstance(node, ast.ImportFrom) and (node.level or node.module == "diffdistill")
        if "eval" in {alias.name for alias in node.names}
    ]


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("core.denoiser", "from diffdistill.core.schedule import Schedule", False),
        ("core.denoiser", "from .schedule import Schedule", False),
        ("core.denoiser", "def f():\n    from diffdistill.training import trainer", True),
        ("core.denoiser", "if TYPE_CHECKING:\n    from diffdistill.training import trainer", False),
        ("core.schedule", "import diffdistill.players.lora as l", True),
        ("core.schedule", "from diffdistill import distill", True),
        ("core.schedule", "import numpy", True),
        ("core.schedule", "import math, torch.nn", False),
        ("players.lora", "def f():\n    from peft import LoraConfig", False),
        ("core.denoiser", "from peft import LoraConfig", True),
        ("training.trainer", "import diffusers", True),
        ("training.trainer", "from diffdistill.methods import dmd", True),
        ("pipelines.export", "import diffusers.utils", False),
        ("methods.dmd", "from diffdistill.core.losses import pseudo_huber", False),
        ("methods.dmd", "from diffdistill.methods.sid import loss", True),
        ("methods.dmd", "from .sid import loss", True),
        ("methods.dmd", "from diffdistill.training.trainer import Trainer", True),
        ("methods.dmd", "from diffdistill.exact.analytic import GaussianMixture", True),
        ("methods.checks.dmd", "from diffdistill.exact.analytic import GaussianMixture", False),
        ("eval.sample", "from diffdistill.commands.distill import distill", True),
        ("commands.distill", "import diffdistill.methods.dmd", False),
    ],
)
def test_violations_are_seen(module: str, source: str, caught: bool) -> None:
    assert bool(violations(module, ast.parse(source))) == caught


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
    assert ("torch" in imported("commands.cli", ast.parse(source), at_start=True)) == caught


def test_importing_a_method_imports_torch_and_nothing_heavier() -> None:
    """LoRA's peft alone takes three seconds, through transformers and accelerate."""
    packages = sorted(HEAVY - {"torch", "numpy"})
    code = f"import sys, diffdistill.methods.lora_guidance; print([p for p in {packages} if p in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
