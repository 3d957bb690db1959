"""A family against its stock pipeline: the teacher's latents, text, autoencoder and layers are the pipeline's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.experts import experts_of
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, solve
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow
from diffdistill.errors import UserError, first_line
from diffdistill.families import (
    Family,
    diffusers_class,
    family_of,
    load_pipeline,
    load_teacher,
    prompt_of,
    with_null,
)
from diffdistill.families._family import OWN_NULL, stock_noise
from diffdistill.families._parts import Config
from diffdistill.families._schedules import around_steps
from diffdistill.options import Size
from diffdistill.pictures import opaque
from diffdistill.players.teacher import Teacher

LIMIT = 1e-4
"""The difference in float32, relative to the greatest value where that is above 1, above which latents are others."""
GUIDANCE = 5.0
"""The scale of the guided comparison."""
_FIRST_ORDER = (
    *("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"),
    "CogVideoXDDIMScheduler",
)


@dataclass(frozen=True)
class Check:
    """One line of a check: what was looked at, whether it is right (None: left out), and what is to be said of it."""

    name: str
    ok: bool | None
    said: str = ""


@dataclass
class Case:
    """A pipeline, and the teacher that is loaded from its folder, with the conditions of one prompt or class."""

    call: Callable[[float], Config]  #: the stock pipeline's arguments at a guidance scale, without size and steps
    pipe: Any
    folder: Path
    family: Family
    teacher: Teacher
    cond: Cond
    steps: int = 4
    notes: list[str] = field(default_factory=list)  #: what was changed of the pipeline so that the two compare


def stock_case(
    folder: Path, pipe: Any = None, *, resolution: Size | None = None, frames: int | None = None, prompt: str,
    dtype: torch.dtype = torch.float32, device: Any = "cpu",
) -> Case:  # fmt: skip
    """The case of a diffusers folder; `pipe` is the stock pipeline, which None loads from there.

    Raises UserError for a folder that is no teacher, a family that cannot encode the prompt, and a pipeline whose call
    takes no class though its network does.
    """
    family, index = family_of(folder)
    teacher = load_teacher(folder, resolution=resolution, frames=frames, dtype=dtype)
    teacher.denoiser.to(device)
    encoders = pipe
    if pipe is None:
        pipe = load_pipeline(folder, device=device, dtype=dtype)
        name = index["_class_name"]
        if isinstance(name, str) and name in family.class_names and type(pipe).__name__ != name:
            # Of a family of several pipelines each is loaded as the first, as which students are saved.
            pipe = diffusers_class(family.pipelines[family.class_names.index(name)])(**pipe.components)
            pipe.set_progress_bar_config(disable=True)
        encoders = pipe
    elif family.text is not None:
        encoders = load_pipeline(folder, leave_out=family.networks)
    cond, what = conditions(encoders, folder, family, teacher, prompt)

    def call(guidance: float) -> Config:
        steps = {key: value for key, value in family.arguments(4).items() if key != "num_inference_steps"}
        extra = family.guided(guidance) if guidance != 1 and family.guided is not None else {}
        return {**what, **steps, **extra}

    case = Case(call, pipe, folder, family, teacher, cond)
    _take_plain_steps(case)
    return case


def conditions(pipe: Any, folder: Path, family: Family, teacher: Teacher, prompt: str) -> tuple[Cond, Config]:
    """What teacher and stock pipeline are given: the network's conditions (1, ...), and arguments of the call.

    The teacher is told the null condition. Raises UserError where the family's own functions fail.
    """
    if family.text is not None:
        try:
            size = prompt_of(family, folder, teacher)
            with torch.no_grad():
                cond = family.text.encode(pipe, [prompt], size)
                with_null(teacher.denoiser, family.text.null(pipe, size))
        except UserError:
            raise
        except Exception as error:  # whatever a family's own code raises
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"family: {family.name}'s text cannot encode a prompt ({reason})") from error
        if size.images is None:
            return cond, {"prompt": prompt}
        return cond, {"prompt": prompt, "image": size.lists[0] if family.several else size.pictures[0]}
    if teacher.num_classes is None:
        return {}, {}
    label = min(7, teacher.num_classes - 1)
    if "class_labels" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(
            f"family: {type(pipe).__name__} gives its network no class, so that there is nothing to compare"
        )
    device = next(teacher.denoiser.parameters()).device
    return {"class_labels": torch.tensor([label], device=device)}, {"class_labels": [label]}


def _take_plain_steps(case: Case) -> None:
    """Give the pipeline a scheduler of first-order steps without noise, which the solver's steps are."""
    old, schedule = case.pipe.scheduler, case.teacher.denoiser.schedule
    name, config = type(old).__name__, dict(old.config)
    if name == "CMStochasticIterativeScheduler":
        case.steps = 1  # it adds noise between two
        return
    changes = {}
    if isinstance(schedule, DiscreteVP):
        wanted = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}
        changes = {key: value for key, value in wanted.items() if config.get(key, value) != value}
        spaced = config.get("timestep_spacing", "leading") in ("leading", "trailing")
        if name in _FIRST_ORDER and spaced and not changes:
            return
        kept = {key: value for key, value in config.items() if key[:1] != "_"}
        ddim = "CogVideoXDDIMScheduler" if "snr_shift_scale" in config else "DDIMScheduler"
        new = diffusers_class(ddim).from_config(kept | wanted | {"timestep_spacing": "trailing"})
    elif name in _FIRST_ORDER:
        return
    elif isinstance(schedule, EDM):
        new = diffusers_class("EDMEulerScheduler").from_config(old.config)
    elif isinstance(schedule, LinearFlow):
        own = {"shift": config.get("flow_shift", config.get("shift", 1.0))}
        new = diffusers_class("FlowMatchEulerDiscreteScheduler")(schedule.train_timesteps, **own)
    else:
        return
    case.pipe.scheduler = new
    settings = f" without {', '.join(changes)}" if changes else ""
    case.notes.append(f"with {type(new).__name__}{settings} in place of {name}, whose steps are of another kind")


