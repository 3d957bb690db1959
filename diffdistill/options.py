"""Options are dataclass fields with a help text and a range; the command line, YAML and Python share them.

No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import numbers
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffdistill.errors import UserError, shown
from diffdistill.files import yaml_mapping


def option(default: Any, help: str, *, above: float | None = None, at_least: float | None = None,
           below: float | None = None, at_most: float | None = None, repeated: bool = False) -> Any:  # fmt: skip
    """A dataclass field with a help text and, for numbers, its range.

    `default` may be `dataclasses.MISSING` for what must be given. `repeated`: on the command line a tuple is given by
    repeating the option, where others are one text with commas.
    """
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {"help": help, "bounds": {k: v for k, v in bounds.items() if v is not None}, "repeated": repeated}
    return field(default=default, metadata=metadata)


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?' where X is close to the name or has it as its last or first word, else what is known."""
    known = list(known)

    def plain(text: str) -> str:
        return text.lstrip("-").replace("_", "-").lower()

    def close(cutoff: float) -> list[str]:
        by_plain = {plain(k): k for k in reversed(known)}
        return [by_plain[k] for k in difflib.get_close_matches(plain(name), by_plain, n=1, cutoff=cutoff)]

    last = [k for k in known if plain(k).endswith(f"-{plain(name)}")]
    first = [k for k in known if plain(k).startswith(f"{plain(name)}-")]
    if candidates := close(0.8) or last[:3] or first[:3] or close(0.5):
        return f"did you mean {' or '.join(map(repr, candidates))}?"
    return f"known are {', '.join(sorted(known))}"


_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def optional(hint: Any) -> tuple[Any, bool]:
    """The type of an option's values without None, and whether None is one of them."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    (kind,) = (k for k in kinds if k is not type(None))
    return kind, len(kinds) > 1


def coerce(name: str, value: Any, hint: Any, bounds: Mapping[str, float]) -> Any:
    """The value as the option's type, from a string (command line), a YAML scalar or a Python value.

    A path becomes its text, and numpy's numbers are numbers. Raises UserError for whatever is not of that type; an
    object is never turned into text.
    """
    kind, may_be_none = optional(hint)
    if may_be_none and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    if typing.get_origin(kind) is tuple:
        return tuple(coerce(name, part, typing.get_args(kind)[0], bounds) for part in _parts(value))
    value = _plain(name, value, kind)
    if isinstance(value, int) and value.bit_length() > 63:
        raise UserError(f"{name}: {shown(value)} is not within 63 bits, as every whole number here is")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        for choice in choices:
            if value == choice or str(value) == str(choice) or (value is False and choice == "no"):
                return choice
        raise UserError(f"{name}: {shown(value)} is not one of {', '.join(map(str, choices))}")
    try:
        return _in_range(name, _scalar(value, kind), bounds)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: {shown(value)} is not {_WORDS[kind]}") from None


def _parts(value: Any) -> Sequence[Any]:
    """The members of a list: a text is parted at its commas, and any other single value is a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _plain(name: str, value: Any, kind: Any) -> Any:
    """The value as Python's own type; UserError for an object that is none of them."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | bool | int | float | list | tuple | dict):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    words = _WORDS.get(kind) or f"one of {', '.join(map(str, typing.get_args(kind)))}"
    raise UserError(f"{name}: {words} is expected, not an object of type {type(value).__name__}")


_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        if str(value).lower() not in _BOOLS:
            raise TypeError
        return _BOOLS[str(value).lower()]
    if isinstance(value, bool | list | tuple | dict) or value is None:
        raise TypeError
    if kind is int and isinstance(value, float) and value != int(value):
        raise TypeError
    if kind is int and int(value).bit_length() > 63:
        raise ValueError
    return kind(value)


def _in_range(name: str, value: Any, bounds: Mapping[str, float]) -> Any:
    checks = {
        "above": (lambda v, b: v > b, "greater than"),
        "at_least": (lambda v, b: v >= b, "at least"),
        "below": (lambda v, b: v < b, "less than"),
        "at_most": (lambda v, b: v <= b, "at most"),
    }
    for key, bound in bounds.items():
        holds, words = checks[key]
        if not holds(value, bound):  # also false for nan
            raise UserError(f"{name}: {shown(value)} must be {words} {bound:g}")
    return value


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass from option values; UserError for a value that does not fit."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"{name}: no such option; {nearest(name, known)}")
    for name, f in known.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{name}: it is missing; give {f.metadata.get('help', 'it')}")
    # A text with commas, a prompt say, is one member of an option that is given by repeating it.
    whole = {n: [v] if isinstance(v, str) and known[n].metadata.get("repeated") else v for n, v in values.items()}
    fitted = {n: coerce(n, v, hints[n], known[n].metadata.get("bounds", {})) for n, v in whole.items()}
    return cls(**fitted)


def split(values: Mapping[str, Any], first: type, second: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Option values parted over two dataclasses; UserError with the nearest name for one that neither has."""
    names = [f.name for f in dataclasses.fields(first)]
    others = [f.name for f in dataclasses.fields(second)]
    for name in values:
        if name not in names and name not in others:
            raise UserError(f"{name}: no such option; {nearest(name, names + others)}")
    return {n: v for n, v in values.items() if n in names}, {n: v for n, v in values.items() if n in others}


