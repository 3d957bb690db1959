"""`diffdistill bench`: the scoreboard of the methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffdistill.config import BenchConfig
from diffdistill.environment import is_first_process
from diffdistill.errors import UserError
from diffdistill.eval.bench import SEEDS, BenchOptions, Board, make_board
from diffdistill.eval.suites import load_suite
from diffdistill.options import build

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import BenchOptions as BenchKeywords


def bench(suite: str | Path = "digits", **options: Unpack[BenchKeywords]) -> Board:
    """Train every method of a suite on the same teacher, budget and seeds, and judge them alike.

    `suite` is a name or a .yaml file. The options are those of `diffdistill bench`, with underscores. Table and
    pictures are written into `out`; what is done there already is not repeated. Raises UserError for whatever cannot
    be used.
    """
    return _bench(build(BenchConfig, {**options, "suite": suite}))


def _bench(config: BenchConfig) -> Board:
    if config.seed is not None and config.seeds is not None:
        raise UserError(f"seed: {config.seed} was given beside seeds; give one of them")
    options = BenchOptions(
        methods=config.methods,
        seeds=config.seeds or (SEEDS if config.seed is None else (config.seed,)),
        budget=config.budget,
        teacher=config.teacher,
        data=config.data,
        reference=config.reference,
        jobs=config.jobs,
        device=config.device,
        attention=config.attention,
        threads=config.threads,
    )
    return make_board(load_suite(config.suite), options, Path(config.out))


def run(config: BenchConfig) -> None:
    """The command: prints the board, and where it and the pictures are."""
    board = _bench(config)
    if not is_first_process():
        return
    print(board)
    files = ("report.html", "board.md", "board.json", "quality.png", "samples.png")
    print("board: " + ", ".join(str(board.out / f) for f in files))
