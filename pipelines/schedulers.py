"""The stock scheduler that repeats a sampler's levels, and what a folder's own pipeline hands it where it does not."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, check_levels, lcm_indices
from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, diffusers_class
from diffdistill.pipelines.policy_scheduler import PolicyScheduler
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.policy import PolicyDenoiser, weights_at
from diffdistill.players.sampler import Gamma, Renoise, Sampler
from diffdistill.players.teacher import Teacher

# What a student keeps of its teacher's discrete VP scheduler: the chain and the kind of output.
_VP_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


Row = tuple[float, float, float, float]
"""Of a step: its level, and the parts that the sample, the clean sample in it and fresh noise have in the next one."""


def student_scheduler(teacher: Teacher, sampler: Sampler) -> SchedulerMixin:
    """The stock scheduler that repeats the sampler exactly when it is given the student's number of steps.

    A student of policies has one of its own, `PolicyScheduler`. Where there are `student_rows`, it does so by the
    folder's own pipeline. Raises UserError where no stock scheduler can start at its level, or take its
    steps.
    """
    if isinstance(sampler.denoiser, PolicyDenoiser):
        return policy_scheduler(teacher, sampler, sampler.denoiser)
    if student_rows(teacher, sampler) is None:
        return _stock_scheduler(teacher, sampler)
    schedule = sampler.denoiser.schedule
    if isinstance(schedule, LinearFlow):
        return diffusers.FlowMatchEulerDiscreteScheduler(schedule.train_timesteps)
    return _stock_scheduler(teacher, Sampler(sampler.denoiser, sampler.levels[:1]))


def student_rows(teacher: Teacher, sampler: Sampler) -> list[Row] | None:
    """What the folder's own pipeline tells `LevelScheduler`; None where a stock pipeline takes the steps by itself.

    In pixels alone. Raises UserError for a level that the schedule has not.
    """
    entry = FAMILIES.get(teacher.family)
    in_pixels = entry is not None and entry.autoencoder is None and isinstance(entry.pipelines[0], str)
    own = isinstance(sampler.denoiser, PolicyDenoiser) or isinstance(sampler.denoiser.network, AdaptedNetwork)
    if len(sampler.levels) == 1 or not in_pixels or own:
        return None
    try:
        _stock_scheduler(teacher, sampler)
    except UserError:
        check_levels(sampler.denoiser.schedule, sampler.levels, "student_level")
        return [_row(sampler, k) for k in range(len(sampler.levels))]
    return None


def _row(sampler: Sampler, k: int) -> Row:
    """In the units of the network's own samples, which are those of the normal form times `size`."""
    schedule, level = sampler.denoiser.schedule, sampler.levels[k]
    if k + 1 == len(sampler.levels):
        return level, 0.0, 1.0, 0.0
    t, r, s = (
        float(angle) for angle in (schedule.angle(level), sampler.leads(k), schedule.angle(sampler.levels[k + 1]))
    )

    def size(angle: float) -> float:
        return float(schedule.native(torch.tensor(angle, dtype=torch.float64)).sigma) / math.sin(angle)

    kept = math.cos(s) / math.cos(r)
    own = kept * math.sin(r) / math.sin(t)
    clean, fresh = math.cos(s) - own * math.cos(t), math.sqrt(max(1 - kept**2, 0.0))
    return level, own * size(s) / size(t), clean * size(s) / schedule.data_std, fresh * size(s)


def policy_scheduler(teacher: Teacher, sampler: Sampler, student: PolicyDenoiser) -> PolicyScheduler:
    """Of a student whose passes say policies: its levels in numbers, whatever its schedule; of heads those of all."""
    schedule, settings = student.schedule, student.settings
    heads, own = settings.kind == "heads", len(sampler.levels)
    t = student.angles.cpu() if heads else torch.stack([schedule.angle(level) for level in sampler.levels])
    native = schedule.native(t)
    of_x, of_y = weights_at(student, t)
    sizes = native.sigma / torch.sin(t)
    return PolicyScheduler(
        policy=settings.kind,
        components=settings.components,
        substeps=settings.substeps,
        channels=teacher.shape[0],
        angles=[*t.tolist(), 0.0],
        times=native.time.tolist(),
        whole_times=isinstance(schedule, DiscreteVP),
        sizes=[*sizes.tolist(), schedule.data_std],
        inputs=(native.scale / sizes).tolist(),
        of_x=of_x.tolist(),
        of_y=of_y.tolist(),
        init_noise=schedule.init_scale(float(t[0])) * float(sizes[0]),
        passes=[own, *(n for n in settings.passes if n != own)] if heads else [],
        num_train_timesteps=len(schedule.alphas_cumprod) if isinstance(schedule, DiscreteVP) else 1000,
        teacher=dict(teacher.scheduler),
    )