def read_yaml(path: str) -> dict[str, Any]:
    """A flat mapping of option names to values; UserError for anything else."""
    return {key.replace("-", "_"): value for key, value in read_mapping(path, "config").items()}


def read_mapping(path: str, what: str) -> dict[str, Any]:
    """A YAML file that is a mapping with texts for keys; UserError, which begins with `what`, for anything else."""
    try:
        return yaml_mapping(path)
    except OSError as error:
        raise UserError(f"{what}: {shown(path)} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{what}: {shown(path)} cannot be read: {error}") from None


# -- option groups that methods share: one idea has one name, one text and one range ----------------------------------


class Options:
    """Base of the groups. `class Config(Group, beta1=0.0)` gives an inherited option another default."""

    def __init_subclass__(cls, **defaults: Any) -> None:
        groups = {f.name: (base, f) for base in cls.__bases__ if dataclasses.is_dataclass(base)
                  for f in dataclasses.fields(base)}  # fmt: skip
        annotations = {}
        for name, default in defaults.items():
            if name not in groups:
                raise TypeError(f"{cls.__name__}: {name} is no option of its groups; {nearest(name, groups)}")
            group, old = groups[name]
            annotations[name] = typing.get_type_hints(group)[name]
            setattr(cls, name, field(default=default, metadata=old.metadata))
        cls.__annotations__ = annotations | inspect.get_annotations(cls)

    def __post_init__(self) -> None:
        """Groups whose options depend on one another check them here, after super().__post_init__()."""


