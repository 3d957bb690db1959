"""Options by which each method runs on a tiny teacher in a step or two."""

from typing import Any

import torch

METHODS: dict[str, dict[str, Any]] = {
    "consistency": {"mode": "distillation", "grid_points": 5, "grid": "native", "student_steps": 2},
    "dmd2": {"update_ratio": 1, "student_steps": 2},
    "sid": {},
    "progressive": {"start_steps": 4, "final_steps": 2, "stage_steps": 1},
}


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward."""
    assert images.shape[:2] == (len(prompts), 3)
    return images.mean((1, 2, 3))


OTHERS: dict[str, dict[str, Any]] = {
    "adapter_guidance": {},
    "arc_flow": {"momenta": 2, "substeps": 4, "states": 2},
    "boot": {"solver_steps": 4},
    "consistency": METHODS["consistency"],
    "ctm": {"grid_points": 5, "student_steps": 2, "gamma": 0.3, "dsm_weight": 0.0, "guidance_scale": 2.0},
    "ctmsr": {"consistency_steps": 1, "matching_steps": 1},
    "decoupled_dmd": {"guidance_scale": 2.0, "update_ratio": 1},
    "diff_instruct": {},
    "disback": {"path_length": 1, "record_every": 1, "update_ratio": 1},
    "distillation_dpo": {"reward": brightness, "update_ratio": 1},
    "dmd": {},
    "dmd2": {"gan_weight": 0.01, "update_ratio": 1},
    "f_distill": {"update_ratio": 1},
    "flash_dmd": {"update_ratio": 1, "student_steps": 2},
    "flow_map": {"student_steps": 2, "equal_share": 0.0, "matching_weight": 1.0, "rollout_steps": [2]},
    "gdd": {},
    "get": {},
    "guided": {"guidance_min": 2.0, "guidance_max": 2.0, "start_steps": 4, "final_steps": 2, "stage_steps": 1,
               "guidance_steps": 1},
    "ladd": {"student_steps": 2, "update_ratio": 1},
    "lcm": {"guidance_min": 2.0, "guidance_max": 2.0, "ddim_steps": 10, "student_steps": 2},
    "lora_guidance": {"trajectories": True, "trajectory_steps": 2, "sampling_steps": 2},
    "mean_flow": {"student_steps": 2, "mode": "distillation", "equal_share": 0.0},
    "mdt_dist": {"student_steps": 2, "matching_scale": 2.0},
    "mlcm": {"solver_steps": 4, "stages": [2, 1], "stage_steps": 1, "states": 2, "gan_weight": 0.1},
    "multi_student": {},
    "multistep_consistency": {},
    "phased_dmd": {"update_ratio": 1, "steps": 3},  # two phases take turns before a fake score says anything
    "pcm": {"solver_steps": 4, "phases": 2, "gan_weight": 0.1, "guidance_scale": 2.0, "guidance_spread": 0.5},
    "pdd": {"intervals": 4, "more_steps": [4]},
    "perflow": {"windows": 2, "student_steps": 2, "solver_steps": 2, "label_dropout": 0.5},
    "pi_flow": {"components": 3, "student_steps": 2, "substeps": 4, "states": 2},
    "progressive": METHODS["progressive"],
    "pso": {"student_steps": 2, "reward": brightness, "student_lr": 0.1},
    "rcm": {"tangent_warmup": 1, "student_steps": 2, "update_ratio": 1},
    "reflow": {"student_steps": 2, "time_exponent": 4.0},
    "sana_sprint": {"tangent_warmup": 1},
    "scm": {"tangent_warmup": 1},
    "score_forgetting": {},
    "scott": {"solver_steps": 6, "skip": 2, "sde_steps": 2, "gan_weight": 0.1, "student_steps": 2},
    "sdxs": {},
    "sid": {},
    "sim": {},
    "sims": {"auxiliary_steps": 1, "sampling_steps": 2},
    "slim_flow": {"reflow_steps": 1, "distill_steps": 1, "anneal_steps": 2},
    "snap_fusion": {"start_steps": 4, "final_steps": 2, "stage_steps": 1},
    "swiftbrush": {"guidance_scale": 2.0},
    "tbcm": {"tangent_warmup": 1, "states": 3},
    "tdd": {"solver_steps": 8, "steps_min": 2, "steps_max": 4, "gamma": 0.2, "gan_weight": 0.1},
    "tscd": {"solver_steps": 4, "stages": [2, 1], "stage_steps": 1, "gan_weight": 0.1, "student_steps": 2},
    "twin_flow": {"student_steps": 2, "batch_size": 4},
    "uni_instruct": {},
    "yonos": {"student_steps": 2},
}  # fmt: skip
SAYS_SO = {
    ("get", "full"): "method: the student reads noise and class labels, and this teacher encoder_hidden_states",
    ("get", "lora"): "method: the student reads noise and class labels, and this teacher encoder_hidden_states",
    ("multi_student", "full"): "4 students part the classes, and the teacher has none",
    ("multi_student", "lora"): "4 students part the classes, and the teacher has none",
    ("score_forgetting", "full"): "forgets classes, and this teacher has none",
    ("score_forgetting", "lora"): "forgets classes, and this teacher has none",
    ("adapter_guidance", "full"): "class-conditional teacher",
    ("adapter_guidance", "lora"): "class-conditional teacher",
}
