"""What a training run promises: the same bits after a stop, whole checkpoints, a clear stop on nan."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import diffdistill.training.checkpoint
from diffdistill import UserError, distill
from diffdistill.config import FitConfig
from diffdistill.players.sampler import Sampler
from diffdistill.scaffold.method import Batch, Method, Optimizer, Outcome, Turn
from diffdistill.training.checkpoint import checkpoints, load_checkpoint
from diffdistill.training.stopping import Interrupted
from diffdistill.training.trainer import NonFinite, Trainer, accelerator_for

Teachers = Callable[[str], Path]


def options(teacher: Path, out: Path, **more: Any) -> dict[str, Any]:
    """A short DMD2 run that uses what could drift: GAN, moving average, both players, a part in evaluation mode."""
    return {
        "teacher": str(teacher),
        "data": "digits",
        "out": str(out),
        "steps": 6,
        "batch_size": 8,
        "update_ratio": 2,
        "gan_weight": 0.1,
        "student_lr": 1e-3,
        "fake_score_lr": 1e-3,
        "ema": 0.9,
        "log_every": 2,
        "sample_every": 3,
        "checkpoint_every": 2,
        "device": "cpu",
        **more,
    }


def student(out: Path) -> dict[str, Tensor]:
    return load_file(out / "student" / "unet" / "diffusion_pytorch_model.safetensors")


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds_per_step", "peak_memory_mb")} for line in lines]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tiny_teacher: Teachers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    distill(**options(tiny_teacher("vp"), out))
    return out


def test_a_run_folder_holds_what_it_promises(whole: Path) -> None:
    names = {"config.yaml", "environment.json", "metrics.jsonl", "looks.jsonl", "samples", "checkpoints", "student"}
    assert names <= {p.name for p in whole.iterdir()}
    pictures = [*(f"step-{k:08d}.png" for k in (0, 3, 6)), "teacher.png"]
    assert [p.name for p in sorted((whole / "samples").iterdir())] == pictures
    assert [line["step"] for line in metrics(whole)] == [2, 4, 6]
    assert "torch" in json.loads((whole / "environment.json").read_text())
    assert {"student/gap", "student/gan", "fake_score/denoising"} <= metrics(whole)[0].keys()


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    whole: Path, tiny_teacher: Teachers, tmp_path: Path
) -> None:
    distill(**options(tiny_teacher("vp"), tmp_path / "again"))
    distill(**options(tiny_teacher("vp"), tmp_path / "other", seed=1))
    assert same(student(whole), student(tmp_path / "again"))
    assert not same(student(whole), student(tmp_path / "other"))


def test_ctrl_c_saves_and_the_resumed_run_has_the_same_bits(
    whole: Path, tiny_teacher: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Trainer.take

    def interrupted_at_step_2(self: Trainer, turn: Turn, batch: Batch) -> dict[str, Tensor]:
        if self.step == 2 and turn.player == "student":
            signal.raise_signal(signal.SIGINT)
        return take(self, turn, batch)

    monkeypatch.setattr(Trainer, "take", interrupted_at_step_2)
    with pytest.raises(Interrupted):
        distill(**options(tiny_teacher("vp"), tmp_path / "run", checkpoint_every=0))
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    assert not (tmp_path / "run" / "student").exists()
    monkeypatch.undo()
    distill(resume=tmp_path / "run")
    assert same(student(whole), student(tmp_path / "run"))
    assert metrics(whole) == metrics(tmp_path / "run")


def test_an_interrupted_write_costs_no_checkpoint(
    whole: Path, tiny_teacher: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = diffdistill.training.checkpoint.save_file

    def fails_in_the_second_checkpoint(tensors: dict[str, Tensor], path: Path) -> None:
        if "step-00000004" in str(path) and "fake_score" in path.name:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(diffdistill.training.checkpoint, "save_file", fails_in_the_second_checkpoint)
    with pytest.raises(UserError, match=r"No space left on device\); the last good checkpoint is step-00000002: free"):
        distill(**options(tiny_teacher("vp"), tmp_path / "run"))
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert [p.name for p in kept] == ["step-00000002"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"], "nothing half-written"
    monkeypatch.undo()
    distill(resume=tmp_path / "run")
    assert same(student(whole), student(tmp_path / "run"))
    assert metrics(whole) == metrics(tmp_path / "run")


def test_a_resumed_run_remembers_what_changed(tiny_teacher: Teachers, tmp_path: Path) -> None:
    import yaml

    out = tmp_path / "run"
    distill(**options(tiny_teacher("vp"), out, steps=2))
    distill(resume=out, steps=4)
    assert yaml.safe_load((out / "config.yaml").read_text())["steps"] == 4
    assert json.loads((out / "student" / "diffdistill.json").read_text())["step"] == 4
    with pytest.raises(UserError, match="steps: 3 is fewer than the 4 that are done"):
        distill(resume=out, steps=3)
    with pytest.raises(UserError, match="seed: cannot change when a run is resumed"):
        distill(resume=out, seed=1)
    assert yaml.safe_load((out / "config.yaml").read_text())["steps"] == 4


def test_the_average_moves_only_with_its_player(tmp_path: Path) -> None:
    class EveryThird(TwoPlayers):
        def turns(self, step: int) -> list[Turn]:
            return [turn for turn in super().turns(step) if turn.player != "a" or step % 3 == 0]

    trainer = trainer_of(EveryThird(), tmp_path, steps=3, ema=0.5)
    assert trainer.average is not None
    before = []
    for _ in range(3):
        trainer.iteration()
        before.append(trainer.average.averages[0].clone())
    assert torch.equal(before[0], before[1]) and torch.equal(before[1], before[2])


def test_overflowing_parameters_are_not_saved(tmp_path: Path) -> None:
    method = TwoPlayers()
    trainer = trainer_of(method, tmp_path, steps=5, checkpoint_every=1)
    method.after_step = lambda step: step == 2 and method.players["a"].weight.data.fill_(torch.inf)  # type: ignore
    with pytest.raises(NonFinite, match=r"player .a.: its parameters are no longer finite.*step-00000002"):
        trainer.fit()
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000002"


def test_only_the_newest_checkpoints_are_kept(whole: Path) -> None:
    assert [p.name for p in checkpoints(whole / "checkpoints")] == ["step-00000004", "step-00000006"]


def test_a_damaged_checkpoint_is_named(whole: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(whole / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    file = tmp_path / "step-00000006" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"step-00000006.*damaged"):
        load_checkpoint(tmp_path / "step-00000006")


class TwoPlayers(Method):
    """Each player's loss also depends on the other; `poison` makes one loss infinite at one step."""

    def __init__(self, poison: int | None = None):
        self.players = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
        self.state = {}
        self.poison = poison
        self.moves: list[tuple[int, str]] = []
        self.ends: list[int] = []

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(1e-2)

    def turns(self, step: int) -> list[Turn]:
        return [Turn(name, lambda batch, name=name: self._loss(name, step, batch)) for name in ("b", "a")]

    def sampler(self) -> Sampler:
        raise AssertionError("nothing is drawn")

    def _loss(self, player: str, step: int, batch: Batch) -> Outcome:
        self.moves.append((step, player))
        loss = self.players["a"](self.players["b"](batch.randn("x"))).square().mean()
        return Outcome(loss * (float("inf") if step == self.poison and player == "a" else 1.0))

    def after_step(self, step: int) -> None:
        self.ends.append(step)


