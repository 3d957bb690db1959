"""A network of diffusers that is several, each for some of the classes: how such students are saved, and load.

A folder of one has a copy of this file beside the weights, and `DiffusionPipeline.from_pretrained(folder,
trust_remote_code=True)` runs it without diffdistill; `save_pretrained` of what it gives writes such a folder again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch import Tensor, nn

FILE = "by_class.py"


class ByClass(ModelMixin, ConfigMixin):
    """Each sample goes to the network of its class.

    Args:
        kind: the class of diffusers that the networks are of.
        network: the config of each of them.
        parts: for each label which network is its own.
    """

    __module__ = FILE.removesuffix(".py")  # by which model_index.json finds the copy

    @register_to_config
    def __init__(
        self, kind: str = "UNet2DModel", network: dict[str, Any] | None = None, parts: tuple[int, ...] = (0, 1)
    ):
        super().__init__()
        model = getattr(diffusers, kind)
        self.networks = nn.ModuleList(model.from_config(network or {}) for _ in range(max(parts) + 1))

    @property
    def config(self) -> Any:
        """What pipelines read: the networks' own, with what says which is whose."""
        own = self._internal_dict
        return FrozenDict({**dict(own["network"] or {}), **own})

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """What `save_pretrained` writes: the code goes along."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        (Path(save_directory) / FILE).write_bytes(Path(__file__).read_bytes())

    def forward(
        self, sample: Tensor, timestep: Any, class_labels: Tensor, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """The output (B, ...) of the networks of these labels (B,), as theirs."""
        whose = torch.tensor(self.config["parts"], device=class_labels.device)[class_labels]
        there, outputs = [(whose == k).nonzero()[:, 0] for k in range(len(self.networks))], []
        for network, rows in zip(self.networks, there, strict=True):
            if len(rows):
                each = isinstance(timestep, Tensor) and timestep.ndim > 0 and len(timestep) == len(sample)
                time = timestep[rows] if each else timestep
                labels = class_labels[rows]
                outputs.append(network(sample[rows], time, class_labels=labels, return_dict=False, **kwargs)[0])
        output = torch.cat(outputs)[torch.cat(there).argsort()]
        return SimpleNamespace(sample=output) if return_dict else (output,)


def by_class(networks: Sequence[Any], parts: Sequence[int]) -> ByClass:
    """The networks as one, which shares their weights."""
    config = {name: value for name, value in dict(networks[0].config).items() if name[:1] != "_"}
    with torch.device("meta"):
        made = ByClass(type(networks[0]).__name__, config, tuple(parts))
    made.networks = nn.ModuleList(networks)
    return made
