"""Tiny pipelines with encoded prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffdistill.data.encoded import encode
from diffdistill.families import FAMILIES
from tests.players.tiny import BUILDERS, PROMPTS, SIZES


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(family, size) -> a tiny pipeline's folder, and its prompts encoded, with latents of drawn images."""
    from PIL import Image

    root = tmp_path_factory.mktemp("families")

    def make(name: str, size: str | None = None) -> tuple[Path, Path]:
        folder, out = root / name, root / f"{name}-encoded-{size}"
        if not folder.exists():
            BUILDERS[name]().save_pretrained(folder)
        if not out.exists():
            images = root / "images"
            if not images.exists():
                images.mkdir()
                for i in range(len(PROMPTS)):
                    Image.new("RGB", (32, 32), (60 * i, 200 - 50 * i, 90)).save(images / f"{i}.png")
                texts = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(PROMPTS)]
                (images / "metadata.jsonl").write_text("\n".join(texts))
                for i in range(len(PROMPTS)):
                    (root / "classes" / str(i % 2)).mkdir(parents=True, exist_ok=True)
                    Image.open(images / f"{i}.png").save(root / "classes" / str(i % 2) / f"{i}.png")
                (root / "edits" / "from").mkdir(parents=True)
                for i in range(len(PROMPTS)):
                    Image.open(images / f"{i}.png").save(root / "edits" / f"{i}.png")
                    source = Image.new("RGB", (32, 32), (250 - 60 * i, 40 * i, 20))
                    source.paste((0, 0, 200), (8 * i, 4, 8 * i + 6, 28))
                    source.save(root / "edits" / "from" / f"{i}.png")
                rows = [{"file_name": f"{i}.png", "condition_image": f"from/{i}.png"} for i in range(len(PROMPTS))]
                lines = [json.dumps(row | {"text": text}) for row, text in zip(rows, PROMPTS, strict=True)]
                (root / "edits" / "metadata.jsonl").write_text("\n".join(lines))
                for i, text in enumerate(PROMPTS):
                    (root / "videos" / str(i)).mkdir(parents=True)
                    (root / "videos" / f"{i}.txt").write_text(text)
                    for j in range(5):
                        colour = (60 * i, 200 - 50 * i, 50 * j)
                        Image.new("RGB", (32, 32), colour).save(root / "videos" / str(i) / f"{j}.png")
            options: dict[str, Any] = {"teacher": str(folder), "resolution": size or SIZES[name], "out": str(out)}
            autoencoder = FAMILIES[name].autoencoder if name in FAMILIES else None
            if autoencoder is not None and not autoencoder.encodes:
                (root / "prompts.txt").write_text("\n".join(PROMPTS))
                encode(**options, prompts=str(root / "prompts.txt"), frames=5)
            elif name in FAMILIES and FAMILIES[name].videos:
                encode(**options, data=str(root / "videos"), frames=5)
            else:
                edits = name in FAMILIES and FAMILIES[name].reads_image
                encode(**options, data=str(root / ("classes" if name == "dit" else "edits" if edits else "images")))
        return folder, out

    return make
