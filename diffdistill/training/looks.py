"""A look at the student before, during and after training: the faults that a few samples show, said in words."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guided
from diffdistill.data.encoded import decoder
from diffdistill.data.examples import Examples, to_device
from diffdistill.families import FAMILIES
from diffdistill.players.sampler import STEPS, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators
from diffdistill.training.derived import COMPARED, MATCHED, amplified_at, noisiest
from diffdistill.training.metrics import MetricsFile

COUNT = 48  # samples that are looked at
STEPS_OF_TEACHER = 8
DIVERGED, SATURATED = 4.0, 1.6  # of the size
BLANK = 0.3  # of the contrast
COLLAPSED, SCATTERED = 0.4, 1.5  # of the spread
LEAST_SPREAD = 0.2  # of the contrast; less than that counts as so much
NOISY = 1.7  # of the roughness
STILL, FAR, WORSE = 0.02, 0.8, 1.5  # of what has moved, and of the distance
REMEDIES = ("student_level", "update_ratio")  # the options that are advised, of methods that have them


class Measures(NamedTuple):
    """Of samples, relative to the teacher's of several steps, where 1 is as the teacher's."""

    size: float  #: root mean square, before pixels are clipped
    contrast: float  #: standard deviation within a sample
    spread: float  #: mean distance of two samples of the same conditions, or a fifth of the contrast if that is more
    roughness: float  #: mean difference of neighbours, over the deviation within a sample
    moved: float  #: root mean square of the change since training began, over the teacher's root mean square
    distance: float  #: energy distance of the samples from the teacher's, over that of the teacher's one pass


class Look:
    """Samples of always the same noise and conditions, beside what the teacher draws there in one pass and in several.

    A teacher of classes or prompts is looked at with a few of them, several samples each. Of the student's `sampler`
    only the levels and the step count: before training a student is its teacher, and so it is in a run that goes on.
    `scale` is the guidance of the teacher that the student imitates: its several passes have it.
    """

    def __init__(self, teacher: Teacher, sampler: Sampler, prompts: Examples | None = None, scale: float = 1.0):
        denoiser = teacher.denoiser
        # It has all that a sampler reads of a denoiser.
        several = cast(Denoiser, guided(denoiser, scale if denoiser.null is not None else 1.0))
        self.teacher, self.level, self.student = teacher, sampler.levels[0], sampler.denoiser
        entry = FAMILIES.get(teacher.family)
        self.latent = entry is not None and entry.autoencoder is not None
        count = 8 if self.latent else COUNT
        self.groups = torch.arange(count) // 4
        self.cond: Cond = {}
        device = next(sampler.denoiser.parameters()).device
        if prompts is not None:
            self.groups = self.groups % len(prompts)
            self.cond = to_device(prompts.get(self.groups), device).cond
        elif teacher.num_classes is not None:
            self.groups = self.groups % teacher.num_classes
            self.cond = {"class_labels": self.groups.to(device)}
        else:
            self.groups = torch.zeros_like(self.groups)
        levels = denoiser.schedule.levels(STEPS_OF_TEACHER).tolist()
        self.several = self.shown(self.drawn(Sampler(several, levels, STEPS["ddim"])))
        self.one = self.before = self.shown(self.drawn(Sampler(denoiser, [self.level])))
        if len(sampler.levels) > 1:
            self.before = self.shown(self.drawn(Sampler(denoiser, sampler.levels, sampler.step)))
        self.reference = _raw(self.several, self.groups)
        self.unit = _energy(self.one, self.several)

    def drawn(self, sampler: Sampler) -> Tensor:
        """(n, *shape) samples on the CPU, in the data's units."""
        count = len(self.groups)
        return sampler(self.teacher.shape, self.cond, image_generators(0, range(count))).float().cpu()

    def shown(self, samples: Tensor) -> Tensor:
        """Pixels clipped as pictures are."""
        return samples if self.latent or not self.teacher.family else samples.clamp(-1, 1)

    def measures(self, samples: Tensor) -> Measures:
        """Of samples that `drawn` gave."""
        clipped = self.shown(samples)
        size = samples.square().mean().sqrt() / self.several.square().mean().sqrt()
        contrast, spread, roughness = (
            mine / max(theirs, 1e-6) for mine, theirs in zip(_raw(clipped, self.groups), self.reference, strict=True)
        )
        moved = (clipped - self.before).square().mean().sqrt() / self.several.square().mean().sqrt()
        distance = _energy(clipped, self.several) / max(self.unit, 1e-6)
        return Measures(float(size), contrast, spread, roughness, float(moved), distance)

    def amplified(self) -> float:
        """By how much an error of the student's output counts in x0 at its level."""
        return amplified_at(self.student, self.level)

    @property
    def relearns(self) -> bool:
        """Whether the student's output is another than the teacher's, so that it begins with none of its skill."""
        return self.student.output != self.teacher.denoiser.output


def _raw(samples: Tensor, groups: Tensor) -> tuple[float, float, float]:
    """Contrast, spread and roughness of samples (n, ...)."""
    flat = samples.flatten(1)
    contrast = flat.std(1).mean()
    same = (groups[:, None] == groups[None]).fill_diagonal_(False)
    spread = torch.cdist(flat, flat)[same].mean() / math.sqrt(flat.shape[1])
    spread = torch.maximum(spread, LEAST_SPREAD * contrast)  # an image that is read may leave next to nothing open
    neighbours = samples.diff(dim=-1).abs().mean() if samples.shape[-1] > 1 else contrast
    return float(contrast), float(spread), float(neighbours / contrast.clamp_min(1e-6))


