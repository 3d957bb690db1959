"""Short runs of a method: one that ends with a student, and one that is stopped and resumed."""

from pathlib import Path
from typing import Any

import torch

from diffdistill import distill, load_student, make_pairs


def trains(folder: Path, **options: Any) -> None:
    """Two steps leave a student in the layout of diffusers."""
    student = distill(**{"steps": 2, "out": str(folder / "run"), **options}).student
    assert (student / "model_index.json").is_file()


def with_pairs(folder: Path, teacher: Path) -> dict[str, str]:
    """Eight pairs of a teacher, and the options that name both."""
    made = make_pairs(teacher=str(teacher), count=8, sampling_steps=2, device="cpu", out=str(folder / "pairs"))
    return {"teacher": str(teacher), "pairs": str(made)}


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


def stock_draws_the_same(pipeline: Any, student: Path) -> int:
    """Stock diffusers' pipeline of pixels draws two images as our sampler of that folder, whose steps are returned."""
    sampler, described = load_student(student)
    drawn, ours = ([torch.Generator().manual_seed(k) for k in range(2)] for _ in range(2))
    steps = len(sampler.levels)
    images = pipeline(
        batch_size=2, class_labels=[1, 3], num_inference_steps=steps, output_type="np", generator=drawn
    ).images
    expected = (sampler(described.shape, {"class_labels": torch.tensor([1, 3])}, ours) / 2 + 0.5).clamp(0, 1)
    assert float((torch.as_tensor(images).permute(0, 3, 1, 2) - expected).abs().max()) < 1e-4
    return steps
