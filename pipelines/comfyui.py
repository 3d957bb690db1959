"""A student's LoRA with the keys that ComfyUI reads, and what the model card says of ComfyUI.

ComfyUI derives the names of a LoRA's layers from its model (comfy/lora.py, `model_lora_keys_unet`). It adds alpha /
rank times up @ down to their weights, and up @ down where there is no alpha (comfy/weight_adapter/lora.py). Keys that
it does not know it leaves out, with a line in its log. Its node Load Diffusion Model reads whole networks of some
families under the names that diffusers gives their weights (comfy/model_detection.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffdistill.core.experts import experts_of
from diffdistill.core.schedule import DiscreteVP, LinearFlow
from diffdistill.errors import UserError
from diffdistill.families import Family
from diffdistill.players.lora import LoraNetwork
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher

FILE = "comfyui/lora.safetensors"
"""The LoRA, in a student's folder."""
_UNETS = ("stable_diffusion", "sdxl")
_PREFIXES = {name: "transformer" for name in ("sd3", "flux", "pixart_sigma", "qwen_image")}
_PREFIXES |= {"z_image": "diffusion_model", "wan": "diffusion_model"} | dict.fromkeys(_UNETS, "unet")
# The names of Wan's makers, by which alone ComfyUI knows its layers; longer ones first.
_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    "proj_out.": "head.head.",
}
_SAMPLERS = {"renoise": "lcm", "ddim": "euler"}
_SHIFTS = {name: "ModelSamplingSD3" for name in ("sd3", "wan")}
_SHIFTS |= {name: "ModelSamplingAuraFlow" for name in ("qwen_image", "z_image")}


def check_comfyui(entry: Family | None, network: nn.Module) -> None:
    """UserError for a student that ComfyUI cannot read, neither its LoRA nor its whole network."""
    what = "a network that is not in diffusers" if entry is None else entry.class_names[0]
    if entry is None or entry.name not in _PREFIXES:
        raise UserError(f"layout: ComfyUI knows no layers of {what}; leave out --layout comfyui")
    if experts_of(network) is not None:
        raise UserError("layout: a student of two networks is two files for ComfyUI; leave out --layout comfyui")
    if isinstance(network, LoraNetwork):
        if network.alone:
            return
    elif entry.name == "wan":
        raise UserError(
            f"layout: ComfyUI reads no whole network of {what} from a diffusers folder, but a LoRA; "
            "give --lora student, or leave out --layout comfyui"
        )
    elif getattr(getattr(network, "config", None), "time_cond_proj_dim", None) is None:
        return
    raise UserError("layout: ComfyUI has no place for the input of a guidance scale; leave out --layout comfyui")


def comfyui_lora(family: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`lora_weights` under ComfyUI's keys; alpha / rank, which is in B already, is 1."""
    if family in _UNETS:
        from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

        return convert_state_dict_to_kohya({f"unet.{name}": value for name, value in weights.items()})
    return {f"{_PREFIXES[family]}.{_makers(family, name)}": value for name, value in weights.items()}


def _makers(family: str, name: str) -> str:
    for theirs, makers in _WAN.items() if family == "wan" else ():
        name = name.replace(theirs, makers)
    return name


def write_comfyui_lora(folder: Path, family: str, weights: dict[str, Tensor]) -> None:
    """Write `FILE` into a student's folder, of its `lora_weights`."""
    (folder / FILE).parent.mkdir()
    save_file(comfyui_lora(family, weights), folder / FILE, {"format": "pt"})


def comfyui_note(entry: Family, teacher: Teacher, sampler: Sampler, folder: Path, form: str) -> str:
    """The paragraph of a model card; `form` is what the folder holds, as in its record."""
    if (folder / FILE).is_file():
        how = f"`{FILE}` is the LoRA; it goes into `models/loras`, and Load LoRA puts it on the teacher at strength 1."
    elif form == "lora":
        return ""  # the folder in a merged student's, which has the file
    elif len(list((folder / entry.component).glob("*.safetensors"))) == 1:
        file = f"{entry.component}/diffusion_pytorch_model.safetensors"
        how = f"`{file}` goes into `models/diffusion_models`, and Load Diffusion Model reads it\nas it is."
    else:
        how = "it reads no network in several files; export with a greater `--max-shard-size`."
    settings = _settings(entry.name, teacher, sampler)
    return f"\nIn ComfyUI: {how}{f' {settings}' if settings else ''}\n\n"


def _settings(family: str, teacher: Teacher, sampler: Sampler) -> str | None:
    """How KSampler takes the student's steps; None where it is not known to take just these."""
    levels, denoiser, n = torch.tensor(sampler.levels, dtype=torch.float64), sampler.denoiser, len(sampler.levels)
    schedule, name = denoiser.schedule, "euler" if n == 1 else _SAMPLERS.get(sampler.step.name)
    line = f"\nKSampler: {n} step{'s' if n > 1 else ''}, cfg 1, sampler {name}, scheduler"
    if name is None or denoiser.output.name != teacher.denoiser.output.name:
        return None
    if isinstance(schedule, DiscreteVP):
        chain = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        usual = DiscreteVP.from_config(chain | {"num_train_timesteps": 1000}).alphas_cumprod
        same = schedule.alphas_cumprod.shape == usual.shape and torch.allclose(schedule.alphas_cumprod, usual)
        fits = (torch.linspace(999, 0, n + 1, dtype=torch.float64)[:-1] - levels).abs().max() < 1
        known = family in _UNETS and denoiser.output.name == "epsilon" and same and fits
        return f"{line} sgm_uniform." if known else None
    if not isinstance(schedule, LinearFlow) or levels[0] != 1:
        return None
    if n == 1:
        return f"{line} simple."
    even = 1 - torch.arange(n, dtype=torch.float64) / n
    shift = round(float(levels[1] * (1 - even[1]) / (even[1] * (1 - levels[1]))), 2)  # the node takes two decimals
    fits = (shift * even / (1 + (shift - 1) * even) - levels).abs().max() < 2e-3
    node = _SHIFTS.get(family)
    return f"{line} simple,\nbehind {node} with shift {shift:g}." if node and fits else None
