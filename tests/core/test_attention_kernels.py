"""Our CUDA kernels of attention, without a GPU: in triton's interpreter; and what is done without triton."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffdistill.core import attention as module
from diffdistill.core.attention import attention

CASES = Path(__file__).with_name("kernel_cases.py")


@pytest.mark.slow
def test_the_kernels_in_tritons_interpreter() -> None:
    """In a process of its own: triton decides when it is imported what it does with a kernel."""
    pytest.importorskip("triton", reason="triton is not installed here")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=plain | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "KERNELS_ON", {"cpu"})
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "diffdistill.core.attention_kernels", raising=False)
    module._kernels.cache_clear()
    yield
    module._kernels.cache_clear()


@pytest.mark.usefixtures("no_triton")
def test_without_triton_torch_computes_it_and_that_is_said_once() -> None:
    q, k, v = torch.randn(3, 1, 2, 7, 4)
    with pytest.warns(UserWarning, match="attention: triton cannot be used .*pip install triton"):
        first = attention(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attention(q, k, v), first)
    assert torch.allclose(first, attention(*(x.double() for x in (q, k, v))).float(), atol=1e-6)
