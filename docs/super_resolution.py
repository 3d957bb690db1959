"""Images made four times larger in one step, by students of models that read the small image.

    python docs/super_resolution.py --out runs/super-resolution --docs docs/super_resolution.md

Drawn shapes, 32x32, by latent models in stock pipelines, and 8x8 digits, by a network of one's own in pixels. Of each a
teacher learns from images that were reduced twice and another from images that were reduced four times, by as many
steps. Students for four times are distilled from either. Judged on images that none has seen: how near a made image is
to the one that was reduced (peak signal to noise, PSNR), and whether what it shows is read right, by rules or by a
classifier. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffdistill.commands.distill import distill
from diffdistill.commands.run import Run
from diffdistill.commands.teacher import train_teacher
from diffdistill.core.denoiser import Cond
from diffdistill.core.schedule import LinearFlow
from diffdistill.data.encoded import decoder, encode, open_encoded, with_prompts
from diffdistill.data.examples import TensorExamples
from diffdistill.data.images import open_data, reduced
from diffdistill.data.progress import slow, speaking
from diffdistill.data.shapes import HELD_OUT, draw_many, read
from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.eval.features.digit_classifier import load_digit_classifier
from diffdistill.eval.report import markdown_table, text_table, write_between, write_json
from diffdistill.families import load_teacher
from diffdistill.files import atomic_write
from diffdistill.options import nearest
from diffdistill.pictures import save_png, side_by_side
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators

TWICE, FOUR = 2, 4
COLUMNS = ("images", "model", "learned from", "steps", "psnr", "read right %", "training steps")
STEPS_OF_TEACHERS = (1, 16)


@dataclass(frozen=True)
class Settings:
    """Where all lies, and how much of it is made."""

    out: Path
    seed: int = 0  #: of teachers, students and the judged noise
    count: int = 357  #: images of each kind that are judged, at most
    share: float = 1.0  #: of all training steps

    def steps(self, number: int) -> int:
        """So many training steps, or the share of them."""
        return max(2, int(self.share * number))


@dataclass(frozen=True)
class Task:
    """Images, teachers of them for so many times of reduction, and how they are judged."""

    name: str
    images: Tensor  #: (n, C, H, W) in [-1, 1], to be made again
    truth: Tensor  #: (n,) what each shows
    shows: Callable[[Tensor], Tensor]  #: images -> (n,) what is read in them
    teacher_steps: int
    students: Mapping[str, dict[str, Any]]  #: by method, the options of its training
    teacher: Callable[[int], Teacher]
    given: Callable[[int], dict[str, Any]]  #: to `distill`: the teacher, and data that were reduced FOUR times
    seen: Callable[[int], dict[str, Any]]  #: and these data as the teacher sees them
    conditions: Callable[
        [int], Cond
    ]  #: (n, ...) of the images, reduced FOUR times, as the teacher's student reads them
    decoded: Callable[[int, Tensor], Tensor]  #: images of the teacher's samples


def shapes(settings: Settings) -> Task:
    """Drawn shapes in the latents of their teacher's autoencoder, as a stock pipeline has them."""
    out, steps = settings.out / "shapes", 1000
    images, _, attributes = draw_many(HELD_OUT, settings.count)
    place = torch.tensor([100, 10, 1])
    held_out = out / "held-out.npy"
    out.mkdir(parents=True, exist_ok=True)
    numpy.save(held_out, images.numpy())

    def folder(times: int) -> str:
        made = out / f"teacher-{times}" / "teacher"
        if not made.is_dir():
            train_teacher(
                architecture="instruct-pix2pix", data=f"reduced:{times}:shapes", layers=1, attention="0,1",
                vae_steps=settings.steps(1000), vae_batch_size=16, steps=settings.steps(steps), batch_size=32, ema=0.98,
                seed=settings.seed, device="cpu", threads=0, out=str(made.parent),
            )  # fmt: skip
        return str(made)

    def encoded(teacher: int, times: int, data: str = "shapes:2000", name: str = "images") -> str:
        to = str(out / f"{name}-{teacher}-{times}")
        return str(encode(teacher=folder(teacher), data=f"reduced:{times}:{data}", device="cpu", out=to))

    def conditions(times: int) -> Cond:
        held = open_encoded(encoded(times, FOUR, str(held_out), "held-out"))
        return held.get(torch.arange(len(held))).cond

    def shows(made: Tensor) -> Tensor:
        seen = read(made).attributes
        return torch.where(seen.min(1).values < 0, -1, (seen * place).sum(1))

    return Task(
        "shapes", images, (attributes * place).sum(1), shows, steps,
        {
            "yonos": {"steps": 400, "batch_size": 32},
            "ctmsr": {"steps": 600, "batch_size": 32},
            "dmd2": {"steps": 200, "batch_size": 32},
        },
        teacher=lambda times: with_prompts(load_teacher(folder(times)), open_encoded(encoded(times, FOUR))),
        given=lambda times: {"teacher": folder(times), "prompts": encoded(times, FOUR)},
        seen=lambda times: {"teacher_data": encoded(times, times)},
        conditions=conditions,
        decoded=lambda times, samples: decoder(load_teacher(folder(times)))(samples),
    )  # fmt: skip


