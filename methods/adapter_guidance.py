"""AGD, adapter guidance distillation: Efficient Distillation of Classifier-Free Guidance using Adapters.

Jensen & Sadat 2025, arXiv:2503.07274 (code: cristianpjensen/agd).

Classifier-free guidance takes two passes of the network a step. Here the network stays as it is, to the bit, and
small adapters on its layers, which know guidance scale, time and class, make one pass give what two gave, for
every scale in a range. They are trained at points of guided trajectories, where they will be used. The number of
sampling steps stays what it was; the adapters can be put on a student of few steps as well.

The trajectories are not stored. A batch is B chains of the guided sampler (scaffold/chains.py), at staggered
steps: the guided output at their present points is the target, and it is also what moves them on. A training
step so costs one guided call and one pass of the student.

Deviations: the authors store trajectories of their 1000-step sampler and shuffle the points; here neighbouring
batches hold neighbouring points of the same chains, and the chains are DDIM's. What adapters add is multiplied
by (scale - 1), so that scale 1 is the base model to the bit. They share one embedding of scale, time and class,
whose features of the scale have periods of 2 pi and more; the authors' adapters have one each, with random
frequencies, on the base's own embeddings or on new ones. Their MLPs have ReLU and layer norm, these SiLU. The gate
of the authors' 'mlp_gate' begins at 1/2 with a random correction behind it; here its last layer begins at zero, as
that of the others. The loss compares the network's own outputs, which is eps for the authors' networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.prediction import Prediction
from diffdistill.options import GuidedSampling, ScaleRange, option
from diffdistill.players.guidance_adapters import adapted, new_adapters
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.imitating import ImitatingMethod

ABOUT = About(
    paper="Jensen & Sadat 2025, arXiv:2503.07274",
    data="nothing; conditions are drawn uniformly",
    kind="guidance",
    equations={
        "guided target and loss (section 3; authors' train.py)": "AdapterGuidance.error, core.guidance.guide",
        "guided trajectories (section 3; authors' sample_trajectories.py)": "scaffold.chains.GuidedChains",
        "adapters: additive, cross-attention, gated MLP (authors' models/)": "players.adapter_networks.KINDS",
    },
)


@dataclass(frozen=True)
class Config(GuidedSampling, ScaleRange, student_lr=1e-4, guidance_max=6.0, guidance_scale=3.0):
    """AGD's options; AdamW trains the adapters alone."""

    adapter: Literal["additive", "attention", "mlp_gate"] = option(
        "additive", "additive: the same at all positions, blind to x; attention, mlp_gate: of the layer's input"
    )
    adapter_width: int = option(64, "hidden width of the adapters", at_least=2)
    adapted_layers: Literal["attention", "blocks"] = option(
        "attention", "attention: the attention layers; blocks: these and the residual blocks"
    )
    loss: Literal["l2", "l1"] = option("l2", "mean square or mean absolute error of the network's output")


class AdapterGuidance(ImitatingMethod):
    """The student is the teacher's own network with adapters, which alone are trained."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        scales = (config.guidance_min, config.guidance_max)
        super().__init__(teacher, config, student or self.adapted(teacher, config), scales)

    @staticmethod
    def adapted(teacher: Teacher, config: Config) -> Denoiser:
        """The teacher with adapters that have no effect yet."""
        adapters = new_adapters(teacher, config.adapter, config.adapter_width, config.adapted_layers)
        return adapted(frozen(teacher.denoiser), adapters, config.scale)

    def sampler(self) -> Sampler:
        return Sampler(self.student, self.schedule.levels(self.config.sampling_steps).tolist(), DDIM())

    def error(self, target: Prediction, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Tensor:
        output = self.student(x_t, t, cond, Extra(scale)).y
        return F.mse_loss(output, target.y) if self.config.loss == "l2" else F.l1_loss(output, target.y)


METHOD = AdapterGuidance