def trainer_of(method: TwoPlayers, out: Path, **config: Any) -> Trainer:
    fit = FitConfig(sample_every=0, device="cpu", **config)
    accelerator = accelerator_for(fit, out)
    out.mkdir(parents=True, exist_ok=True)

    def batches(step: int) -> Batch:
        return Batch(4, (2,), {}, None, accelerator.device, (fit.seed, step, 0))

    return Trainer(method, batches, fit, out, accelerator)  # type: ignore[arg-type]


def test_players_move_in_the_order_of_the_turns(tmp_path: Path) -> None:
    method = TwoPlayers()
    trainer_of(method, tmp_path, steps=2).fit()
    assert method.moves == [(0, "b"), (0, "a"), (1, "b"), (1, "a")]
    assert method.ends == [0, 1]


def test_only_the_moving_player_moves(tmp_path: Path) -> None:
    method = TwoPlayers()
    trainer = trainer_of(method, tmp_path, steps=1)
    before = {name: [p.clone() for p in m.parameters()] for name, m in method.players.items()}
    trainer.take(method.turns(0)[0], trainer.batches(0))
    assert all(torch.equal(p, q) for p, q in zip(before["a"], method.players["a"].parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(before["b"], method.players["b"].parameters(), strict=True))
    assert all(p.grad is None for m in method.players.values() for p in m.parameters())


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    method = TwoPlayers()
    trainer = trainer_of(method, tmp_path, steps=1, max_grad_norm=1e-3)
    seen = []
    optimizer = trainer.optimizers["b"]
    optimizer.register_step_pre_hook(
        lambda *args: seen.append(torch.nn.utils.get_total_norm([p.grad for p in method.players["b"].parameters()]))
    )
    logs = trainer.take(method.turns(0)[0], trainer.batches(0))
    assert float(logs["grad_norm"]) > 1e-2
    assert float(seen[0]) == pytest.approx(1e-3, rel=1e-3)


def test_a_non_finite_loss_stops_before_anything_is_updated(tmp_path: Path) -> None:
    method = TwoPlayers(poison=3)
    trainer = trainer_of(method, tmp_path, steps=5, checkpoint_every=2)
    with pytest.raises(NonFinite, match=r"step 3, player 'a': loss inf.*step-00000002"):
        trainer.fit()
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]
    assert all(bool(p.isfinite().all()) for m in method.players.values() for p in m.parameters())


def test_two_runs_in_one_process_may_differ_in_precision(tmp_path: Path) -> None:
    trainer_of(TwoPlayers(), tmp_path / "a", steps=1).fit()
    trainer = trainer_of(TwoPlayers(), tmp_path / "b", steps=1, mixed_precision="bf16")
    trainer.fit()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert all(p.dtype == torch.float32 for m in trainer.method.players.values() for p in m.parameters())


def test_warm_up_and_cosine(tmp_path: Path) -> None:
    trainer = trainer_of(TwoPlayers(), tmp_path, steps=8, warmup_steps=4, lr_schedule="cosine")
    rates = []
    for step in range(8):
        trainer.step = step
        rates.append(trainer.learning_rate("a") / 1e-2)
    assert rates[0] == pytest.approx(0.25) and max(rates) < 1
    assert rates[4] == pytest.approx(0.5) and rates[7] == pytest.approx(0.0381, abs=1e-4)


def test_the_folder_is_made_before_the_first_step(tiny_teacher: Teachers, tmp_path: Path) -> None:
    from diffdistill.training.assemble import make_game

    game = make_game({"teacher": str(tiny_teacher("vp")), "steps": 1, "batch_size": 2, "device": "cpu"})

    def no_step(step: int) -> Batch:
        raise RuntimeError("a step was taken")

    def trainer(out: Path) -> Trainer:
        return Trainer(game.method, no_step, game.config, out, accelerator_for(game.config, out))

    with pytest.raises(RuntimeError, match="a step was taken"):
        trainer(tmp_path / "deep" / "run").fit()
    assert (tmp_path / "deep" / "run").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot make"):
        trainer(tmp_path / "file" / "run").fit()
