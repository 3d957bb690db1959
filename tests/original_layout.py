"""The names that Stable Diffusion's makers gave its weights, from those of diffusers: what a single file holds.

As in the table of diffusers' scripts/convert_diffusers_to_original_stable_diffusion.py.
"""

from typing import Any

from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _blocks(config: Any) -> dict[str, str]:
    """The beginnings of names of a UNet's blocks."""
    layers, down, up = config.layers_per_block, config.down_block_types, config.up_block_types
    found = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i in range(len(down)):
        for j in range(layers):
            found[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{i * (layers + 1) + j + 1}.0"
            found[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{i * (layers + 1) + j + 1}.1"
        found[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (layers + 1)}.0.op"
    for i, kind in enumerate(up):
        for j in range(layers + 1):
            found[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{i * (layers + 1) + j}.0"
            found[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{i * (layers + 1) + j}.1"
        place = 2 if "CrossAttn" in kind else 1
        found[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{i * (layers + 1) + layers}.{place}"
    return found


def unet_name(name: str, config: Any) -> str:
    """The makers' name of a UNet's weight."""
    beginnings = _blocks(config) | _ENDS
    begin = next(key for key in sorted(beginnings, key=len, reverse=True) if name.startswith(f"{key}."))
    rest = name.removeprefix(begin)
    if ".resnets." in begin:
        part = rest.split(".")[1]
        rest = rest.replace(f".{part}.", f".{_RESNET[part]}.", 1)
    return beginnings[begin] + rest


def _vae_name(name: str, blocks: int) -> str:
    for key, value in _VAE.items():
        name = name.replace(key, value)
    if ".mid.attn_1." in name:
        for key, value in _VAE_ATTENTION.items():
            name = name.replace(f"attn_1.{key}.", f"attn_1.{value}.")
    for i in range(blocks):
        name = name.replace(f"down_blocks.{i}.resnets.", f"down.{i}.block.")
        name = name.replace(f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.")
        name = name.replace(f"up_blocks.{i}.resnets.", f"up.{blocks - 1 - i}.block.")
        name = name.replace(f"up_blocks.{i}.upsamplers.0.", f"up.{blocks - 1 - i}.upsample.")
    return name


def stable_diffusion_file(pipe: Any) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion 1 pipeline as its single file has them."""
    held = {}
    for name, value in pipe.unet.state_dict().items():
        held[f"model.diffusion_model.{unet_name(name, pipe.unet.config)}"] = value
    blocks = len(pipe.vae.config.block_out_channels)
    for name, value in pipe.vae.state_dict().items():
        made = _vae_name(name, blocks)
        square = "mid.attn_1" in made and made.endswith(".weight") and value.ndim == 2  # 1x1 convolutions there
        held[f"first_stage_model.{made}"] = value[:, :, None, None] if square else value
    for name, value in pipe.text_encoder.state_dict().items():
        held[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.contiguous() for name, value in held.items()}
