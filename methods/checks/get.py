"""Exact checks of GET."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS, Output, edm_boundary
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, Schedule, TrigFlow
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.methods import get
from diffdistill.methods.get import GET, Config
from diffdistill.players.equilibrium import Block, EquilibriumTransformer, positions
from diffdistill.players.generators import equilibrium_student, fitting, output_weights
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Pair

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "width": 64,
        "heads": 4,
        "depth": 1,
        "equilibrium_depth": 1,
        "equilibrium_ratio": 4,
        "iterations": 3,
        "correction": 0.8,
        "distance": "l1",
        "student_lr": 0.002,
        "steps": 1000,
    },
}

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
REAL: dict[str, Any] = {"images": GET.images, "forward": Block.forward, "injected": EquilibriumTransformer.injected}

_COSINE = torch.cos(torch.linspace(0.05, 1.5, 40, dtype=torch.float64)) ** 2
WORLDS: dict[str, tuple[Schedule, Output]] = {
    "trig": (TrigFlow(), OUTPUTS["v_prediction"]),
    "epsilon": (DiscreteVP(_COSINE), OUTPUTS["epsilon"]),
    "flow": (LinearFlow(data_std=0.5), OUTPUTS["flow_prediction"]),
    "edm": (EDM(), OUTPUTS["edm"]),
    "consistency model": (EDM(unit_init=False), edm_boundary(0.002)),
}


class Iterated(nn.Module):
    """Images mean + slope x + off rho^k of n iterations, as a network of that schedule and output gives them."""

    every = False

    def __init__(self, schedule: Schedule, output: Output, read: float, n: int = 1, off: float = 0.0):
        super().__init__()
        self.weights, self.n, self.off = output_weights(schedule, output), n, off
        self.mean, self.slope = nn.Parameter(MEAN.clone()), nn.Parameter(STD / read)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, 2), or (n, B, 2) of every iteration."""
        steps = torch.arange(1, self.n + 1, dtype=x.dtype)[:, None, None]
        made = self.weights[0] * x + self.weights[1] * (self.mean + self.slope * x + self.off * 0.5**steps)
        return made if self.every else made[-1]


def _read(kind: str) -> float:
    """What the network reads of standard normal noise at the noisiest level."""
    return {"edm": math.sqrt((80**2 + 1) / (80**2 + 0.25)), "consistency model": 80 / math.hypot(80, 0.5)}.get(kind, 1)


def _method(kind: str = "trig", n: int = 1, off: float = 0.0, **options: Any) -> GET:
    """GET with a student that is right but for `off`."""
    schedule, output = WORLDS[kind]
    student = Denoiser(Iterated(schedule, output, _read(kind), n, off), schedule, output)
    return GET(Teacher(student, (2,)), Config(**options), student=student)


def _batch(x: Tensor | None = None, n: int = 64) -> Batch:
    """Pairs of the teacher's exact map, or of noise and x."""
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch(n, (2,), {}, None, torch.device("cpu"), (0, 0, 0), Pair(z, MEAN + STD * z if x is None else x, {}))


def _loss(method: GET, batch: Batch | None = None) -> Tensor:
    return method.turns(0)[0].loss(batch or _batch()).loss


def verify() -> Iterator[Check]:
    """Section 8.2's sanity items, the network against its formulas, and the mistakes that they must catch."""
    yield from _minimum()
    yield from _distances()
    yield from _corrections()
    yield from _network()
    yield from _equilibrium()
    yield from _wiring()


