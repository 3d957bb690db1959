"""The trainings of a scoreboard: which there are, and how long each is within the budget.

The budget is counted in network passes, which do not depend on the machine: a forward pass of the batch is 1, a
backward pass through weights and input 2 more, through the input alone 1 more. The teacher's passes for noise-image
pairs come first, in batches as large as the training's. A method takes as many training steps as fit into the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from diffdistill.catalogue import MethodInfo, describe_method, method_names
from diffdistill.core.denoiser import Denoiser
from diffdistill.data.examples import ClassLabels
from diffdistill.errors import UserError
from diffdistill.eval.suites import Suite
from diffdistill.players.teacher import Teacher, only_trains, trainable
from diffdistill.scaffold.method import Batch, Method, Need, Pair
from diffdistill.training.assemble import Game, make_game

PAIRS = 2000  # noise-image pairs of the teacher, for methods that need them
PAIR_STEPS = 32  # the sampler's steps to an image
DERIVED = "derived"
"""In a preset's place: settings come from the teacher, as `train` without a preset has them."""


@dataclass(frozen=True)
class Entry:
    """One training: a method, one of its presets for the suite, a seed."""

    info: MethodInfo
    preset: str
    seed: int

    @property
    def name(self) -> str:
        """As the board calls it."""
        preset = self.preset.removeprefix("digits").removeprefix("-")
        return f"{self.info.name} {preset}".replace("-", " ").rstrip()

    @property
    def folder(self) -> str:
        """Its run's folder."""
        return f"{self.name.replace(' ', '-')}-seed{self.seed}"


def entries(suite: Suite, methods: Sequence[str] | None, seeds: Sequence[int]) -> list[Entry]:
    """All trainings, seed by seed; a method is all its presets for the suite, or METHOD:PRESET is that one.

    METHOD:derived goes with every method; a suite of that has all but those that tune a student, or read an image that
    is to be restored. Raises UserError for a
    method without such a preset.
    """
    trainings = []
    for seed in seeds:
        for choice in methods or method_names():
            name, _, preset = choice.partition(":")
            info = describe_method(name)
            if info.name in method_names() and name != info.name:
                raise UserError(f"methods: {name!r} has the name of a method of ours; give the file another")
            wanted = preset or suite.preset
            presets = [p for p in info.presets if p == preset or (not preset and p.split("-")[0] == suite.preset)]
            if wanted == DERIVED:
                special = info.about.kind in ("preference", "restoration")
                presets = [DERIVED] if methods or not special else []
            elif not presets and methods:
                raise UserError(f"methods: {info.name} has no preset {wanted!r}; {info.name}:{DERIVED} needs none")
            trainings += [Entry(info, preset, seed) for preset in presets]
    return list({entry.folder: entry for entry in trainings}.values())


def preset_options(info: MethodInfo, preset: str) -> Mapping[str, Any]:
    """The options of one of a method's presets."""
    return info.presets[preset].options


PAST_WARM_UP = 50 * 27720
"""A training step that warm-ups lie before, and that every ratio of turns up to 12 divides."""


class PassCounter:
    """Counts the network passes of a game inside the block; a batch of the training is one pass."""

    def __init__(self, game: Game):
        self.forward = self.backward = 0.0
        self.size = game.config.batch_size
        # Denoisers, not their networks: two of them may share one.
        players = (game.teacher.denoiser, *game.method.players.values(), *game.method.state.values())
        self.denoisers = {id(m): m for player in players for m in player.modules() if isinstance(m, Denoiser)}
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> PassCounter:
        self.handles = [m.register_forward_pre_hook(self._count) for m in self.denoisers.values()]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        share = len(args[0]) / self.size
        self.forward += share
        if torch.is_grad_enabled():
            weights = any(p.requires_grad for p in module.parameters())
            self.backward += share * (2.0 if weights else 1.0 if args[0].requires_grad else 0.0)


def passes_per_step(game: Game, steps: int = 12) -> tuple[float, float]:
    """Network passes of a training step, each counted once for a batch, and the same with backward passes."""
    method, owned = game.method, trainable(game.method.players)
    first = 0 if method.whole else PAST_WARM_UP  # a warm-up may need less than what follows it
    with PassCounter(game) as count:
        for step in range(first, first + steps + 1):
            if step == first + 1:  # the first step may hold what is done once
                count.forward = count.backward = 0.0
            for turn in method.turns(step):
                only_trains(turn.player, owned)
                turn.loss(any_batch(method, game.teacher, game.config.batch_size, step))
    return count.forward / steps, (count.forward + count.backward) / steps


def any_batch(method: Method, teacher: Teacher, size: int, step: int) -> Batch:
    """A batch of noise in place of data, as the method needs it."""
    draw = torch.Generator().manual_seed(step)
    cond = ClassLabels(teacher.num_classes).draw(size, draw).cond or teacher.sample_cond(size)
    x = torch.randn(size, *teacher.shape, generator=draw)
    pair = Pair(torch.randn(x.shape, generator=draw), x, cond) if Need.PAIRS in method.needs else None
    if method.reward is None:  # of which nothing is counted
        method.reward = lambda x, batch: x.detach().flatten(1).sum(1)
    if method.decode is None:  # nor of this, but that what reads the images is
        method.decode = lambda x: torch.cat([x[:, :1]] * 3, 1).repeat_interleave(8, -1).repeat_interleave(8, -2)
    images, losers = (x if need in method.needs else None for need in (Need.IMAGES, Need.LOSERS))
    its = cond if Need.TEACHER_DATA in method.needs else None
    return Batch(size, teacher.shape, cond, images, x.device, (0, step, 0), pair, losers=losers, teacher_cond=its)


class TrainingPlan(NamedTuple):
    """A preset's training within the budget."""

    values: dict[str, Any]  #: all options but the seed
    passes: float  #: a step
    scale: float  #: of guidance


def planned(entry: Entry, suite: Suite, budget: int, shared: dict[str, Any]) -> TrainingPlan:
    """As many training steps as the budget allows; UserError where it does not even allow the pairs."""
    info, deriving = entry.info, entry.preset == DERIVED
    # The budget replaces the steps, on which what is derived depends a little.
    preset: dict[str, Any] = {"steps": budget // 4} if deriving else dict(preset_options(info, entry.preset))
    preset["steps"] = preset["steps"] or 1
    method = info.name if info.name in method_names() else str(info.path.resolve())  # a user's own is a file
    known = {k: v for k, v in suite.overrides.items() if k in preset}
    values = preset | known | shared | {"method": method}
    for _ in range(2 if deriving else 1):
        game = make_game(values, deriving=deriving)
        pairs = PAIRS * PAIR_STEPS / game.config.batch_size if Need.PAIRS in game.method.needs else 0.0
        if pairs >= budget:
            raise UserError(
                f"budget: {budget} network passes are no more than the {pairs:g} for the pairs of {entry.name}; give "
                "more, or name other methods"
            )
        passes, units = passes_per_step(game)
        values["steps"] = max(1, round((budget - pairs) / units))
    if not pairs:
        values.pop("pairs", None)
    if not deriving:  # options that count training steps, a stage's say, keep their share of the whole
        for name in suite.method(info.name).scales:
            values[name] = max(1, preset[name] * values["steps"] // preset["steps"])
    return TrainingPlan(values, passes, float(game.options().get("guidance_scale", 1.0)))
