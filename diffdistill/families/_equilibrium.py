"""A network of ours as a model of diffusers: how a student that is an equilibrium transformer is saved, and loads.

A folder of one has `equilibrium.py` beside the weights: `players/equilibrium.py` and the class here, in one file that
needs nothing of this package. `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` runs it, and
`save_pretrained` of what it gives writes such a folder again.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch import Tensor, nn

from diffdistill.players import equilibrium
from diffdistill.players.equilibrium import EquilibriumTransformer

FILE = "equilibrium.py"

_IMPORTS = """
from pathlib import Path
from types import SimpleNamespace

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
"""


class Equilibrium(ModelMixin, ConfigMixin):
    """An equilibrium transformer in the place of another network.

    Args:
        kind: the class of diffusers in whose place it stands.
        network: the config that one would have, which pipelines read.
        arguments: those of `EquilibriumTransformer`.
    """

    @register_to_config
    def __init__(
        self,
        kind: str = "UNet2DModel",
        network: dict[str, Any] | None = None,
        arguments: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.transformer = EquilibriumTransformer(**(arguments or {}))

    @property
    def config(self) -> Any:
        """What pipelines read: that of the network in whose place this stands, and its own."""
        own = self._internal_dict
        return FrozenDict({**dict(own["network"] or {}), **own})

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """What `save_pretrained` writes: the code goes along."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        (Path(save_directory) / FILE).write_text(SOURCE, encoding="utf-8")

    def forward(
        self, sample: Tensor, timestep: Any = None, class_labels: Any = None, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """The output (B, ...) as networks of diffusers give it."""
        output = self.transformer(sample, timestep, class_labels)
        return SimpleNamespace(sample=output) if return_dict else (output,)


SOURCE = f"""{inspect.getsource(equilibrium)}
{_IMPORTS}
FILE = {FILE!r}
SOURCE = Path(__file__).read_text(encoding="utf-8")


{inspect.getsource(Equilibrium)}

Equilibrium.__module__ = FILE.removesuffix(".py")
"""
Equilibrium.__module__ = FILE.removesuffix(".py")  # by which model_index.json finds the file


def in_place_of(kind: str, config: dict[str, Any], transformer: EquilibriumTransformer) -> Equilibrium:
    """The transformer, whose weights are shared, in the place of a network of that class and config.

    The config may be that of such a student, whose place it takes.
    """
    plain = {name: value for name, value in (config.get("network") or config).items() if name[:1] != "_"}
    if plain.get("out_channels") is not None:  # of a network that also gives a variance
        plain["out_channels"] = plain["in_channels"]
    with torch.device("meta"):
        made = Equilibrium(kind, plain, transformer.described)
    made.transformer = transformer
    return made


def stand_in(model: Equilibrium) -> nn.Module:
    """A network, without weights, in whose place the model stands."""
    own = model._internal_dict
    with torch.device("meta"):
        return getattr(diffusers, own["kind"]).from_config(dict(own["network"] or {}))
