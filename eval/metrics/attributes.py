"""Do images of captions show what the captions say? Drawn shapes, judged by the rules of shapes.py.

Caption i is that of picture i of the seed that nothing is trained on, and its noise comes from (seed, i).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.data import shapes
from diffdistill.data.shapes import HELD_OUT, SIDE, draw_many, judge
from diffdistill.errors import UserError
from diffdistill.eval.protocol import digest
from diffdistill.families import FAMILIES, Prompt, load_pipeline, local_folder, with_null
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators

COLUMNS = ("model", "steps", "colour %", "shape %", "position %", "all three %", "spread px", "ms per image")
COUNT, SHOWN = 500, 12
_BATCH = 100


@torch.no_grad()
def compare_attributes(
    teacher: Teacher,
    source: str,
    rows: Iterable[tuple[str, int, Callable[[Cond, Sequence[torch.Generator]], Tensor]]],
    count: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[tuple[str, Tensor]]]:
    """The table of rows (model, steps, draw), and for the picture the first images of each, all from the same noise.

    The first row is the drawn pictures themselves after the autoencoder: no model of its latents does better.
    """
    family = FAMILIES[teacher.family]
    if family.text is None or family.autoencoder is None:
        raise UserError(f"data: shapes are judged by their captions, and {source!r} takes none")
    if teacher.size.get("height") != SIDE:
        raise UserError(f"data: shapes have {SIDE} pixels a side and {source!r} makes {teacher.size.get('height')}")
    pictures, captions, wanted = draw_many(HELD_OUT, count)
    device = next(teacher.denoiser.parameters()).device
    pipeline = load_pipeline(local_folder(source), leave_out=(family.component,), device=device)
    prompt = Prompt((SIDE, SIDE))
    parts = [family.text.encode(pipeline, captions[i : i + _BATCH], prompt) for i in range(0, count, _BATCH)]
    with_null(teacher.denoiser, family.text.null(pipeline, prompt))
    encode, decode = family.autoencoder.encode, family.autoencoder.decode

    def decoded(latents: Tensor) -> Tensor:
        return decode(pipeline.vae, latents).float().clamp(-1, 1).cpu()

    again = torch.cat([decoded(encode(pipeline.vae, part.to(device))) for part in pictures.split(_BATCH)])
    table: list[dict[str, Any]] = [{"model": "drawn, through the autoencoder", **judge(again, wanted)}]
    shown = [("drawn, through the autoencoder", again[:SHOWN])]
    for model, steps, draw in rows:
        images, seconds = [], 0.0
        for i, cond in enumerate(parts):
            generators = image_generators(seed, range(i * _BATCH, min((i + 1) * _BATCH, count)))
            started = time.perf_counter()
            latents = draw(cond, generators)
            seconds += time.perf_counter() - started
            images.append(decoded(latents))
        drawn = torch.cat(images)
        if not bool(drawn.isfinite().all()):
            raise UserError(f"eval: the images of {model!r} are not finite; its training diverged")
        told = {"model": model, "steps": steps, **judge(drawn, wanted), "ms per image": 1000 * seconds / count}
        table.append(told)
        shown.append((f"{model}, {steps} step{'' if steps == 1 else 's'}", drawn[:SHOWN]))
    return table, shown


class Attributes:
    """Do images (B, 3, 32, 32) show the colour, shape and position of their captions? 1 or 0 each, and of all three.

    Captions are those of drawn shapes; UserError for others.
    """

    key = "attributes"
    name = "colour, shape and position read by the rules of diffdistill.data.shapes"
    fingerprint = digest([shapes.PALETTE, shapes.SHAPES, shapes.PLACES, shapes.RADII, shapes.CLEAN])

    def __init__(self) -> None:
        sizes = (len(shapes.COLOURS), len(shapes.SHAPES), len(shapes.POSITIONS))
        self._wanted = {shapes.caption(*each): each for each in itertools.product(*map(range, sizes))}

    def __call__(self, images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        for text in captions or [""]:
            if text not in self._wanted:
                raise UserError(
                    f"prompts: {text!r} is no caption of a drawn shape; 'a red circle in the middle' is one"
                )
        wanted = torch.tensor([self._wanted[text] for text in captions or ()])
        right = shapes.read(images.float() / 127.5 - 1).attributes == wanted
        columns = {"colour": right[:, 0], "shape": right[:, 1], "position": right[:, 2], "all": right.all(1)}
        return {name: column.float() for name, column in columns.items()}
