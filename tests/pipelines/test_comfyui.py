"""A student for ComfyUI: its rule of reading a LoRA, stated again, gives the change of weights that the student has."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from diffdistill import UserError, distill, export
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import DiscreteVP, LinearFlow
from diffdistill.families import FAMILIES
from diffdistill.pipelines.comfyui import FILE, check_comfyui, comfyui_lora, comfyui_note, write_comfyui_lora
from diffdistill.players.lora import LoraNetwork, LoraSettings, lora_view, lora_weights, merged
from diffdistill.players.sampler import Sampler, step_named
from diffdistill.players.teacher import Teacher
from tests import tiny_a, tiny_b

BUILDERS = {**tiny_a.PIPELINES, **tiny_b.PIPELINES}

# The layers that ComfyUI's tables have under diffusers' names (comfy/utils.py); its Qwen-Image has them itself.
_UNET = (
    r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
    r"|(down|up)samplers\.0\.conv)|conv_in|conv_out|(time|add)_embedding\.linear_[12]"
)
_JOINT = r"attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
_EMBEDDED = (
    r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]|context_embedder|norm_out\.linear|proj_out"
)
_FF = r"net\.(0\.proj|2)"
_BLOCKS = rf"transformer_blocks\.\d+\.({_JOINT}|norm1(_context)?\.linear|ff(_context)?\.{_FF})"
KNOWN = {
    "stable_diffusion": _UNET,
    "sdxl": _UNET,
    "sd3": rf"{_BLOCKS}|pos_embed\.proj|{_EMBEDDED}",
    "flux": rf"{_BLOCKS}|x_embedder|{_EMBEDDED}"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)",
    "pixart_sigma": rf"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.{_FF})|pos_embed\.proj|proj_out"
    r"|caption_projection\.linear_[12]|adaln_single\.(linear|emb\.\w+_embedder\.linear_[12])",
    "qwen_image": rf"transformer_blocks\.\d+\.({_JOINT}|(img|txt)_mod\.1|(img|txt)_mlp\.{_FF})"
    rf"|img_in|txt_in|{_EMBEDDED}",
    "z_image": r"(layers|context_refiner|noise_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]"
    r"|adaLN_modulation\.0)|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)|all_x_embedder\.2-1|cap_embedder\.1"
    r"|t_embedder\.mlp\.[02]",
}  # fmt: skip


def key_map(family: str, names: list[str], file: dict[str, Tensor]) -> dict[str, str]:
    """ComfyUI's name of a layer -> the network's."""
    if (
        family == "wan"
    ):  # the makers' names; which layers of diffusers they are is said by diffusers' reader of their files
        makers = {key.rsplit(".lora_", 1)[0].removeprefix("diffusion_model.") for key in file}
        back = {one: convert_wan_transformer_to_diffusers({f"{one}.weight": torch.zeros(1)}) for one in makers}
        return {f"diffusion_model.{one}": next(iter(name)).removesuffix(".weight") for one, name in back.items()}
    known = [name for name in names if re.fullmatch(KNOWN[family], name)]
    if family in ("stable_diffusion", "sdxl"):
        return {"lora_unet_" + name.replace(".", "_"): name for name in known}
    return {f"{'diffusion_model' if family == 'z_image' else 'transformer'}.{name}": name for name in known}


def read_as_comfyui_does(file: dict[str, Tensor], layers: dict[str, str]) -> dict[str, Tensor]:
    """layer of the network -> what is added to its weight (out, in * kernel); a key that is left over fails."""
    changes, left = {}, dict(file)
    for theirs, name in layers.items():
        for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
            if f"{theirs}.{up}.weight" in left:
                above, below = left.pop(f"{theirs}.{up}.weight"), left.pop(f"{theirs}.{down}.weight")
                alpha = left.pop(f"{theirs}.alpha", None)
                scale = 1.0 if alpha is None else alpha.item() / below.shape[0]
                changes[name] = scale * above.flatten(1) @ below.flatten(1)
    assert not left, sorted(left)
    return changes


def lora_student(family: str) -> LoraNetwork:
    """On all layers of the tiny network; with what a second time adds at one layer, which makes its rank greater."""
    network = getattr(BUILDERS[family](), FAMILIES[family].component).double()
    player = Denoiser(network, LinearFlow(), OUTPUTS["flow_prediction"])
    torch.manual_seed(0)
    student = lora_view(player, LoraSettings(rank=2, alpha=6.0)).network
    assert isinstance(student, LoraNetwork)
    for p in student.parameters():
        torch.nn.init.normal_(p)
    name, layer = next(
        (n, m) for n, m in network.named_modules() if isinstance(getattr(m, "base_layer", None), torch.nn.Linear)
    )
    width, height = layer.in_features, layer.out_features
    added = (torch.randn(3, width).double(), torch.randn(height, 3).double())
    return student.with_changes({name: added}, folds_inputs=False)


@pytest.mark.parametrize("family", [*KNOWN, "wan"])
def test_comfyuis_reading_gives_the_students_weights(family: str, tmp_path: Path) -> None:
    student = lora_student(family)
    before = {name.replace(".base_layer", ""): p.detach() for name, p in student.base.named_parameters()}
    after = merged(student).state_dict()
    adapted = [name.removesuffix(".weight") for name, p in after.items() if not torch.equal(p, before.get(name, p))]
    assert len(adapted) > 10

    def worst(file: dict[str, Tensor]) -> float:
        found = read_as_comfyui_does(file, key_map(family, adapted, file))
        assert sorted(found) == sorted(adapted)
        change = {name: after[f"{name}.weight"] - before[f"{name}.weight"] for name in adapted}
        return max(float((found[name].reshape(change[name].shape) - change[name]).abs().max()) for name in adapted)

    write_comfyui_lora(tmp_path, family, lora_weights(student))
    assert worst(load_file(tmp_path / FILE)) < 1e-6
    unscaled = {name: w / 3 if ".lora_B." in name else w for name, w in lora_weights(student).items()}
    assert worst(comfyui_lora(family, unscaled)) > 1e-1  # alpha / rank forgotten


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a LoRA student and of one that was trained whole, on a tiny Stable Diffusion of the usual betas."""
    root = tmp_path_factory.mktemp("runs")
    tiny_a.stable_diffusion().save_pretrained(root / "tiny")
    (root / "prompts.txt").write_text("a red square\ntwo dogs")
    shared: dict[str, Any] = {
        "method": "dmd2", "teacher": str(root / "tiny"), "prompts": str(root / "prompts.txt"), "steps": 1,
        "batch_size": 2, "update_ratio": 1, "student_steps": 2, "sample_every": 0, "resolution": 32, "device": "cpu",
    }  # fmt: skip
    lora = {"lora": "student,fake_score", "lora_rank": 2, "lora_alpha": 4.0, "layout": "comfyui"}
    distill(**shared, **lora, out=str(root / "lora"))
    distill(**shared, out=str(root / "full"))
    return root


