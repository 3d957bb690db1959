"""What the tests of encoding encode, and how."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

PROMPTS = [f"prompt number {i}" for i in range(7)]


def options(teacher: Path, prompts: Path, out: Path, **more: Any) -> dict[str, Any]:
    shared = {"resolution": 16, "shard_size": 3, "batch_size": 2, "device": "cpu"}
    return {"teacher": str(teacher), "prompts": str(prompts), "out": str(out)} | shared | more


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def png(i: int) -> bytes:
    file = io.BytesIO()
    picture = Image.new("RGB", (20, 16), (40 * i, 250 - 30 * i, 99))
    picture.putpixel((10, 8), (i, i, i))
    picture.save(file, "png")
    return file.getvalue()
