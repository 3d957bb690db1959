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
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """family -> a tiny pipeline's folder, and its prompts encoded, with latents of drawn images."""
    from PIL import Image

    root = tmp_path_factory.mktemp("families")

    def make(name: str) -> tuple[Path, Path]:
        folder, out = root / name, root / f"{name}-encoded"
        if not out.exists():
            BUILDERS[name]().save_pretrained(folder)
            images = root / "images"
            if not images.exists():
                images.mkdir()
                for i in range(len(PROMPTS)):
                    Image.new("RGB", (32, 32), (60 * i, 200 - 50 * i, 90)).save(images / f"{i}.png")
                rows = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(PROMPTS)]
                (images / "metadata.jsonl").write_text("\n".join(rows))
                for i in range(len(PROMPTS)):
                    (root / "classes" / str(i % 2)).mkdir(parents=True, exist_ok=True)
                    Image.open(images / f"{i}.png").save(root / "classes" / str(i % 2) / f"{i}.png")
                (root / "prompts.txt").write_text("\n".join(PROMPTS))
            options: dict[str, Any] = {"teacher": str(folder), "resolution": SIZES[name], "out": str(out)}
            if name in FAMILIES and FAMILIES[name].videos:
                encode(**options, prompts=str(root / "prompts.txt"), frames=5)
            else:
                encode(**options, data=str(root / "classes" if name == "dit" else images))
        return folder, out

    return make