def level_arguments(teacher: Teacher, sampler: Sampler) -> dict[str, list[float]]:
    """What a latent student's stock pipeline is told of its levels, where its scheduler has not these in a row."""
    scheduler, levels = student_scheduler(teacher, sampler), list(sampler.levels)
    entry = FAMILIES.get(teacher.family)
    if len(levels) == 1 or entry is None or entry.autoencoder is None or isinstance(scheduler, PolicyScheduler):
        return {}
    if isinstance(sampler.denoiser.schedule, LinearFlow):
        own = torch.tensor(levels, dtype=torch.float64)
        return {} if torch.allclose(sampler.denoiser.schedule.trailing(len(levels)), own) else {"sigmas": levels}
    scheduler.set_timesteps(len(levels))
    if scheduler.timesteps.tolist() == levels:
        return {}
    return {"timesteps": [int(level) for level in levels]}


def _takes(teacher: Teacher, *names: str) -> bool:
    """Whether the stock pipeline of a latent teacher takes arguments of these names in its call."""
    entry = FAMILIES.get(teacher.family)
    if entry is None or entry.autoencoder is None:
        return False
    return set(names) <= set(inspect.signature(diffusers_class(entry.pipelines[0]).__call__).parameters)


def _any_timesteps(teacher: Teacher, sampler: Sampler) -> SchedulerMixin | None:
    """The stock scheduler to which a pipeline hands any timesteps; None where the pipeline does not."""
    fresh = isinstance(sampler.step, Renoise)
    if not _takes(teacher, "timesteps", *([] if fresh else ["eta"])):
        return None
    check_levels(sampler.denoiser.schedule, sampler.levels, "student_level")
    kept = _kept(teacher, sampler)
    if not fresh:
        return _tcd(sampler)
    return diffusers.LCMScheduler(**kept, original_inference_steps=len(sampler.levels), timestep_scaling=1e6)


def _tcd(sampler: Sampler) -> SchedulerMixin:
    """It ends at timestep 0, whose noise is taken off its chain: no step reads that timestep."""
    schedule = sampler.denoiser.schedule
    assert isinstance(schedule, DiscreteVP)
    alphas = schedule.alphas_cumprod[: int(sampler.levels[0]) + 1].double().clone()
    alphas[0] = 1.0
    kind, steps = sampler.denoiser.output.name, len(sampler.levels)
    return diffusers.TCDScheduler(**_chain(alphas), prediction_type=kind, original_inference_steps=steps)