@torch.no_grad()
def stock(case: Case, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (1, *shape) and images (1, ..) in [-1, 1] that the stock pipeline makes, and the angles on its way.

    The noise is that of seed 1.
    """
    scheduler, shape = case.pipe.scheduler, case.teacher.shape
    if case.family.steer is not None:
        case.family.steer(case.pipe, guidance)
    outputs: list[Tensor] = []
    others: list[Tensor] = []  # of a copy of the scheduler, which makes the other part of each sample

    def around(stepping: Any, own: Callable[[], Any], told: dict[str, Any]) -> Any:
        result = own()
        (outputs if stepping is scheduler else others).append(result[0])
        return result

    settings = {"num_inference_steps": case.steps, **case.teacher.size, **case.call(guidance)}
    with around_steps(scheduler, around):
        result = case.pipe(**settings, generator=torch.Generator().manual_seed(1), output_type="np")
        if case.family.reads_image and case.pipe.config.get("expand_timesteps"):
            # After the last step this pipeline puts the image's frame into the latents.
            outputs.append(case.pipe(**settings, generator=torch.Generator().manual_seed(1), output_type="latent")[0])
    images = torch.as_tensor(result[0])
    images = opaque(images.movedim(-1, 1)).movedim(1, -1) * 2 - 1
    x = torch.cat([part[-1][:1].float() for part in (outputs, others) if part], 1)
    packing = case.family.packing
    packed = packing is not None and x.ndim == packing.dims
    latents = packing.unpack(x, shape) if packed else x.reshape(1, *shape)  # type: ignore[union-attr]
    schedule = case.teacher.denoiser.schedule
    levels = scheduler.timesteps if isinstance(schedule, DiscreteVP) else scheduler.sigmas[:-1]
    grid = torch.cat([schedule.angle(levels.double().cpu()), torch.zeros(1, dtype=torch.float64)])
    return latents, images, grid


@torch.no_grad()
def ours(case: Case, guidance: float, grid: Tensor) -> Tensor:
    """(1, *shape) what the teacher makes of the same noise on the same grid."""
    denoiser = case.teacher.denoiser
    z = stock_noise(case.family, case.teacher, torch.Generator().manual_seed(1))
    start = z * denoiser.schedule.init_scale(float(grid[0]))
    start, grid = (value.to(next(denoiser.parameters()).device) for value in (start, grid))
    return solve(ddim_step, guided(denoiser, guidance), start, grid, case.cond) * denoiser.schedule.data_std


def gap(a: Tensor, b: Tensor) -> float:
    """The greatest difference, relative to the greatest value of b where that is above 1."""
    assert a.shape == b.shape, (a.shape, b.shape)
    assert b.isfinite().all()
    return float(((a - b).abs().max() / b.abs().max().clamp(min=1)).detach())


def middle(case: Case, n: int) -> tuple[Tensor, Tensor, Cond]:
    """x_t, t and conditions of n samples half-way."""
    schedule, device = case.teacher.denoiser.schedule, next(case.teacher.denoiser.parameters()).device
    t = schedule.at_fraction(torch.full((n,), 0.5, dtype=torch.float64)).to(device)
    x = torch.randn(n, *case.teacher.shape).to(device)
    return x, t, {k: v.expand(n, *v.shape[1:]) for k, v in case.cond.items()}


# -- the checks --------------------------------------------------------------------------------------------------


@contextmanager
def _calls(network: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The arguments of the network's calls while it lasts, by name; those that are None are left out."""
    calls: list[dict[str, Any]] = []
    parameters = inspect.signature(type(network).forward)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = parameters.bind(module, *args, **kwargs).arguments
        calls.append({name: value for name, value in list(bound.items())[1:] if value is not None})

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        size = f"{float(value.double().abs().mean()):.4g} on average" if value.numel() else "empty"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}, {size}"
    return repr(value)[:40]


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and gap(a.detach().double().cpu(), b.detach().double().cpu()) < 1e-3
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return bool(a == b)


