"""References: images, files of statistics, the cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffdistill.errors import UserError
from diffdistill.eval.image_folder import open_image_file
from diffdistill.eval.protocol import load
from diffdistill.eval.reference import statistics_of_file
from tests.eval.sixty import PROTOCOL, Run


def test_statistics_of_a_file(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our own file gives the images' number; one of another network, size or protocol is refused in one line."""
    values = {"labels": "balanced", "metrics": PROTOCOL["metrics"][:1]}  # type: ignore[index]
    images = run("images", **values)
    file = tmp_path / "r.safetensors"
    # A second time from the statistics that are kept in the cache.
    assert run("images", None, "--save-reference", str(file), **values)["rows"] == images["rows"]
    from_file = run("file", None, "--reference", str(file), **values)
    assert from_file["rows"][0]["frechet distance"] == images["rows"][0]["frechet distance"]

    # A distance that the file has no statistics of is a dash, and the other one is there.
    logits = {"name": "of logits", "kind": "frechet", "measure": "digits", "column": "logits"}
    two = run("two", None, "--reference", str(file), labels="balanced", metrics=[*values["metrics"], logits])
    assert two["rows"][0]["frechet distance"] == images["rows"][0]["frechet distance"]
    assert two["rows"][0]["of logits"] is None
    assert "of logits: none, r.safetensors holds no statistics of digits.logits" in two["notes"]

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(AssertionError):
            run("no", None, "--reference", str(file), **changes)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error

    refused("holds statistics alone", labels="balanced", metrics=PROTOCOL["metrics"][1:2])  # type: ignore[index]
    some = run("some", None, "--reference", str(file), labels="balanced")
    assert some["rows"][0]["frechet distance"] == images["rows"][0]["frechet distance"]
    assert some["rows"][0]["kernel distance"] is None
    assert "kernel distance: none, r.safetensors holds statistics alone, and it needs the images" in some["notes"]
    refused("is of images 1x8x8 None, and the protocol's are 1x28x28", resolution=28, **values)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    other = metadata | {"measures": json.dumps({"digits": "0" * 16})}
    save_file(load_file(file), file, other)
    refused("was made with 0000000000000000 of digits", **values)
    file.write_bytes(file.read_bytes()[:100])
    refused("is not a whole safetensors file", **values)


def test_real_images_that_change_are_measured_again(run: Run, tmp_path: Path) -> None:
    """Under the same names and of the same sizes in bytes."""
    for i in range(20):
        (tmp_path / "real").mkdir(exist_ok=True)
        draw = np.random.default_rng(i)
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "real" / f"{i:02d}.bmp")
    changes: dict[str, Any] = {"labels": "balanced"}
    before = run("a", None, "--reference", str(tmp_path / "real"), **changes)["rows"][0]["frechet distance"]
    for path in (tmp_path / "real").iterdir():
        size = path.stat().st_size
        Image.new("L", (8, 8), 255 * (int(path.stem) % 2)).save(path)
        assert path.stat().st_size == size
    after = run("a", None, "--reference", str(tmp_path / "real"), **changes)["rows"][0]["frechet distance"]
    assert abs(after - before) > 1


def test_the_usual_npz_of_mu_and_sigma(tmp_path: Path) -> None:
    mean, cov = np.arange(2048.0), np.eye(2048)
    np.savez(tmp_path / "s.npz", mu=mean, sigma=cov)
    by_column = statistics_of_file(tmp_path / "s.npz", load("cifar10"), [])
    assert by_column is not None
    (statistics,) = by_column.values()
    assert torch.equal(statistics.mean, torch.from_numpy(mean)) and torch.equal(statistics.cov, torch.from_numpy(cov))
    np.savez(tmp_path / "s.npz", mu=mean[:3], sigma=cov[:3, :3])
    with pytest.raises(UserError, match="is of 3 features, and Inception's are 2048"):
        statistics_of_file(tmp_path / "s.npz", load("cifar10"), [])
    (tmp_path / "s.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read"):
        statistics_of_file(tmp_path / "s.npz", load("cifar10"), [])


MEAN, COV = np.arange(2048.0), np.eye(2048)
MALFORMED: dict[str, dict[str, Any]] = {
    "mu of two rows": {"mu": np.stack([MEAN, MEAN]), "sigma": COV},
    "sigma of a row": {"mu": MEAN, "sigma": np.ones(2048)},
    "numbers": {"mu": np.float64(1), "sigma": np.float64(1)},
    "nan": {"mu": MEAN * np.nan, "sigma": COV},
    "infinite": {"mu": MEAN, "sigma": np.full_like(COV, np.inf)},
    "texts": {"mu": np.array(["a"] * 2048), "sigma": COV},
    "complex": {"mu": MEAN * 1j, "sigma": COV},
    "objects": {"mu": np.array([None] * 2048, dtype=object), "sigma": COV},
    "empty": {"mu": MEAN[:0], "sigma": COV[:0, :0]},
    "records": {"mu": np.zeros(2048, dtype=[("a", "f8")]), "sigma": COV},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arrays", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_npz_of_statistics_is_refused_in_one_line(arrays: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=r"^reference: ") as error:
        statistics_of_file(tmp_path / "s.npz", load("cifar10"), [])
    assert "s.npz" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 280


def test_an_npz_of_samples_and_statistics_is_read_as_what_the_protocol_needs(tmp_path: Path) -> None:
    """As ADM's reference batches are: images with Inception's statistics of them."""
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "both.npz"
    np.savez(path, arr_0=images, mu=MEAN, sigma=COV, mu_s=MEAN[:9], sigma_s=COV[:9, :9])
    statistics = statistics_of_file(path, load("cifar10"), [])
    assert statistics is not None and torch.equal(statistics["inception.features"].mean, torch.from_numpy(MEAN))
    assert statistics_of_file(path, load("digits"), []) is None, (
        "these are the images, whose other features are measured"
    )
    model = open_image_file(path)
    assert model.count == 12 and torch.equal(
        model.draw([3], 0, None, None)[0].permute(1, 2, 0), torch.tensor(images[3])
    )


OWN = {"format": "diffdistill reference", "images": "1x8x8 None unrounded", "count": "5", "measures": "{}", "data": "x"}


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"digits.features.mean": torch.zeros(3)}, {}),
        ({"digits.features.mean": torch.zeros(3), "digits.features.cov": torch.zeros(2, 2)}, {}),
        ({"digits.features.mean": torch.zeros(3) / 0, "digits.features.cov": torch.eye(3)}, {}),
        ({"digits.features.mean": torch.zeros(3).long(), "digits.features.cov": torch.eye(3)}, {}),
        ({}, {"count": "many"}),
        ({}, {"count": "0"}),
        ({}, {"measures": "[]"}),
        ({}, {"measures": "{"}),
        ({}, {"images": "3x8x8 None unrounded"}),
    ],
)
def test_a_malformed_file_of_our_own_is_refused_in_one_line(
    tensors: dict[str, Any], metadata: dict[str, str], tmp_path: Path
) -> None:
    whole = {"digits.features.mean": torch.zeros(3), "digits.features.cov": torch.eye(3)}
    save_file(whole, tmp_path / "r.safetensors", OWN)
    assert statistics_of_file(tmp_path / "r.safetensors", load("digits"), []) is not None
    save_file(tensors or whole, tmp_path / "r.safetensors", OWN | metadata)
    with pytest.raises(UserError, match=r"^reference: .*make it anew") as error:
        statistics_of_file(tmp_path / "r.safetensors", load("digits"), [])
    assert len(str(error.value)) < 280
