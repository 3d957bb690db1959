"""Guidance adapters on a denoiser: where they go, and how they are saved apart from it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser, scale_by_keyword
from diffdistill.errors import UserError
from diffdistill.files import atomic_folder
from diffdistill.players.adapter_networks import CONFIG, AdaptedNetwork, GuidanceAdapters, Site, layer_input, positions
from diffdistill.players.teacher import Teacher


def adapted(denoiser: Denoiser, adapters: nn.Module, guidance_scale: float) -> Denoiser:
    """The denoiser with adapters on its network, which both share; it takes `Extra.scale`, or `guidance_scale`."""
    network = AdaptedNetwork(denoiser.network, adapters, guidance_scale)
    inner = denoiser.feature_layer
    network.to(next(iter(denoiser.network.state_dict().values())).device)
    twin = denoiser.with_network(network, None if inner is None else f"base.{inner}")
    twin.extra_call = scale_by_keyword(denoiser.call)
    return twin


def new_adapters(teacher: Teacher, kind: str, hidden: int, where: str) -> GuidanceAdapters:
    """Adapters for a class-conditional teacher, with zero output, in its network's precision.

    `where` is 'attention': the network's attention layers, or its residual blocks if it has none; or 'blocks':
    both. A network with neither is corrected at its output. Raises UserError for a teacher without null class.
    """
    if teacher.num_classes is None or teacher.denoiser.null is None:
        raise UserError(
            "teacher: guidance needs a class-conditional teacher with a null class, and this one has none; "
            "give its label with --null-class"
        )
    if teacher.size or teacher.family == "dit":
        raise UserError(f"teacher: guidance adapters are for models of pixels, and this one is of {teacher.family}")
    network = teacher.denoiser.network
    names = _layers(network, "Attention")
    if where == "blocks" or not names:
        blocks = _layers(network, "ResnetBlock2D")
        names = [name for name, _ in network.named_modules() if name in {*names, *blocks}]
    sites = _measured(teacher, names or [""])
    dtype = next((v.dtype for v in network.state_dict().values() if v.is_floating_point()), torch.float32)
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    return GuidanceAdapters(kind, hidden, teacher.num_classes + 1, sites).to(dtype)


def _layers(network: nn.Module, kind: str) -> list[str]:
    # By name, so that the attention of any diffusers model is found; of nested ones the outermost.
    names = [name for name, module in network.named_modules() if name and type(module).__name__.endswith(kind)]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _measured(teacher: Teacher, names: list[str]) -> list[Site]:
    """Sites with the channels that they have in a call of the teacher."""
    sites: list[Site] = []

    def measure(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x, y = (positions(v) for v in (layer_input(args, kwargs), output if isinstance(output, Tensor) else output[0]))
        if x.shape[1] == y.shape[1]:  # a block that changes the resolution has no correction per position
            sites.append(Site(name, x.shape[2], y.shape[2]))

    handles = []
    for name in names:

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            measure(name, args, kwargs, output)

        layer = teacher.denoiser.network.get_submodule(name)
        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    weight = next(v for v in teacher.denoiser.state_dict().values() if v.is_floating_point())
    try:
        with torch.no_grad():
            t = torch.ones(1, dtype=torch.float64, device=weight.device)
            teacher.denoiser(torch.zeros(1, *teacher.shape).to(weight), t, teacher.sample_cond(1))
    finally:
        for handle in handles:
            handle.remove()
    return sites


def fingerprint(network: nn.Module) -> str:
    """16 hex digits of a network's architecture: the names and shapes of its weights."""
    shapes = sorted(f"{name} {tuple(value.shape)}" for name, value in network.state_dict().items())
    return hashlib.blake2b("\n".join(shapes).encode(), digest_size=8).hexdigest()


def write_adapters(folder: Path, network: AdaptedNetwork) -> None:
    """adapter.safetensors and adapter.json into an existing folder."""
    assert isinstance(network.adapters, GuidanceAdapters)
    base = {"class": type(network.base).__name__, "fingerprint": fingerprint(network.base)}
    network.adapters.save(folder, guidance_scale=float(network.guidance_scale), base=base)


def save_adapters(folder: str | Path, denoiser: Denoiser) -> Path:
    """Write the adapters of an adapted denoiser to a folder of their own, whole or not at all."""
    network = denoiser.network
    if not isinstance(network, AdaptedNetwork):
        raise UserError(f"adapters: a {type(network).__name__} has none; only adapted networks can be saved so")
    with atomic_folder(Path(folder), CONFIG) as partial:
        write_adapters(partial, network)
    return Path(folder)


def load_adapters(folder: str | Path, denoiser: Denoiser) -> Denoiser:
    """The denoiser with the folder's adapters attached: the base they were trained on, or a checkpoint like it.

    Such is a student of few steps distilled from that base. The denoiser is not changed; the two share its
    network. Raises UserError where the folder is not whole or is of another architecture.
    """
    try:
        adapters = GuidanceAdapters.from_pretrained(folder)
        base, scale = adapters.described["base"], adapters.described["guidance_scale"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"adapters: {str(folder)!r} is not a whole folder of guidance adapters ({reason})") from None
    own = fingerprint(denoiser.network)
    if own != base["fingerprint"]:
        raise UserError(
            f"adapters: {str(folder)!r} is for another network ({base['class']} {base['fingerprint']}, "
            f"and this is {type(denoiser.network).__name__} {own}); use a checkpoint of the same base"
        )
    return adapted(denoiser, adapters, scale)
