"""What a family is, and what families share: autoencoders, prompts, packing, the teacher made of it all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from diffdistill.core.denoiser import Call, Cond, Denoiser, FeatureMap
from diffdistill.core.prediction import Output
from diffdistill.core.schedule import Schedule
from diffdistill.errors import UserError
from diffdistill.families._parts import Config, both_sides, part_config
from diffdistill.options import Sides
from diffdistill.players.teacher import Teacher

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers that LoRA usually adapts."""


def diffusers_class(kind: str | type) -> Any:
    """The class of diffusers that has this name; a class is itself."""
    return getattr(diffusers, kind) if isinstance(kind, str) else kind


class Source(NamedTuple):
    """A pipeline folder as far as it has been read, and how the user wants it."""

    folder: Path
    parts: Config  #: model_index.json
    scheduler: Config  #: scheduler_config.json
    null_class: int | None = None  #: the class label that the network learned as "no class", where one is known
    guidance_scale: float | None = None  #: of a student of ours that takes it as an input: its default
    resolution: tuple[int, int] | None = None  #: height and width in pixels; None: the model's own
    frames: int | None = None  #: of a video

    def config(self, component: str) -> Config:
        """`component`/config.json, with the defaults of its class."""
        return part_config(self.folder / component)


class Prompt(NamedTuple):
    """How prompts are encoded besides their text."""

    resolution: tuple[int, int]  #: height and width of the image in pixels
    guidance: float = 3.5  #: the scale that a network with an embedded guidance scale is given
    negative: str | None = None  #: stands in place of "no prompt"; None: what the family has for it
    #: (n, 3, H, W) in [-1, 1] of that size, what n prompts are to change, or begin with; of k each (n, k, 3, H, W).
    images: Tensor | None = None
    frames: int | None = None  #: of a video

    @property
    def pictures(self) -> list[Image.Image]:
        """The images as the stock pipeline is given them."""
        assert self.images is not None
        bytes_ = (self.images.float().cpu() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in bytes_.flatten(0, -4)]

    @property
    def lists(self) -> list[list[Image.Image]]:
        """The images of each prompt, as a stock pipeline that takes several is given them."""
        assert self.images is not None
        pictures = self.pictures
        each = len(pictures) // len(self.images)
        return [pictures[i : i + each] for i in range(0, len(pictures), each)]


OWN_NULL = "null."
"""Before the name of a condition: what stands in its place where there is no prompt, of each prompt its own."""


def example_images(n: int, size: Sides) -> Tensor:
    """(n, 3, H, W) in [-1, 1] of 8 bits, pictures to be changed where only their size matters; no two are alike."""
    rows, columns = (torch.linspace(-1, 1, side) for side in size)
    plane = torch.stack([rows[:, None].expand(size), columns.expand(size), rows[:, None] * columns])
    images = torch.stack([plane.roll(i, 0) * 0.9**i for i in range(n)])
    return (127.5 * images + 127.5).round() / 127.5 - 1


@dataclass(frozen=True)
class Autoencoder:
    """The autoencoder of a latent family: pixels a latent pixel, and both ways between images and latents.

    `encode` maps images (B, 3, H, W) or videos (B, 3, F, H, W) in [-1, 1] to latents of the network's scale, without
    drawing (the mean of the posterior); `decode` maps back.
    """

    factor: Callable[[Config], int]
    encode: Callable[[Any, Tensor], Tensor]
    decode: Callable[[Any, Tensor], Tensor]
    channels: Callable[[Config], int] = field(default=lambda config: config["latent_channels"])
    network: str | None = None  #: the name of its class; None: any
    numbers: tuple[str, ...] = ()  #: what its config must have besides
    encodes: bool = True  #: False: a sample is more than an image or a video, and `encode` raises UserError