def test_the_folder_has_the_file_and_the_card_says_what_comfyui_does_with_it(runs: Path, tmp_path: Path) -> None:
    settings = "KSampler: 2 steps, cfg 1, sampler lcm, scheduler sgm_uniform."
    student = runs / "lora" / "student"
    keys = load_file(student / FILE)
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in keys
    assert FILE in (student / "README.md").read_text() and settings in (student / "README.md").read_text()
    assert "ComfyUI" not in (student / "lora" / "README.md").read_text()
    alone = export(runs / "lora", export="lora", layout="comfyui", dtype="bfloat16", out=tmp_path / "alone")
    half = load_file(alone / FILE)
    assert half.keys() == keys.keys() and all(w.dtype == torch.bfloat16 for k, w in half.items() if "alpha" not in k)
    assert FILE in (alone / "README.md").read_text()
    plain = export(runs / "lora", out=tmp_path / "plain")
    assert not (plain / "comfyui").exists() and "ComfyUI" not in (plain / "README.md").read_text()

    whole = export(runs / "full", layout="comfyui", out=tmp_path / "whole")
    text = (whole / "README.md").read_text()
    assert "`unet/diffusion_pytorch_model.safetensors` goes into `models/diffusion_models`" in text and settings in text
    assert not (whole / "comfyui").exists()
    shards = export(runs / "full", layout="comfyui", max_shard_size="100KB", out=tmp_path / "shards")
    assert "a greater `--max-shard-size`" in (shards / "README.md").read_text()


def simple(shift: float, steps: int) -> torch.Tensor:
    """ComfyUI's scheduler of that name for a flow (comfy/samplers.py), without its last level, 0."""
    table = shifted(shift, torch.arange(1, 1001) / 1000)
    return torch.stack([table[-(1 + int(k * len(table) / steps))] for k in range(steps)])


def shifted(shift: float, times: Tensor) -> Tensor:
    return shift * times / (1 + (shift - 1) * times)


def even(shift: float, steps: int) -> list[float]:
    """The levels of a student of a flow."""
    return shifted(shift, 1 - torch.arange(steps).double() / steps).tolist()


