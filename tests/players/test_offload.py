"""`--offload` with the families' own networks, from a run's first look to its student: the same bits as without it."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from diffdistill import distill
from diffdistill.core import divided
from diffdistill.families import FAMILIES
from tests.players.test_player_kinds import METHODS, OTHERS, options_for
from tests.training.test_trainer import metrics, same

Encoded = Callable[[str], tuple[Path, Path]]
LIKE_OTHERS = (  # whose layers others have
    *("aura_flow", "chroma", "cogvideox", "flux2_dev", "lumina2", "pixart_alpha", "sana_video"),
    *(
        "flux_kontext",
        "instruct_pix2pix",
        "qwen_image_edit",
        "qwen_image_edit_plus",
        "qwen_image21",
        "kandinsky5",
        "wan_i2v",
    ),
)
LATENT = [n for n, family in FAMILIES.items() if family.autoencoder is not None]
MEASURED = ("seconds_per_step", "peak_memory_mb")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divided, "PIECE", 10_000)


def logged(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in metrics(run)]


def compare(options: dict[str, Any], kind: str, folder: Path, **more: Any) -> None:
    every = dict.fromkeys(("sample_every", "figures_every", "log_every", "checkpoint_every"), 1)
    shared = {"ema": 0.9, "lr_schedule": "constant", **every, **more}
    plain, moved = folder / "plain", folder / "moved"
    distill(**{**options, **shared}, out=str(plain))
    distill(**{**options, **shared, "steps": 1}, offload=kind, out=str(moved))
    distill(resume=moved, steps=options["steps"])
    weights = [path.relative_to(plain) for path in (plain / "student").rglob("diffusion_pytorch_model.safetensors")]
    assert len(weights) >= 1
    for path in weights:
        assert same(load_file(plain / path), load_file(moved / path)), path
    assert logged(plain) == logged(moved)
    for picture in sorted((plain / "samples").iterdir()):
        assert picture.read_bytes() == (moved / "samples" / picture.name).read_bytes(), picture.name


def shared_out(kinds: Sequence[Any], turn: int) -> list[Any]:
    """(family, kind) for each family, the kinds in turn; those that are not of this turn are for `make test-whole`.

    In turn 0 and turn 1 each family is once, but those whose layers others have.
    """
    pairs = list(zip(LATENT, itertools.cycle(kinds), strict=False))
    own = [pair for pair in pairs if pair[0] not in LIKE_OTHERS]
    mine = [pair for k, pair in enumerate(own) if k % 4 // 2 == turn]
    return [pytest.param(*pair, marks=() if pair in mine else pytest.mark.whole) for pair in pairs]


@pytest.mark.parametrize(("name", "players"), shared_out(["full", "lora"], 0))
def test_blocks_of_every_family_come_and_go(name: str, players: str, encoded: Encoded, tmp_path: Path) -> None:
    options = options_for(*encoded(name), name, "dmd2", players)
    compare(options, "group", tmp_path, **({"gan_weight": 0.1} if not FAMILIES[name].videos else {}))


@pytest.mark.parametrize(
    ("name", "players", "kind", "more"),
    [
        ("sd3", "full", "group", {"gradient_checkpointing": True}),
        ("stable_diffusion", "lora", "group", {"gradient_checkpointing": True, "accumulate": 2}),
        ("stable_diffusion", "full", "model", {"mixed_precision": "bf16"}),
        ("sd3", "lora", "group", {"mixed_precision": "bf16", "teacher_dtype": "bfloat16"}),
    ],
)
def test_with_what_else_saves_memory(
    name: str, players: str, kind: str, more: dict[str, Any], encoded: Encoded, tmp_path: Path
) -> None:
    compare(options_for(*encoded(name), name, "sid", players), kind, tmp_path, **more)


@pytest.mark.parametrize(
    ("method", "kind", "checkpointing"),
    [("scm", "group", True), ("flow_map", "model", False), ("ladd", "group", True), ("progressive", "group", False)],
)
def test_games_of_other_kinds(method: str, kind: str, checkpointing: bool, encoded: Encoded, tmp_path: Path) -> None:
    options = options_for(*encoded("sd3"), "sd3", "dmd2", "full")
    own = {name: value for name, value in options.items() if name not in METHODS["dmd2"]}
    compare(own | {"method": method} | OTHERS[method], kind, tmp_path, gradient_checkpointing=checkpointing)