@dataclass(frozen=True)
class Text:
    """How a family reads prompts, through the pipeline's own `encode_prompt`.

    `encode` gives the conditions (n, ...) of n prompts by the network's names for them; those of "no prompt", or of the
    negative prompt, come from `null`. A family that reads images has those of the prompts in `Prompt.images`; where
    what "no prompt" means depends on them, `encode` gives it too, under OWN_NULL and the name, and `null` leaves it
    out. `components` are the pipeline's parts that this needs.
    """

    components: tuple[str, ...]
    encode: Callable[[Any, list[str], Prompt], Cond]
    null: Callable[[Any, Prompt], Cond]
    optional: tuple[str, ...] = ()  #: components without which the pipeline encodes too, where its index has null
    negative: str | None = None  #: the makers' negative prompt; None: what their pipeline takes where it is given none
    advised: str | None = None  #: one that the makers draw with, which their pipeline takes only where it is given it


def padded_with_zeros(embeds: Tensor, mask: Tensor) -> Tensor:
    """Embeddings (n, L, D) with zeros where the mask (n, L) has them: attention looks at none, and none are stored."""
    return embeds.masked_fill(~mask.bool().unsqueeze(-1), 0)


def plain_text(
    components: tuple[str, ...],
    encode: Callable[[Any, list[str], Prompt], Cond],
    optional: tuple[str, ...] = (),
    negative: str | None = None,
    advised: str | None = None,
) -> Text:
    """For families whose "no prompt" is a prompt: the empty one, or the makers' own."""

    def null(pipe: Any, prompt: Prompt) -> Cond:
        chosen = (text for text in (prompt.negative, negative, "") if text is not None)
        return encode(pipe, [next(chosen)], prompt._replace(images=None))

    return Text(components, encode, null, optional, negative, advised)


class Packing(NamedTuple):
    """Between samples (B, C, ...) and a stock pipeline's latents, tokens (B, L, D) of most."""

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, Sequence[int]], Tensor]  #: (latents, (C, ...)) -> samples
    dims: int = 3  #: of the pipeline's latents, by which they are known
    drawn: bool = False  #: the pipeline draws its first noise so too; others draw it as a sample and pack it


