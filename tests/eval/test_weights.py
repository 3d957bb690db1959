"""Weights files of feature networks: found in order, read only where their checksum is right."""

import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from diffdistill.errors import UserError
from diffdistill.eval.features import lite0, lpips, weights
from diffdistill.eval.features.weights import FOLDER, Standard, find_weights, read_weights
from tests.eval.pictures import errors_of


@pytest.fixture
def standard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Standard:
    """A file 'on a server', and empty places to look for it."""
    state = {"w": torch.arange(3.0)}
    source = tmp_path / "server" / "net-12345678.pth"
    source.parent.mkdir()
    torch.save(state, source)
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return Standard("a network", (source.name, "alias.pth"), source.as_uri(), digest)


def test_weights_are_found_in_order(standard: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, hub, own = tmp_path / "server", tmp_path / "hub" / "checkpoints", tmp_path / "own"
    bytes_ = (server / standard.names[0]).read_bytes()
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set; fetch file://.* and pu.*checkpoints or"):
        find_weights("net", standard)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert find_weights("net", standard) == hub / standard.names[0]  # downloaded
    assert [path.name for path in hub.iterdir()] == [standard.names[0]]
    assert (hub / standard.names[0]).read_bytes() == bytes_
    own.mkdir()
    (own / "alias.pth").write_bytes(bytes_)
    monkeypatch.setenv(FOLDER, str(own))
    assert find_weights("net", standard) == own / "alias.pth"
    assert find_weights("net", standard, str(server)) == server / standard.names[0]
    assert find_weights("net", standard, str(own / "alias.pth")) == own / "alias.pth"
    tensors, what = read_weights("net", standard)
    assert torch.equal(tensors["w"], torch.arange(3.0)) and what == "a network"
    for source, why in ((str(tmp_path), "the folder has no net"), (str(tmp_path / "no.pth"), "does not exist")):
        with pytest.raises(UserError, match=why):
            find_weights("net", standard, source)


def test_other_bytes_are_never_read(standard: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "own" / standard.names[0]
    wrong.parent.mkdir()
    torch.save({"w": torch.zeros(3)}, wrong)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read before it was verified"))
    for error in errors_of(lambda: read_weights("net", standard, str(wrong))):
        assert "is not a network: its sha256 begins with" in error and "\n" not in error
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match=r"file://.*sha256"):
        find_weights("net", replace(standard, sha256="0" * 64))
    assert not (tmp_path / "hub").exists()  # what was downloaded is thrown away
    with pytest.raises(UserError, match="nor to be had"):
        find_weights("net", replace(standard, url=(tmp_path / "gone").as_uri()))


def test_safetensors_may_be_others(standard: Standard, tmp_path: Path) -> None:
    data = save({"w": torch.ones(2)})
    (tmp_path / "mine.safetensors").write_bytes(data)
    tensors, what = read_weights("net", standard, str(tmp_path / "mine.safetensors"))
    assert torch.equal(tensors["w"], torch.ones(2)) and hashlib.sha256(data).hexdigest()[:8] in what
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights("net", standard, str(tmp_path / "bad.safetensors"))


def test_standards() -> None:
    """torch.hub's rule: a name ends in the first eight digits of its sha256."""
    for each in (weights.INCEPTION, weights.ALEXNET, lite0.LITE0):
        assert len(each.sha256) == 64
        assert all(name.endswith(f"-{each.sha256[:8]}.pth") for name in each.names)
    assert weights.INCEPTION.url.endswith(weights.INCEPTION.names[0])
    spec = importlib.util.find_spec("torchmetrics")
    assert spec is not None and spec.origin is not None
    heads = Path(spec.origin).parent / "functional/image/lpips_models/alex.pth"
    assert hashlib.sha256(heads.read_bytes()).hexdigest() == lpips.LPIPS_HEADS.sha256
