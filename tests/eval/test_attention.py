"""Attention backends are used inside the block, and nothing of them is left after it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import _cur_sdpa_kernel_backends
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill import UserError
from diffdistill.eval import attention as module
from diffdistill.eval.attention import attention
from tests import tiny_a, tiny_b

BUILDERS: dict[str, Callable[[], Any]] = {**tiny_a.PIPELINES, **tiny_b.PIPELINES}
SIZES = {**tiny_a.SIZES, **tiny_b.SIZES}
CALLS: dict[str, dict[str, Any]] = {
    "dit": {"class_labels": [3], "guidance_scale": 2.0},
    "unet2d_ddim": {},
    "consistency_model": {"class_labels": 3, "num_inference_steps": 1},
    "wan": {"prompt": "a b", "num_frames": tiny_b.FRAMES},
    "sana": {"prompt": "a b", "use_resolution_binning": False, "clean_caption": False},
    "pixart_sigma": {"prompt": "a b", "use_resolution_binning": False, "clean_caption": False},
}


class Kernels(TorchDispatchMode):
    """Counts attention by kernel; what torch makes of plain products counts as "math"."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        for kernel in ("flash", "efficient", "cudnn"):
            if "attention" in name and kernel in name:
                self.seen[kernel] = self.seen.get(kernel, 0) + 1
        if name == "aten::_safe_softmax":  # math's own, which nothing else in these models calls
            self.seen["math"] = self.seen.get("math", 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def tiny() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def build(name: str) -> Any:
        if name not in made:
            made[name] = BUILDERS[name]()
            made[name].set_progress_bar_config(disable=True)
        return made[name]

    return build


def draw(pipeline: Any, name: str) -> Tensor:
    call = {"num_inference_steps": 2} | CALLS.get(name, {"prompt": "a b"})
    if name not in ("dit", "unet2d_ddim", "consistency_model"):
        call |= {"height": SIZES[name], "width": SIZES[name]}
    made = pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="np")
    return torch.as_tensor(made.images if hasattr(made, "images") else made.frames)


def state(pipeline: Any) -> list[Any]:
    """Everything that a backend might touch."""
    modules = [m for part in pipeline.components.values() if isinstance(part, nn.Module) for m in part.modules()]
    own = [getattr(m, "processor", None) for m in modules]
    return [
        *map(id, own),
        [vars(p).get("_attention_backend", "unset") for p in own if p is not None and hasattr(p, "__dict__")],
        _AttentionBackendRegistry._active_backend,
        set(_cur_sdpa_kernel_backends()),
    ]