def _energy(x: Tensor, y: Tensor) -> float:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| of samples (n, ...), a root mean square an element.

    x[i] and y[i] come of the same noise and are left out.
    """
    x, y = x.flatten(1), y.flatten(1)

    def between(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b)[~torch.eye(len(a), dtype=torch.bool)].mean()

    return float(2 * between(x, y) - between(x, x) - between(y, y)) / math.sqrt(x.shape[1])


def faults(
    m: Measures, before: Measures, *, first: bool, relearns: bool = False, options: Collection[str] = REMEDIES
) -> list[str]:
    """What is wrong, in words, with what to change; `first` at a tenth of the budget, else at its end.

    `before`: of the untrained student, whose samples are blurred, and so alike, to begin with. `relearns`: its output
    is another than its teacher's, and at a tenth of the budget it has nothing else to show. `options`: the method's,
    of which alone something is said.
    """
    lower = "take lower learning rates" + " or a less noisy --student-level" * ("student_level" in options)
    if not all(map(math.isfinite, m)) or m.size > DIVERGED:
        return [f"divergence: samples are {m.size:.1f} times as large as the teacher's; {lower}"]
    if relearns and first:
        return []
    if m.contrast < BLANK:
        return [f"blank: samples have {m.contrast:.2f} of the contrast of the teacher's; {lower}"]
    result = []
    if m.distance > FAR and (m.moved < STILL or not first):
        still = m.moved < STILL
        figures = f"samples have changed by {m.moved:.0%} and are {m.distance:.2f} as far from the teacher's as its"
        advice = "higher learning rates or more steps" if still else "more steps, or other learning rates"
        result.append(f"{'nothing moved' if still else 'no nearer'}: {figures} one pass; take {advice}")
    if m.size > SATURATED:
        result.append(f"saturation: before they are clipped samples are {m.size:.1f} times the teacher's; {lower}")
    if m.spread < COLLAPSED * (min(1.0, before.spread / 0.5) if first else 1.0):
        alike = f"collapse: two samples differ by {m.spread:.2f} of what the teacher's do"
        more = ", or more steps of the fake score, --update-ratio" * ("update_ratio" in options)
        result.append(f"{alike}; {lower}{more}")
    if m.roughness > NOISY or m.spread > SCATTERED:
        rough = f"noise: neighbours differ {m.roughness:.1f} and samples {m.spread:.1f} times as much as the teacher's"
        result.append(f"{rough}; {lower}, or give more steps")
    if first and m.distance > WORSE:
        far = f"getting worse: {m.distance:.1f} times as far from the teacher's samples as its one pass"
        result.append(f"{far}; {lower}")
    return result


def watch(
    out: Path,
    look: Look,
    sampler_now: Callable[[], Sampler],
    steps: int,
    *,
    done: int = 0,
    drawing: bool = True,
    saving: bool = True,
    options: Collection[str] = REMEDIES,
) -> Callable[[int], None]:
    """step -> looks at the student, prints what is wrong and adds a line to <out>/looks.jsonl.

    Lines of steps after those that are `done` go first: they come once more.

    Before that it prints what one pass of the teacher gives at the student's level, and draws it above what several
    passes give, <out>/samples/teacher.png, if `drawing`. Without `saving` samples are drawn, for another process that
    cannot do it alone, and that is all. `options` are the method's.
    """
    if not saving:
        return lambda step: _drawn(look, sampler_now())
    _show_teacher(out, look, drawing)
    before, file = look.measures(look.before), MetricsFile(out / "looks.jsonl", done)

    def now(step: int) -> None:
        m = look.measures(look.drawn(sampler_now()))
        wrong = faults(m, before, first=step < steps, relearns=look.relearns, options=options)
        file.write({"step": step, **m._asdict(), "faults": wrong})
        print(
            f"look at step {step}: {m.distance:.2f} as far from the teacher's {STEPS_OF_TEACHER} steps as its one pass"
        )
        for fault in wrong:
            print(f"warning: {fault}", file=sys.stderr)

    return now


def _drawn(look: Look, sampler: Sampler) -> None:
    look.drawn(sampler)


def _show_teacher(out: Path, look: Look, drawing: bool) -> None:
    from diffdistill.pictures import image_grid, save_png

    m = look.measures(look.one)
    print(
        f"the teacher's one pass at the student's level {look.level:g} has {m.contrast:.2f} of the contrast and "
        f"{m.spread:.2f} of the spread of its {STEPS_OF_TEACHER} steps; an error of the student's output counts "
        f"{look.amplified():.1f} times in x0"
    )
    if look.amplified() > COMPARED:
        fits = f"at {noisiest(look.teacher.denoiser, *MATCHED):g} it would count {MATCHED[0]:g} times at most"
        print(f"warning: student_level: {look.level:g} is noisier than the teacher can answer; {fits}", file=sys.stderr)
    if not drawing:
        return
    if not look.latent and (len(look.teacher.shape) != 3 or look.teacher.shape[0] not in (1, 3)):
        return
    columns = min(len(look.one), 16)
    images = decoder(look.teacher)(torch.cat([look.one[:columns], look.several[:columns]])).float().clamp(-1, 1)
    save_png(image_grid(images, columns, scale=max(1, 32 // images.shape[-1])), out / "samples" / "teacher.png")
