"""What is no pipeline's folder is refused with the command that makes one of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffdistill import LinearFlow, Teacher
from diffdistill.errors import UserError
from diffdistill.families import local_folder
from diffdistill.families._registry import family_of

XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
FUSED = r"python -c .*load_lora_weights\('{}'\); p.fuse_lora\(\); p.unload_lora_weights\(\); p.save_pretrained"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([XL], "needs the configs of its pipeline, and stabilityai/stable-diffusion-xl-base-1.0 could not be had"),
        (["model.diffusion_model.out.2.weight"], "give --teacher-config FOLDER_OR_ID, a diffusers folder of its kind"),
        (["blocks.0.weight"], "from_single_file of that pipeline's class"),
        (["unet.to_q.lora_A.weight", "unet.to_q.lora_B.weight"], f"a LoRA; fuse it: {FUSED.format('m.safetensors')}"),
        (["lora_unet_down.lora_down.weight"], "a LoRA; fuse it"),
    ],
)
def test_a_single_file(names: list[str], says: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=says):
        local_folder(str(tmp_path / "m.safetensors"))


def test_a_pickled_file_is_not_looked_into(tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"from_single_file\('m.ckpt'\).*or the pipeline class of its kind"):
        local_folder(str(tmp_path / "m.ckpt"))


def test_a_lora_folder_names_its_base(tmp_path: Path) -> None:
    folder = tmp_path / "style"
    folder.mkdir()
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(UserError, match=r"holds a LoRA.*from_pretrained\('some/base'\).*load_lora_weights\('style'\)"):
        family_of(folder)


def test_a_network_with_a_lora_on_it_is_refused() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.to_q(x)

    network = Network()
    Teacher.around(network, (4,), LinearFlow(), "flow_prediction")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), network, "style")
    with pytest.raises(UserError, match=r"network: a LoRA is on it \(to_q\); put it into the weights"):
        Teacher.around(network, (4,), LinearFlow(), "flow_prediction")
