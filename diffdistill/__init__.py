"""Distill a pretrained diffusion model into a generator that needs one to four steps.

    import diffdistill

    run = diffdistill.distill("dmd2", preset="digits", out="runs/digits")

Heavy modules are imported on first use, so that `import diffdistill` and `diffdistill --help` are quick.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING

from diffdistill.errors import UserError
from diffdistill.version import __version__

if TYPE_CHECKING:
    from diffdistill.commands.bench import bench
    from diffdistill.commands.compare import compare
    from diffdistill.commands.decoder import train_decoder
    from diffdistill.commands.distill import distill
    from diffdistill.commands.evaluate import evaluate
    from diffdistill.commands.export import export
    from diffdistill.commands.family_check import family_check
    from diffdistill.commands.jvp_check import jvp_check
    from diffdistill.commands.plan import plan
    from diffdistill.commands.prune import prune
    from diffdistill.commands.report import report
    from diffdistill.commands.run import Run
    from diffdistill.commands.sample import sample
    from diffdistill.commands.shards import encode, make_pairs
    from diffdistill.commands.speed import speed
    from diffdistill.commands.teacher import train_teacher
    from diffdistill.commands.verify import verify
    from diffdistill.core.denoiser import Denoiser
    from diffdistill.core.guidance import guided
    from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, TrigFlow
    from diffdistill.data.examples import Example, Examples
    from diffdistill.data.images import open_data
    from diffdistill.families import Family, load_student, load_teacher, register_family
    from diffdistill.players.teacher import Teacher
    from diffdistill.scaffold.score_distillation import ScoreDistillation

_MODULES = {
    "distill": "commands.distill",
    "encode": "commands.shards",
    "make_pairs": "commands.shards",
    "prune": "commands.prune",
    "train_decoder": "commands.decoder",
    "train_teacher": "commands.teacher",
    "evaluate": "commands.evaluate",
    "compare": "commands.compare",
    "speed": "commands.speed",
    "sample": "commands.sample",
    "bench": "commands.bench",
    "verify": "commands.verify",
    "family_check": "commands.family_check",
    "jvp_check": "commands.jvp_check",
    "plan": "commands.plan",
    "report": "commands.report",
    "export": "commands.export",
    "Run": "commands.run",
    "ScoreDistillation": "scaffold.score_distillation",
    "Teacher": "players.teacher",
    "Example": "data.examples",
    "Examples": "data.examples",
    "DiscreteVP": "core.schedule",
    "EDM": "core.schedule",
    "LinearFlow": "core.schedule",
    "TrigFlow": "core.schedule",
    "Denoiser": "core.denoiser",
    "guided": "core.guidance",
    "Family": "families",
    "register_family": "families",
    "load_student": "families",
    "load_teacher": "families",
    "open_data": "data.images",
}
"""Where each public name lies; a test holds it equal to the imports above, which editors and type checkers read."""

__all__ = [
    "EDM",
    "Denoiser",
    "DiscreteVP",
    "Example",
    "Examples",
    "Family",
    "LinearFlow",
    "Run",
    "ScoreDistillation",
    "Teacher",
    "TrigFlow",
    "UserError",
    "__version__",
    "bench",
    "compare",
    "distill",
    "encode",
    "evaluate",
    "export",
    "family_check",
    "guided",
    "jvp_check",
    "load_student",
    "load_teacher",
    "make_pairs",
    "open_data",
    "plan",
    "prune",
    "register_family",
    "report",
    "sample",
    "speed",
    "train_decoder",
    "train_teacher",
    "verify",
]

if not TYPE_CHECKING:  # where a type checker sees it, a misspelt name would have any type

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return getattr(importlib.import_module(f"diffdistill.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)


class _Moved:
    """Modules that lay directly in the package before they had a layer, under their first names.

    `from diffdistill.shapes import draw_many` and `python -m diffdistill.cli`, of scripts written then, go on.
    """

    layers = ("commands", "core", "data", "exact", "players", "scaffold", "training")
    renamed = {"encode": "data.prompts", "adapters": "players.lora", "end_to_end": "exact.plane"}  # noqa: RUF012

    def place(self, name: str) -> str:
        """The module's name today, "" for one that never was."""
        package, _, first = name.rpartition(".")
        if package != __name__:
            return ""
        first = self.renamed.get(first, first.replace("data_", "data.", 1))
        found = [f"{layer}.{first}" for layer in self.layers] if "." not in first else [first]
        files = [f for f in found if (Path(__file__).parent / f"{f.replace('.', '/')}.py").is_file()]
        return f"{__name__}.{files[0]}" if files else ""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        today = importlib.util.find_spec(place) if (place := self.place(name)) else None
        if today is None:
            return None
        spec = importlib.util.spec_from_loader(name, self, origin=today.origin)  # type: ignore[arg-type]
        if spec is not None:
            spec.has_location = True  # `python -m` takes its __file__ from there
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual empty module, which gives way to the one that moved."""

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(self.place(module.__name__))

    def get_code(self, name: str) -> CodeType | None:  # for `python -m`
        spec = importlib.util.find_spec(self.place(name))
        return spec.loader.get_code(self.place(name)) if spec and spec.loader else None  # type: ignore[attr-defined]


sys.meta_path.append(_Moved())
