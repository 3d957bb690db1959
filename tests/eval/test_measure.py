"""Measures: any module is one, fingerprints, clear refusals."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel

from diffdistill.errors import UserError
from diffdistill.eval.features.measure import measure, module_measure
from tests.eval.pictures import errors_of, pictures


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) * self.scale


def test_any_module_is_a_measure() -> None:
    images = pictures(3, 8, 8)
    module = Mean()
    of_module = module_measure(module, "mean", "mean of the pixels, 8 bit")
    columns = of_module(images, None, None)
    torch.testing.assert_close(columns["features"], 2 * images.float().mean((2, 3)))
    assert not columns["features"].requires_grad and not module.training
    assert len(of_module.fingerprint) == 16 and int(of_module.fingerprint, 16)
    assert module_measure(module, "mean", "mean of the pixels, 16 bit").fingerprint != of_module.fingerprint
    with torch.no_grad():
        module.scale += 1e-6
    assert module_measure(module, "mean", of_module.name).fingerprint != of_module.fingerprint
    with pytest.raises(ValueError, match=r"want features \(B, D\)"):
        module_measure(nn.Identity(), "id", "identity")(images, None, None)


def test_fingerprint_is_of_weights_and_not_of_places(clip: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "another-name"
    shutil.copytree(clip, copy)
    for key in ("clip", "clip-score"):
        here, there = (measure(key, weights={key: str(folder)}) for folder in (clip, copy))
        assert here.fingerprint == there.fingerprint
    model = CLIPModel.from_pretrained(copy)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    model.save_pretrained(copy)
    assert measure("clip", weights={"clip": str(copy)}).fingerprint != here.fingerprint
    assert measure("digits").fingerprint != measure("mnist").fingerprint


def test_precision_settings_are_given_back() -> None:
    seen = []

    class Look(Mean):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().forward(images)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        module_measure(Look(), "look", "look")(pictures(1, 4, 4), None, None)
        assert seen == [("highest", False)]
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_bad_images_and_captions(clip: Path) -> None:
    digits = measure("digits")
    with pytest.raises(UserError, match="4 channels, and 'digits' takes 1"):
        digits(pictures(2, 8, 8, 4), None, None)
    with pytest.raises(UserError, match=r"shape \(1, 9, 8\)"):
        digits(pictures(2, 9, 8, 1), None, None)
    with pytest.raises(ValueError, match="uint8"):
        module_measure(Mean(), "mean", "mean")(torch.rand(2, 1, 8, 8), None, None)
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        digits(pictures(2, 8, 8, 1), None, torch.zeros(1))
    with pytest.raises(UserError, match="captions, and there are none"):
        measure("clip-score", weights={"clip-score": str(clip)})(pictures(2, 8, 8), None, None)


def test_bad_keys_and_networks(clip: Path, dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'inceptoin' is not known; did you mean 'inception'"):
        measure("inceptoin")
    with pytest.raises(UserError, match="'clips' is not known"):
        measure("digits", weights={"clips": "x"})
    with pytest.raises(UserError, match="weights that are shipped"):
        measure("mnist", weights={"mnist": "x"})
    with pytest.raises(UserError, match="holds a 'dinov2' network and not a 'clip'"):
        measure("clip", weights={"clip": str(dinov2)})
    with pytest.raises(UserError, match="hf download facebook/dinov2-large"):
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        measure("dinov2")
    model = CLIPModel.from_pretrained(clip)
    state = model.state_dict()
    del state["visual_projection.weight"]
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(UserError, match=r"lacks weights, visual_projection\.weight"):
        measure("clip", weights={"clip": str(tmp_path / "part")})
    for error in errors_of(lambda: measure("clip-score", weights={"clip-score": str(tmp_path / "none")})):
        assert "\n" not in error and "FOLDER of a CLIPModel" in error
