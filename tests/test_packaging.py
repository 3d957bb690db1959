"""What is installed is what is in git; nothing committed names a machine; nothing unpickles."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("methods", "pipelines", "eval")


def git_files(*folders: str) -> list[str]:
    """Paths that git tracks or would add, and that exist."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted({path for path in listed.split("\0") if path and (ROOT / path).is_file()})


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from that sdist, of a copy of what is in git."""
    copy = tmp_path_factory.mktemp("copy")
    for path in git_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy / path)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_wheel_holds_what_git_holds(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    committed = {
        path if path.startswith("diffdistill/") else f"diffdistill/{path}" for path in git_files("diffdistill", *MAPPED)
    }
    # A folder of modules needs __init__.py, a data file a pattern in package_data.
    in_git_only, in_wheel_only = committed - packed, packed - committed
    assert not in_git_only
    assert not in_wheel_only


def test_wheel_metadata(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        licenses = [name for name in archive.namelist() if name.endswith("LICENSE")]
    version = importlib.import_module("diffdistill.version").__version__
    assert f"\nName: diffdistill\nVersion: {version}\n" in metadata
    assert "diffdistill = diffdistill.commands.cli:main" in scripts
    assert licenses
    assert "Requires-Dist: torchvision" not in metadata


def test_build_system_table() -> None:
    """Without it pip may fall back to `setup.py develop`, which installs half a package."""
    assert 'build-backend = "setuptools.build_meta"' in (ROOT / "pyproject.toml").read_text()
    done = subprocess.run([sys.executable, "setup.py", "develop"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "pip install -e ." in done.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_no_second_copy(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"AssertionError: {name}/ is the package diffdistill.{name}" in done.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_folder_imports(name: str) -> None:
    module = importlib.import_module(f"diffdistill.{name}")
    # A plain install run from the root finds ./diffdistill, and the mapped folders elsewhere or not at all.
    assert Path(str(module.__file__)) == ROOT / name / "__init__.py", "install with `pip install -e .`"


# Folders of one machine, at the start of a path only; a host; registries. Put together from pieces, so that
# this file does not hold what it looks for.
MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w.~})>-])/(?:home|root|work|opt|tmp|Users)/",
            r"\b" + r"\.".join(["127", "0", "0", "1"]),
            r"\b(?:pypi|pythonhosted)" + r"\.org",
            "--(?:extra-)?" + "index-url|--" + "find-links",
        ]
    )
)


def test_no_machine_in_committed_text() -> None:
    places = []
    for path in git_files():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # not text
            continue
        places += [f"{path}: {match[0]}" for match in MACHINE.finditer(text)]
    assert not places


@pytest.mark.parametrize(
    ("text", "caught"),
    [("x = '/{}/me'", True), ("see /{}/x", True), ("a/{}/b", False), ("https://example.com/{}/", False)],
)
def test_machine_pattern(text: str, caught: bool) -> None:
    assert bool(MACHINE.search(text.format("home"))) == caught


PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Each can run code that the file brings.
LOADERS = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    "numpy.load",  # allowed where it is called with a literal allow_pickle=False
}


def unpickling(source: str) -> list[str]:
    """The places in `source` that unpickle, as `"line: name"`."""
    nodes = list(ast.walk(ast.parse(source)))
    full_names, places = {}, []
    for node in nodes:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            full_names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module]
            full_names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        places += [f"{node.lineno}: {module}" for module in modules if module.split(".")[0] in PICKLERS]
    pickle_free = {
        id(node.func)
        for node in nodes
        if isinstance(node, ast.Call) and "allow_pickle=False" in map(ast.unparse, node.keywords)
    }
    for node in nodes:
        # Names too, not only calls: `map(torch.load, files)` unpickles as well.
        if isinstance(node, ast.Name | ast.Attribute):
            head, dot, rest = ast.unparse(node).partition(".")
            name = full_names.get(head, head) + dot + rest
            if name in LOADERS and not (name == "numpy.load" and id(node) in pickle_free):
                places.append(f"{node.lineno}: {name}")
    return places


def test_nothing_unpickles() -> None:
    paths = [path for path in git_files("setup.py", "diffdistill", *MAPPED) if path.endswith(".py")]
    places = {path: unpickling((ROOT / path).read_text(encoding="utf-8")) for path in paths}
    # The standard feature networks are .pth files: read where their checksum is right, and then without running code.
    weights = (ROOT / "eval/features/weights.py").read_text(encoding="utf-8")
    (line,) = places.pop("eval/features/weights.py")
    assert line.endswith(": torch.load") and "weights_only=True" in weights.splitlines()[int(line.split(":")[0]) - 1]
    assert not {path: lines for path, lines in places.items() if lines}


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("import torch\ntorch.load(f)", True),
        ("import torch as th\nth.load(f, weights_only=True)", True),
        ("from torch import load as read\nread(f)", True),
        ("import torch\nread = torch.load", True),
        ("import pickle", True),
        ("from joblib import load", True),
        ("import numpy as np\nnp.load(f)", True),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", True),
        ("import numpy as np\nnp.load(f, allow_pickle=False)", False),
        ("import yaml\nyaml.load(f, yaml.SafeLoader)", True),
        ("import yaml\nyaml.safe_load(f)", False),
        ("from safetensors.torch import load\nload(f)", False),
        ("import json\njson.load(f)", False),
    ],
)
def test_unpickling_is_seen(source: str, caught: bool) -> None:
    assert bool(unpickling(source)) == caught