def _first_difference(case: Case, grid: Tensor) -> str:
    """Of the network's arguments in the first step, the one in which the family's call differs from the pipeline's."""
    with _calls(getattr(case.pipe, case.family.component)) as theirs:
        stock(case, 1.0)
    experts = experts_of(case.teacher.denoiser.network)  # of two networks the first is called in the first step
    network = case.teacher.denoiser.network if experts is None else experts.get_submodule(case.family.component)
    with _calls(network) as mine:
        ours(case, 1.0, grid)
    for name, value in theirs[0].items():
        own = mine[0].get(name)
        if own is None:
            return f"the pipeline gives its network {name} ({_kind(value)}), and the family does not"
        if not _alike(own, value):
            return f"in the first step {name} is {_kind(own)}, and the pipeline's {_kind(value)}"
    return "the network is given the same in the first step: look at its output, its sign and the schedule"


def latents_check(case: Case, guidance: float) -> Check:
    """Whether the teacher makes the stock pipeline's latents of the same noise, on its grid and in float32."""
    name = f"latents, guidance {'off' if guidance == 1 else f'{guidance:g}'}"
    latents, _, grid = stock(case, guidance)
    error = gap(ours(case, guidance, grid).cpu(), latents.cpu())
    notes = f" ({'; '.join(case.notes)})" if case.notes else ""
    said = f"off by {error:.1e}; {LIMIT:g} is allowed"
    if error < LIMIT:
        if guidance != 1 and gap(latents, stock(case, 1.0)[0]) < LIMIT:
            return Check(name, False, "guidance changes nothing: the network does not hear its conditions")
        return Check(name, True, said + notes)
    why = _first_difference(case, grid) if guidance == 1 else "without guidance see above; else look at null and guided"
    return Check(name, False, f"{said}{notes}; {why}")


def half_cases(folder: Path, **size: Any) -> tuple[Case, Case]:
    """Cases of the folder with its weights in bfloat16, widened again and as they are; `size` as for `stock_case`."""
    wide, half = stock_case(folder, **size), stock_case(folder, **size, dtype=torch.bfloat16)
    networks = [part for part in wide.pipe.components.values() if isinstance(part, nn.Module)]
    for part in (*networks, wide.teacher.denoiser):
        for value in part.parameters():
            value.data = value.data.to(torch.bfloat16).to(value.dtype)
    return wide, half


