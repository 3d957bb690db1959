"""What a pipeline is that no family reads, and the beginning of a family file for it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import diffusers

from diffdistill.errors import UserError, shown
from diffdistill.families._family import diffusers_class
from diffdistill.families._not_yet import reason_of
from diffdistill.families._parts import Config, part_class, parts_of, read_json


class Unread(NamedTuple):
    """A stock pipeline's folder as far as its index and configs say what it is."""

    pipeline: str  #: the name of its class in diffusers
    parts: dict[str, str]  #: sub-folder -> class
    component: str | None  #: the sub-folder of the network; None: it was not found
    takes: tuple[str, ...]  #: the arguments of the network's forward
    encodes: tuple[str, ...] | None  #: those of the pipeline's encode_prompt; None: it has none
    calls: tuple[str, ...]  #: those of the pipeline's call
    flow: bool  #: its scheduler is one of flow matching


def unread_pipeline(folder: Path) -> Unread:
    """What the folder of a pipeline of diffusers is; UserError for one whose class diffusers does not have."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise UserError(
            f"teacher: pipeline class {shown(name)} is not in diffusers {diffusers.__version__}; a family file for it "
            "must bring the class along: pipelines=(MyPipeline,), network=MyNetwork (see CONTRIBUTING.md)"
        )
    parts = {part: str(index[part][1]) for part in parts_of(index, kind)}
    component = next((part for part in parts if _is_network(index, part)), None)
    takes = () if component is None else _names(part_class(index[component]).forward)
    encodes = _names(kind.encode_prompt) if hasattr(kind, "encode_prompt") else None
    scheduler = parts.get("scheduler", "")
    flow = scheduler.startswith("FlowMatch") or _is_flow(folder / "scheduler" / "scheduler_config.json")
    return Unread(str(name), parts, component, takes, encodes, _names(kind.__call__), flow)


def _is_network(index: Config, part: str) -> bool:
    """Whether a part is the network that is distilled: the one whose forward takes a time."""
    own = part_class(index[part])
    if index[part][0] != "diffusers" or not hasattr(own, "forward"):
        return False
    return bool({"timestep", "timesteps", "t"} & set(_names(own.forward)))


def _is_flow(path: Path) -> bool:
    return path.is_file() and read_json(path).get("prediction_type") == "flow_prediction"


def _names(function: Any) -> tuple[str, ...]:
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    return tuple(p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def report_unread(folder: Path) -> list[str]:
    """The lines that say what a family file for the folder must have."""
    about = unread_pipeline(folder)
    why = reason_of(about.pipeline)
    lines = [f"no family reads {about.pipeline}" + (f": {why}" if why else ""), "its parts:"]
    for part, kind in about.parts.items():
        mark = "  <- the network" if part == about.component else ""
        lines.append(f"  {part + '/':20} {kind}{mark}")
    if about.component is None:
        lines.append("  none of them takes a time, so that it is not known which is the network")
    else:
        lines.append(f"its network's forward takes: {', '.join(about.takes)}")
    if about.encodes is None:
        lines.append("it has no encode_prompt")
    else:
        lines.append(f"its encode_prompt takes: {', '.join(about.encodes)}")
    lines.append("a family file must give (CONTRIBUTING.md, 'Adding a family'):")
    lines += [f"  {name:20} {what}" for name, what in needed(about).items()]
    return lines


def needed(about: Unread) -> dict[str, str]:
    """Field of `Family` -> what it has to be for this pipeline."""
    vae = about.parts.get("vae")
    guides = "guidance_scale" if "guidance_scale" in about.calls else "none of guidance_scale: say what guides"
    fields = {
        "pipelines": f'("{about.pipeline}",)',
        "component, network": f'"{about.component}", "{about.parts.get(about.component or "", "?")}"',
        "teacher": "the shape of a sample, the schedule, and a call of the network that returns the sample's shape",
        "autoencoder": f"KL serves {vae}" if vae == "AutoencoderKL" else f"both ways through {vae}",
        "text": "encode and null, through the pipeline's own encode_prompt",
        "lora_targets": "the names of the attention's linear layers",
        "arguments": "arguments of the call that turn guidance off",
        "guided": f"arguments of the call that guide by g: {guides}",
    }
    if vae is None:
        fields.pop("autoencoder")
    if about.encodes is None:
        fields.pop("text")
    return fields


def skeleton(folder: Path) -> str:
    """A family file for the folder's pipeline, with the names that are known; what is not, the user must fill in."""
    about = unread_pipeline(folder)
    name = about.pipeline.removesuffix("Pipeline").lower()
    kl = about.parts.get("vae") == "AutoencoderKL"
    conditions = [n for n in about.takes if n not in ("hidden_states", "sample", "timestep", "return_dict")]
    schedule = 'flow_schedule(source.scheduler, "own")' if about.flow else "schedule_of(source.scheduler)"
    where = "_flow import flow_schedule" if about.flow else "_schedules import schedule_of"
    first = about.takes[0] if about.takes else "hidden_states"
    return f'''"""{about.parts.get(about.component or "", "?")}: {about.pipeline}."""

from diffdistill.families import Autoencoder, Family
from diffdistill.families._family import ATTENTION, KL, latent_size, latent_teacher, plain_text, token_map
from diffdistill.families.{where}


def call(network, x, time, cond):
    """x (B, *shape) as the scheduler scales it, time (B,) in its own units (0 to 1000); gives (B, *shape).

    The network also takes: {", ".join(conditions) or "nothing"}.
    """
    return network({first}=x, timestep=time, return_dict=False, **cond)[0]


def teacher(network, source):
    """The sample's shape is (channels, height, width) in latent pixels, with frames after the channels for videos."""
    config = network.config
    factor = AUTOENCODER.factor(source.config("vae"))
    size = latent_size("{name}", factor, 128 * factor, source.resolution, 2)
    shape = (config.in_channels, *size)
    layer = "transformer_blocks.0"  # whose output (B, tokens, width) a discriminator reads
    return latent_teacher(
        "{name}", network, source, shape, {schedule}, call, feature_layer=layer, feature_map=token_map
    )


def encode(pipe, prompts, prompt):
    """The network's conditions (n, ...) of n prompts, by its own names for them, all padded to one length.

    pipe.encode_prompt takes: {", ".join(about.encodes or ()) or "nothing"}.
    """
    raise NotImplementedError("call pipe.encode_prompt of the prompts")


AUTOENCODER = {"KL" if kl else _AUTOENCODER}

{_family_lines(about, name)}'''


def _family_lines(about: Unread, name: str) -> str:
    """`FAMILY`, at the end of the file."""
    encoders = [part for part in about.parts if part.startswith(("tokenizer", "text_encoder"))]
    guidance = '"guidance_scale": 1.0' if "guidance_scale" in about.calls else ""
    return f'''FAMILY = Family(
    "{name}",
    "{about.pipeline.removesuffix("Pipeline")}",
    ("{about.pipeline}",),
    "{about.component}",
    "{about.parts.get(about.component or "", "?")}",
    "text",
    teacher,
    lora_targets=ATTENTION,
    autoencoder=AUTOENCODER,
    text=plain_text({tuple(encoders)!r}, encode),
    arguments=lambda steps: {{"num_inference_steps": steps, {guidance}}},
    loads_lora={hasattr(diffusers_class(about.pipeline), "load_lora_weights")},
)
'''


_AUTOENCODER = """Autoencoder(
    lambda config: 8,  # pixels a latent pixel
    lambda vae, images: vae.encode(images).latent_dist.mode() * vae.config.scaling_factor,
    lambda vae, latents: vae.decode(latents / vae.config.scaling_factor).sample,
)"""
