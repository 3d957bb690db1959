"""Our CUDA kernels of attention, without a GPU: in triton's interpreter, and as machine code that is not run."""

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_output", "_of_queries", "_of_keys"])
@pytest.mark.parametrize(
    ("dtype", "width", "kind", "causal"),
    [
        (torch.bfloat16, 64, 0, True),
        (torch.float16, 256, 1, False),
        (torch.float32, 128, 0, False),
        (torch.float32, 256, 2, True),
    ],
)
def test_the_kernels_are_compiled_for_cuda(
    name: str, dtype: torch.dtype, width: int, kind: int, causal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes what the compiler does not; none needs more than the 99 KB that small cards share."""
    pytest.importorskip("triton", reason="triton is not installed here")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from diffdistill.core import attention_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(1, 1, 64, width, dtype=dtype)
    mask = [None, torch.ones(1, 1, 64, 64, dtype=torch.bool), torch.ones(1, 1, 64, 64, dtype=dtype)][kind]
    _, constants = kernels._launch(x, x, x, mask, causal)
    options = {"num_stages": constants.pop("num_stages")}
    if name == "_output":
        constants |= {"DQ": True, "DK": True, "DV": True, "TANGENT": True}
    kernel, stored = getattr(kernels, name), {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    integers = ("heads", "rows", "keys", "width", "out_width", "mask_batch", "mask_head", "mask_row", "mask_key")
    kinds = dict.fromkeys(kernel.arg_names, stored[dtype]) | dict.fromkeys(integers, "i32") | {"scale": "fp32"}
    kinds |= {"mask": "*u8" if kind == 1 else stored[dtype], **{n: "*fp32" for n in ("lse", "delta") if n in kinds}}
    kinds |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    made = compile(
        ASTSource(fn=kernel, signature=kinds, constexprs=places), target=GPUTarget("cuda", 80, 32), options=options
    )
    assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024


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
