"""A choice of attention holds inside the block, and nothing of it is left after it."""

from collections.abc import Callable
from threading import Thread
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import _cur_sdpa_kernel_backends
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill import UserError
from diffdistill.core import attention_choice as module
from diffdistill.core import jvp as jvp_module
from diffdistill.core.attention_choice import attention_by, attention_choice
from diffdistill.core.jvp import jvp
from diffdistill.core.recompute import recomputed
from diffdistill.families import Prompt
from diffdistill.families import attention_of as attention
from diffdistill.families._family import example_images
from tests import tiny as all_tiny

PICTURE = Prompt((16, 16), images=example_images(1, (16, 16))).pictures[0]
BUILDERS: dict[str, Callable[[], Any]] = all_tiny.PIPELINES
SIZES = all_tiny.SIZES
CALLS: dict[str, dict[str, Any]] = {
    "dit": {"class_labels": [3], "guidance_scale": 2.0},
    "unet2d_ddim": {},
    "consistency_model": {"class_labels": 3, "num_inference_steps": 1},
    "wan": {"prompt": "a b", "num_frames": all_tiny.FRAMES},
    "sana": {"prompt": "a b", "use_resolution_binning": False, "clean_caption": False},
    "pixart_sigma": {"prompt": "a b", "use_resolution_binning": False, "clean_caption": False},
    "pixart_alpha": {"prompt": "a b", "use_resolution_binning": False, "clean_caption": False},
    "sana_video": {"prompt": "a b", "use_resolution_binning": False, "frames": all_tiny.FRAMES},
    "hunyuan_video15": {"prompt": "a b", "num_frames": all_tiny.FRAMES},
    "flux_kontext": {"prompt": "a b", "image": PICTURE, "max_area": 16 * 16, "_auto_resize": False},
    "qwen_image_edit": {"prompt": "a b", "image": PICTURE},
    "qwen_image_edit_plus": {"prompt": "a b", "image": [PICTURE, PICTURE]},
    "instruct_pix2pix": {"prompt": "a b", "image": PICTURE},
    "wan_i2v": {"prompt": "a b", "image": PICTURE, "num_frames": all_tiny.FRAMES},
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
        attention_choice(),
        _get_current_function_mode_stack(),
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
    pipeline, active = all_tiny.PIPELINES["flux"](), _AttentionBackendRegistry._active_backend
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
    with pytest.raises(UserError, match=r"^attention: 'flash' is not one of auto, sdpa, xformers, jvp, math$"):
        attention(pipeline, "flash").__enter__()
    with pytest.raises(UserError, match=r"^attention: xformers .*; .*use sdpa$"):
        attention(pipeline, "xformers").__enter__()
    monkeypatch.setattr(module, "import_module", lambda name: None)
    with pytest.raises(UserError, match=r"^attention: xformers runs on CUDA only, and the model is on cpu; use sdpa$"):
        attention(pipeline, "xformers").__enter__()


class FakeXFormers:
    """xformers.ops.memory_efficient_attention by torch, on (B, L, D) or (B, L, H, D)."""

    class LowerTriangularMask: ...

    def __init__(self) -> None:
        self.ops, self.calls, self.refuses = self, 0, False

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None,
        op: Any = None,
    ) -> Tensor:  # fmt: skip
        if self.refuses:
            raise NotImplementedError
        self.calls += 1
        query, key, value = (x.transpose(1, 2) if x.ndim == 4 else x for x in (query, key, value))
        causal = isinstance(attn_bias, self.LowerTriangularMask)
        assert causal or attn_bias is None or attn_bias.ndim < 4 or attn_bias.stride(-2) % 8 == 0
        mask = None if causal else attn_bias
        got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
        return got.transpose(1, 2) if got.ndim == 4 else got


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> FakeXFormers:
    fake = FakeXFormers()
    monkeypatch.setattr(module, "require_xformers", lambda device: None)
    monkeypatch.setattr(module, "import_module", lambda name: fake)
    monkeypatch.setattr(attention_processor, "xformers", fake, raising=False)
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


@pytest.mark.parametrize(
    "call",
    [
        {"is_causal": True},
        {"attn_mask": torch.randn(1, 1, 5, 7), "scale": 0.3},
        {"attn_mask": torch.tensor([[True] * 7, [False] * 7, [True] + [False] * 6] + [[True] * 7] * 2)},
        {"enable_gqa": True},
        {"attn_mask": torch.randn(5, 7, requires_grad=True)},  # left to torch, as is what has no operator
    ],
)
def test_every_kind_of_call_is_computed_alike(call: dict[str, Any], xformers: FakeXFormers) -> None:
    shared = 1 if call.get("enable_gqa") else 2
    q, k, v = torch.randn(2, 2, 5, 8), torch.randn(2, shared, 7, 8), torch.randn(2, shared, 7, 8)
    expected = F.scaled_dot_product_attention(q, k, v, **call)
    for choice in module.CHOICES:
        with attention_by(choice):
            assert torch.allclose(F.scaled_dot_product_attention(q, k, v, **call), expected, atol=1e-6), choice
    xformers.refuses = True
    with attention_by("xformers"):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, **call), expected)


@pytest.mark.parametrize("choice", module.CHOICES)
def test_under_a_product_with_the_jacobian_all_but_math_are_ours(choice: str, xformers: FakeXFormers) -> None:
    """And the recomputed one of the backward pass as well; gradients of the tangent are right under each."""
    seen: list[str] = []
    ours, plain = jvp_module.attention, jvp_module.plain_attention

    def noting(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(name)
            return function(*args, **kwargs)

        return called

    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [False] * 5, *[[True] * 4 + [False]] * 3])

    def gradient(inside: bool) -> Tensor:
        leaf = q.clone().requires_grad_()

        def attend(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, k, v, mask)

        tangent = jvp(lambda x: recomputed(attend, (x,), ()) if inside else attend(x), (leaf,), (v,))[1]
        (grad,) = torch.autograd.grad(tangent.square().sum(), leaf)
        return grad

    expected = gradient(inside=False)
    noted = {"attention": noting("ours", ours), "plain_attention": noting("math", plain)}
    with mock.patch.multiple(jvp_module, **noted), attention_by(choice):
        assert torch.allclose(gradient(inside=False), expected, atol=1e-12)
        assert torch.allclose(gradient(inside=True), expected, atol=1e-12)
    assert seen == ["math" if choice == "math" else "ours"] * 3
    assert xformers.calls == 0


def test_a_choice_is_of_one_thread() -> None:
    seen: list[str] = []
    with attention_by("math"):
        thread = Thread(target=lambda: seen.append(attention_choice()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("choice", ["math", "jvp"])
def test_autocast_is_as_with_torchs_own(choice: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v)
        with attention_by(choice):
            out = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(out, expected, atol=2e-2)


def test_xformers_in_double_precision_is_one_line(xformers: FakeXFormers) -> None:
    takes = r"^attention: xformers takes float16, bfloat16, float32, and the weights are float64; use sdpa$"
    with pytest.raises(UserError, match=takes):
        attention(nn.Linear(2, 2).double(), "xformers").__enter__()


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
