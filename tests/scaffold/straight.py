"""Tiny networks and batches for the checks of the wiring, and what is around them written out in plain formulas.

Nothing here calls the package's own schedules, conversions, noise or guidance: a whole turn of a method is compared
with a straight-line rewrite of it. All is float64, so that the two agree to rounding.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, Schedule, TrigFlow
from diffdistill.players.teacher import Teacher, only_trains, trainable
from diffdistill.scaffold.method import Batch, Method, Pair, Turn

SHAPE, CLASSES, SIZE, WHOLE, KEY = (1, 3, 3), 3, 6, 13, (5, 4, 4)
"""Of a sample; without the null class, which is the last label; of a batch, and of the step, of which it is a part;
seed, step and the place of its first sample."""


# -- noise, from the names of what it is for ---------------------------------------------------------------------------


def draw(*parts: int | str) -> torch.Generator:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def step_draw(purpose: str, key: tuple[int, ...] = KEY) -> torch.Generator:
    """Of all samples of a step."""
    return draw(*key[:2], 0, purpose)


def mine(of_the_step: Tensor, key: tuple[int, ...] = KEY, copies: int = 1) -> Tensor:
    """The batch's rows, of each sample so many."""
    return of_the_step[copies * key[2] : copies * (key[2] + SIZE)]


def normal(purpose: str, key: tuple[int, ...] = KEY, copies: int = 1) -> Tensor:
    return mine(torch.randn(copies * WHOLE, *SHAPE, generator=step_draw(purpose, key)), key, copies)


def uniform(purpose: str, key: tuple[int, ...] = KEY, copies: int = 1) -> Tensor:
    drawn = torch.rand(copies * WHOLE, generator=step_draw(purpose, key), dtype=torch.float64)
    return mine(drawn, key, copies)


def whole(n: int, purpose: str, key: tuple[int, ...] = KEY, copies: int = 1) -> Tensor:
    return mine(torch.randint(n, (copies * WHOLE,), generator=step_draw(purpose, key)), key, copies)


def gaussian(purpose: str, key: tuple[int, ...] = KEY) -> Tensor:
    """(B,) standard normal."""
    return mine(torch.randn(WHOLE, generator=step_draw(purpose, key), dtype=torch.float64), key)