class Beside(nn.Module):
    """A stock UNet whose input is the sample and the image beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=8, in_channels=2, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor, image: Tensor) -> Tensor:
        """(B, 1, 8, 8) the velocity of a flow, noise minus data, at times in [0, 1]."""
        velocity: Tensor = self.unet(torch.cat([x, image], 1), 1000 * time, return_dict=False)[0]
        return velocity


def digits(settings: Settings) -> Task:
    """The embedded digits in pixels, by a network of one's own."""
    steps, train, test = 2000, open_data("digits#train"), open_data("digits#test")
    learned, held = train.get(torch.arange(len(train))).images, test.get(torch.arange(min(settings.count, len(test))))
    assert held.labels is not None
    classifier = load_digit_classifier()

    def examples(times: int) -> TensorExamples:
        return TensorExamples(learned, {"image": reduced(learned, times)})

    def teacher(times: int) -> Teacher:
        file = settings.out / "digits" / f"teacher-{times}.safetensors"
        torch.manual_seed(settings.seed)
        network = Beside()
        if file.is_file():
            network.load_state_dict(load_file(file))
        else:
            _flow_matching(network, learned, reduced(learned, times), settings.steps(steps))
            atomic_write(file, save(network.state_dict()))
        schedule, cond = LinearFlow(data_std=float(learned.std()), time_scale=1.0), {"image": learned[:1]}
        layer = "unet.mid_block"
        return Teacher.around(network, (1, 8, 8), schedule, "flow_prediction", cond=cond, feature_layer=layer)

    return Task(
        "digits", held.images, held.labels, lambda made: classifier(made).argmax(1), steps,
        {
            "yonos": {"steps": 1000, "batch_size": 64},
            "ctmsr": {"steps": 1000, "batch_size": 64},
            "dmd2": {"steps": 500, "batch_size": 64},
        },
        teacher=teacher,
        given=lambda times: {"teacher": teacher(times), "data": examples(FOUR)},
        seen=lambda times: {"teacher_data": examples(times)},
        conditions=lambda times: {"image": reduced(held.images, FOUR)},
        decoded=lambda times, samples: samples,
    )  # fmt: skip