@pytest.mark.parametrize(
    ("family", "levels", "step", "sampler", "node", "shift"),
    [
        ("sd3", even(3.0, 4), "ddim", "euler", "ModelSamplingSD3", 3.0),
        ("wan", even(8.0, 2), "ddim", "euler", "ModelSamplingSD3", 8.0),
        ("z_image", even(6.25, 3), "renoise", "lcm", "ModelSamplingAuraFlow", 6.25),
        ("qwen_image", even(1.0, 7), "renoise", "lcm", "ModelSamplingAuraFlow", 1.0),
        ("flux", [1.0], "renoise", "euler", None, 1.0),
        ("flux", even(3.0, 4), "ddim", None, None, None),  # its shift is another
        ("sd3", [1.0, 0.9, 0.8, 0.1], "ddim", None, None, None),  # levels that no shift gives
        ("sd3", [0.99, 0.5], "ddim", None, None, None),
        ("sd3", even(3.0, 4), "gamma 0.5", None, None, None),
    ],
)
def test_ksampler_is_set_only_to_what_takes_the_students_levels(
    family: str,
    levels: list[float],
    step: str,
    sampler: str | None,
    node: str | None,
    shift: float | None,
    tmp_path: Path,
) -> None:
    taken, n = step_named(step), len(levels)
    assert taken is not None
    teacher = Teacher(Denoiser(torch.nn.Linear(1, 1), LinearFlow(), OUTPUTS["flow_prediction"]), (1, 8, 8))
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).touch()
    note = comfyui_note(FAMILIES[family], teacher, Sampler(teacher.denoiser, levels, taken), tmp_path, "pipeline")
    assert FILE in note
    if shift is None:
        assert "KSampler" not in note
        return
    assert f"KSampler: {n} step{'s' if n > 1 else ''}, cfg 1, sampler {sampler}, scheduler simple" in note
    assert ("behind" not in note) if node is None else (f"behind {node} with shift {shift:g}." in note)
    assert (simple(shift, n) - torch.tensor(levels)).abs().max() < 2e-3


USUAL = {**tiny_a.STABLE_DIFFUSION_BETAS, "num_train_timesteps": 1000}


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, True),
        ({"family": "sdxl"}, True),
        ({"family": "pixart_sigma"}, False),
        ({"beta_schedule": "linear"}, False),
        ({"num_train_timesteps": 1200}, False),
        ({"levels": [999, 759, 499, 259]}, False),
        ({"output": "v_prediction"}, False),
        ({"teacher": "v_prediction"}, False),
        ({"teacher": "v_prediction", "output": "v_prediction"}, False),
    ],
)
def test_ksampler_has_the_noise_of_stable_diffusion(changed: dict[str, Any], fits: bool, tmp_path: Path) -> None:
    case = {"family": "stable_diffusion", "levels": [999, 749, 499, 249], "output": "epsilon", "teacher": "epsilon"}
    case |= USUAL | changed
    schedule = DiscreteVP.from_config({name: case[name] for name in USUAL})
    teacher, student = (Denoiser(torch.nn.Linear(1, 1), schedule, OUTPUTS[case[of]]) for of in ("teacher", "output"))
    sampler = Sampler(student, case["levels"])
    note = comfyui_note(FAMILIES[case["family"]], Teacher(teacher, (1, 8, 8)), sampler, tmp_path, "pipeline")
    assert ("KSampler: 4 steps, cfg 1, sampler lcm, scheduler sgm_uniform." in note) == fits
    assert ("KSampler" in note) == fits


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("sana", "layout: ComfyUI knows no layers of SanaPipeline"),
        ("wan", "layout: ComfyUI reads no whole network of WanPipeline .* but a LoRA"),
        (None, "layout: ComfyUI knows no layers of a network that is not in diffusers"),
    ],
)
def test_what_comfyui_cannot_read_is_refused(family: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_comfyui(None if family is None else FAMILIES[family], torch.nn.Linear(1, 1))


def test_it_is_refused_before_the_training(tiny_teacher: Callable[[str], Path], tmp_path: Path, runs: Path) -> None:
    shared: dict[str, Any] = {"layout": "comfyui", "steps": 1, "device": "cpu", "out": str(tmp_path / "run")}
    with pytest.raises(UserError, match="layout: ComfyUI knows no layers of"):
        distill("dmd2", teacher=tiny_teacher("vp"), **shared)
    scales = {"guidance_min": 2.0, "guidance_max": 4.0, "ddim_steps": 10, "resolution": 32, **shared}
    with pytest.raises(UserError, match="layout: ComfyUI has no place for the input of a guidance scale"):
        distill("lcm", teacher=str(runs / "tiny"), prompts=str(runs / "full" / "encoded"), **scales)
    assert not (tmp_path / "run" / "config.yaml").exists()
