"""`diffdistill jvp-check`: whether a teacher's network has a forward derivative, and whether it is right."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from diffdistill.commands.check_config import JvpCheckConfig
from diffdistill.core.jvp import ALIKE, derivative_gap
from diffdistill.environment import use_machine
from diffdistill.exact.tangents import LIMITS, ModuleTangent, module_tangents
from diffdistill.families import attention_of, family_of, load_pipeline, load_teacher, local_folder, prompt_of
from diffdistill.options import Size, build
from diffdistill.players.teacher import Teacher
from diffdistill.rng import generator
from diffdistill.scaffold.tangent import own_path


def jvp_check(
    teacher: str | os.PathLike[str] | Teacher,
    *,
    resolution: Size | None = None,
    frames: int | None = None,
    prompt: str = "a red fox in the snow",
    seed: int = 0,
    attention: str = "auto",
) -> list[ModuleTangent]:
    """How the tangents of the teacher's network and of each module in it compare with two others.

    `teacher` is a diffusers folder, a hub id, 'digits', or a loaded `Teacher`, whose example conditions are then used.
    Each row has `name` ("" for the whole network, the last), `kind`, the relative errors `double_vjp` and
    `differences`, `problem` and `ok`. A module stands after those that it consists of, so that the first that is not
    ok is at fault. Raises UserError for a teacher that cannot be loaded.
    """
    name = os.fspath(teacher) if not isinstance(teacher, Teacher) else teacher.source
    options = {"resolution": resolution, "frames": frames, "prompt": prompt, "seed": seed}
    config = build(JvpCheckConfig, {"teacher": name, "attention": attention, **options})
    return _check(_teacher(config, teacher), config)


def _teacher(config: JvpCheckConfig, teacher: str | os.PathLike[str] | Teacher) -> Teacher:
    """With the conditions of the prompt, where it takes any."""
    if isinstance(teacher, Teacher):
        return teacher
    folder = local_folder(os.fspath(teacher))
    family, _ = family_of(folder)
    loaded = load_teacher(folder, resolution=config.resolution, frames=config.frames)
    if family.text is None:
        return loaded
    encoders = load_pipeline(folder, leave_out=family.networks)
    with torch.no_grad():
        cond = family.text.encode(encoders, [config.prompt], prompt_of(family, folder, loaded))
    return replace(loaded, example_cond=cond)


def _samples(teacher: Teacher, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples of noise at two times within the teacher's range, on the device of its weights."""
    device = next(teacher.denoiser.parameters()).device
    t = teacher.denoiser.schedule.at_fraction(torch.tensor([0.35, 0.65], dtype=torch.float64))
    x = torch.randn(2, *teacher.shape, generator=generator("cpu", seed, "jvp-check"))
    return x.to(device), t.to(device)


def _check(teacher: Teacher, config: JvpCheckConfig) -> list[ModuleTangent]:
    denoiser = teacher.denoiser
    x, t = _samples(teacher, config.seed)
    with attention_of(denoiser, config.attention):
        return list(module_tangents(denoiser.network, lambda: denoiser(x, t, teacher.sample_cond(2)), config.seed))


def run(config: JvpCheckConfig) -> int:
    """The command; 1 if a module disagrees."""
    device = use_machine(config.device, config.threads)
    teacher = _teacher(config, config.teacher)
    teacher.denoiser.to(device)
    rows = _check(teacher, config)
    shown = [row for row in rows if config.all or not row.ok or not row.name]
    print(f"{'':4} {'double VJP':>10} {'differences':>11}  module")
    for row in shown:
        errors = ("-" if e is None else f"{e:.1e}" for e in (row.double_vjp, row.differences))
        verdict = "ok" if row.ok else "FAIL"
        print("{:4} {:>10} {:>11}  {} ({})".format(verdict, *errors, row.name or "the network", row.kind))
    limits = ", ".join(f"{limit:g} ({name})" for name, limit in LIMITS.items())
    print(f"{sum(row.ok for row in rows)} of {len(rows)} modules agree within {limits}")
    wrong = next((row for row in rows if not row.ok), None)
    if wrong is not None:
        reason = f": {wrong.problem}" if wrong.problem else ""
        print(
            f"the first that does not: {wrong.name or 'the network'} ({wrong.kind}){reason}; use --derivative central"
        )
        return 1
    print(f"--derivative auto takes: {_choice(teacher)}")
    return 0


def _choice(teacher: Teacher) -> str:
    """What a training takes by default, and by how much exact product and central difference differ there."""
    schedule = teacher.denoiser.schedule
    gap = derivative_gap(*own_path(teacher), times=(schedule.t_min, schedule.t_max))
    return f"{'exact' if gap <= ALIKE else 'central'} (they differ by {gap:.1%})"
