"""`diffdistill plan`: what a training would take, from configs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diffdistill.commands.check_config import RateConfig
from diffdistill.commands.distill import is_whole, with_settings
from diffdistill.environment import use_machine
from diffdistill.eval.plan import CARDS, GIB, Plan, plans
from diffdistill.eval.report import write_json
from diffdistill.options import build, coerce
from diffdistill.scaffold.method import Method
from diffdistill.training.assemble import Game
from diffdistill.training.recipe import Objects

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import TrainOptions


def plan(
    method: str | PathLike[str] | ModuleType | Callable[..., Method] | None = None,
    *,
    preset: str | None = None,
    recipe: str | None = None,
    teacher: str | PathLike[str] | None = None,
    options: Mapping[str, float | int | str | bool | None] | DataclassInstance | None = None,
    **training: Unpack[TrainOptions],
) -> Plan:
    """What `distill` with these arguments would take: memory of each player and turn, passes and operations of a step.

    Only configs are read of the teacher, and fetched from the hub; its prompts, where none are given, are taken to be
    of usual length. Raises UserError for whatever `distill` would refuse of them.
    """
    named = {"method": method, "preset": preset, "recipe": recipe, "teacher": teacher}
    values, objects = Objects.split(named | dict(training), options)
    return next(_planned(values, objects)[1])[1]


def _planned(values: dict[str, Any], objects: Objects) -> tuple[Game, Iterator[tuple[dict[str, Any], Plan]]]:
    whole = with_settings(values, objects) | dict(objects.named)
    return plans(whole, objects, deriving=not is_whole(values))


def run(values: dict[str, Any]) -> int:
    """The command; `values` are those of the command line and of a YAML file."""
    names = {f.name for f in fields(RateConfig)}
    rate = build(RateConfig, {name: value for name, value in values.items() if name in names})
    values = {name: value for name, value in values.items() if name not in names}
    use_machine("cpu", coerce("threads", values.get("threads", 0), int, {"at_least": 0}))
    game, more_plans = _planned(values, Objects())
    found = [next(more_plans)]
    made = found[0][1]
    for name, (value, reason) in game.derived.items():
        print(f"{name}: {value} ({reason})")
    print(f"\n{game.recipe.name} of {game.config.teacher}, batches of {made.batch_size}\n")
    _print_players(made)
    print(
        f"\nkept between turns {_gib(made.kept)}{_host(made)}; the most {_gib(made.peak)}, in the turn of {made.turn}\n"
        f"a step: {made.passes:.3g} network passes ({made.passes_with_backward:.3g} with those back), "
        f"{made.flops / 1e12:.3g} TFLOP\n{made.steps} steps: {made.samples} samples, "
        f"{made.steps * made.flops / 1e15:.3g} PFLOP{_hours(made, rate)}\n",
        flush=True,
    )
    found += more_plans
    for card in CARDS:
        fitting = next(((more, each) for more, each in found if each.fits(card)), None)
        print(f"{card:4} GiB  {'does not fit' if fitting is None else _fitting(*fitting)}")
    if rate.json is not None:
        rungs = [{"options": more, **each.values()} for more, each in found]
        write_json({"method": game.recipe.name, "teacher": game.config.teacher, "plans": rungs}, rate.json)
    return 0


def _host(made: Plan) -> str:
    return f", in host memory {_gib(made.host)}" if made.host else ""


def _hours(made: Plan, rate: RateConfig) -> str:
    hours = made.hours(rate.tflops, rate.seconds_per_step)
    return "; --tflops or --seconds-per-step gives hours" if hours is None else f", {hours:.3g} hours"


def _print_players(made: Plan) -> None:
    columns = ("weights", "gradients", "optimizer", "average", "activations")
    width = max(len(player.name) for player in made.players)
    print(f"{'':{width}}  {'parameters':>10}  {'trained':>8}" + "".join(f"  {name:>11}" for name in columns))
    for player in made.players:
        sizes = "".join(f"  {_gib(getattr(player, name)):>11}" for name in columns)
        print(f"{player.name:{width}}  {_count(player.parameters):>10}  {_count(player.trained):>8}{sizes}")


def _fitting(more: Mapping[str, Any], made: Plan) -> str:
    options = " ".join(_option(name, value) for name, value in more.items())
    return f"fits{f' with {options}' if options else ''} ({_gib(made.peak)})"


def _option(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def _gib(size: float) -> str:
    return "–" if not size else f"{size / GIB:.3g} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.3g} MiB"


def _count(n: int) -> str:
    units: Sequence[tuple[str, float]] = (("B", 1e9), ("M", 1e6), ("k", 1e3))
    return next((f"{n / size:.3g}{unit}" for unit, size in units if n >= size), str(n) if n else "–")
