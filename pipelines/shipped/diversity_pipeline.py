"""Diffusers pipelines that start with the base model and go on with its few-step student.

A student loses variety mostly in its first step (Gandikota & Bau 2025, arXiv:2503.10637). So the base model, with its
own scheduler and guidance, goes from noise to its timestep nearest the student's second one, and the student takes its
remaining steps from there.

This file needs nothing of diffdistill: an exported folder holds a copy of it, and
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` runs that copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline


def hand_off_index(timesteps: torch.Tensor, t: Any) -> int:
    """How many steps the base takes: its timestep nearest t, and of equally near ones the last.

    The last, because some schedulers visit a timestep twice and correct their sample the second time.
    Raises ValueError if the base would take none.
    """
    distance = (timesteps.double() - float(t)).abs()
    index = int((distance == distance.min()).nonzero()[-1])
    if index == 0:
        raise ValueError(f"base_steps: {len(timesteps)} steps are too few to end one near timestep {float(t):g}")
    return index


def carried(x: torch.Tensor, base: Any, base_t: Any, student: Any, t: Any) -> torch.Tensor:
    """The base scheduler's sample at base_t in the convention of the student's scheduler at t.

    Both networks read the variance-preserving form, which a scheduler makes of its sample in `scale_model_input`, so
    the sample goes through that form: x0 + sigma eps of the Euler schedulers is divided by sqrt(1 + sigma^2).
    """
    return base.scale_model_input(x, base_t) / student.scale_model_input(torch.ones_like(x), t)


class _FromSecondStep:
    """A scheduler whose first step has been taken already."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._scheduler, name)
        # Some pipelines tell it to begin with the first of the timesteps that they see.
        return (lambda index=0: value(index + 1)) if name == "set_begin_index" else value

    @property
    def timesteps(self) -> torch.Tensor:
        return self._scheduler.timesteps[1:]

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self._scheduler.set_timesteps(*args, **kwargs)
        if hasattr(self, "set_begin_index"):
            self.set_begin_index()


class _StartsWithBase:
    """What the pipelines below add to stock ones: `base_unet`, `base_scheduler`, and a call in two parts."""

    _inside = False  # a part of a call is running

    def _add_base(self: Any, base_unet: Any, base_scheduler: Any, **settings: Any) -> None:
        self.register_modules(base_unet=base_unet, base_scheduler=base_scheduler)
        self.register_to_config(**settings)

    def save_config(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """What `save_pretrained` and `push_to_hub` write last: this file belongs to it."""
        super().save_config(save_directory, *args, **kwargs)  # type: ignore[misc]
        index, source = Path(save_directory) / "model_index.json", Path(__file__)
        values = json.loads(index.read_text(encoding="utf-8"))
        values.pop("_module", None)
        values["_class_name"] = [source.stem, type(self).__name__]
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (Path(save_directory) / source.name).write_bytes(source.read_bytes())

    @contextmanager
    def _with(self: Any, **parts: Any) -> Iterator[None]:
        """The stock call with other parts. Not by setattr, which would rewrite the config."""
        own = {name: self.__dict__[name] for name in parts}
        self.__dict__.update(parts, _inside=True)
        try:
            yield
        finally:
            self.__dict__.update(own, _inside=False)

    def maybe_free_model_hooks(self: Any) -> None:
        # Offloading takes in all networks; it is set up again when each is back in its place.
        if not self._inside:
            super().maybe_free_model_hooks()  # type: ignore[misc]

    @torch.no_grad()
    def base_latents(
        self: Any,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        base_steps: int | None = None,
        base_guidance: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What the student starts from: the base model's latents, as the student's scheduler has them."""
        steps = num_inference_steps or self.config.num_inference_steps
        if steps < 2:
            raise ValueError("num_inference_steps: the base model stands in for the first of two steps or more")
        base, student, device = self.base_scheduler, self.scheduler, self._execution_device
        base_steps = self.config.base_steps if base_steps is None else base_steps
        base.set_timesteps(base_steps, device=device)
        student.set_timesteps(steps, device=device)
        last = hand_off_index(base.timesteps, student.timesteps[1])

        def stop(pipeline: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipeline._interrupt = i == last - 1
            return {}

        sized = {"height": self.config.height, "width": self.config.width}
        rest = sized | kwargs | {"output_type": "latent", "return_dict": False, "callback_on_step_end": stop}
        rest.pop("callback_on_step_end_tensor_inputs", None)
        guidance = self.config.base_guidance if base_guidance is None else base_guidance
        with self._with(unet=self.base_unet, scheduler=base):
            x = super().__call__(prompt, num_inference_steps=base_steps, guidance_scale=guidance, **rest)[0]  # type: ignore[misc]
        return carried(x, base, base.timesteps[last], student, student.timesteps[1])

    @torch.no_grad()
    def __call__(
        self: Any,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        base_steps: int | None = None,
        base_guidance: float | None = None,
        guidance_scale: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """`base_steps` of the base model's own from noise to clean data, of which the first are taken; 0: the student
        alone. `base_guidance` is its guidance scale, `guidance_scale` the student's. `num_inference_steps` are the
        student's. What is not told comes from the folder. The other arguments are those of the stock pipeline;
        `callback_on_step_end` is called in the student's steps.
        """
        steps = num_inference_steps or self.config.num_inference_steps
        kwargs = {"height": self.config.height, "width": self.config.width} | kwargs
        parts = {}
        if (self.config.base_steps if base_steps is None else base_steps) != 0:
            kwargs["latents"] = self.base_latents(
                prompt, num_inference_steps=steps, base_steps=base_steps, base_guidance=base_guidance, **kwargs
            )
            parts = {"scheduler": _FromSecondStep(self.scheduler)}
        with self._with(**parts):
            images = super().__call__(  # type: ignore[misc]
                prompt, num_inference_steps=steps, guidance_scale=guidance_scale, **kwargs
            )
        self.maybe_free_model_hooks()
        return images


class DiversityPipeline(_StartsWithBase, StableDiffusionPipeline):
    """Stable Diffusion 1 and 2. `unet` and `scheduler` are the student's."""

    model_cpu_offload_seq = "text_encoder->image_encoder->base_unet->unet->vae"

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        base_unet: Any,
        base_scheduler: Any,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
        base_steps: int = 20,
        base_guidance: float = 7.0,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self._add_base(
            base_unet,
            base_scheduler,
            base_steps=base_steps,
            base_guidance=base_guidance,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
        )


class DiversityXLPipeline(_StartsWithBase, StableDiffusionXLPipeline):
    """Stable Diffusion XL. `unet` and `scheduler` are the student's."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->base_unet->unet->vae"

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        base_unet: Any,
        base_scheduler: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        base_steps: int = 20,
        base_guidance: float = 7.0,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self._add_base(
            base_unet,
            base_scheduler,
            base_steps=base_steps,
            base_guidance=base_guidance,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
        )
