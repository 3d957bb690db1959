"""Which reward a training is given: a function of a file, an object, or one of ours for what is drawn here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.data.seen import images_seen
from diffdistill.errors import UserError, first_line, shown
from diffdistill.options import nearest
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.reward import Judge, Reward

ATTRIBUTES = ("colour", "shape", "position", "all")


def judge_of(given: str | Reward, teacher: Teacher) -> Judge:
    """What scores the teacher's samples by the reward of that name or object; UserError where there is none such."""
    own = not isinstance(given, str)
    reward = given if callable(given) else named_reward(str(given))
    name = getattr(given, "__name__", type(given).__name__) if own else str(given)
    return Judge(reward, name, teacher.denoiser.schedule.data_std, images_seen(teacher), own=own)


def named_reward(name: str) -> Reward:
    """The reward FILE.py:FUNCTION, 'digits', 'shapes' or 'shapes:ATTRIBUTE'; UserError for anything else."""
    kind, _, which = name.partition(":")
    if name == "digits":
        return Digits()
    if kind == "shapes":
        if which and which not in (*ATTRIBUTES, *_values()):
            raise UserError(f"reward: shapes have no {which!r}; {nearest(which, (*ATTRIBUTES, *_values()))}")
        return Shapes(which or "all")
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(
            f"reward: {shown(name)} is none; give FILE.py:FUNCTION, 'digits', 'shapes' or 'shapes:ATTRIBUTE'"
        )
    return _in_file(Path(path), function)


def file_of(name: str) -> Path | None:
    """The file of FILE.py:FUNCTION; None of a reward of ours."""
    path = name.rpartition(":")[0]
    return Path(path) if path.endswith(".py") else None


def _in_file(path: Path, function: str) -> Reward:
    if not path.is_file():
        raise UserError(f"reward: the file {shown(str(path))} does not exist; give FILE.py:FUNCTION")
    name = f"diffdistill_reward_{path.stem}"  # a file called random.py must not hide the real one
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file's own code raises
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"reward: {shown(str(path))} cannot be imported ({what})") from error
    reward = vars(module).get(function)
    if not callable(reward):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(function, functions) if functions else "it defines no function"
        raise UserError(f"reward: {shown(str(path))} has no function {function!r}; {hint}")
    return reward


class Digits:
    """The log probability that the shipped classifier gives a digit's label; grey images of 8x8 or 28x28."""

    def __init__(self) -> None:
        self.classifiers: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}

    def __call__(self, images: Tensor, labels: Any) -> Tensor:
        """(B,) for images (B, 1, 8, 8) or (B, 1, 28, 28) in [-1, 1] and labels (B,) of digits."""
        from diffdistill.eval.features.digit_classifier import load_digit_classifier, load_mnist_classifier

        known = {(1, 8, 8): load_digit_classifier, (1, 28, 28): load_mnist_classifier}
        shape = tuple(images.shape[1:])
        if shape not in known or not isinstance(labels, Tensor):
            raise UserError(
                f"reward: digits is for images of digits with classes, (1, 8, 8) or (1, 28, 28), not {shape}"
            )
        if shape not in self.classifiers:
            self.classifiers[shape] = known[shape]().to(images.device)
        scores = self.classifiers[shape](images).log_softmax(1)
        # The label of "no class" is no digit's: it is as good as the likeliest.
        chosen = scores.gather(1, labels.clamp(max=scores.shape[1] - 1)[:, None])[:, 0]
        return torch.where(labels < scores.shape[1], chosen, scores.max(1).values)


class Shapes:
    """Do drawn shapes show an attribute? 1 or 0, read by the rules of data/shapes.py from images (B, 3, 32, 32).

    'colour', 'shape', 'position' or 'all': those of the caption. A value, such as 'red' or 'circle': that one, whatever
    the caption says.
    """

    def __init__(self, which: str):
        self.which = which

    def __call__(self, images: Tensor, captions: Any) -> Tensor:
        """(B,) for images and their captions."""
        from diffdistill.data import shapes
        from diffdistill.eval.features.attributes import Attributes

        if tuple(images.shape[1:]) != (3, shapes.SIDE, shapes.SIDE):
            raise UserError(f"reward: shapes is for images (3, 32, 32) of drawn shapes, not {tuple(images.shape[1:])}")
        if self.which in ATTRIBUTES:
            texts: Sequence[str] | None = captions if isinstance(captions, list) else None
            return Attributes()(images.cpu(), texts, None)[self.which]
        kind, value = _values()[self.which]
        return (shapes.read(images.cpu()).attributes[:, kind] == value).float()


def _values() -> dict[str, tuple[int, int]]:
    """By name, the column of `shapes.read` and the number of each value of an attribute."""
    from diffdistill.data import shapes

    names = (shapes.COLOURS, shapes.SHAPES, shapes.POSITIONS)
    return {name: (kind, number) for kind, values in enumerate(names) for number, name in enumerate(values)}
