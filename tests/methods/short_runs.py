"""Short runs of a method: one that ends with a student, and one that is stopped and resumed."""

from pathlib import Path
from typing import Any

from diffdistill import distill


def trains(folder: Path, **options: Any) -> None:
    """Two steps leave a student in the layout of diffusers."""
    student = distill(**{"steps": 2, "out": str(folder / "run"), **options}).student
    assert (student / "model_index.json").is_file()


def same_when_resumed(folder: Path, stop: int = 2, end: int = 4, **options: Any) -> None:
    """Stopped at a step and resumed, a run has all the weights and states of one that goes to its end at once."""
    whole, run = folder / "whole", folder / "run"
    options = {"checkpoint_every": stop, "lr_schedule": "constant", **options}
    distill(**options | {"out": str(whole), "steps": end})
    distill(**options | {"out": str(run), "steps": stop})
    distill(resume=run, steps=end)
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*.safetensors"))]
    assert {file.parts[0] for file in files} == {"student", "checkpoints"}
    for file in files:
        assert (whole / file).read_bytes() == (run / file).read_bytes(), file