def _stock_scheduler(teacher: Teacher, sampler: Sampler) -> SchedulerMixin:
    schedule, level = sampler.denoiser.schedule, sampler.levels[0]
    if isinstance(sampler.step, Gamma) and len(sampler.levels) > 1:
        return _gamma_steps(teacher, sampler)
    if isinstance(schedule, LinearFlow) and isinstance(sampler.denoiser.network, AdaptedNetwork):
        # Its own pipeline can drive the scheduler of flow matching, which takes any number of steps.
        return diffusers.FlowMatchEulerDiscreteScheduler(schedule.train_timesteps, schedule.shift)
    if isinstance(schedule, LinearFlow) and schedule.starts_at_one:
        entry = FAMILIES.get(teacher.family)
        kind = sampler.step.stock["LinearFlow"]
        own = torch.tensor(sampler.levels, dtype=torch.float64)
        if _takes(teacher, "sigmas") and not torch.allclose(schedule.trailing(len(own)), own) and len(own) > 1:
            check_levels(schedule, sampler.levels, "student_level")
            return getattr(diffusers, kind)(schedule.train_timesteps)
        return _latent_flow_scheduler(schedule, sampler, entry is None or entry.flow_grid == "own")
    if len(sampler.levels) > 1:
        return _several_steps(teacher, sampler)
    if isinstance(schedule, DiscreteVP):
        # One trailing step is at the last timestep; one leading step is at `steps_offset`.
        kept = _kept(teacher, sampler)
        return diffusers.DDIMScheduler(**kept, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    if isinstance(schedule, EDM):
        if not schedule.sigma_min < level <= schedule.sigma_max:
            raise UserError(f"student_level: {level} is not a sigma from {schedule.sigma_min} to {schedule.sigma_max}")
        shared = {
            "sigma_min": schedule.sigma_min,
            "sigma_max": level,
            "sigma_data": schedule.data_std,
            "rho": schedule.rho,
        }
        if schedule.unit_init:
            kind = teacher.scheduler.get("prediction_type", "epsilon")
            return diffusers.EDMEulerScheduler(**shared, prediction_type=kind)
        return diffusers.CMStochasticIterativeScheduler(**shared, clip_denoised=False)
    if isinstance(schedule, LinearFlow):
        return _flow_scheduler(_flow_shift_for(level, schedule), schedule.train_timesteps)
    raise UserError(f"export: no stock scheduler for a {type(schedule).__name__} student")


def _kept(teacher: Teacher, sampler: Sampler) -> dict[str, Any]:
    """The student's chain and kind of output: its teacher's betas up to the level, in numbers where that is not all.

    `trained_betas` may be fewer than the config says.
    """
    schedule, level = sampler.denoiser.schedule, sampler.levels[0]
    assert isinstance(schedule, DiscreteVP)
    noisiest = len(schedule.alphas_cumprod) - 1
    if level != int(level) or not 0 <= level <= noisiest:
        raise UserError(f"student_level: {level} is not a whole timestep from 0 to {noisiest}")
    kept = {k: teacher.scheduler[k] for k in _VP_KEYS if k in teacher.scheduler}
    kept["prediction_type"] = sampler.denoiser.output.name
    # Schedulers of students have neither DDPM's sigmoid nor CogVideoX's shift.
    theirs = kept.get("beta_schedule") == "sigmoid" or teacher.scheduler.get("snr_shift_scale", 1.0) != 1
    if level == noisiest and not theirs:
        return kept | {"num_train_timesteps": noisiest + 1} if kept.get("trained_betas") else kept
    # `steps_offset` would do for one step, but StableDiffusionPipeline sets it to 1.
    return _chain(schedule.alphas_cumprod[: int(level) + 1].double()) | {"prediction_type": kept["prediction_type"]}


def _chain(alphas: Tensor) -> dict[str, Any]:
    """A scheduler's betas in numbers."""
    betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
    return {"num_train_timesteps": len(betas), "trained_betas": betas.tolist()}


def _several_steps(teacher: Teacher, sampler: Sampler) -> SchedulerMixin:
    schedule, steps = sampler.denoiser.schedule, len(sampler.levels)
    own = torch.tensor(sampler.levels, dtype=torch.float64)
    stock = sampler.step.stock.get(type(schedule).__name__)
    if isinstance(schedule, DiscreteVP):
        kept = _kept(teacher, sampler)
        chain = DiscreteVP(schedule.alphas_cumprod[: int(sampler.levels[0]) + 1])
        length = len(chain.alphas_cumprod)
        if stock == "LCMScheduler":
            for points in (n for n in range(steps, length + 1) if length % n == 0):
                if torch.equal(chain.levels(points)[lcm_indices(points, steps)], own):
                    # The scaling makes its c_skip less than 1e-12, so that it takes the network's x0 as it is.
                    return diffusers.LCMScheduler(**kept, original_inference_steps=points, timestep_scaling=1e6)
        if stock != "DDIMScheduler" or length % steps or not torch.equal(chain.levels(steps), own):
            if (scheduler := _any_timesteps(teacher, sampler)) is not None:
                return scheduler
            raise _uneven(steps, length)
        return diffusers.DDIMScheduler(**kept, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    if isinstance(schedule, EDM) and schedule.unit_init and stock == "EDMEulerScheduler":
        low, high = sampler.levels[-1], sampler.levels[0]
        if torch.allclose(replace(schedule, sigma_min=low, sigma_max=high).levels(steps), own):
            scheduler = _stock_scheduler(teacher, Sampler(sampler.denoiser, [high]))
            return type(scheduler).from_config({**scheduler.config, "sigma_min": low})
    raise UserError(
        f"export: no stock scheduler takes {steps} steps of the kind {sampler.step.name!r} on this teacher's "
        f"{type(schedule).__name__} schedule; use one step"
    )


def _gamma_steps(teacher: Teacher, sampler: Sampler) -> SchedulerMixin:
    """TCDScheduler, whose steps a pipeline tells `eta`, which is gamma."""
    schedule, steps = sampler.denoiser.schedule, len(sampler.levels)
    if not isinstance(schedule, DiscreteVP) or not _takes(teacher, "eta"):
        raise UserError(
            f"{sampler.step.name}: of the stock pipelines only those with discrete timesteps that take eta, such as "
            "Stable Diffusion's, sample so; use gamma 0 or 1, or one step"
        )
    count = int(sampler.levels[0]) + 1
    if count % steps or sampler.levels != tuple(float(count - 1 - k * count // steps) for k in range(steps)):
        if (scheduler := _any_timesteps(teacher, sampler)) is not None:
            return scheduler
        raise _uneven(steps, count)
    return _tcd(sampler)


def _uneven(steps: int, timesteps: int) -> UserError:
    """Of levels that do not part the student's chain in equal pieces, which is all that a pipeline lets it take."""
    even = ", ".join(str(n) for n in range(1, 17) if timesteps % n == 0)
    return UserError(
        f"export: {steps} steps do not divide the {timesteps} timesteps up to the student's first level evenly, which "
        f"this pipeline needs; use evenly spaced ones, {even} for instance"
    )


def _latent_flow_scheduler(schedule: LinearFlow, sampler: Sampler, own_row: bool) -> SchedulerMixin:
    """Flow matching's own scheduler with the sampler's levels, the trailing ones.

    `own_row`: the pipeline lets it take its own row, where others hand it 1, .., 1/n.
    """
    steps, own = len(sampler.levels), torch.tensor(sampler.levels, dtype=torch.float64)
    if not torch.allclose(schedule.trailing(steps), own):
        levels = ", ".join(f"{level:g}" for level in sampler.levels)
        raise UserError(
            f"export: this pipeline's scheduler cannot take {steps} steps at {levels}; leave the levels out"
        )
    # With one step the two are the same; the plain one is better known.
    kind = getattr(diffusers, sampler.step.stock["LinearFlow"] if steps > 1 else "FlowMatchEulerDiscreteScheduler")
    shift, terminal = schedule.shift, None
    if own_row and steps > 1:
        # It shifts the row from 1 to its own least sigma and stretches that to end at `shift_terminal`. Both rows are
        # Moebius functions of k; they are the same one for the shift q/(q - 1), q = shift n d/(shift - 1), where d is
        # what one step takes off before the shift. d depends weakly on the new shift.
        terminal, shift = float(own[-1]), 1.0
        for _ in range(100 if schedule.shift != 1 else 0):
            least = shift / (schedule.train_timesteps + shift - 1)
            q = schedule.shift * steps * (1 - least) / (steps - 1) / (schedule.shift - 1)
            shift = q / (q - 1)
    return kind(schedule.train_timesteps, shift, shift_terminal=terminal)


def _flow_scheduler(shift: float, timesteps: int) -> SchedulerMixin:
    """Euler steps of flow matching, in the one stock scheduler that pixel pipelines can drive."""
    return diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=1,
        final_sigmas_type="zero",
    )


def _flow_shift_for(level: float, schedule: LinearFlow) -> float:
    """The shift that moves that scheduler's one-step sigma, 1 - 1/T, to the level."""
    first, time = 1 - 1 / schedule.train_timesteps, level * schedule.train_timesteps
    # That scheduler hands the network whole timesteps only.
    if not 0 < level < 1 or abs(time - round(time)) > 1e-6:
        raise UserError(f"student_level: {level} is not k/{schedule.train_timesteps} inside (0, 1)")
    level = (round(time) + 1e-6) / schedule.train_timesteps  # it cuts off what is behind the point
    return level * (1 - first) / (first * (1 - level))


def teacher_scheduler(parameterization: str) -> SchedulerMixin:
    """The stock scheduler of a teacher of ours: DDIM ('vp'), EDM's Euler ('edm') or Euler steps of a flow."""
    if parameterization == "edm":
        return diffusers.EDMEulerScheduler()
    if parameterization == "flow":
        return _flow_scheduler(1.0, 1000)
    return diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def scheduler_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The config as scheduler_config.json would hold it."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}
