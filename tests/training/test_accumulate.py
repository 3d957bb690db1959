"""A batch that is computed in parts trains as the whole one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError
from diffdistill.catalogue import describe_method, method_names
from diffdistill.config import FitConfig
from diffdistill.scaffold.method import Batch, Pair
from diffdistill.training.trainer import Trainer, accelerator_for
from tests.scaffold.straight import CLASSES, SHAPE, VP, draw, in_double

SIZE, STEPS = 6, 4
_double = pytest.fixture(autouse=True)(in_double)

OPTIONS: dict[str, dict[str, Any]] = {
    "adapter_guidance": {"trajectory_steps": 4, "guidance_max": 3.0},
    "arc_flow": {"momenta": 2, "substeps": 4, "component_dropout": 0.3, "teacher_share": 0.5},
    "boot": {"solver_steps": 4, "ramp_steps": 4, "guidance_scale": 2.0},
    "ctmsr": {"consistency_steps": 2, "matching_steps": 2, "ramp_steps": 4, "renew_every": 1},
    "ctm": {"gan_weight": 0.5, "adaptive": False, "grid_points": 5, "solver_steps": 2},
    "decoupled_dmd": {"guidance_scale": 2.0, "update_ratio": 2, "student_steps": 2},
    "disback": {"path_length": 1, "record_every": 1, "update_ratio": 1},
    "dmd": {"regression_weight": 0.25},
    "dmd2": {"gan_weight": 0.1, "update_ratio": 2, "student_steps": 2},
    "f_distill": {"update_ratio": 2, "ratio_ema": 0.5},
    "flash_dmd": {"update_ratio": 2, "student_steps": 3, "fake_scores": "shared"},
    "flow_map": {"objective": "progressive", "matching_weight": 0.5},
    "get": {"width": 8, "heads": 2, "depth": 1, "equilibrium_depth": 1, "iterations": 2},
    "lcm": {"guidance_max": 3.0, "ddim_steps": 8},
    "mean_flow": {"guidance_scale": 2.0},
    "multi_student": {"students": 2, "update_ratio": 2, "gan_weight": 0.1},
    "multistep_consistency": {"anneal_steps": 4, "teacher_steps_start": 8, "teacher_steps_end": 16},
    "phased_dmd": {"update_ratio": 1},
    "pcm": {"solver_steps": 4, "phases": 2, "gan_weight": 0.1, "guidance_scale": 2.0, "guidance_spread": 0.5},
    "pdd": {"intervals": 8, "more_steps": (4,), "states": 2, "guidance_scale": 2.0},
    "perflow": {"windows": 2, "student_steps": 2, "solver_steps": 2, "guidance_scale": 2.0, "label_dropout": 0.5},
    "mdt_dist": {"guidance_scale": 2.0, "derivative_c": 0.1},
    "mlcm": {"solver_steps": 4, "stages": [2, 1], "stage_steps": 2, "states": 2, "gan_weight": 0.1},
    "pi_flow": {"components": 3, "student_steps": 2, "substeps": 4, "component_dropout": 0.3, "teacher_share": 0.5},
    "progressive": {"start_steps": 4, "final_steps": 1, "stage_steps": 2},
    "pso": {"student_steps": 3, "clip": 0.9},
    "rcm": {"student_steps": 2, "tangent_warmup": 1, "update_ratio": 2},
    "reflow": {"reflow_steps": 2, "distill_steps": 2, "ode_steps": 2, "time_exponent": 4.0},
    "sana_sprint": {"guidance_max": 3.0, "tangent_warmup": 2},
    "scm": {"tangent_warmup": 2},
    "scott": {"solver_steps": 6, "skip": 2, "sde_steps": 2, "gan_weight": 0.1, "guidance_scale": 2.0},
    "score_forgetting": {"forget": (1,)},
    "sdxs": {"boundary_steps": 0},
    "sid": {"fake_score_guidance": 2.0, "fake_score_training_guidance": 1.5},
    "slim_flow": {"anneal_steps": 2, "reflow_steps": 2, "distill_steps": 2},
    "snap_fusion": {"start_steps": 4, "final_steps": 1, "stage_steps": 2},
    "tdd": {"solver_steps": 8, "steps_min": 2, "steps_max": 4, "gan_weight": 0.1, "guidance_scale": 2.0},
    "tscd": {"solver_steps": 4, "stages": [2, 1], "stage_steps": 2, "gan_weight": 0.1},
    "twin_flow": {"self_guidance": 0.5, "ode_order": 2},
    "sims": {"auxiliary_steps": 1},
    "tbcm": {"guidance_max": 3.0, "tangent_warmup": 2, "states": 3},
}
"""Those that have more in play than the method's defaults, in few steps. CTM's adaptive weight is of a whole batch."""


def score(x: Tensor, batch: Batch) -> Tensor:
    """A reward."""
    return x.detach().flatten(1).mean(1)


def batch_of(step: int) -> Batch:
    made = draw("data", step)
    x0, z, end = (torch.randn(SIZE, *SHAPE, generator=made) for _ in range(3))
    labels = torch.randint(CLASSES, (2, SIZE), generator=made)
    pair = Pair(z, end, {"class_labels": labels[1]})
    seen = [{"class_labels": row} for row in labels]
    return Batch(SIZE, SHAPE, seen[0], x0, torch.device("cpu"), (3, step, 0), pair, teacher_cond=seen[1])


def trained(name: str, accumulate: int, out: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and averages, and what was logged, after a few steps."""
    module = describe_method(name).load()
    torch.manual_seed(0)  # of the layers that begin at random
    method = module.METHOD(VP.teacher(), module.Config(**OPTIONS.get(name, {})))
    method.reward = score
    fit = FitConfig(batch_size=SIZE, accumulate=accumulate, steps=STEPS, ema=0.5, device="cpu", sample_every=0)
    trainer = Trainer(method, batch_of, fit, out, accelerator_for(fit, out))
    logs: dict[str, float] = {}
    for step in range(STEPS):
        logs |= {f"{step} {key}": float(value) for key, value in trainer.iteration().items()}
    assert trainer.average is not None
    values = {f"average {key}": value for key, value in trainer.average.state().items()}
    for role, module in {**method.players, **method.state}.items():
        values |= {f"{role} {key}": value for key, value in module.state_dict().items()}
    return values, logs


