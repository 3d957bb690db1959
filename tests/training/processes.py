"""Trainings of a few steps, for the tests that compare several processes with one.

    python -m tests.training.processes OUT

trains all of `CASES` in float64 and in float32 and leaves the weights in OUT, from the main process; started twice with
what torchrun sets in the environment it is two processes, which train all of them with whole networks each, and then
once more with networks that FSDP2 divides.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor

from diffdistill.catalogue import describe_method
from diffdistill.config import FitConfig
from diffdistill.core.divided import put_together
from diffdistill.core.experts import Experts
from diffdistill.data.batches import batches
from diffdistill.data.examples import TensorExamples
from diffdistill.players.lora import LoraSettings
from diffdistill.training.sharding import shard
from diffdistill.training.trainer import Trainer, accelerator_for
from tests.scaffold.straight import CLASSES, SHAPE, VP, draw, scatter

TOGETHER, STEPS, HALF = 8, 4, 2  # samples of a step in all processes
KINDS = ("whole", "divided")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one player": ("consistency", {}),
    "two players": ("sid", {}),
    "GAN": ("dmd2", {"gan_weight": 0.1, "update_ratio": 2}),
    "GAN of layers": ("dmd2", {"gan_weight": 0.1, "update_ratio": 2, "discriminator_depths": (0.5,)}),
    "stages": ("progressive", {"start_steps": 4, "final_steps": 1, "stage_steps": 2}),
    "LoRA": ("dmd2", {"gan_weight": 0.0}),
    "JVP": ("scm", {"tangent_warmup": 2, "derivative": "exact"}),
    "data-free": ("diff_instruct", {}),
    "two networks": ("dmd2", {"gan_weight": 0.1, "update_ratio": 2, "student_steps": 2}),
}


WHOLE = ("two networks",)  # which FSDP does not divide
PAIRS = [(kind, case) for case in CASES for kind in KINDS if kind == "whole" or case not in WHOLE]
RESUMED = ("two players", "GAN", "stages", "LoRA")


def trained(case: str, processes: int, out: Path, kind: str = "whole", precision: str = "no") -> dict[str, Tensor]:
    """The weights and averages after a few steps, and what was logged, in torch's default type.

    It goes on from what is in the folder.
    """
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if kind == "divided":
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    name, options = CASES[case]
    module = describe_method(name).load()
    torch.manual_seed(0)  # of the layers that begin at random
    teacher = VP.teacher()
    if case == "LoRA":
        teacher = replace(teacher, lora={role: LoraSettings(2) for role in ("student", "fake_score")})
    if case == "two networks":
        one = teacher.denoiser
        networks = Experts({"first": one.network, "second": copy.deepcopy(one.network)}, 500)
        scatter(networks.get_submodule("second"), 5)
        teacher = replace(teacher, denoiser=one.with_network(networks, f"first.{one.feature_layer}"))
    # In float32 Adam turns the rounding of a small gradient into a share of the learning rate.
    method = module.METHOD(teacher, module.Config(student_lr=1e-3, **options))
    for seed, player in enumerate(method.players.values()):  # as copies of each other they have next to no gradient
        scatter(player, 20 + seed)
    fit = FitConfig(
        batch_size=TOGETHER // processes, steps=STEPS, ema=0.5, device="cpu", sample_every=0, log_every=STEPS,
        checkpoint_every=HALF, keep_checkpoints=STEPS, mixed_precision=precision,
    )  # fmt: skip
    accelerator = accelerator_for(fit, out, may_divide=True)
    if kind == "divided":
        shard([teacher.denoiser, *method.players.values(), *method.state.values()], accelerator.device)
    made = draw("images")
    images = torch.randn(21, *SHAPE, generator=made, dtype=torch.float64).to(torch.get_default_dtype())
    examples = None if case == "data-free" else TensorExamples(images, {"class_labels": torch.arange(21) % CLASSES})
    trainer = Trainer(method, batches(fit, teacher, examples, accelerator, 0.3), fit, out, accelerator)
    trainer.resume()
    trainer.fit()
    assert trainer.average is not None
    values = {f"average {key}": value for key, value in trainer.average.state().items()}
    for role, player in {**method.players, **method.state}.items():
        values |= {f"{role} {key}": value for key, value in player.state_dict().items()}
    return {key: put_together(value.detach()).clone().contiguous() for key, value in values.items()}


def main(processes: int, out: Path) -> None:
    """All cases in both types, by two processes in both kinds; the main one leaves them in `out`."""
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        for kind, case in PAIRS:
            if kind in KINDS[:processes]:
                keep(out / f"{kind} {case} {dtype}", case, processes, kind)


def keep(folder: Path, case: str, processes: int, kind: str) -> None:
    values = trained(case, processes, folder, kind)
    if os.environ.get("RANK", "0") == "0":
        save_file(values, folder / "weights.safetensors")


def resumed(out: Path) -> None:
    """From the checkpoints in the middle: in the same kind, and in the other one."""
    for case in RESUMED:
        for before, after in (("divided", "divided"), ("divided", "whole"), ("whole", "divided")):
            folder = out / f"{before} {after} {case}"
            if os.environ["RANK"] == "0":
                name = f"checkpoints/step-{HALF:08d}"
                shutil.copytree(out / f"{before} {case} {torch.float32}" / name, folder / name)
            torch.distributed.barrier()
            keep(folder, case, 2, after)


def reductions(out: Path) -> None:
    """The types in which gradients are averaged where a step's first pass is through a frozen player, in bf16."""
    seen: list[str] = []
    # What it is called depends on the version of torch.
    name = next(n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(torch.distributed, n))
    average = getattr(torch.distributed, name)

    def watched(output: Tensor, input: Tensor, *args: Any, **named: Any) -> Any:
        seen.append(f"{input.dtype} {output.dtype}")
        return average(output, input, *args, **named)

    setattr(torch.distributed, name, watched)
    AcceleratorState._reset_state()  # which keeps the precision of a process
    trained("two players", 2, out, "divided", "bf16")
    if os.environ["RANK"] == "0":
        (out / "reductions.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    main(2, folder)
    resumed(folder)
    reductions(folder / "bf16")
    # The first process, which keeps the group's store, ends last; gloo's threads do not always end in order.
    done = folder / "done"
    if os.environ["RANK"] == "1":
        done.touch()
    for _ in range(1200):
        if not done.exists():
            time.sleep(0.05)
    os._exit(0)