def half_check(case: Case, half: Case, guidance: float) -> Check:
    """The same with weights in bfloat16: the teacher is as near to the latents of the widened weights as the pipeline.

    `half` has the weights of `case` in bfloat16, and `case` those widened again.
    """
    name = f"latents in bfloat16, guidance {'off' if guidance == 1 else f'{guidance:g}'}"
    exact, _, _ = stock(case, guidance)
    theirs, _, grid = stock(half, guidance)
    mine = ours(half, guidance, grid)
    stocks, own = gap(theirs.cpu(), exact.cpu()), gap(mine.float().cpu(), exact.cpu())
    allowed = 2 * stocks + 1e-3
    said = f"off by {own:.1e} by rounding; the pipeline itself by {stocks:.1e}, and {allowed:.1e} is allowed"
    return Check(name, own <= allowed, said)


def network_check(case: Case) -> Check:
    """Whether the family's call gives samples of the shape, finite, and each of two as alone."""
    denoiser = case.teacher.denoiser
    x, t, cond = middle(case, 2)
    with torch.no_grad():
        both = denoiser(x, t, cond).y
        alone = torch.cat([denoiser(x[i : i + 1], t[:1], case.cond).y for i in range(2)])
    if both.shape != x.shape:
        return Check("network", False, f"it gives {tuple(both.shape)} for samples {tuple(x.shape)}; look at the call")
    if not both.isfinite().all():
        return Check("network", False, "its output is not finite")
    error, shape = gap(both, alone), tuple(case.teacher.shape)
    return Check("network", error < LIMIT, f"samples are {shape}; each of two is as alone to {error:.1e}")


def text_check(case: Case, prompt: str) -> Check:
    """Whether prompts are encoded alike alone and beside another, and whether there is a null condition for each."""
    text, other = case.family.text, "cat"
    if text is None:
        return Check("text", None, "the family reads no prompts")
    size = prompt_of(case.family, case.folder, case.teacher, 2)
    second = size if size.images is None else size._replace(images=size.images[1:])
    with torch.no_grad():
        both = text.encode(case.pipe, [prompt, other], size)
        null = text.null(case.pipe, size)
        alone = text.encode(case.pipe, [other], second)
    for key, value in both.items():
        for i, row in enumerate((case.cond, alone)):
            if len(value) != 2 or row[key].shape != value[:1].shape:
                shapes = f"{tuple(value.shape)} of two prompts and {tuple(row[key].shape)} of one"
                return Check("text", False, f"{key} is {shapes}; all prompts must be padded to one length")
            if gap(value[i : i + 1].double(), row[key].double()) > 1e-3:
                return Check("text", False, f"{key} of a prompt is another beside a second prompt")
    if unknown := [key for key in null if key not in both or null[key].shape[1:] != both[key].shape[1:]]:
        return Check("text", False, f"null gives {unknown[0]}, which is no condition of a prompt, or of another shape")
    null |= {key.removeprefix(OWN_NULL): value[:1] for key, value in both.items() if key.startswith(OWN_NULL)}
    if all(gap(null[key].double(), case.cond[key].double()) < 1e-6 for key in null):
        return Check("text", False, "null is what the prompt is: guidance would do nothing")
    return Check("text", True, ", ".join(f"{key} {tuple(value.shape[1:])}" for key, value in both.items()))


