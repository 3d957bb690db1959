"""`--attention` reaches the network of every command that runs one, and stands where its results are kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from diffdistill import UserError, distill, jvp_check, make_pairs, sample
from diffdistill.config import run_options
from diffdistill.core import attention_choice
from diffdistill.data.pairs import open_pairs
from diffdistill.families import load_student

SHORT: dict[str, Any] = {"batch_size": 4, "sample_every": 0, "device": "cpu"}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls by the choice that computes them."""
    seen: dict[str, int] = {}

    def counting(name: str, forms: dict[Any, Any]) -> dict[Any, Any]:
        def called(form: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                seen[name] = seen.get(name, 0) + 1
                return form(*args, **kwargs)

            return call

        return {function: called(form) for function, form in forms.items()}

    forms = {name: counting(name, replaced) for name, replaced in attention_choice._REPLACED.items()}
    with mock.patch.object(attention_choice, "_REPLACED", forms):
        yield seen


@pytest.mark.parametrize("choice", ["math", "jvp"])
def test_a_run_keeps_its_choice_and_gives_a_student_like_the_default(choice: str, tmp_path: Path) -> None:
    runs = {}
    for name in ("auto", choice):
        with counted() as seen:
            runs[name] = distill("sid", steps=1, out=tmp_path / name, attention=name, **SHORT)
        assert set(seen) == {name} - {"auto"}
        assert run_options(runs[name].folder)["attention"] == name
    weights = [load_student(run.student)[0].denoiser.state_dict() for run in runs.values()]
    # Adam's first steps are of the sign of the gradient alone, which rounding turns round where it is next to nothing.
    gaps = torch.cat([(weights[0][key] - weights[1][key]).abs().flatten() for key in weights[0]])
    assert gaps.median() < 1e-6
    with pytest.raises(UserError, match=r"^attention: cannot change when a run is resumed"):
        distill(resume=runs[choice].folder, attention="auto", steps=2)


def test_pictures_and_pairs_are_computed_by_it(tmp_path: Path) -> None:
    plain = sample("digits", count=4, steps=2, device="cpu").images
    with counted() as seen:
        images = sample("digits", count=4, steps=2, device="cpu", attention="math").images
    assert seen["math"] > 0
    assert torch.allclose(images, plain, atol=1e-4)
    pairs: dict[str, Any] = {"count": 4, "sampling_steps": 2, "device": "cpu", "out": tmp_path / "pairs"}
    with counted() as seen:
        folder = make_pairs(attention="jvp", **pairs)
    assert seen["jvp"] > 0
    assert len(open_pairs(folder)) == 4
    with pytest.raises(UserError, match="attention"):
        make_pairs(attention="math", **pairs)


def test_jvp_check_takes_it() -> None:
    with counted() as seen:
        assert all(row.ok for row in jvp_check("digits", attention="jvp"))
    assert seen["jvp"] > 0


@pytest.mark.parametrize("command", ["train", "sample", "pairs"])
def test_what_the_device_lacks_is_one_line(command: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^attention: xformers .*; .*use sdpa$"):
        if command == "train":
            distill("sid", steps=1, out=tmp_path / "run", attention="xformers", **SHORT)
        elif command == "sample":
            sample("digits", device="cpu", attention="xformers")
        else:
            make_pairs(count=4, device="cpu", attention="xformers", out=tmp_path / "pairs")
    assert not list(tmp_path.glob("run/config.yaml"))
