"""Several processes train as one does, and what a launcher asks for is done or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import UserError
from diffdistill.config import FitConfig
from diffdistill.training.trainer import accelerator_for
from tests.launched import two_processes
from tests.training.processes import PAIRS, RESUMED, main

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of one process and of two, which stand for what they are started with."""
    out = tmp_path_factory.mktemp("processes")
    started = two_processes("-m", "tests.training.processes", str(out / "two"), OMP_NUM_THREADS="1")
    try:
        main(1, out / "alone")
    finally:
        torch.set_default_dtype(torch.float32)
    for process in started:
        assert process.wait() == 0, process.stderr and process.stderr.read()[-2000:]
    return out / "alone", out / "two"


def distance(one: Path, two: Path) -> float:
    """The greatest difference of two files of tensors with the same names."""
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    return max(float((second[key].double() - value.double()).abs().max()) for key, value in first.items())


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize(("kind", "case"), PAIRS)
def test_two_processes_train_as_one(
    kind: str, case: str, dtype: str, limit: float, trainings: tuple[Path, Path]
) -> None:
    name = f"{case} torch.{dtype}"
    one, two = trainings[0] / f"whole {name}", trainings[1] / f"{kind} {name}"
    values = load_file(one / "weights.safetensors").values()
    assert any(value.dtype == getattr(torch, dtype) for value in values)
    assert distance(one / "weights.safetensors", two / "weights.safetensors") < limit
    # Whole tensors, of moments too, so that a checkpoint is read by any number of processes of either kind.
    files = sorted(path.relative_to(one) for path in one.glob("checkpoints/*/*.safetensors"))
    assert files and files == sorted(path.relative_to(two) for path in two.glob("checkpoints/*/*.safetensors"))
    for file in files:
        assert distance(one / file, two / file) < (limit if dtype == "float64" else 1e-4), file


@pytest.mark.parametrize(("kind", "case"), PAIRS)
def test_two_processes_log_what_one_logs(kind: str, case: str, trainings: tuple[Path, Path]) -> None:
    def logged(folder: Path) -> dict[str, float]:
        (line,) = (folder / "metrics.jsonl").read_text().splitlines()
        return {key: value for key, value in json.loads(line).items() if "/" in key}

    one, two = (
        logged(trainings[0] / f"whole {case} torch.float64"),
        logged(trainings[1] / f"{kind} {case} torch.float64"),
    )
    assert two == pytest.approx(one, rel=1e-6, abs=1e-9) and one


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_of_divided_networks_goes_on_from_its_middle_to_the_same_bits(
    case: str, trainings: tuple[Path, Path]
) -> None:
    through, resumed = trainings[1] / f"divided {case} torch.float32", trainings[1] / f"divided divided {case}"
    assert distance(through / "weights.safetensors", resumed / "weights.safetensors") == 0


@pytest.mark.parametrize(("before", "after"), [("divided", "whole"), ("whole", "divided")])
@pytest.mark.parametrize("case", RESUMED)
def test_checkpoints_go_from_divided_networks_to_whole_ones_and_back(
    case: str, before: str, after: str, trainings: tuple[Path, Path]
) -> None:
    one = trainings[0] / f"whole {case} torch.float32" / "weights.safetensors"
    assert distance(one, trainings[1] / f"{before} {after} {case}" / "weights.safetensors") < 1e-5


def test_gradients_of_divided_players_are_averaged_in_full_precision(trainings: tuple[Path, Path]) -> None:
    # pytorch #186998: what is frozen in its first pass may be averaged in the type of its activations.
    types = json.loads((trainings[1] / "bf16" / "reductions.json").read_text())
    assert set(types) == {"torch.float32 torch.float32"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP with fsdp_version 1; give --fsdp_version 2"),
        (FSDP | {"WORLD_SIZE": "1"}, "over processes, and there is one"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params true"),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward false"),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy size_based_wrap"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "give --gradient-checkpointing true"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which diffdistill does not do"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a mesh"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "compile with 'inductor'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: .*fp16 and the run no; use bf16 or no"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: .*bf16 and the run no; give --mixed-precision bf16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "accumulate: .*4 steps and the run .*in 2"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "max_grad_norm: .*clip to 1.0"),
    ],
)
def test_what_a_launcher_asks_for_is_not_ignored(
    asked: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = FitConfig(batch_size=4, accumulate=2, device="cpu")
    usual = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_DYNAMO_BACKEND": "no",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    }
    for name, value in (usual | asked).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        accelerator_for(fit, tmp_path, may_divide=True)
    for name in asked:
        monkeypatch.delenv(name)
    accelerator_for(fit, tmp_path)


@pytest.mark.parametrize(
    ("changes", "may_divide", "message"),
    [
        ({}, False, "launcher: .*FSDP, which is for distillations"),
        ({"optimizer": "adamw8bit"}, True, "optimizer: adamw8bit"),
    ],
)
def test_divided_networks_are_refused_where_they_are_not_known(
    changes: dict[str, Any], may_divide: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (FSDP | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        accelerator_for(FitConfig(device="cpu", **changes), tmp_path, may_divide)
