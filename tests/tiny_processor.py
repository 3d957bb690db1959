"""Qwen2VLProcessor where torchvision is not installed, without which the one of transformers cannot be made.

Its own images go through transformers' image processor, which needs Pillow alone; what is missing is that each image
is as many placeholders in the text as it is words.
"""

import importlib.util
from typing import Any

import transformers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from transformers import Qwen2Tokenizer
from transformers.processing_utils import ProcessorMixin

IMAGE = "<|image_pad|>"
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}"


class Processor(ProcessorMixin):
    """Of one text and its images."""

    def __init__(self, image_processor: Any, tokenizer: Any):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, text: list[str], images: Any, padding: Any, return_tensors: str, **settings: Any) -> Any:
        if images is None:
            settings.pop("videos", None)
            return self.tokenizer(text, padding=padding, return_tensors=return_tensors, **settings)
        found = self.image_processor(images=images, return_tensors=return_tensors)
        (first, *rest) = text[0].split(IMAGE)
        for grid, part in zip(found["image_grid_thw"], rest, strict=True):
            first += IMAGE * (int(grid.prod()) // self.image_processor.merge_size**2) + part
        tokens = self.tokenizer([first], padding=padding, return_tensors=return_tensors)
        found.update(tokens)
        return found

    def save_pretrained(self, folder: Any, **settings: Any) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Any, **settings: Any) -> "Processor":
        reader = transformers.Qwen2VLImageProcessor.from_pretrained(folder)
        return cls(reader, Qwen2Tokenizer.from_pretrained(folder))


class TextProcessor(ProcessorMixin):
    """Of texts alone, as Qwen3VLProcessor where there is no image."""

    def __init__(self, image_processor: Any, tokenizer: Any):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, **settings: Any) -> Any:
        return self.tokenizer(**settings)

    def apply_chat_template(self, conversation: list[dict[str, Any]], **settings: Any) -> Any:
        texts = [{"role": each["role"], "content": each["content"][0]["text"]} for each in conversation]
        return [self.tokenizer.apply_chat_template(texts, **settings)]

    def save_pretrained(self, folder: Any, **settings: Any) -> None:
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Any, **settings: Any) -> "TextProcessor":
        return cls(None, Qwen2Tokenizer.from_pretrained(folder))


def make_of_texts(tokenizer: Any) -> Any:
    """Qwen3VLProcessor, or ours in its place."""
    if importlib.util.find_spec("torchvision") is not None:
        return transformers.Qwen3VLProcessor(
            transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen3VLVideoProcessor(), CHAT_TEMPLATE
        )
    stand_in()
    return TextProcessor(None, tokenizer)


def make(image_processor: Any, tokenizer: Any) -> Any:
    """The processor of transformers where it can be made, else ours under its name."""
    if importlib.util.find_spec("torchvision") is not None:
        return transformers.Qwen2VLProcessor(image_processor, tokenizer, transformers.Qwen2VLVideoProcessor())
    stand_in()
    return Processor(image_processor, tokenizer)


def stand_in() -> None:
    """Let the pipeline load ours, and show its encoders images of 16 pixels a side in place of 1024."""
    if importlib.util.find_spec("torchvision") is None:
        Processor.__name__ = Processor.__qualname__ = "Qwen2VLProcessor"
        Processor.__module__ = "transformers.models.qwen2_vl.processing_qwen2_vl"
        transformers.Qwen2VLProcessor = Processor
        TextProcessor.__name__ = TextProcessor.__qualname__ = "Qwen3VLProcessor"
        TextProcessor.__module__ = "transformers.models.qwen3_vl.processing_qwen3_vl"
        transformers.Qwen3VLProcessor = TextProcessor
    pipeline_qwenimage_edit.calculate_dimensions = small
    pipeline_qwenimage_edit_plus.calculate_dimensions = lambda area, ratio: small(area, ratio)[:2]


def small(area: int, ratio: float) -> tuple[int, int, None]:
    """Width and height for that ratio, of an area of 16 by 16 pixels for a megapixel, in multiples of 8."""
    width = (area / 4096 * ratio) ** 0.5
    return max(1, round(width / 8)) * 8, max(1, round(width / ratio / 8)) * 8, None
