"""Networks that take prompts of one length in a call."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.experts import Experts
from diffdistill.core.guidance import guided
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.rows import by_length
from diffdistill.core.schedule import LinearFlow
from diffdistill.errors import UserError
from diffdistill.players.teacher import trainable_copy
from diffdistill.training.sharding import shard


class Counting(nn.Module):
    """Its output depends on how long the prompts of the call are; `sign` tells two of them apart."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(sign))
        self.layers = nn.ModuleList([nn.Identity()])
        self.lengths: list[int] = []

    def forward(self, x: Tensor, time: Tensor, text: Tensor, scale: Tensor | None = None) -> Tensor:
        self.lengths.append(text.shape[1])
        scale = torch.ones(len(x)) if scale is None else scale
        told = text.sum(1) * text.shape[1] * scale[:, None] + time[:, None]
        return self.layers[0](x * self.weight + told)


def lengths(cond: Cond) -> Tensor:
    return cond["mask"].sum(1)


def call(network: Any, x: Tensor, time: Tensor, cond: Cond, extra: Extra | None = None) -> Tensor:
    own = lengths(cond).tolist()
    assert len(set(own)) == 1, "prompts of two lengths in a call"
    return network(x, time, cond["text"][:, : own[0]], None if extra is None else extra.scale)


def null(cond: Cond) -> Cond:
    return {"text": 0 * cond["text"], "mask": torch.arange(3).expand_as(cond["mask"]) < 1}


def conditions() -> Cond:
    mask = torch.arange(3) < torch.tensor([[2], [3], [2], [1]])
    return {"text": torch.randn(4, 3, 2) * mask.unsqueeze(2), "mask": mask}


@pytest.mark.parametrize("two", [False, True])
def test_each_sample_is_as_alone(two: bool) -> None:
    """Guided, as a copy, for a discriminator, with a second input and with two networks."""
    network = Experts({"a": Counting(), "b": Counting(-1.0)}, 500) if two else Counting()
    layer = "a.layers.0" if two else "layers.0"
    denoiser = Denoiser(
        network, LinearFlow(), OUTPUTS["flow_prediction"], call=call, null=null, feature_layer=layer, lengths=lengths
    )
    t = denoiser.schedule.angle(torch.tensor([0.3, 0.9, 0.8, 0.7], dtype=torch.float64))
    x, cond = torch.randn(4, 2), conditions()
    copied = trainable_copy(denoiser)
    twice = denoiser.with_network(network, layer)
    twice.extra_call = call
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with torch.no_grad():
        for each in (
            lambda x, t, cond, s: denoiser(x, t, cond).y,
            lambda x, t, cond, s: copied(x, t, cond).y,
            lambda x, t, cond, s: guided(denoiser, 3.0)(x, t, cond).y,
            lambda x, t, cond, s: denoiser.features(x, t, cond),
            lambda x, t, cond, s: twice(x, t, cond, Extra(s)).y,
        ):
            whole = each(x, t, cond, scale)
            alone = [each(x[i], t[i], {k: v[i] for k, v in cond.items()}, scale[i]) for i in torch.arange(4).split(1)]
            assert torch.allclose(whole, torch.cat(alone), atol=1e-5)


def test_one_call_for_prompts_of_one_length() -> None:
    network = Counting()
    denoiser = Denoiser(network, LinearFlow(), OUTPUTS["flow_prediction"], call=call, lengths=lengths)
    t, cond = torch.full((4,), 0.5, dtype=torch.float64), conditions()
    denoiser(torch.randn(4, 2), t, cond)
    denoiser(torch.randn(4, 2), t, cond | {"mask": torch.ones(4, 3, dtype=torch.bool)})
    assert network.lengths == [1, 2, 3, 3]
    assert by_length(torch.zeros(2, device="meta"), lambda rows: [torch.tensor(rows is None)])[0]
    with pytest.raises(UserError, match="launcher: FSDP does not divide a network that is called once for each length"):
        shard([denoiser], torch.device("cpu"))