def _flow_matching(network: nn.Module, images: Tensor, small: Tensor, steps: int) -> None:
    """Trains by a plain loop (Lipman et al. 2022, arXiv:2210.02747, eq. 23)."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    with speaking("a teacher of digits"):
        for step in slow(range(steps), steps, "step"):
            optimizer.param_groups[0]["lr"] = 1e-3 * max(0.02, (1 + math.cos(math.pi * step / steps)) / 2)
            rows = torch.randint(len(small), (64,))
            x, noise, s = images[rows], torch.randn(64, *images.shape[1:]), torch.rand(64, 1, 1, 1)
            made = network((1 - s) * x + s * noise, s.flatten(), small[rows])
            optimizer.zero_grad()
            (made - (noise - x)).square().mean().backward()
            optimizer.step()


TASKS = {"shapes": shapes, "digits": digits}


def trained(task: Task, method: str, settings: Settings) -> Run:
    """The student of a method; that of the folder of its run where there is one."""
    options, folder = dict(task.students[method]), settings.out / task.name / method
    times = TWICE if method == "yonos" else FOUR
    given = task.given(times) | (task.seen(times) if method == "yonos" else {})
    steps = settings.steps(options.pop("steps"))
    if (folder / "student").is_dir():
        objects = {name: value for name, value in given.items() if not isinstance(value, str)}
        return distill(resume=folder, steps=steps, **objects)
    return distill(method, **given, **options, steps=steps, seed=settings.seed, device="cpu", threads=0, out=folder)


def drawn(task: Task, times: int, sampler: Sampler, shape: Sequence[int], settings: Settings) -> Tensor:
    """An image for each that is judged, always of the same noise."""
    noise = image_generators(1000 + settings.seed, range(len(task.images)))
    with torch.inference_mode():
        return task.decoded(times, sampler(tuple(shape), task.conditions(times), noise).float()).clamp(-1, 1)


def judged(task: Task, settings: Settings) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The rows of a task with their images."""

    def row(model: str, images: Tensor, **others: Any) -> tuple[dict[str, Any], Tensor]:
        # Of a peak of 2, since images span [-1, 1]; the mean over images.
        psnr = 10 * torch.log10(4 / (images - task.images).square().flatten(1).mean(1)).mean()
        right = 100 * float((task.shows(images) == task.truth).double().mean())
        return {"images": task.name, "model": model, "psnr": float(psnr), "read right %": right, **others}, images

    yield row("enlarged, bicubic", reduced(task.images, FOUR))
    for times in (TWICE, FOUR):
        teacher, learned = task.teacher(times), f"{times} times"
        for steps in STEPS_OF_TEACHERS:
            sampler = Sampler(teacher.denoiser, teacher.denoiser.schedule.levels(steps).tolist(), DDIM())
            made = drawn(task, times, sampler, teacher.shape, settings)
            yield row(
                "teacher", made, **{"learned from": learned, "steps": steps, "training steps": task.teacher_steps}
            )
        for method in [name for name in task.students if (name == "yonos") == (times == TWICE)]:
            sampler = trained(task, method, settings).sampler()
            source = "images" if method == "ctmsr" else f"the teacher of {learned}"
            cost = {"steps": len(sampler.levels), "training steps": task.students[method]["steps"]}
            yield row(method, drawn(task, times, sampler, teacher.shape, settings), **{"learned from": source}, **cost)


def benchmark(settings: Settings, tasks: Sequence[str]) -> dict[str, Any]:
    """Makes and judges what is missing; writes results.json, and a picture of each task."""
    rows: list[dict[str, Any]] = []
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"tasks: {name!r} is not known; {nearest(name, list(TASKS))}")
        task = TASKS[name](settings)
        shown = [("the image itself", task.images[:12])]
        for row, images in judged(task, settings):
            source = f" ({row['learned from']}), {row['steps']}" if "steps" in row else ""
            shown.append((f"{row['model']}{source}", images[:12]))
            rows.append(row)
            print(text_table(rows[-1:], COLUMNS), flush=True)
        save_png(side_by_side(shown, scale=64 // task.images.shape[-1]), settings.out / f"{name}.png")
    results = {"rows": rows, "seed": settings.seed, "count": settings.count, "environment": environment()}
    write_json(results, settings.out / "results.json")
    return results


def write_page(results: dict[str, Any], out: Path, page: Path) -> None:
    """Puts table and pictures between the marks of a page."""
    made = results["environment"]
    names = list(dict.fromkeys(row["images"] for row in results["rows"]))
    said = f"{made['platform']}, torch {made['torch']}, commit {made['commit']}, seed {results['seed']}"
    pictures = [f"![{name}, a row for each model](super_resolution_{name}.png)" for name in names]
    lines = [
        f"{said}; at most {results['count']} images of each kind.",
        "",
        markdown_table(results["rows"], COLUMNS),
        *pictures,
    ]
    write_between(page, "\n".join(lines))
    for name in names:
        shutil.copyfile(out / f"{name}.png", page.parent / f"super_resolution_{name}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/super-resolution"), help="folder of all that is made")
    parser.add_argument("--tasks", default="shapes,digits", help="shapes, digits, or both")
    parser.add_argument("--seed", type=int, default=0, help="of teachers, students and judged noise")
    parser.add_argument("--count", type=int, default=357, help="images of each kind that are judged")
    parser.add_argument("--share", type=float, default=1.0, help="of all training steps, for a quick try")
    parser.add_argument("--docs", type=Path, help="a page between whose marks the table is written")
    args = parser.parse_args(argv)
    settings = Settings(args.out, args.seed, args.count, args.share)
    results = benchmark(settings, args.tasks.split(","))
    if args.docs:
        write_page(results, args.out, args.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
