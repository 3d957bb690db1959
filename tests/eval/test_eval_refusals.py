"""What an evaluation cannot do is said in one line."""

from pathlib import Path
from typing import Any

import pytest

from tests.eval.sixty import Run, pictures


def test_images_that_are_not_right(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(folder: Path, message: str, **changes: Any) -> None:
        with pytest.raises(AssertionError):
            run("no", folder, **({"count": 20, "labels": "balanced"} | changes))
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error

    refused(pictures(tmp_path / "sizes", ("L", 8), ("L", 9)), "001.png is 9x9 L where 000.png is 8x8 L")
    refused(pictures(tmp_path / "modes", ("L", 8), ("RGB", 8)), "001.png is 8x8 RGB where 000.png is 8x8 L")
    refused(pictures(tmp_path / "alpha", ("RGBA", 8)), "000.png is of mode RGBA")
    refused(pictures(tmp_path / "colour", ("RGB", 8)), "are RGB and the protocol's grey")
    refused(
        pictures(tmp_path / "few", ("L", 8), count=5), "few has 5 images and sixty takes 20; give more, or --count 5"
    )
    refused(pictures(tmp_path / "large", ("L", 16)), "are 16x16 and the protocol's 8x8, without resizing")
    split = tmp_path / "split"
    split.mkdir()
    pictures(split / "train", ("L", 8)), pictures(split / "test", ("L", 8))
    refused(split, "has 40 image files and 20 of them are read as data")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no pipeline (model_index.json) and no images")
    corrupt = pictures(tmp_path / "corrupt", ("L", 8))
    (corrupt / "007.png").write_bytes((corrupt / "007.png").read_bytes()[:-30])
    refused(corrupt, "007.png")
    (corrupt / "007.png").write_bytes(b"no picture")
    refused(corrupt, "cannot read the image")


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ([], {"conditions": ["prompts"], "prompts": "shapes"}, "takes class labels, and the protocol sixty prompts"),
        ([], {"classes": 1000, "labels": "balanced"}, "has 10 classes and the protocol sixty 1000"),
        ([], {"resolution": 28}, "images of digits are 8x8 and the protocol's 28x28"),
        ([], {"reference": "mnist.npz", "fetch": "it there"}, "nowhere/mnist.npz is not there; fetch it there"),
        (["--reference", "gone"], {}, "'gone' does not exist"),
        (["--weights", "digits"], {}, "'digits' is not KEY=PATH"),
        (["--count", "1"], {}, "count: 1 must be at least 2"),
        (["--attention", "flash"], {}, "attention: 'flash' is not one of"),
        (["--prompts", "p.txt"], {}, "prompts: the protocol sixty takes no prompts; its conditions are "),
        ([], {"metrics": [{"name": "d", "kind": "frechet", "measure": "vgg"}]}, "'vgg' is not known"),
        (
            [],
            {"metrics": [{"name": "d", "kind": "vendi", "measure": "digits", "column": "x"}]},
            "d reads digits.x, which is not measured; there is",
        ),
        (
            [],
            {"metrics": [{"name": "d", "kind": "kid", "measure": "digits"}]},
            "d: no value can be had; its subsets are of",
        ),
        (["--weights", "bogus=x"], {}, "'bogus' is no measure of sixty; they are digits"),
        (["--dtype", "bfloat16"], {}, "bfloat16 is for latent pipelines"),
        (["--dtype", "float16"], {}, "float16 is for GPUs"),
        (
            ["--data", "digits"],
            {},
            "data: 'digits' cannot be used with --protocol; name the real images by --reference",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    run: Run, capsys: pytest.CaptureFixture[str], more: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError):
        run("no", None, *more, **changes)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