def fold(t: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return t[:, None, None, None]


def noised(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    return fold(torch.cos(t)) * x + fold(torch.sin(t)) * eps


# -- a network ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Nonlinear in what it reads, its time and its class; `middle` is a layer that a discriminator can read."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.class_embedding = nn.Embedding(CLASSES + 1, 4)
        self.read = nn.Conv2d(1, 4, 3, padding=1)
        self.time_embedding = nn.Linear(3, 4)
        self.dropout = nn.Dropout(dropout)
        self.middle = nn.Conv2d(4, 4, 1)
        self.write = nn.Conv2d(4, 1, 3, padding=1)

    def hidden(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        clock = self.time_embedding(
            torch.stack([torch.sin(0.3 * time), torch.cos(0.05 * time), torch.sin(0.003 * time)], 1)
        )
        h = self.read(x) + (clock + self.of_class(class_labels))[:, :, None, None]
        return self.middle(self.dropout(torch.tanh(h)))

    def of_class(self, class_labels: Tensor) -> Tensor:
        """What a class (B,) is embedded as, or a class and the guidance scale (B, 2), as straight lines have them."""
        part: Any = self.class_embedding
        if class_labels.ndim == 1:
            return part(class_labels)
        labels, scale = class_labels.unbind(1)
        return part.layer(labels.long()) + part.of_scale(scale)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        return self.write(torch.tanh(self.hidden(x, time, class_labels)))


def scatter(module: nn.Module, seed: int, size: float = 0.3) -> None:
    """Give a module weights of its own, so that no player is another's copy."""
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.add_(size * torch.randn(p.shape, generator=draw(seed, k, "weights"), dtype=p.dtype))


def nothing(cond: Cond) -> Cond:
    return {"class_labels": torch.full_like(cond["class_labels"], CLASSES)}


# -- the normal form, plainly ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """A kind of schedule and output: its formulas in the papers' own units, and a teacher of it.

    `std` is the data's standard deviation: images are `std` times the normal form's x0.
    """

    kind: str
    std: float
    steps: int = 24  # of vp and eps

    def alphas(self) -> Tensor:
        """abar of a discrete chain; `vp` ends in pure noise."""
        u = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        return torch.cos((0.05 + (0.95 if self.kind == "vp" else 0.85) * u) * math.pi / 2) ** 2

    def table(self) -> Tensor:
        abar = self.alphas()
        return torch.atan2((1 - abar).sqrt(), abar.sqrt() * self.std)

    def schedule(self) -> Schedule:
        if self.kind in ("vp", "eps"):
            return DiscreteVP(self.alphas(), self.std)
        return {
            "trig": TrigFlow(self.std),
            "edm": EDM(sigma_min=0.01, sigma_max=30.0, data_std=self.std),
            "flow": LinearFlow(shift=2.0, data_std=self.std),
        }[self.kind]

    def teacher(self, dropout: float = 0.0, seed: int = 1) -> Teacher:
        names = {
            "vp": "v_prediction",
            "eps": "epsilon",
            "trig": "v_prediction",
            "edm": "edm",
            "flow": "flow_prediction",
        }
        net = Net(dropout)
        scatter(net, seed)
        row = OUTPUTS[names[self.kind]]
        denoiser = Denoiser(net, self.schedule(), row, null=nothing, feature_layer="middle")
        return Teacher(denoiser, SHAPE, CLASSES)

    def ends(self) -> tuple[float, float]:
        """The least and the greatest angle that the network knows."""
        if self.kind in ("vp", "eps"):
            return float(self.table()[0]), float(self.table()[-1])
        if self.kind == "edm":
            return math.atan(0.01 / self.std), math.atan(30 / self.std)
        return 0.0, math.pi / 2

    def native(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Network time, alpha, sigma and the input's factor, each (B,)."""
        low, high = self.ends()
        t = t.clamp(low, high)
        cos, sin = torch.cos(t) / self.std, torch.sin(t)
        if self.kind == "trig":
            return t, cos, sin, torch.ones_like(t)
        if self.kind == "edm":
            sigma = self.std * torch.tan(t)
            return torch.log(sigma) / 4, torch.ones_like(t), sigma, torch.ones_like(t)
        if self.kind == "flow":
            return 1000 * sin / (cos + sin), cos / (cos + sin), sin / (cos + sin), 1 / (cos + sin)
        table, norm = self.table(), torch.sqrt(cos**2 + sin**2)
        below = (table[None] <= t[:, None]).sum(1).clamp(1, len(table) - 1) - 1
        time = below + (t - table[below]) / (table[below + 1] - table[below])
        return time, cos / norm, sin / norm, 1 / norm

    def x0_eps(self, net: Callable[..., Tensor], x_t: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """What the network says of image (of unit variance) and noise."""
        y = self.output(net, x_t, t, **cond)
        _, alpha, sigma, _ = (fold(v) for v in self.native(t))
        # x_t has the variance that data of unit variance have; what diffusers adds noise to is this times `size`.
        x = x_t * torch.sqrt((alpha * self.std) ** 2 + sigma**2)
        if self.kind in ("trig", "vp"):  # v = alpha eps - sigma x0; trig's is of x0/std
            if self.kind == "trig":
                cos, sin = fold(torch.cos(t)), fold(torch.sin(t))
                det = cos * alpha + sin * sigma * self.std
                return (alpha * x_t - sin * y) / det, (cos * y + sigma * self.std * x_t) / det
            return (alpha * x - sigma * y) / self.std, sigma * x + alpha * y
        if self.kind == "eps":
            return (x - sigma * y) / alpha / self.std, y
        if self.kind == "edm":
            total = torch.sqrt(sigma**2 + self.std**2)
            image = self.std**2 / total**2 * x + sigma * self.std / total * y
            return image / self.std, (x - image) / sigma
        return (x - sigma * y) / self.std, x + (1 - sigma) * y

    def output(self, net: Callable[..., Tensor], x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The network's own output."""
        time, _, _, factor = self.native(t)
        return net(fold(factor) * x_t, time, **cond)

    def guided(
        self, net: Callable[..., Tensor], x_t: Tensor, t: Tensor, labels: Tensor, scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Image and noise of classifier-free guidance."""
        s = scale if isinstance(scale, float) else fold(scale)
        with_class = self.x0_eps(net, x_t, t, class_labels=labels)
        without = self.x0_eps(net, x_t, t, class_labels=torch.full_like(labels, CLASSES))
        return without[0] + s * (with_class[0] - without[0]), without[1] + s * (with_class[1] - without[1])

    # -- levels ------------------------------------------------------------------------------------------------------

    def angle(self, level: float) -> float:
        if self.kind in ("vp", "eps"):
            return float(self.table()[int(level)])
        if self.kind == "edm":
            return math.atan(level / self.std)
        return math.atan2(level, (1 - level) * self.std) if self.kind == "flow" else level

    def at(self, u: Tensor) -> Tensor:
        """The angles at fractions of the schedule's own times."""
        if self.kind in ("vp", "eps"):
            return self.table()[(u * self.steps).long().clamp(0, self.steps - 1)]
        if self.kind == "edm":
            low, high = 0.01 ** (1 / 7), 30 ** (1 / 7)
            return torch.atan((low + u * (high - low)) ** 7 / self.std)
        if self.kind == "flow":
            s = 2 * u / (1 + u)
            return torch.atan2(s, (1 - s) * self.std)
        return u * math.pi / 2

    def levels(self, n: int, start: float | None = None) -> list[float]:
        """Where a student of n steps starts each of them; `start`: the first, from which the others divide the way."""
        if start is not None:
            if self.kind in ("vp", "eps"):
                return [start - k * (int(start) + 1) // n for k in range(n)]
            if self.kind == "edm":
                low, high = 0.01 ** (1 / 7), start ** (1 / 7)
                return [(high + k / n * (low - high)) ** 7 for k in range(n)]
            if self.kind == "flow":
                u = start / (2 - start)  # before the shift
                return [2 * v / (1 + v) for v in (u * (n - k) / n for k in range(n))]
            return [start * (n - k) / n for k in range(n)]
        if self.kind in ("vp", "eps"):
            return [round(self.steps - k * self.steps / n) - 1.0 for k in range(n)]
        if self.kind == "edm":
            low, high = 0.01 ** (1 / 7), 30 ** (1 / 7)
            return [(high + k / n * (low - high)) ** 7 for k in range(n)]
        if self.kind == "flow":
            return [min(2 * u / (1 + u), 0.999) for u in ((n - k) / n for k in range(n))]
        return [math.pi / 2 * (n - k) / n for k in range(n)]

    def start(self, level: float, z: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t of the noise that the stock scheduler draws at a level."""
        t = torch.full((len(z),), self.angle(level), dtype=torch.float64)
        if self.kind == "edm":
            return z * math.sqrt((level**2 + 1) / (level**2 + self.std**2)), t
        return z / fold(self.native(t)[3]), t

    def karras(self, u: Tensor) -> Tensor:
        """EDM's grid from sigma 0.002 to 80, at its data of 0.5; whatever the schedule, the same angles."""
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        return torch.atan((low + u * (high - low)) ** 7 / 0.5).clamp(*self.ends())

    def log_normal(self, z: Tensor, mean: float, std: float) -> Tensor:
        """EDM's training levels, at its data of 0.5."""
        return torch.atan(torch.exp(mean + std * z) / 0.5).clamp(*self.ends())


TRIG, VP, EPS, EDM_, FLOW = (
    Plain("trig", 1.0), Plain("vp", 0.8), Plain("eps", 1.0), Plain("edm", 0.5), Plain("flow", 0.7),
)  # fmt: skip
KINDS = {plain.kind: plain for plain in (TRIG, VP, EPS, EDM_, FLOW)}


# -- a turn ------------------------------------------------------------------------------------------------------------


def batch_of(key: tuple[int, ...] = KEY, *, images: bool = True, pairs: bool = False) -> Batch:
    """Six samples, whose classes are others read backwards or turned on; pairs have other classes."""
    labels = torch.tensor([2, 0, 1, 1, 2, 0])
    made = draw(*key, "the test's own data")
    x0, z, pair_x0 = (torch.randn(SIZE, *SHAPE, generator=made, dtype=torch.float64) for _ in range(3))
    pair = Pair(z, pair_x0, {"class_labels": torch.tensor([1, 1, 0, 2, 2, 0])}) if pairs else None
    x0_or_none = x0 if images else None
    return Batch(SIZE, SHAPE, {"class_labels": labels}, x0_or_none, torch.device("cpu"), key, pair, WHOLE)


def trained(method: Method) -> dict[str, list[nn.Parameter]]:
    """What the trainer would train, as it was before the first turn."""
    kept: Any = vars(method)
    return kept.setdefault("trained before the first turn", trainable(method.players))


def slopes(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    got = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, got, strict=True)]


def agree(method: Method, turn: Turn, batch: Batch, expected: Callable[[], dict[str, Tensor]]) -> None:
    """Loss, what is logged, and the gradient in each parameter are those of the straight-line rewrite."""
    torch.manual_seed(7)
    everything = trained(method)
    only_trains(turn.player, everything)
    parameters = everything[turn.player]
    outcome = turn.loss(batch)
    gradient = slopes(outcome.loss, parameters)
    torch.manual_seed(7)
    values = expected()
    loss = values.pop("loss")
    assert torch.allclose(outcome.loss, loss, rtol=1e-9, atol=1e-13), (outcome.loss.item(), loss.item())
    assert outcome.shown.keys() == values.keys()
    for name, value in values.items():
        assert torch.allclose(outcome.shown[name], value, rtol=1e-9, atol=1e-13), name
    assert not outcome.shown.get("gap", torch.zeros(())).requires_grad, "no network is in the graph for nothing"
    theirs = slopes(loss, parameters)
    size = max(float(g.abs().max()) for g in theirs)
    assert size > 0, "nothing would move"
    for mine, other in zip(gradient, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-7, atol=1e-9 * size)


def agree_alone(method: Method, step: int, batch: Batch, expected: Callable[[], dict[str, Tensor]]) -> None:
    """`agree`, of a method whose student alone moves in a step."""
    (turn,) = method.turns(step)
    assert (turn.player, turn.lr_factor, turn.restart) == ("student", 1.0, False)
    agree(method, turn, batch, expected)


def nets(*denoisers: Any) -> list[Net]:
    """The networks under denoisers."""
    return [denoiser.network for denoiser in denoisers]


def modes(parts: dict[str, nn.Module], act: Callable[[], Any]) -> list[tuple[str, bool]]:
    """Which part was called while `act` ran, in order, and whether it dropped units."""
    calls: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, out: calls.append((name, module.training))

    handles = [module.register_forward_hook(note(name)) for name, module in parts.items()]
    act()
    for handle in handles:
        handle.remove()
    return calls


def copies(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def twin(net: nn.Module) -> Any:
    return copy.deepcopy(net)


def in_double() -> Iterator[None]:
    """For a fixture: noise is drawn in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