@pytest.mark.parametrize("name", BUILDERS)
def test_math_and_sdpa_give_the_same_images_and_leave_nothing(tiny: Callable[[str], Any], name: str) -> None:
    pipeline = tiny(name)
    before, images, seen = state(pipeline), {}, {}
    for backend in ("sdpa", "math"):
        with Kernels() as kernels, attention(pipeline, backend):
            images[backend] = draw(pipeline, name)
        seen[backend] = kernels.seen
        assert state(pipeline) == before
    assert "math" in seen["math"] and not {"flash", "efficient", "cudnn"} & set(seen["math"])
    assert seen["sdpa"].get("flash", 0) > 0, "torch's fused kernel on a CPU"
    assert images["sdpa"].std() > 0.01
    assert torch.allclose(images["sdpa"], images["math"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_an_exception_leaves_nothing_and_the_inner_block_holds(tiny: Callable[[str], Any], name: str) -> None:
    pipeline = tiny(name)
    before = state(pipeline)
    with pytest.raises(ZeroDivisionError), attention(pipeline, "math"):
        _ = 1 / 0
    assert state(pipeline) == before
    with attention(pipeline, "math"):
        outer = state(pipeline)
        with Kernels() as kernels, attention(pipeline, "auto"):
            draw(pipeline, name)
        assert kernels.seen.get("flash", 0) > 0
        assert state(pipeline) == outer != before
        with Kernels() as kernels:
            draw(pipeline, name)
        assert set(kernels.seen) == {"math"}
    assert state(pipeline) == before


def test_sdpa_is_what_torch_does_when_nobody_asks(tiny: Callable[[str], Any]) -> None:
    untouched = set(_cur_sdpa_kernel_backends())
    with attention(tiny("dit"), "sdpa"):
        assert set(_cur_sdpa_kernel_backends()) == untouched


def test_a_models_own_backend_gives_way_and_comes_back(tiny: Callable[[str], Any]) -> None:
    """As `set_attention_backend` sets it on the processors, and, which diffusers leaks, for all models."""
    pipeline, active = tiny_b.flux(), _AttentionBackendRegistry._active_backend
    try:
        pipeline.transformer.set_attention_backend("_native_math")
        before = state(pipeline)
        with Kernels() as kernels, attention(pipeline.transformer, "sdpa"):
            inside = state(pipeline)
            run = pipeline.transformer.transformer_blocks[0].attn.processor
            assert run._attention_backend is None
            draw_flux(pipeline)
        assert kernels.seen.get("flash", 0) > 0 and "math" not in kernels.seen
        assert state(pipeline) == before != inside
        assert run._attention_backend == AttentionBackendName._NATIVE_MATH
    finally:
        _AttentionBackendRegistry._active_backend = active


def draw_flux(pipeline: Any) -> None:
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline, "flux")


def test_what_cannot_be_used_is_said_in_one_line(tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny("dit")
    with pytest.raises(UserError, match=r"^attention: 'flash' is not one of auto, sdpa, xformers, math$"):
        attention(pipeline, "flash").__enter__()
    with pytest.raises(UserError, match=r"^attention: xformers .*; .*use sdpa$"):
        attention(pipeline, "xformers").__enter__()
    monkeypatch.setattr(module, "import_module", lambda name: None)
    with pytest.raises(UserError, match=r"^attention: xformers runs on CUDA only, and the model is on cpu; use sdpa$"):
        attention(pipeline, "xformers").__enter__()


class FakeXFormers:
    """xformers.ops.memory_efficient_attention by torch, on (B, L, D) or (B, L, H, D)."""

    LowerTriangularMask = None

    def __init__(self) -> None:
        self.ops, self.calls = self, 0

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None,
        op: Any = None,
    ) -> Tensor:  # fmt: skip
        self.calls += 1
        query, key, value = (x.transpose(1, 2) if x.ndim == 4 else x for x in (query, key, value))
        got = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias, scale=scale)
        return got.transpose(1, 2) if got.ndim == 4 else got


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> FakeXFormers:
    fake = FakeXFormers()
    monkeypatch.setattr(module, "require_xformers", lambda devices: None)
    monkeypatch.setattr(attention_processor, "xformers", fake, raising=False)
    monkeypatch.setattr(attention_dispatch, "xops", fake)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    return fake


@pytest.mark.parametrize("name", ["stable_diffusion", "dit", "sd3", "flux", "unet2d_ddim"])
def test_xformers_gets_the_attention_and_gives_it_back(
    tiny: Callable[[str], Any], name: str, xformers: FakeXFormers
) -> None:
    pipeline = tiny(name)
    before, plain = state(pipeline), draw(pipeline, name)
    with pytest.raises(KeyError), attention(pipeline, "xformers"):
        images, calls = draw(pipeline, name), xformers.calls
        with attention(pipeline, "auto"):
            draw(pipeline, name)
        assert xformers.calls == calls, "auto inside is not xformers"
        raise KeyError
    assert calls > 3, "in the network, not in the autoencoder alone"
    assert state(pipeline) == before
    assert torch.allclose(images, plain, rtol=0, atol=1e-5)
    draw(pipeline, name)
    assert xformers.calls == calls, "after the block neither"


def test_what_xformers_would_compute_otherwise_is_left_to_torch(xformers: FakeXFormers) -> None:
    """Its plain form drops the norms of queries and keys; a module without any attention that fits is refused."""
    normed = attention_processor.Attention(16, heads=2, dim_head=8, qk_norm="rms_norm")
    with pytest.raises(UserError, match=r"^attention: xformers has no form of any attention in Sequential; use sdpa$"):
        attention(nn.Sequential(normed), "xformers").__enter__()
    plain = attention_processor.Attention(16, heads=2, dim_head=8)
    processors = normed.processor, plain.processor
    with attention(nn.Sequential(normed, plain), "xformers"):
        assert normed.processor is processors[0]
        assert type(plain.processor) is attention_processor.XFormersAttnProcessor
    assert (normed.processor, plain.processor) == processors


def test_auto_takes_xformers_back_out(xformers: FakeXFormers) -> None:
    """Also where somebody had enabled it on the model."""
    plain = attention_processor.Attention(16, heads=2, dim_head=8)
    x = torch.randn(1, 5, 16)
    expected = plain(x)
    chosen = attention_processor.XFormersAttnProcessor()
    plain.processor = chosen
    with attention(plain, "auto"):
        assert torch.allclose(plain(x), expected, atol=1e-6)
    assert xformers.calls == 0
    assert plain.processor is chosen