@dataclass(frozen=True)
class Family:
    """One entry: how a pipeline of diffusers becomes a teacher, and a network a pipeline again."""

    name: str
    models: str  #: what people know it by
    #: Pipelines, by the names of classes in diffusers, or classes of your own; a student is saved as the first.
    pipelines: tuple[str | type, ...]
    component: str  #: the sub-folder of the network
    network: str | type  #: its class: the name of one in diffusers, or a ModelMixin of your own
    conditions: str  #: "none", "classes", "text"
    teacher: Callable[[nn.Module, Source], Teacher]
    lora_targets: tuple[str, ...] | None = None  #: the layers that LoRA usually adapts; None: all linear ones
    autoencoder: Autoencoder | None = None
    text: Text | None = None
    arguments: Callable[[int], Config] = field(default=lambda steps: {"num_inference_steps": steps})
    #: Arguments of the stock pipeline's call that guide by the scale g of u + g (c - u); None: it has none.
    guided: Callable[[float], Config] | None = field(default=lambda scale: {"guidance_scale": scale})
    #: Gives a pipeline the scale where that is no argument of its call; `load_pipeline` turns guidance off by it.
    steer: Callable[[Any, float], None] | None = None
    #: What files of a student's folder have otherwise than its teacher's, by their paths.
    settings: Mapping[str, Config] = field(default_factory=dict)
    built_with: tuple[str, ...] = ()  #: parts without which its pipeline cannot be made, whatever is left out
    packing: Packing | None = None  #: how the stock pipeline lays its latents out, where that is not the sample's shape
    #: (1, *shape) as the stock pipeline draws it, of a teacher; None: as a sample, or packed (`Packing.drawn`).
    first_noise: Callable[[Teacher, torch.Generator], Tensor] | None = None
    flow_grid: str = "own"  #: "given": the pipeline hands its flow scheduler 1, .., 1/n; "own": it takes its own row
    stock_guidance: str = "u + g (c - u)"  #: for the table
    loads_lora: bool = True  #: the stock pipeline has `load_lora_weights`
    videos: bool = False  #: the samples are videos
    reads_image: bool = False  #: with each prompt comes an image, which the stock pipeline's call takes as `image`
    several: bool = False  #: that call takes a list of images for a prompt; not `reads_image`: or none
    packages: tuple[str, ...] = ()  #: those that the stock pipeline imports, and diffusers does not bring
    #: The sub-folder of a second network of that class, for the noise below an index's `boundary_ratio`, if it has one.
    second: str | None = None
    single_file: bool = False  #: `from_single_file` of the network's class reads the weights of a student

    @property
    def networks(self) -> tuple[str, ...]:
        """The sub-folders of the network, and of a second one that a folder may have."""
        return (self.component,) if self.second is None else (self.component, self.second)

    @property
    def needed_parts(self) -> tuple[str, ...]:
        """The parts without which no image is drawn; a pipeline may have others, such as a safety checker."""
        vae = () if self.autoencoder is None else ("vae",)
        return (self.component, *vae, *(self.text.components if self.text else ()))

    @property
    def task(self) -> str:
        """What the pipeline does, as the hub calls it (`pipeline_tag`)."""
        if self.conditions != "text":
            return "unconditional-image-generation"
        made = "video" if self.videos else "image"
        return f"image-to-{made}" if self.reads_image else f"text-to-{made}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The pipelines as model_index.json names them."""
        return tuple(kind if isinstance(kind, str) else kind.__name__ for kind in self.pipelines)

    def pixels(self, folder: Path, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of images whose samples have that shape."""
        assert self.autoencoder is not None
        factor = self.autoencoder.factor(part_config(folder / "vae"))
        return shape[-2] * factor, shape[-1] * factor


def prompt_of(family: Family, folder: Path, teacher: Teacher, count: int = 1, negative: str | None = None) -> Prompt:
    """How so many prompts are encoded for the teacher, with as many example images for a family that reads them."""
    size = family.pixels(folder, teacher.shape)
    images = example_images(count, size) if family.reads_image else None
    return Prompt(size, negative=negative, images=images, frames=teacher.frames)


# -- autoencoders ------------------------------------------------------------------------------------------


def _kl_encode(vae: Any, images: Tensor) -> Tensor:
    z = vae.encode(images)
    z = z.latents if hasattr(z, "latents") else z.latent_dist.mode()  # a small one's, see `diffdistill decoder`
    return (z - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def _kl_decode(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)).sample


SMALL_AUTOENCODERS = {"AutoencoderKL": "AutoencoderTiny"}
"""What may stand in an autoencoder's place, for the same latents."""

KL = Autoencoder(
    lambda config: 2 ** (len(config["block_out_channels"]) - 1),
    _kl_encode,
    _kl_decode,
    network="AutoencoderKL",
    numbers=("scaling_factor",),
)


# -- latents -----------------------------------------------------------------------------------------------


def without_variance(y: Tensor, x: Tensor) -> Tensor:
    """(B, C, ...) an output of twice as many channels as x (B, C, ...), the rest of which is a learned variance.

    Another output is given as it is.
    """
    return y[:, : x.shape[1]] if y.shape[1] == 2 * x.shape[1] else y


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 w/2, 4 C), the tokens of Flux and Qwen-Image."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(y: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, h/2 w/2, 4 C) -> (B, C, h, w), `shape` being (channels, h, w); of a wide output C are more."""
    _, h, w = shape
    return y.view(len(y), h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(y), -1, h, w)


PATCHES = Packing(pack, unpack)
ROWS = Packing(lambda x: x.flatten(2).transpose(1, 2), lambda y, shape: y.transpose(1, 2).unflatten(2, shape[1:]))
"""(B, h w, C), row by row."""


