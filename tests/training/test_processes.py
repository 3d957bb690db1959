"""Several processes train as one does, and what a launcher asks for is done or refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import UserError
from diffdistill.config import FitConfig
from diffdistill.training.trainer import accelerator_for
from tests.training.processes import CASES, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of one process and of two."""
    out = tmp_path_factory.mktemp("processes")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.processes", str(out)],
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        main(1, out / "alone")
    finally:
        torch.set_default_dtype(torch.float32)
    for process in started:
        assert process.wait() == 0, process.stderr and process.stderr.read()[-2000:]
    return out / "alone", out / "0"


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, dtype: str, limit: float, trainings: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / f"{case} torch.{dtype}" / "weights.safetensors") for folder in trainings)
    assert one.keys() == two.keys() and any(value.dtype == getattr(torch, dtype) for value in one.values())
    for key, value in one.items():
        assert float((two[key].double() - value.double()).abs().max()) < limit, key


@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_what_one_logs(case: str, trainings: tuple[Path, Path]) -> None:
    def logged(folder: Path) -> dict[str, float]:
        (line,) = (folder / f"{case} torch.float64" / "metrics.jsonl").read_text().splitlines()
        return {key: value for key, value in json.loads(line).items() if "/" in key}

    one, two = map(logged, trainings)
    assert two == pytest.approx(one, rel=1e-6, abs=1e-9) and one


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP, which this version does not do"),
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
        accelerator_for(fit, tmp_path)
    for name in asked:
        monkeypatch.delenv(name)
    accelerator_for(fit, tmp_path)