def _minimum() -> Iterator[Check]:
    """The least of the loss over pairs of a deterministic sampler is at its map."""
    for kind in WORLDS:
        for distance in ("l1", "l2", "huber"):
            loss = _loss(_method(kind, distance=distance))
            yield equal(f"the exact map has no loss, {kind}, {distance}", 0.0, loss, 1e-9, scale=1.0)
        method = _method(kind, distance="l2")
        parameters = list(method.student.parameters())
        yield equal(f"... and no gradient, {kind}", 0.0, gradient(_loss(method), *parameters), 1e-9, scale=1.0)
        with mistake(type(method.schedule), "init_scale", lambda self, t: 0.9):
            got = gradient(_loss(method), *parameters)
        yield differs(f"noise of another scale than the pairs' is caught, {kind}", 0.0, got, 1e-3, scale=1.0)
        with mistake(GET, "images", lambda self, z, cond: REAL["images"](self, z.flip(0), cond)):
            got = gradient(_loss(method), *parameters)
        yield differs(f"noise of other pairs is caught, {kind}", 0.0, got, 1e-2, scale=1.0)
        halfway = get.Sampler(method.student, [method.schedule.init_level // 2 or method.schedule.init_level / 2])
        with mistake(GET, "sampler", lambda self, halfway=halfway: halfway):
            got = gradient(_loss(method), *parameters)
        yield differs(f"another level than the noisiest is caught, {kind}", 0.0, got, 1e-3, scale=1.0)


def _distances() -> Iterator[Check]:
    """Of a target that is no function of the noise, l2 takes the mean and l1 the median: x = map(z) + Exp(1)."""
    n = 4000
    apart = -torch.log1p(-(torch.arange(n, dtype=torch.float64) + 0.5) / n)  # exponential, at its quantiles
    batch = _batch(MEAN + STD * _batch(n=n).paired.z + apart[:, None], n)
    median = math.log(2)
    for distance, shift, slope in (("l2", 1.0, 0.0), ("l1", median, 0.0), ("l1", 1.0, 1 - 2 / math.e),
                                   ("l2", median, 2 * (median - 1))):  # fmt: skip
        method = _method(distance=distance)
        network: Any = method.student.network
        with torch.no_grad():
            network.mean.add_(shift)
        got = gradient(_loss(method, batch), network.mean).mean() * 2
        where = "mean" if shift == 1 else "median"
        yield equal(f"{distance}'s gradient at the conditional {where}", slope, got, 2e-3, scale=1.0)
    for kind, std in (("flow", 0.5), ("edm", 0.5)):
        for distance, closed in (("l1", 0.3 * std), ("l2", (0.3 * std) ** 2)):
            loss = _loss(_method(kind, off=0.6, distance=distance))
            yield equal(
                f"the loss of a student that is off, in the data's units, {kind}, {distance}", closed, loss, 1e-9
            )


def _corrections() -> Iterator[Check]:
    """Iteration k is off by c/2^k: the loss is sum_k gamma^(n - k) c/2^k."""
    n, off = 5, 0.7
    for gamma in (0.8, 0.3, 1.0, 0.0):
        closed = sum((gamma ** (n - k) if k < n or not gamma else 1.0) * off / 2**k for k in range(1, n + 1))
        closed = off / 2**n if not gamma else closed
        method = _method(n=n, off=off, correction=gamma)
        yield equal(f"the loss of all iterations, gamma = {gamma}", closed, _loss(method), 1e-7)
        if 0 < gamma < 1:
            turned = lambda self, z, cond: REAL["images"](self, z, cond).flip(0)  # noqa: E731
            with mistake(GET, "images", turned):
                yield differs(
                    f"the first iteration counting most is caught, gamma = {gamma}", closed, _loss(method), 1e-2
                )
    drawn = method.sampler().one_step(_batch().paired.z, {})
    yield equal("a sample is the last iteration's image", MEAN + STD * _batch().paired.z + off / 2**n, drawn, 1e-9)


# -- the network, by its formulas ---------------------------------------------------------------------------------

SIZE: dict[str, Any] = {
    "shape": (2, 4, 6), "labels": 3, "width": 8, "depth": 2, "equilibrium_depth": 2, "heads": 2, "patch": 2,
    "iterations": 3, "ratio": (3, 2), "of_input": 0.3, "of_image": -1.7,
}  # fmt: skip


def _transformer(**size: Any) -> EquilibriumTransformer:
    """With weights of its own everywhere."""
    draw = torch.Generator().manual_seed(1)
    network = EquilibriumTransformer(**{**SIZE, **size}).double()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_((p if p.ndim == 1 else 0) + 0.4 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return network


def _noise(n: int = 5, shape: Sequence[int] = SIZE["shape"]) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(n, *shape, generator=draw, dtype=torch.float64), torch.arange(n) % 3


Weights = Mapping[str, Tensor]


def _normed(h: Tensor, w: Weights, name: str) -> Tensor:
    mean, var = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, correction=0)
    return (h - mean) / torch.sqrt(var + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _affine(h: Tensor, w: Weights, name: str) -> Tensor:
    return torch.einsum("...i,oi->...o", h, w[f"{name}.weight"]) + w.get(f"{name}.bias", 0.0)


def _block(h: Tensor, w: Weights, name: str, injected: Tensor, heads: int = 2) -> Tensor:
    """A block, head by head."""
    q, k, v = (_affine(_normed(h, w, f"{name}.norms.0"), w, f"{name}.qkv") + injected).chunk(3, -1)
    width = h.shape[-1] // heads
    seen = []
    for one in range(heads):
        mine = slice(one * width, (one + 1) * width)
        scores = torch.einsum("bnd,bmd->bnm", q[..., mine], k[..., mine]) / math.sqrt(width)
        seen.append(scores.softmax(-1) @ v[..., mine])
    h = h + _affine(torch.cat(seen, -1), w, f"{name}.out")
    x = _affine(_normed(h, w, f"{name}.norms.1"), w, f"{name}.mlp.0")
    return h + _affine(x * (1 + torch.erf(x / math.sqrt(2))) / 2, w, f"{name}.mlp.2")


def _plainly(w: Weights, each: Sequence[Weights], x: Tensor, labels: Tensor) -> list[Tensor]:
    """The images (B, C, H, W) of all iterations, of which number k has the weights each[k] in f."""
    p, (rows, columns) = SIZE["patch"], (SIZE["shape"][1] // SIZE["patch"], SIZE["shape"][2] // SIZE["patch"])
    tokens = torch.stack(
        [x[:, :, p * i : p * i + p, p * j : p * j + p].flatten(1) for i in range(rows) for j in range(columns)], 1
    )
    h = _affine(tokens, w, "read") + positions((rows, columns), SIZE["width"], x.device).double()
    of_class = w["labels.weight"][labels][:, None]
    for k in range(SIZE["depth"]):
        h = _block(h, w, f"blocks.{k}", of_class)
    u, z, images = _affine(h, w, "inject"), torch.zeros_like(h), []
    for of_step in each:
        for k in range(SIZE["equilibrium_depth"]):
            part = u[..., 3 * SIZE["width"] * k : 3 * SIZE["width"] * (k + 1)]
            z = _block(z, of_step, f"equilibrium.{k}", part + of_class)
        made, image = _affine(_normed(z, w, "norm"), w, "write"), torch.zeros_like(x)
        for n in range(rows * columns):
            i, j = p * (n // columns), p * (n % columns)
            image[:, :, i : i + p, j : j + p] = made[:, n].unflatten(1, (-1, p, p))
        images.append(SIZE["of_input"] * x + SIZE["of_image"] * image)
    return images


def _network() -> Iterator[Check]:
    """Against a straight-line rewrite; the gradient of tied weights is the sum of those of as many untied ones."""
    network, (x, labels) = _transformer(), _noise()
    w = dict(network.named_parameters())
    tied = [name for name in w if name.startswith("equilibrium.")]
    each = [{name: w[name].detach().clone().requires_grad_() for name in tied} for _ in range(network.iterations)]
    plain = _plainly(w, each, x, labels)
    network.every = True
    images = network(x, class_labels=labels)
    yield equal("the images of all iterations", torch.stack(plain), images, 1e-10)
    network.every = False
    yield equal("... of which the last is the network's", plain[-1], network(x, class_labels=labels), 1e-10)
    powers = [0.8 ** (network.iterations - k) for k in range(1, network.iterations + 1)]
    closed = sum(c * (image - 1).abs().mean() for c, image in zip(powers, plain, strict=True))
    teacher = Teacher(Denoiser(network, TrigFlow(), OUTPUTS["sample"]), SIZE["shape"], 3)
    method = GET(teacher, Config(), student=teacher.denoiser)
    cond = {"class_labels": labels}
    batch = Batch(len(x), SIZE["shape"], {}, None, x.device, (0, 0, 0), Pair(x, torch.ones_like(x), cond))
    yield equal("... and their loss", closed, _loss(method, batch), 1e-7)
    assert isinstance(closed, Tensor)
    sums = sum(gradient(closed, *(of_step[name] for name in tied)) for of_step in each)
    own = partial(lambda: gradient(_loss(method, batch), *(w[name] for name in tied)))
    yield equal("its gradient in the tied weights is the sum of those of each iteration", sums, own(), 1e-6)
    others = [w[name] for name in w if name not in tied]
    yield equal("... and in all others", gradient(closed, *others), gradient(_loss(method, batch), *others), 1e-6)

    def cut(self: EquilibriumTransformer, injected: Sequence[Tensor]) -> list[Tensor]:
        states = [torch.zeros_like(injected[0][..., :8])]
        for _ in range(self.iterations):
            states.append(self.step(states[-1].detach(), injected))
        return states

    with mistake(EquilibriumTransformer, "states", cut):
        yield equal("(a cut between iterations leaves the loss)", closed, _loss(method, batch), 1e-7)
        yield differs("... and its gradient is caught", sums, own(), 1e-2)

    def once(self: EquilibriumTransformer, injected: Sequence[Tensor]) -> list[Tensor]:
        nothing = [torch.zeros_like(part) for part in injected]
        states = [torch.zeros_like(injected[0][..., :8]), self.step(torch.zeros_like(injected[0][..., :8]), injected)]
        for _ in range(self.iterations - 1):
            states.append(self.step(states[-1], nothing))
        return states

    with mistake(EquilibriumTransformer, "states", once):
        yield differs("an injection into the first iteration alone is caught", closed, _loss(method, batch), 1e-3)
    swapped = lambda self, x, labels: REAL["injected"](self, x, labels)[::-1]  # noqa: E731
    with mistake(EquilibriumTransformer, "injected", swapped):
        yield differs("injections of other blocks are caught", closed, _loss(method, batch), 1e-3)


def _equilibrium() -> Iterator[Check]:
    """Where f contracts, h_k goes to its equilibrium; without norms and with z + mlp(z) = rho z all is known."""
    rho, n, width = 0.6, 12, SIZE["width"]
    network, (x, labels) = _transformer(equilibrium_depth=1, iterations=n, ratio=(2, 2)), _noise()
    block: Any = network.equilibrium[0]
    block.norms = nn.ModuleList(nn.Identity() for _ in range(2))
    eye = torch.eye(width, dtype=torch.float64)
    with torch.no_grad():
        block.qkv.weight.zero_()
        block.mlp[0].weight.copy_(torch.cat([eye, -eye]))  # gelu(x) - gelu(-x) = x
        block.mlp[2].weight.copy_((rho - 1) * torch.cat([eye, -eye], 1))
        block.mlp[0].bias.zero_()
        block.mlp[2].bias.zero_()
        injected = network.injected(x, labels)
        states = network.states(injected)
        added = (
            REAL["forward"](block, torch.zeros_like(states[0]), injected[0]) / rho
        )  # of attention, which sees u alone
        steps = [network.step(z, injected) - z for z in states]
    for k in (0, 1, 3, n):
        closed = rho * (1 - rho**k) / (1 - rho) * added
        yield equal(f"h_{k} of a contraction by {rho}", closed, states[k], 1e-10, scale=1.0)
        yield equal(
            f"... and how far f moves it, which is {rho}^{k + 1} as far", rho ** (k + 1) * added, steps[k], 1e-10
        )
    far = network.states(injected)[-1]
    network.iterations = 80
    with torch.no_grad():
        there = network.states(injected)[-1]
    yield equal("many iterations are at the equilibrium", rho / (1 - rho) * added, there, 1e-10)
    yield differs("... and a few are not", rho / (1 - rho) * added, far, 1e-4)
    with torch.no_grad():
        block.mlp[2].weight.zero_()
        stay = [float((network.step(z, injected) - z).norm()) for z in network.states(injected)[:3]]
    yield equal("a map that does not contract moves on as far", torch.tensor(stay[:1] * 3), torch.tensor(stay), 1e-10)
    whole = _transformer(iterations=96)
    with torch.no_grad():
        injected = whole.injected(x, labels)
        states = whole.states(injected)
        moved = [float((whole.step(states[k], injected) - states[k]).norm() / states[k].norm()) for k in (6, 24, 96)]
    falls = float(moved[0] > 2 * moved[1] and moved[1] > 2 * moved[2])
    yield equal("with the blocks' norms f moves h less and less, relative to h", 1.0, falls, 0.0)


def _wiring() -> Iterator[Check]:
    """What a network without iterations, or without injection, cannot know; and what a new student is."""
    network, (x, labels) = _transformer(), _noise()
    with torch.no_grad():
        of_image = lambda: (network(x, class_labels=labels) - 0.3 * x) / -1.7  # noqa: E731
        whole = of_image()
        network.iterations = 0
        none = of_image()
        yield equal("without iterations all noise gives one image", none[:1].expand_as(none), none, 1e-10)
        decoded = network.image(torch.zeros(1, 6, 8, dtype=torch.float64))
        yield equal("... which is what zero is decoded to", decoded.expand_as(none), none, 1e-10)
        network.iterations = 3
        with mistake(network.inject, "weight", nn.Parameter(torch.zeros_like(network.inject.weight))):
            blind = of_image()
        yield equal("without injection the noise does not matter", blind[:2], blind[3:], 1e-10)  # of labels 0 and 1
        yield differs("... and the class does", blind[0], blind[1], 1e-3)
        yield differs("... with it both do", whole[:2], whole[3:], 1e-3)
    schedule = TrigFlow(data_std=0.5)
    teacher = Teacher(Denoiser(nn.Linear(1, 1), schedule, OUTPUTS["v_prediction"]), (1, 8, 8), 3)
    student = equilibrium_student(teacher, Config())
    z = _noise(5, (1, 8, 8))[0].float()
    method = GET(teacher, Config(), student=student)
    cond = {"class_labels": labels}
    batch = Batch(5, (1, 8, 8), {}, None, z.device, (0, 0, 0), Pair(z, torch.ones_like(z), cond))
    closed = 0.5 * sum(0.8**k for k in range(6))
    yield equal("a new student makes grey, and the loss says how far that is", closed, _loss(method, batch), 1e-6)
    for kind, (own, output) in WORLDS.items():
        method = GET(Teacher(Denoiser(nn.Linear(1, 1).double(), own, output), (2,)), Config(width=8, depth=1))
        made: Any = method.student.double().network
        nn.init.normal_(made.write.weight)
        read = _noise(5, (2,))[0]
        image = made.image(made.states(made.injected(_read(kind) * read, None))[-1]).reshape(5, 2)
        yield equal(f"what a new student says is its image, {kind}", image, method.images(read, {})[-1], 1e-9)
    for shape, width, heads, patch in (((1, 8, 8), 64, 1, 1), ((3, 32, 32), 256, 4, 2), ((3, 64, 64), 512, 8, 4),
                                       ((4, 32, 32), 320, 5, 2), ((2,), 64, 1, 1)):  # fmt: skip
        made = fitting(shape, Config())
        got = torch.tensor([made["width"], made["heads"], made["patch"]])
        yield equal(f"the size for samples {shape}", torch.tensor([width, heads, patch]), got, 0.0)
