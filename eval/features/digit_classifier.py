"""Small classifiers of digits, 8x8 and MNIST's 28x28, whose penultimate layer is the feature space of their metrics.

Distances measured here compare runs on these digits with each other and with nothing else: the
feature space is neither Inception's nor any other paper's.

The shipped weights (`assets/digit_classifier.safetensors` and `mnist_classifier.safetensors`, cards beside
them) come from

    python -m diffdistill.eval.features.digit_classifier --out DIR --seed 0
    python -m diffdistill.eval.features.digit_classifier --data mnist.npz --out DIR --seed 0

which repeat bit for bit on one machine and torch version.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.data.images import open_data
from diffdistill.errors import UserError
from diffdistill.eval.metrics.scores import class_agreement
from diffdistill.files import atomic_write

MODULE = "diffdistill.eval.features.digit_classifier"
WEIGHTS = "digit_classifier.safetensors"
CARD = "digit_classifier.json"
MNIST = "mnist_classifier"
EPOCHS = 100
MNIST_EPOCHS = 10
BATCH = 64
LEARNING_RATE = 6e-3
HELD_OUT = 360
MAX_SHIFT = 0.75  # pixels
MAX_NOISE = 0.1  # standard deviation; ink to paper is 2


class DigitClassifier(nn.Module):
    """Images `(B, *shape)` in [-1, 1] to logits `(B, classes)`; those shipped know grey digits of 8x8 and 28x28.

    SiLU keeps the features smooth in the image, and there is no normalisation layer, so that an
    image's features never depend on its batch.
    """

    def __init__(self, shape: tuple[int, ...] = (1, 8, 8), classes: int = 10) -> None:
        super().__init__()
        self.shape = shape
        # In larger images the three convolutions must see further than 9 pixels, the width of a stroke's turn.
        first_stride = 2 if min(shape[1:]) >= 16 else 1
        self.trunk = nn.Sequential(
            nn.Conv2d(shape[0], 32, 3, padding=1, stride=first_stride),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.SiLU(),
        )
        self.head = nn.Linear(64, classes)
        # The unit of the features; `train` sets it.
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer, `(B, 64)`, in units of its root mean variance over the real images.

        So these have a total variance of 64, which gives a Frechet distance something to be compared with.
        Raises ValueError unless x is `(B, *shape)`.
        """
        if tuple(x.shape[1:]) != tuple(self.shape):
            raise ValueError(f"want images (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return self.trunk(x) / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, *shape) in [-1, 1]. Raises ValueError for another shape."""
        return self.head(self.features(x) * self.scale)


def load_digit_classifier() -> DigitClassifier:
    """The shipped classifier of 8x8 digits, on the CPU, in eval mode, its parameters frozen."""
    return _load(DigitClassifier(), WEIGHTS)


def load_mnist_classifier() -> DigitClassifier:
    """The shipped classifier of MNIST's 28x28 digits, on the CPU, in eval mode, its parameters frozen."""
    return _load(DigitClassifier((1, 28, 28)), f"{MNIST}.safetensors")


def _load(model: DigitClassifier, name: str) -> DigitClassifier:
    model.load_state_dict(
        safetensors.torch.load(files("diffdistill.eval").joinpath("features", "assets", name).read_bytes())
    )
    return model.eval().requires_grad_(False)


def load_digits() -> tuple[Tensor, Tensor]:
    """All images `(1797, 1, 8, 8)` float32 in [-1, 1], ink at 1, and labels `(1797,)` int64."""
    data = open_data("digits")
    digits = data.get(torch.arange(len(data)))
    assert digits.labels is not None
    return digits.images, digits.labels


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Sub-pixel shifts and noise: small changes of the image that must not move the class."""
    shift = (torch.rand(len(x), 2, generator=generator) * 2 - 1) * MAX_SHIFT
    affine = torch.eye(2, 3).repeat(len(x), 1, 1)
    affine[:, :, 2] = shift * 2 / x.shape[-1]  # the grid spans [-1, 1]
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    shifted = F.grid_sample(x + 1, grid, align_corners=False) - 1  # it pads with 0, paper is -1
    scale = MAX_NOISE * torch.rand(len(x), 1, 1, 1, generator=generator)
    return shifted + scale * torch.randn(x.shape, generator=generator)


def train(images: Tensor, labels: Tensor, seed: int, epochs: int, classes: int = 10) -> DigitClassifier:
    """Cross-entropy with AdamW under a one-cycle learning rate; random only through `seed`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier((images.shape[1], images.shape[2], images.shape[3]), classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(augment(images[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        features = torch.cat([model.trunk(part) for part in images.split(4096)])
        model.scale.copy_(features.var(0).mean().sqrt())
    return model.eval()


@torch.no_grad()
def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """The share, in [0, 1], of images (N, *shape) that the model gives their label (N,)."""
    return class_agreement(torch.cat([model(part) for part in images.split(4096)]), labels)


def make(out: Path, seed: int, epochs: int) -> dict[str, Any]:
    """Train without the held-out digits for the accuracy, then on all for the weights; write both files.

    Returns the card. The fold is random: the digits carry no writer, so a writer can be on both sides.
    """
    images, labels = load_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    judged = train(images[rest], labels[rest], seed, epochs)
    model = train(images, labels, seed, epochs)
    return _write(
        out,
        Path(WEIGHTS).stem,
        model,
        {
            "data": f"the {len(images)} digits of diffdistill/data/assets/digits.safetensors",
            "feature_unit": "root mean variance of the features over these digits",
            "held_out_images": HELD_OUT,
            "held_out_accuracy": accuracy(judged, images[held_out], labels[held_out]),
            "accuracy_on_all_after_training_on_all": accuracy(model, images, labels),
            "seed": seed,
            "epochs": epochs,
            "torch": torch.__version__,
            "command": f"python -m {MODULE} --out DIR --seed {seed} --epochs {epochs}",
        },
    )


def make_mnist(data: str, out: Path, seed: int, epochs: int) -> dict[str, Any]:
    """Train on the training images of `data` (as of `open_data`) and judge on its test images; write both files.

    Returns the card. Raises UserError if the data cannot be read, or carry no labels.
    """
    train_data, test_data = open_data(data, channels=1), open_data(f"{data}#test", channels=1)
    training, test = (part.get(torch.arange(len(part))) for part in (train_data, test_data))
    if training.labels is None or test.labels is None:
        raise UserError(f"data: {data!r} has no labels; give an .npz with train_images, train_labels and test_*")
    model = train(training.images, training.labels, seed, epochs)
    options = f"--data {train_data.name} --out DIR --seed {seed} --epochs {epochs}"
    return _write(
        out,
        MNIST,
        model,
        {
            "data": f"the {len(train_data)} training images of {train_data.name}, MNIST (LeCun, Cortes, Burges 1998)",
            "data_fingerprint": train_data.fingerprint,
            "feature_unit": "root mean variance of the features over these images",
            "test_images": len(test_data),
            "test_accuracy": accuracy(model, test.images, test.labels),
            "accuracy_on_training_images": accuracy(model, training.images, training.labels),
            "seed": seed,
            "epochs": epochs,
            "torch": torch.__version__,
            "command": f"python -m {MODULE} {options}",
        },
    )


def _write(out: Path, name: str, model: DigitClassifier, record: dict[str, Any]) -> dict[str, Any]:
    weights = safetensors.torch.save(model.state_dict())
    card = {
        "weights": f"{name}.safetensors",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        **record,
    }
    atomic_write(out / f"{name}.safetensors", weights)
    atomic_write(out / f"{name}.json", json.dumps(card, indent=2) + "\n")
    return card


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: train a classifier, write its weights and card, print the card's accuracy."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Train the digit classifier and write its weights and card.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--data", help="MNIST as an .npz with train_images, train_labels, test_*; left out: 8x8 digits")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the training and of the held-out images (default: 0)"
    )
    parser.add_argument(
        "--epochs", type=int, help=f"epochs; default: {EPOCHS} for the 8x8 digits, {MNIST_EPOCHS} for MNIST"
    )
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the order of a parallel sum would depend on the machine
    if parsed.data is None:
        card = make(parsed.out, parsed.seed, parsed.epochs or EPOCHS)
    else:
        card = make_mnist(parsed.data, parsed.out, parsed.seed, parsed.epochs or MNIST_EPOCHS)
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
