"""What a distillation would take, from configs alone: memory of each player and turn, passes and operations of a step.

The method's own turns run with networks without weights (`core.weightless`), so that what is counted is what they
would hold. Memory is that of tensors: what a CUDA context, kernels' scratch and fragmentation take comes on top, for
which `fits` leaves room.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.config import FitConfig
from diffdistill.core.weightless import Weightless
from diffdistill.errors import UserError, first_line
from diffdistill.eval.budget import PAST_WARM_UP, PassCounter, any_batch
from diffdistill.families import attention_of
from diffdistill.players.quantized import saved
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.training.assemble import NO_OBJECTS, Game, make_game
from diffdistill.training.offload import Offload, Stored
from diffdistill.training.recipe import Objects

GIB = 2**30
CARDS = (16, 24, 40, 80, 141)  # GiB
_CONTEXT, _FRAGMENTS = 0.7 * GIB, 1.08  # of CUDA and its libraries; what an allocator cannot use, to what is held
_STEPS = 12  # every ratio of turns up to 4, and 6, divides it
_OCCURRENCES = 4  # of a turn that are counted, or two that are alike: a turn may take a random number of steps


@dataclass(frozen=True)
class Player:
    """What one of the networks takes, in bytes; weights that two share count for the first alone."""

    name: str
    parameters: int
    trained: int
    weights: int
    optimizer: int = 0
    average: int = 0
    gradients: int = 0  #: in its own turn alone
    #: the most that its turn holds beyond its gradients and all that is on the device between turns
    activations: int = 0


@dataclass(frozen=True)
class Plan:
    """What a training takes."""

    players: tuple[Player, ...]
    turn: str  #: the player in whose turn memory is highest
    kept: int  #: bytes between turns, on the device
    peak: int  #: bytes in that turn
    passes: float  #: network passes of a step, each counted once for a batch
    passes_with_backward: float  #: the same with a pass back as 1 more through the input, 2 with the weights
    flops: float  #: of a step: two for a multiplication and an addition
    steps: int
    batch_size: int
    host: int = 0  #: bytes that lie in host memory while they are not used

    @property
    def samples(self) -> int:
        """Of the whole training, in one process."""
        return self.steps * self.batch_size

    def hours(self, tflops: float | None = None, seconds_per_step: float | None = None) -> float | None:
        """Of the whole training, at so many 10^12 operations or so many seconds; None where neither is known."""
        if seconds_per_step is None and tflops is not None:
            seconds_per_step = self.flops / (1e12 * tflops)
        return None if seconds_per_step is None else self.steps * seconds_per_step / 3600

    def fits(self, card: float) -> bool:
        """Whether a card of so many GiB has the memory, with room for CUDA's own and for fragments."""
        return self.peak * _FRAGMENTS + _CONTEXT <= card * GIB

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"samples": self.samples}


def plan_of(game: Game) -> Plan:
    """The plan of a game, whose networks have no values after it."""
    method, config, teacher = game.method, game.config, game.teacher
    named: dict[str, nn.Module] = {"teacher": teacher.denoiser, **method.players}
    named |= {name: module for name, module in method.state.items() if name not in named}
    empty = Weightless()
    empty.bare(named.values())
    owned = trainable(method.players)
    offload = Offload(config.offload, named.values(), torch.device("cpu"), partial(Counted, empty))
    first = 0 if method.whole else PAST_WARM_UP
    happened: Counter[str] = Counter()
    counts: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    most: Counter[str] = Counter()
    networks = nn.ModuleList(named.values())
    attention = config.attention if config.attention in ("math", "jvp") else "auto"
    half = torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16")
    with attention_of(networks, attention), PassCounter(game) as count, empty:
        for step in range(first, first + _STEPS + 1):
            if step == first + 1:  # the first may hold what is done once
                happened.clear()
                counts.clear()
            for turn in method.turns(step):
                happened[turn.player] += 1
                known = counts[turn.player]
                if len(known) == _OCCURRENCES or (len(known) > 1 and len(set(known)) == 1):
                    continue
                only_trains(turn.player, owned)
                offload.release()
                before, count.forward, count.backward = empty.restart(), 0.0, 0.0
                parts = any_batch(method, teacher, config.batch_size, step).parts(config.accumulate)
                for part in parts[:2]:  # of a second one the gradients are there already
                    with half, offload.graph():
                        loss = turn.loss(part).loss
                    loss.backward()
                    del loss
                share = len(parts) / len(parts[:2])
                sums = (empty.flops, count.forward, count.forward + count.backward)
                known.append(tuple(share * value for value in sums))
                most[turn.player] = max(most[turn.player], empty.most - before)
                for p in owned[turn.player]:
                    p.grad = None
    costs = torch.zeros(3, dtype=torch.float64)
    for name, times in happened.items():
        costs += times / _STEPS * torch.tensor(counts[name], dtype=torch.float64).mean(0)
    for name in most:
        most[name] = max(most[name], _of_a_step(owned[name], offload, config))
    players = _players(named, owned, most, method.exported, config)
    if config.teacher_bits:
        less = saved(teacher.denoiser.network, config.teacher_bits)
        players = (replace(players[0], weights=players[0].weights - less), *players[1:])
    host = offload.nbytes + (sum(p.optimizer + p.average for p in players) if config.offload != "none" else 0)
    kept = sum(p.weights + p.optimizer + p.average for p in players) - host
    turn_of = max(most, key=most.__getitem__)
    flops, passes, whole = costs.tolist()
    peak = kept + most[turn_of]
    return Plan(players, turn_of, kept, peak, passes, whole, flops, config.steps, config.batch_size, host)


