"""A diffusers pipeline whose guidance takes one pass a step: the network and its guidance adapters.

This file needs nothing of diffdistill: an exported folder holds a copy of it, and
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` runs that copy.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class AdaptedPipeline(DiffusionPipeline):
    """Class-conditional images at any guidance scale. `unet` is the base model, as it was before the adapters."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: Any, scheduler: Any, adapter: Any, num_inference_steps: int = 20):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, adapter=adapter)
        self.register_to_config(num_inference_steps=num_inference_steps)

    def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """What `save_pretrained` and `push_to_hub` write last: the adapters and both files of code belong to it."""
        super().save_config(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        (folder / "adapter").mkdir(exist_ok=True)
        self.adapter.save(folder / "adapter", **self.adapter.described)
        values = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        values.pop("_module", None)
        for kind, key, where in (
            (type(self), "_class_name", folder),
            (type(self.adapter), "adapter", folder / "adapter"),
        ):
            source = Path(inspect.getsourcefile(kind) or "")
            values[key] = [source.stem, kind.__name__]
            (where / source.name).write_bytes(source.read_bytes())
        (folder / "model_index.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: torch.Tensor | list[int] | int | None = None,
        guidance_scale: float | list[float] | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """`guidance_scale` is one number for all images or one for each; 1 is no guidance, default the trained one.

        Without `class_labels` they are drawn at random. The other arguments are those of diffusers' pipelines.
        """
        device, config = self._execution_device, self.unet.config
        if class_labels is None:
            class_labels = torch.randint(config.num_class_embeds - 1, (batch_size,)).tolist()
        labels = torch.as_tensor(class_labels, device=device).reshape(-1).expand(batch_size)
        network = self.adapter.attached(self.unet).to(device)
        scale = network.guidance_scale if guidance_scale is None else torch.tensor(guidance_scale, device=device)
        scale = scale.reshape(-1).expand(batch_size)

        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        # The schedulers of flow matching have neither: their noise and input are as they should be.
        x = latents.to(device, self.unet.dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(self.scheduler, "scale_model_input", lambda x, t: x)
        self.scheduler.set_timesteps(num_inference_steps or self.config.num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            y = network(scaled(x, t), t, class_labels=labels, guidance_scale=scale, return_dict=False)[0]
            x = self.scheduler.step(y, t, x, return_dict=False)[0]

        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
