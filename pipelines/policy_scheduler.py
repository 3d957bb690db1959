"""The scheduler of a student whose passes say policies: each step follows one to the student's next level.

A folder that holds one has a copy of this file and of `core/policies.py` in scheduler/, and the one imports the other
from beside it: `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` runs them without diffdistill, and
`save_pretrained` of what it gives writes such a folder again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffdistill.core.policies import policy_of


class PolicyScheduler(SchedulerMixin, ConfigMixin):
    """A step reads the network's wide output and a sample, and gives the sample at the next level.

    Args:
        policy: "mixture", "nodes", "heads" or "momenta".
        components: Gaussians of a mixture, values on the way, heads, or momenta.
        substeps: small steps from a level to the next.
        channels: of a sample.
        angles: of the levels, or of all heads, and 0; t = atan2(sigma, alpha * std of the data).
        times: what the network is told at the levels.
        whole_times: whether these are whole numbers.
        sizes: at the levels and at the end, what samples of unit variance are multiplied by in the pipeline.
        inputs: at the levels, what the pipeline's sample is multiplied by for the network.
        of_x: at the levels, x0 = of_x x + of_y y for samples of unit variance and the network's output y.
        of_y: see there.
        init_noise: the standard deviation of the noise that the pipeline begins with.
        passes: of heads, the numbers of steps that may be taken, the first by default: each skips as many heads.
        teacher: the config of the teacher's scheduler, for diffdistill.
    """

    order = 1
    __module__ = Path(__file__).stem  # by which model_index.json finds the copy

    @register_to_config
    def __init__(
        self,
        policy: str = "mixture",
        components: int = 8,
        substeps: int = 32,
        channels: int = 4,
        angles: tuple[float, ...] = (1.5707963267948966, 0.0),
        times: tuple[float, ...] = (1000.0,),
        whole_times: bool = False,
        sizes: tuple[float, ...] = (1.0, 1.0),
        inputs: tuple[float, ...] = (1.0,),
        of_x: tuple[float, ...] = (1.0,),
        of_y: tuple[float, ...] = (-1.0,),
        init_noise: float = 1.0,
        num_train_timesteps: int = 1000,
        passes: tuple[int, ...] = (),
        teacher: dict[str, Any] | None = None,
    ):
        self.init_noise_sigma = init_noise
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: Any = None,
    ) -> None:
        """Back to the first level. The levels are the student's own; ValueError for another number of them."""
        own = list(self.config.passes) or [len(self.config.times)]
        for given in (timesteps, sigmas):
            num_inference_steps = num_inference_steps if given is None else len(given)
        steps = own[0] if num_inference_steps is None else num_inference_steps
        if steps not in own:
            made = " or ".join(str(n) for n in own)
            raise ValueError(f"num_inference_steps: this student makes {made} steps, and {steps} were asked for")
        self._stride = len(self.config.times) // steps
        kind = torch.int64 if self.config.whole_times else torch.float32
        times = torch.tensor(self.config.times, dtype=torch.float64)[:: self._stride]
        self.timesteps = times.to(kind).to(device)
        angles = torch.tensor(self.config.angles, dtype=torch.float64)[:: self._stride]
        self.sigmas = torch.sin(angles) / (torch.sin(angles) + torch.cos(angles))
        self.num_inference_steps = steps

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """What `save_pretrained` writes: the code goes along."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        for file in (__file__, policy_of.__code__.co_filename):
            text = Path(file).read_text(encoding="utf-8")
            text = text.replace("from diffdistill.core.policies import", "from .policies import")
            (Path(save_directory) / Path(file).name).write_text(text, encoding="utf-8")

    def set_begin_index(self, begin_index: int = 0) -> None:
        """A step is found by its timestep."""

    def _at(self, timestep: Any) -> int:
        return int((self.timesteps - timestep).abs().argmin()) * self._stride

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """What the network reads."""
        return sample * self.config.inputs[self._at(timestep)]

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """The sample at the next level, after the last one the clean sample; no noise is drawn."""
        c, k = self.config, self._at(timestep)
        end = k + self._stride
        # Channels first; of packed tokens (B, N, channels * n) each channel's n features are a position more.
        packed = sample.ndim == 3
        x, y = (part.float() for part in (sample, model_output))
        if packed:
            n = sample.shape[2] // c.channels
            x, y = (part.unflatten(2, (-1, n)).movedim(2, 1) for part in (x, y))
        s, e, of_x, of_y = (
            torch.full((len(x),), value, dtype=torch.float64, device=x.device)
            for value in (c.angles[k], c.angles[end], c.of_x[k], c.of_y[k])
        )
        nodes = None
        if c.policy == "heads":
            nodes, of_x, of_y = (
                torch.tensor(row, dtype=torch.float64, device=x.device) for row in (c.angles, c.of_x, c.of_y)
            )
        x = x / c.sizes[k]
        policy = policy_of(c.policy, c.components, y, x, s, e, of_x, of_y, nodes)
        x = policy.roll(x, s, e, c.substeps) * c.sizes[end]
        if packed:
            x = x.movedim(1, 2).flatten(2)
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
