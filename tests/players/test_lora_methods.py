"""Methods whose LoRA players take a time or a scale besides, or a derivative: trained, exported, drawn by strangers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import UserError, distill, export
from diffdistill.data.encoded import open_encoded
from tests.players.test_player_kinds import OTHERS, apart, drawn_by_a_stranger, options_for, ours
from tests.players.tiny import PROMPTS

SCALES: dict[str, Any] = {"guidance_min": 1.0, "guidance_max": 3.0, "guidance_scale": 2.0}
KINDS: dict[str, dict[str, Any]] = {
    "ctm": OTHERS["ctm"],
    "ctm gamma 0": OTHERS["ctm"] | {"gamma": 0.0},
    "flow_map": OTHERS["flow_map"],
    "flow_map matched": OTHERS["flow_map"] | {"lora": "student,fake_score"},
    "ladd": OTHERS["ladd"],
    "lcm": OTHERS["lcm"] | SCALES,
    "mean_flow": OTHERS["mean_flow"],
    "mean_flow checkpointed": OTHERS["mean_flow"] | {"gradient_checkpointing": True},
    "rcm": OTHERS["rcm"] | {"lora": "student,fake_score"},
    "sana_sprint": OTHERS["sana_sprint"] | {"guidance_min": 2.0, "guidance_max": 2.0},
    "sana_sprint scales": OTHERS["sana_sprint"] | SCALES,
    "scm": OTHERS["scm"],
    "tbcm": OTHERS["tbcm"] | {"guidance_min": 2.0, "guidance_max": 2.0},
    "tbcm scales": OTHERS["tbcm"] | SCALES,
}


@pytest.fixture(scope="module")
def trained(
    encoded: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], dict[str, torch.Tensor]]:
    """The runs, two steps each, and what a stranger draws with each folder and with each LoRA alone."""
    root = tmp_path_factory.mktemp("lora")
    folder, prompts = encoded("sd_v")
    runs, jobs = {}, {}
    for kind, own in KINDS.items():
        runs[kind] = root / kind.replace(" ", "-")
        options = options_for(folder, prompts, "sd_v", "sid", "full") | {"method": kind.split()[0], "lora": "student"}
        student = distill(**options | {"student_lr": 0.1, "lora_alpha": 6.0} | own, out=str(runs[kind])).student
        for base in ["", *([str(folder)] if (student / "lora").exists() else [])]:
            job = {"student": str(student), "base": base, "what": {"prompt": PROMPTS[1]}, "type": "latent"}
            jobs[f"{kind}, {'alone' if base else 'whole'}"] = job
    return runs, dict(zip(jobs, drawn_by_a_stranger(list(jobs.values()), root), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_stranger_draws_the_images_of_a_lora_student(
    kind: str,
    trained: tuple[dict[str, Path], dict[str, torch.Tensor]],
    encoded: Callable[[str], tuple[Path, Path]],
) -> None:
    runs, drawn = trained
    data = open_encoded(encoded("sd_v")[1])
    cond, shape = data.get(torch.tensor([1])).cond, tuple(data.settings["shape"])
    image, before = (ours(runs[kind], cond, shape, trained=there) for there in (True, False))
    assert apart(image, before) > 1e-2
    assert apart(drawn[f"{kind}, whole"].reshape(image.shape), image) < 1e-3
    takes_scale = KINDS[kind].get("guidance_max", 2.0) == 3.0
    assert (f"{kind}, alone" in drawn) is not takes_scale
    if takes_scale:
        with pytest.raises(UserError, match="export: the LoRA alone cannot say what a guidance scale adds"):
            export(runs[kind], export="lora", out=runs[kind] / "none")
    else:
        assert apart(drawn[f"{kind}, alone"].reshape(image.shape), image) < 1e-3


@pytest.mark.slow
def test_the_new_inputs_are_trained(trained: tuple[dict[str, Path], dict[str, torch.Tensor]]) -> None:
    for kind, part in (("mean_flow", "mlp.2.weight"), ("ctm", "mlp.2.weight"), ("tbcm scales", "cond_proj.weight")):
        weights = load_file(trained[0][kind] / "checkpoints" / "step-00000002" / "student.safetensors")
        inputs = {name: value for name, value in weights.items() if ".inputs." in f".{name}"}
        assert any(name.endswith(part) and bool(value.any()) for name, value in inputs.items()), kind