@pytest.mark.parametrize("name", method_names())
def test_parts_of_a_batch_train_as_the_whole(name: str, tmp_path: Path) -> None:
    whole, logs = trained(name, 1, tmp_path)
    for parts in (2, 3):
        values, logged = trained(name, parts, tmp_path)
        assert values.keys() == whole.keys() and logged.keys() == logs.keys()
        for key, value in whole.items():
            assert float((values[key].double() - value.double()).abs().max()) < 1e-10, key
        assert logged == pytest.approx(logs, rel=1e-6, abs=1e-9)


def test_each_part_is_computed_alone(tmp_path: Path) -> None:
    """Which is what the memory is saved by; and every sample is in one of them."""
    module = describe_method("diff_instruct").load()
    method = module.METHOD(VP.teacher(), module.Config())
    fit = FitConfig(batch_size=SIZE, accumulate=3, steps=1, device="cpu", sample_every=0)
    trainer = Trainer(method, batch_of, fit, tmp_path, accelerator_for(fit, tmp_path))
    seen: list[Batch] = []
    loss = method.student_turn
    method.student_turn = lambda drawn, batch: (seen.append(batch), loss(drawn, batch))[1]
    trainer.iteration()
    whole = batch_of(0)
    assert [part.size for part in seen] == [2, 2, 2] and [part.first for part in seen] == [0, 2, 4]
    assert torch.equal(torch.cat([part.images for part in seen]), whole.images)
    for part in seen:
        assert torch.equal(part.randn("z"), whole.randn("z")[part.rows])
        assert part.pair is not None and whole.pair is not None
        assert torch.equal(part.pair.cond["class_labels"], whole.pair.cond["class_labels"][part.rows])


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accumulate: a batch of 6 is not 4 equal parts; use one of 1, 2, 3, 6"):
        accelerator_for(FitConfig(batch_size=6, accumulate=4, device="cpu"), tmp_path)