class Counted(Stored):
    """What takes memory of a device where it is said to be there, and is not moved."""

    def __init__(self, empty: Weightless, tensors: Iterable[Tensor], device: torch.device):
        self.empty, self.tensors, self.here = empty, list(tensors), False

    def fetch(self) -> None:
        """It takes its memory."""
        self.empty.take(self.nbytes)
        self.here = True

    def release(self) -> None:
        """It takes none."""
        self.empty.take(-self.nbytes)
        self.here = False


def _of_a_step(trained: Sequence[Tensor], offload: Offload, config: FitConfig) -> int:
    """Bytes of an optimizer's step: all gradients, and a piece of what comes to the device for it."""
    pieces = offload.groups(trained) if config.offload != "none" else []
    coming = [sum(s.nbytes for s in offload.holding(p)) + int(_states(config) * _bytes(p)) for p in pieces]
    return _bytes(trained) + max(coming, default=0)


def _states(config: FitConfig) -> float:
    """Bytes of moments for each byte of weights in float32."""
    return {"adamw": 2, "adamw8bit": 0.5, "muon": 1}[config.optimizer]


def _players(
    named: Mapping[str, nn.Module],
    owned: Mapping[str, Sequence[nn.Parameter]],
    most: Mapping[str, int],
    exported: str,
    config: FitConfig,
) -> tuple[Player, ...]:
    players, seen = list[Player](), set[int]()
    for name, module in named.items():
        trained = owned.get(name, [])
        size = _bytes(trained)
        weights = _bytes([t for t in _tensors(module) if id(t) not in seen])
        seen |= {id(t) for t in _tensors(module)}
        players.append(
            Player(
                name,
                sum(p.numel() for p in module.parameters()),
                sum(p.numel() for p in trained),
                weights,
                optimizer=int(_states(config) * size),
                average=size if config.ema and name == exported else 0,
                gradients=size,
                activations=max(0, most.get(name, 0) - size),
            )
        )
    return tuple(players)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# -- what fits -----------------------------------------------------------------------------------------------


def switches(game: Game) -> list[dict[str, Any]]:
    """Options that take less memory, each with those before it; the last, LoRA, train other weights than was meant."""
    config = game.config
    rungs: list[dict[str, Any]] = []
    if not config.gradient_checkpointing:
        rungs.append({"gradient_checkpointing": True})
    if config.mixed_precision == "no" or config.teacher_dtype == "float32":
        rungs.append({"mixed_precision": "bf16", "teacher_dtype": "bfloat16"})
    if config.accumulate < config.batch_size:
        rungs.append({"accumulate": config.batch_size})
    kinds: list[dict[str, Any]] = [{"offload": kind} for kind in ("optimizer", "model", "group")]
    moved = kinds[("none", "optimizer", "model", "group").index(config.offload) :]
    whole: dict[str, Any] = {}
    found = [whole := whole | rung for rung in rungs]
    found += [whole | rung for rung in moved]
    if config.lora is None:
        roles = [role for role in ("student", "fake_score") if role in game.method.players]
        whole = whole | {"lora": ",".join(roles)}
        found += [whole]
    if config.teacher_bits is None and config.offload == "none":  # networks of few bits stay where they are
        found += [whole | {"teacher_bits": bits} for bits in (8, 4)]
    return found + ([whole | rung for rung in moved[-1:]] if config.lora is None else [])


def plans(
    values: Mapping[str, Any], objects: Objects = NO_OBJECTS, *, deriving: bool = False
) -> tuple[Game, Iterator[tuple[dict[str, Any], Plan]]]:
    """The game of a training's options, and its plan without and with switches, until one fits the smallest card.

    Each plan is made when it is asked for. Switches that the method or the network does not take are left out.
    """
    game = make_game(values, objects, deriving=deriving, weights=False)
    known = {**values} | {name: derived.value for name, derived in game.derived.items()}

    def made() -> Iterator[tuple[dict[str, Any], Plan]]:
        yield {}, (plan := _first_plan(game))
        for more in switches(game):
            if plan.fits(CARDS[0]):
                return
            try:
                other = make_game(known | more, objects, weights=False)
            except UserError:
                continue
            yield more, (plan := plan_of(other))

    return game, made()


def _first_plan(game: Game) -> Plan:
    """The plan of a game; UserError where its network cannot be called."""
    try:
        return plan_of(game)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of a network that its config does not fit
        raise UserError(
            f"teacher: a training step of {game.config.teacher!r} cannot be done ({first_line(error)}); give a folder "
            "whose configs fit the installed diffusers, and a resolution that it takes"
        ) from error
