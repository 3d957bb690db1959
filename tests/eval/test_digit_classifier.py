"""The digits, the shipped classifier of them, and the recipe that made it."""

import hashlib
import json
from importlib.resources import files

import pytest
import torch
from sklearn import datasets

from diffdistill.eval.features.digit_classifier import (
    CARD,
    WEIGHTS,
    accuracy,
    augment,
    load_digit_classifier,
    load_digits,
    main,
    train,
)

ASSETS = files("diffdistill.eval") / "features" / "assets"


def test_digits_are_sklearns() -> None:
    images, labels = load_digits()
    expected = datasets.load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert torch.equal((images[:, 0].double() + 1) * 8, torch.from_numpy(expected.images))
    assert torch.equal(labels, torch.from_numpy(expected.target).long())


def test_digits_are_described() -> None:
    assets = files("diffdistill") / "data" / "assets"
    card = json.loads((assets / "digits.json").read_text())
    assert card["sha256"] == hashlib.sha256((assets / "digits.safetensors").read_bytes()).hexdigest()


def test_shipped_classifier_knows_the_digits() -> None:
    model = load_digit_classifier()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert accuracy(model, *load_digits()) >= 0.99


def test_features_are_what_the_docstring_says() -> None:
    """(B, 64), finite, of total variance 64 on the digits, deterministic, an image's own business."""
    model, (images, _) = load_digit_classifier(), load_digits()
    features = model.features(images)
    assert features.shape == (1797, 64)
    assert features.isfinite().all()
    assert features.double().var(0).sum().item() == pytest.approx(64, abs=1e-2)
    assert torch.equal(features, load_digit_classifier().features(images))
    torch.testing.assert_close(model.features(images[5:8]), features[5:8], rtol=0, atol=1e-4)


def test_features_keep_apart_what_differs() -> None:
    """A small change of the image is a small change of the features, and other digits are far."""
    model, (images, labels) = load_digit_classifier(), load_digits()
    noise = 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    features = model.features(images)
    moved = (model.features(images + noise) - features).norm(dim=1)
    apart = torch.cdist(features, features)[labels[:, None] != labels].min()
    assert moved.mean() < apart / 2


def test_features_refuse_other_images() -> None:
    with pytest.raises(ValueError, match="8, 8"):
        load_digit_classifier().features(torch.zeros(2, 1, 28, 28))


def test_augmentation_shifts_on_paper() -> None:
    """Nothing but paper stays paper up to the noise; a digit moves, and by the generator alone."""
    paper = torch.full((4, 1, 8, 8), -1.0)
    assert (augment(paper, torch.Generator().manual_seed(0)) + 1).abs().max() < 0.5
    images, _ = load_digits()
    once, again = (augment(images[:4], torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(once, again)
    assert (once - images[:4]).abs().mean() > 0.05


def test_training_leaves_the_global_generator_alone() -> None:
    images, labels = load_digits()
    state = torch.get_rng_state()
    train(images[:64], labels[:64], seed=0, epochs=1)
    assert torch.equal(state, torch.get_rng_state())


def test_recipe_repeats_bit_for_bit(tmp_path, capsys) -> None:
    threads = torch.get_num_threads()
    try:
        for run, seed in (("a", 3), ("b", 3), ("c", 4)):
            torch.rand(1)  # the state of the global generator must not matter
            main(["--out", str(tmp_path / run), "--seed", str(seed), "--epochs", "1"])
    finally:
        torch.set_num_threads(threads)
    a, b, c = (tmp_path / run for run in "abc")
    assert (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes() != (c / WEIGHTS).read_bytes()
    assert (a / CARD).read_text() == (b / CARD).read_text()
    assert sorted(p.name for p in a.iterdir()) == sorted([CARD, WEIGHTS])
    assert json.loads((a / CARD).read_text())["held_out_accuracy"] > 0.2  # a tenth is chance


def test_card_is_of_the_shipped_weights() -> None:
    card = json.loads((ASSETS / CARD).read_text())
    weights = (ASSETS / WEIGHTS).read_bytes()
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert card["held_out_accuracy"] >= 0.985
    assert len(weights) < 300_000
