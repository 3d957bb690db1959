"""The shipped classifiers of digits as measures."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffdistill.errors import UserError
from diffdistill.eval.features.digit_classifier import (
    MNIST,
    DigitClassifier,
    load_digit_classifier,
    load_digits,
    load_mnist_classifier,
    main,
    train,
)
from diffdistill.eval.features.measure import measure
from tests.eval.pictures import apart, pictures, read


def test_digits_measure() -> None:
    images, labels = load_digits()
    eight_bit = ((images[:300] + 1) * 127.5).round().to(torch.uint8)
    columns = measure("digits")(eight_bit, None, labels[:300])
    model = load_digit_classifier()
    assert columns["features"].shape == (300, 64) and columns["logits"].shape == (300, 10)
    torch.testing.assert_close(columns["logits"], model(eight_bit.float() / 127.5 - 1), rtol=1e-4, atol=1e-4)
    assert apart(columns["features"], model.features(images[:300])) < 0.05
    right = columns["logits"].argmax(1) == labels[:300]
    assert torch.equal(columns["agrees"], right.float()) and columns["agrees"].mean() > 0.98
    assert "agrees" not in measure("digits")(eight_bit, None, None)


def test_mnist_measure() -> None:
    images = pictures(5, 28, 28, channels=1)
    of_mnist = measure("mnist")
    columns = of_mnist(images, None, torch.arange(5))
    assert columns["features"].shape == (5, 64) and set(columns["agrees"].tolist()) <= {0.0, 1.0}
    padded = F.pad(images, (2, 2, 2, 2), value=77)
    assert torch.equal(of_mnist(padded, None, None)["features"], columns["features"])
    assert "32x32" in of_mnist.name
    for size, channels in ((30, 1), (28, 3)):
        with pytest.raises(UserError, match=r"takes \(1, 28, 28\)"):
            of_mnist(pictures(2, size, size, channels), None, None)


def test_mnist_classifier_reads_enlarged_digits() -> None:
    """The 8x8 digits, other hands and another scanner, brought to 20x20 in a margin of 4."""
    images, labels = load_digits()
    large = F.pad(F.interpolate(images, (20, 20), mode="bicubic").clamp(-1, 1), (4, 4, 4, 4), value=-1)
    model = load_mnist_classifier()
    assert (model(large).argmax(1) == labels).float().mean() > 0.8


def test_mnist_card_is_of_the_shipped_weights() -> None:
    assets = files("diffdistill.eval") / "features" / "assets"
    card = json.loads((assets / f"{MNIST}.json").read_text())
    data = (assets / f"{MNIST}.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(data).hexdigest()
    assert card["test_images"] == 10_000 and card["test_accuracy"] > 0.99
    assert len(data) < 300_000
    assert not any(p.requires_grad for p in load_mnist_classifier().parameters())


def test_recipe_of_mnist(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The command on a few drawings in MNIST's form writes what training on them gives; labels are needed."""
    x, y = pictures(96, 28, 28, 1)[:, 0].numpy(), np.arange(96) % 10
    np.savez(tmp_path / "few.npz", train_images=x[:64], train_labels=y[:64], test_images=x[64:], test_labels=y[64:])
    threads = torch.get_num_threads()
    try:
        main(["--data", str(tmp_path / "few.npz"), "--out", str(tmp_path / "out"), "--epochs", "1"])
        model = train(torch.from_numpy(x[:64, None]).float() / 127.5 - 1, torch.from_numpy(y[:64]), 0, 1)
    finally:
        torch.set_num_threads(threads)
    loaded = DigitClassifier((1, 28, 28))
    loaded.load_state_dict(read(tmp_path / "out" / f"{MNIST}.safetensors"))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    card = json.loads((tmp_path / "out" / f"{MNIST}.json").read_text())
    assert card["test_images"] == 32 and str(tmp_path) not in json.dumps(card)
    np.savez(tmp_path / "bare.npz", train_images=x, test_images=x)
    with pytest.raises(UserError, match="no labels"):
        main(["--data", str(tmp_path / "bare.npz"), "--out", str(tmp_path / "out2")])
    torch.set_num_threads(threads)