def autoencoder_check(case: Case) -> Check:
    """Whether images and latents go both ways as the stock pipeline's do."""
    autoencoder, vae = case.family.autoencoder, getattr(case.pipe, "vae", None)
    if autoencoder is None or vae is None:
        return Check("autoencoder", None, "the family works in pixels")
    latents, images, _ = stock(case, 1.0)
    video = len(case.teacher.shape) == 4
    with torch.no_grad():
        decoded = autoencoder.decode(vae, latents.to(vae.device)).clamp(-1, 1).cpu()
        theirs = images.movedim(-1, 2 if video and images.ndim == 5 else 1).reshape(decoded.shape)
        if video and images.ndim == 5:
            theirs = images.permute(0, 4, 1, 2, 3)
        error = gap(decoded, theirs.float())
        if error > LIMIT:
            return Check("autoencoder", False, f"decode gives other images than the pipeline, off by {error:.1e}")
        if not autoencoder.encodes:
            return Check("autoencoder", True, f"decoded as by the pipeline, off by {error:.1e}; there is no way back")
        pictures = torch.rand_like(decoded[:1]).to(vae.device) * 2 - 1
        encoded = autoencoder.encode(vae, pictures)
        if tuple(encoded.shape[1:]) != tuple(case.teacher.shape):
            shapes = f"{tuple(encoded.shape[1:])}, and samples are {tuple(case.teacher.shape)}"
            return Check("autoencoder", False, f"encode gives {shapes}")
        again = autoencoder.decode(vae, encoded)
        lifted = not video and any(isinstance(module, nn.Conv3d) for module in vae.modules())
        plain = vae(pictures[:, :, None] if lifted else pictures)[0].reshape(again.shape)
    error = gap(again, plain)
    return Check("autoencoder", error < LIMIT, f"there and back as its own, off by {error:.1e}")


def layers_check(case: Case) -> list[Check]:
    """Whether the layers that LoRA adapts, and the one that a discriminator reads, are in the network."""
    names = [name for name, _ in case.teacher.denoiser.network.named_modules()]
    targets = case.family.lora_targets
    if targets is None:
        rows = [Check("lora_targets", True, "all linear layers")]
    else:
        lacking = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        said = f"the network has no {', '.join(lacking)}" if lacking else ", ".join(targets)
        rows = [Check("lora_targets", not lacking, said)]
    layer = case.teacher.denoiser.feature_layer
    if layer is None:
        return [*rows, Check("feature_layer", False, "none is named, so that no discriminator can read the network")]
    if layer not in names:
        return [*rows, Check("feature_layer", False, f"the network has no {layer}")]
    try:
        with torch.no_grad():
            features = case.teacher.denoiser.features(*middle(case, 2))
    except Exception as error:  # whatever the family's map makes of it
        return [*rows, Check("feature_layer", False, f"{layer}: {type(error).__name__}: {first_line(error)}")]
    right = features.ndim == 4 and len(features) == 2 and bool(features.isfinite().all())
    return [*rows, Check("feature_layer", right, f"{layer}, a map {tuple(features.shape[1:])}")]


def scales_of(case: Case) -> list[float]:
    """The guidance scales at which the stock pipeline can be compared."""
    # FLUX.2's pipeline ignores the scale of a model that was distilled already.
    alone = case.family.guided is None or case.teacher.denoiser.null is None or case.pipe.config.get("is_distilled")
    return [1.0] if alone else [1.0, GUIDANCE]


def stock_checks(case: Case, prompt: str) -> Iterator[Check]:
    """All of them on a float32 case, each that fails by an error with that error's line."""
    checks: list[tuple[str, Callable[[], Check | list[Check]]]] = [
        ("network", lambda: network_check(case)),
        ("text", lambda: text_check(case, prompt)),
        *((f"latents at guidance {g:g}", partial(latents_check, case, g)) for g in scales_of(case)),
        ("autoencoder", lambda: autoencoder_check(case)),
        ("layers", lambda: layers_check(case)),
    ]
    for name, check in checks:
        yield from carried_out(name, check)


def carried_out(name: str, check: Callable[[], Check | list[Check]]) -> list[Check]:
    """The rows of a check; one that fails, with its line, where the family or the pipeline raises."""
    try:
        rows = check()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a family's own code and a stock pipeline may raise anything
        return [Check(name, False, f"{type(error).__name__}: {first_line(error)}")]
    return rows if isinstance(rows, list) else [rows]


def replaced(case: Case, denoiser: Denoiser) -> Case:
    """The case with another denoiser."""
    return replace(case, teacher=replace(case.teacher, denoiser=denoiser))