def token_map(output: Any, x: Tensor, cond: Cond) -> Tensor:
    """(B, D, h', w'): a transformer block's image tokens (B, L, D) on the grid of the sample x (B, C, h, w)."""
    tokens = output[-1] if isinstance(output, tuple) else output
    h, w = x.shape[-2:]
    patch = math.isqrt(max(h * w // tokens.shape[1], 1))
    grid = (h // patch, w // patch)
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)


def last_tokens_map(patch: int) -> FeatureMap:
    """`token_map` of a block that has other tokens before the image's, of so many latent pixels a side each."""

    def features(output: Any, x: Tensor, cond: Cond) -> Tensor:
        tokens = output[-1] if isinstance(output, tuple) else output
        return token_map(tokens[:, -(x.shape[-2] * x.shape[-1] // patch**2) :], x, cond)

    return features


def middle_block(first: tuple[str, int], second: tuple[str, int]) -> str:
    """The name of a network's middle block, of its two lists of blocks, by name and length."""
    (name, count), (others, more) = first, second
    middle = (count + more) // 2
    return f"{name}.{middle}" if middle < count else f"{others}.{middle - count}"


def native_pixels(sample_size: Any, factor: int, resolution: Sides | None) -> Sides:
    """Height and width in pixels of a network's own sample_size in latent pixels, one number or two.

    UserError where it says none and no resolution is chosen.
    """
    sides = both_sides(sample_size)
    if sides is None and resolution is None:
        raise UserError(
            f"resolution: the teacher's sample_size is {sample_size}; give --resolution of encode or train, or "
            "write the size into its config"
        )
    height, width = sides or (0, 0)
    return height * factor, width * factor


def latent_size(family: str, factor: int, native: int | Sides, resolution: Sides | None, multiple: int = 1) -> Sides:
    """Height and width in latent pixels of images of `resolution` (`native` if None), both in pixels.

    `native` may be one number for both. UserError where they are no multiples of `factor` times `multiple`.
    """
    pixels = resolution or ((native, native) if isinstance(native, int) else native)
    whole = factor * multiple
    if any(side < whole or side % whole for side in pixels):
        near = "x".join(str(max(round(side / whole), 1) * whole) for side in pixels)
        asked, known = "x".join(map(str, pixels)), f"a multiple of {whole}, which {family} needs"
        if pixels[0] == pixels[1]:
            asked, near = str(pixels[0]), near.partition("x")[0]
        raise UserError(f"resolution: {asked} is not {known}; use {near}")
    return pixels[0] // factor, pixels[1] // factor


def check_positions(size: Sides, most: int, factor: int) -> None:
    """UserError for a side in latent pixels beyond the positions that a network has for `most`."""
    if max(size) > most:  # beyond which the network takes positions of other places, or none
        asked = "x".join(str(side * factor) for side in size)
        raise UserError(f"resolution: {asked} is beyond this network's positions; use {most * factor} a side at most")


def stock_noise(family: Family, teacher: Teacher, generator: torch.Generator) -> Tensor:
    """(1, *shape) the first noise of a stock pipeline, as it draws it."""
    packing, shape = family.packing, teacher.shape
    if family.first_noise is not None:
        return family.first_noise(teacher, generator)
    if packing is None or not packing.drawn:
        return torch.randn(1, *shape, generator=generator)
    laid_out = packing.pack(torch.empty(1, *shape)).shape
    return packing.unpack(torch.randn(laid_out, generator=generator), shape)


# -- the teacher -------------------------------------------------------------------------------------------


def with_null(denoiser: Denoiser, null: Cond) -> None:
    """Tell a denoiser the conditions of "no prompt", (1, ...) each; others it leaves as they are.

    Conditions that a prompt brings along under OWN_NULL go before them.
    """

    def nothing(cond: Cond) -> Cond:
        nulls = {key: value.to(cond[key]).expand_as(cond[key]) for key, value in null.items()}
        own = {key.removeprefix(OWN_NULL): value for key, value in cond.items() if key.startswith(OWN_NULL)}
        return cond | nulls | own

    denoiser.null = nothing


def latent_teacher(
    family: str,
    network: nn.Module,
    source: Source,
    shape: tuple[int, ...],
    schedule: tuple[Schedule, Output],
    call: Call,
    *,
    num_classes: int | None = None,
    feature_layer: str | None = None,
    feature_map: FeatureMap | None = None,
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None,
    lengths: Callable[[Cond], Tensor] | None = None,
) -> Teacher:
    """The teacher of a latent family; the null condition of one of text comes with its prompts (`with_null`)."""
    denoiser = Denoiser(
        network,
        *schedule,
        call=call,
        feature_layer=feature_layer,
        feature_map=feature_map,
        rescale=rescale,
        lengths=lengths,
    )
    return Teacher(denoiser, shape, num_classes, family, "", source.scheduler)