@dataclass(frozen=True)
class StudentOptions(Options):
    """A student that AdamW trains."""

    student_lr: float = option(1e-5, "AdamW's learning rate for the student", above=0)
    beta1: float = option(0.9, "AdamW's first beta, for all players", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay; 0 is Adam", at_least=0)


@dataclass(frozen=True)
class TeacherGuidance(Options):
    """A teacher that may be guided, at one scale."""

    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher; 1 is none", at_least=0)


@dataclass(frozen=True)
class ScaleRange(Options):
    """Guidance scales that are drawn for each sample, and that the student takes as an input."""

    guidance_min: float = option(1.0, "the lowest guidance scale; they are drawn uniformly; 1 is none", at_least=0)
    guidance_max: float = option(
        5.0, "the highest of the guidance scales; if it is guidance_min, the student takes no scale", at_least=0
    )
    guidance_scale: float | None = option(
        None, "the guidance scale of samples and of the exported student; default: the middle of the range", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance_min, self.guidance_max
        if low > high:
            raise UserError(f"guidance_min: {low} must be at most guidance_max ({high})")
        if self.guidance_scale is None:
            object.__setattr__(self, "guidance_scale", (low + high) / 2)
        elif not low <= self.guidance_scale <= high:
            raise UserError(
                f"guidance_scale: {self.guidance_scale} is not in what is trained, {low} (guidance_min) to "
                f"{high} (guidance_max)"
            )

    def drawn(self, u: Any) -> Any:
        """The scales for u, uniform in [0, 1)."""
        return self.guidance_min + (self.guidance_max - self.guidance_min) * u

    @property
    def takes_scale(self) -> bool:
        """Whether the student takes the scale as an input."""
        return self.guidance_min < self.guidance_max

    @property
    def scale(self) -> float:
        """The exported student's guidance scale."""
        assert self.guidance_scale is not None
        return self.guidance_scale


@dataclass(frozen=True)
class StudentLevel(Options):
    """A student that need not start at the noisiest level."""

    student_level: float | None = option(
        None, "the timestep or sigma at which the student reads pure noise; none: the noisiest", at_least=0
    )


@dataclass(frozen=True)
class DerivativeOptions(Options):
    """How the student's derivative along a trajectory is computed."""

    derivative: Literal["auto", "exact", "central", "backward", "semi"] = option(
        "auto",
        "the derivative along a trajectory; exact: a Jacobian product; central, backward: differences; semi: exact in "
        "x alone; auto: exact if the teacher's agrees with its central difference within 30%, else central",
    )
    derivative_step: float = option(
        0.05, "the angle that differences step over, in radians; in bfloat16 not below 0.02", above=0, at_most=0.5
    )


@dataclass(frozen=True)
class MatchingOptions(StudentOptions, TeacherGuidance, StudentLevel):
    """A one-step student and a fake score that learns its samples."""

    fake_score_lr: float = option(1e-5, "AdamW's learning rate for the fake score", above=0)
    fake_score_loss: Literal["v", "epsilon"] = option(
        "v", "the fake score's loss; v: weighted as in EDM; epsilon: unweighted, as for Stable Diffusion"
    )
    update_ratio: int = option(1, "steps of the fake score for one of the student", at_least=1)


@dataclass(frozen=True)
class MatchingTimes(Options):
    """The range of noise levels at which distributions are matched."""

    time_low: float = option(
        0.02,
        "the least noise in the student's loss, as a fraction of the range of times that it is drawn from",
        at_least=0,
        below=1,
    )
    time_high: float = option(
        0.98,
        "the most noise in the student's loss, as a fraction of the range of times that it is drawn from",
        above=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_low >= self.time_high:
            raise UserError(f"time_low: {self.time_low} must be less than time_high ({self.time_high})")


@dataclass(frozen=True)
class EDMTimes(MatchingTimes, time_low=0.0, time_high=0.8):
    """The same, as fractions of EDM's grid of sigma from 0.002 to 80, where 0.8 is sigma = 24.4."""


@dataclass(frozen=True)
class NormaliserOptions(Options):
    """DMD's normaliser of the matching gradient."""

    normalise: bool = option(True, "divide each sample's loss by mean|x - D_teacher|; false: the exact divergence's")


@dataclass(frozen=True)
class SimulationOptions(Options):
    """A student of several steps, trained on inputs that its own sampler makes."""

    student_steps: int = option(
        1, "sampling steps, at evenly spaced times of the teacher's own from student_level down", at_least=1
    )
    fake_scores: Literal["shared", "per_level"] = option(
        "shared",
        "of a student of several steps; shared: one fake score, which learns the samples of all levels together; "
        "per_level: one network (or LoRA) for each level, and the levels take turns",
    )


@dataclass(frozen=True)
class AdversarialOptions(Options):
    """A discriminator head on the fake score."""

    gan_weight: float = option(0.0, "weight of the GAN loss in the student's loss; above 0 needs data", at_least=0)
    discriminator_weight: float = option(0.01, "weight of the GAN loss in the fake score's loss", at_least=0)


@dataclass(frozen=True)
class LatentAdversarialOptions(Options):
    """A discriminator of heads on layers of the frozen teacher, which reads noised images."""

    discriminator_lr: float = option(1e-5, "AdamW's learning rate for the discriminator's heads", above=0)
    depths: tuple[float, ...] = option((0.5, 0.75, 0.99), "the layers that have a head, as fractions of the depth",
                                       at_least=0, below=1)  # fmt: skip
    gan_loss: Literal["hinge", "logistic"] = option("hinge", "hinge: LADD's and SANA-Sprint's; logistic: FastGen's")
    gan_time_mean: float = option(0.3, "mean of ln sigma of what it reads, for data of deviation 0.5")
    gan_time_std: float = option(1.0, "standard deviation of ln sigma of what it reads", above=0)
    misaligned: bool = option(False, "it also learns to refuse images under the conditions of others")


@dataclass(frozen=True)
class FakeScoreGuidance(Options):
    """A fake score that is guided, and so learns without conditions too."""

    label_dropout: float = option(
        0.1, "share of conditions that a guided fake score learns without", at_least=0, at_most=1
    )


@dataclass(frozen=True)
class TrajectoryOptions(StudentOptions, StudentLevel):
    """A student that learns trajectories."""

    student_output: Literal["teacher", "v_prediction", "sample"] = option(
        "teacher", "what the student's network gives: what the teacher's does, or v or x0 (sample)"
    )
    student_steps: int = option(1, "the student's sampling steps; its training is the same for any number", at_least=1)
    student_dropout: float | None = option(
        None, "dropout of the student's residual blocks in training; default: its network's own", at_least=0, below=1
    )


@dataclass(frozen=True)
class FollowingOptions(TrajectoryOptions):
    """A student that follows trajectories against a slow copy of itself."""

    target_ema: float = option(0.95, "decay of the target, the student's moving average", at_least=0, below=1)


@dataclass(frozen=True)
class TangentOptions(TrajectoryOptions, TeacherGuidance, DerivativeOptions):
    """A student whose target is its own derivative along the path."""

    mode: Literal["distillation", "training"] = option(
        "distillation", "the direction of the path; distillation: the teacher's; training: the data's own noise"
    )


@dataclass(frozen=True)
class TangentTarget(Options):
    """sCM's times, and its target."""

    time_mean: float = option(-1.0, "mean of ln sigma, for data of deviation 0.5")
    time_std: float = option(1.4, "standard deviation of ln sigma", above=0)
    tangent_warmup: int = option(10000, "training steps over which the derivative's share r rises to 1; 0: none",
                                 at_least=0)  # fmt: skip
    norm: Literal["rms", "l2", "none"] = option("rms", "|g|; rms: FastGen's; l2: SANA-Sprint's; none: not normalised")
    norm_c: float = option(0.1, "c of g/(|g| + c)", above=0)

    def warm(self, step: int) -> float:
        """r, the share of the derivative, at that training step."""
        return min(1.0, step / self.tangent_warmup) if self.tangent_warmup else 1.0


@dataclass(frozen=True)
class ImageDistance(Options):
    """How far two images lie apart."""

    distance: Literal["huber", "l2", "lpips"] = option(
        "huber", "huber: pseudo-Huber of the whole sample; l2: mean square; lpips: VGG features, with pip install lpips"
    )
    huber_c: float | None = option(None, "c of the pseudo-Huber distance; default: 0.00054 sqrt(dimensions)", above=0)


@dataclass(frozen=True)
class HalvingOptions(StudentOptions):
    """Stages, each of which halves the sampling steps."""

    start_steps: int = option(16, "teacher's DDIM steps in the first halving; final_steps times 2, 4 ..", at_least=1)
    final_steps: int = option(1, "the sampling steps of the last stage's student", at_least=1)
    stage_steps: int = option(1000, "training steps of each halving", at_least=1)
    student_lr: float = option(5e-5, "AdamW's learning rate as a stage starts; it falls linearly to zero", above=0)
    weight: Literal["truncated_snr", "snr_plus_one"] = option(
        "truncated_snr", "weight of the error in x0; truncated_snr: max(1, SNR); snr_plus_one: the error in v"
    )


@dataclass(frozen=True)
class GuidedSampling(StudentOptions):
    """A student that imitates guidance in one pass and leaves the number of steps as it is."""

    trajectory_steps: int = option(50, "DDIM steps of the guided trajectories that are trained on", at_least=1)
    sampling_steps: int = option(20, "DDIM steps of samples and of the export, one pass each", at_least=1)
