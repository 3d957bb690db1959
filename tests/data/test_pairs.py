"""Noise-image pairs: a function of (seed, index), whole or absent, and refused where they do not fit."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, load_teacher
from diffdistill.commands.cli import main
from diffdistill.config import FitConfig, PairsConfig, TrainConfig
from diffdistill.data import pairs
from diffdistill.data.batches import batches
from diffdistill.data.images import open_data
from diffdistill.data.pairs import KIND, check_pairs, draw_pairs, fingerprint, make_pairs, open_pairs
from diffdistill.eval.models import teacher_images
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.players.sampler import Sampler
from diffdistill.rng import generator, image_generators
from diffdistill.scaffold.method import Need
from diffdistill.training.assemble import NO_OBJECTS, pairs_for
from diffdistill.training.trainer import accelerator_for

Teachers = Callable[[str], Path]


def settings(teacher: Path, out: Path, **changed: Any) -> dict[str, Any]:
    config = {"teacher": str(teacher), "count": 10, "sampling_steps": 2, "shard_size": 4, "batch_size": 3}
    return config | {"out": str(out), "device": "cpu"} | changed


@pytest.fixture
def folder(tiny_teacher: Teachers, tmp_path: Path) -> Path:
    return make_pairs(**settings(tiny_teacher("vp"), tmp_path / "pairs"))


def test_they_are_the_exact_flow_of_a_gaussian() -> None:
    teacher = gaussian_teacher([0.7, -0.4], torch.tensor([0.5, 1.3]))
    errors = {}
    for solver in ("ddim", "heun"):
        got = draw_pairs(teacher, teacher.denoiser, PairsConfig(solver=solver, sampling_steps=200), range(8))  # type: ignore[arg-type]
        exact = torch.tensor([0.7, -0.4]).double() + torch.tensor([0.5, 1.3]).double() * got["z"]
        errors[solver] = float((got["x0"] - exact).abs().max())
    assert errors["ddim"] < 2e-2 and errors["heun"] < 1e-3, errors


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_the_noise_is_the_teachers_and_the_students(parameterization: str, tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher(parameterization))
    schedule = teacher.denoiser.schedule
    got = draw_pairs(teacher, teacher.denoiser, PairsConfig(sampling_steps=3), range(4))
    own = [generator("cpu", 0, "pair", i) for i in range(4)]
    images = teacher_images(teacher, 3, 1.0, {"class_labels": torch.arange(4)}, own)
    torch.testing.assert_close(got["x0"] * schedule.data_std, images, rtol=0, atol=1e-6)
    # What the teacher's solver starts from is what the student reads at that level.
    seen: list[Tensor] = []
    handle = teacher.denoiser.network.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    draw_pairs(teacher, teacher.denoiser, PairsConfig(sampling_steps=1), range(4))
    sampler = Sampler(teacher.denoiser, schedule.levels(1).tolist())
    sampler.one_step(got["z"], {"class_labels": torch.arange(4)})
    handle.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-6, atol=0)


def test_a_pair_is_a_function_of_seed_and_index(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    config = PairsConfig(sampling_steps=2)
    whole = draw_pairs(teacher, teacher.denoiser, config, range(12))
    part = draw_pairs(teacher, teacher.denoiser, config, [7, 3])
    assert torch.equal(part["z"], whole["z"][[7, 3]])
    assert torch.equal(part["class_labels"], torch.tensor([7, 3]))
    assert torch.equal(whole["class_labels"], torch.arange(12) % 10)
    torch.testing.assert_close(part["x0"], whole["x0"][[7, 3]], rtol=0, atol=1e-5)
    other = draw_pairs(teacher, teacher.denoiser, replace(config, seed=1), range(12))
    assert not (other["z"] == whole["z"]).any()
    for seed in (0, 1):  # else a student would be judged on the noise that it learned
        judged = torch.stack([torch.randn(teacher.shape, generator=g) for g in image_generators(seed, range(12))])
        assert not (judged == whole["z"]).any()
    draws = draw_pairs(teacher, teacher.denoiser, config, range(400))["z"]
    assert abs(float(draws.mean())) < 0.03 and abs(float(draws.std()) - 1) < 0.03


def test_they_are_read_in_any_order_across_shards(tiny_teacher: Teachers, folder: Path, tmp_path: Path) -> None:
    read = open_pairs(folder)
    assert len(read) == 10 and len(read.shards) == 3
    indices = torch.tensor([9, 0, 5, 5])
    example = read.get(indices)
    got = example.pair
    assert got is not None and torch.equal(example.cond["class_labels"], got.cond["class_labels"])
    assert got.z.shape == got.x0.shape == (4, 1, 8, 8)
    teacher = load_teacher(tiny_teacher("vp"))
    drawn = draw_pairs(teacher, teacher.denoiser, PairsConfig(sampling_steps=2), indices.tolist())
    assert torch.equal(got.z, drawn["z"]) and torch.equal(got.cond["class_labels"], drawn["class_labels"])
    torch.testing.assert_close(got.x0, drawn["x0"], rtol=0, atol=1e-5)
    other = make_pairs(**settings(tiny_teacher("vp"), tmp_path / "one", shard_size=50, batch_size=10))
    again = open_pairs(other).get(indices).pair
    assert again is not None and torch.equal(again.z, got.z)
    with pytest.raises(IndexError):
        read.get(torch.tensor([10]))
    with pytest.raises(IndexError):
        read.get(torch.tensor([-1]))


def test_a_stopped_run_goes_on_and_has_the_same_bits(
    tiny_teacher: Teachers, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real, calls = draw_pairs, []

    def stopping(teacher: Any, denoise: Any, config: Any, indices: Sequence[int], conditions: Any) -> dict[str, Tensor]:
        calls.append(indices[0])
        if len(calls) == 4:  # inside the second shard
            raise KeyboardInterrupt
        return real(teacher, denoise, config, indices)

    arguments = settings(tiny_teacher("vp"), tmp_path / "stopped")
    monkeypatch.setattr(pairs, "draw_pairs", stopping)
    argv = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["pairs", *argv]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not finished, 1 of 3 shards are there"):
        open_pairs(tmp_path / "stopped")
    assert main(["pairs", *argv]) == 0
    assert calls[4:] == [4, 7, 8], "the first shard is kept"
    for name in ("00000.safetensors", "00001.safetensors", "00002.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (folder / name).read_bytes()
    assert {p.name for p in (tmp_path / "stopped").iterdir()} == {p.name for p in folder.iterdir()}
    capsys.readouterr()
    assert main(["pairs", *argv]) == 0
    assert len(calls) == 7 and "is done: 10 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["flipped", "short", "gone"])
def test_a_damaged_shard_is_refused_and_made_again(harm: str, tiny_teacher: Teachers, folder: Path) -> None:
    shard = folder / "00001.safetensors"
    before = shard.read_bytes()
    if harm == "gone":
        shard.unlink()
    else:
        shard.write_bytes(before[:-1] + (b"" if harm == "short" else bytes([before[-1] ^ 1])))
    with pytest.raises(UserError, match=r"00001.safetensors is missing or damaged; run `diffdistill pairs` again"):
        open_pairs(folder)
    make_pairs(**settings(tiny_teacher("vp"), folder))
    assert shard.read_bytes() == before
    assert len(open_pairs(folder)) == 10


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", 11), ("solver", "heun"), ("sampling_steps", 3), ("guidance_scale", 2.0), ("seed", 1), ("shard_size", 5)],
)
def test_other_settings_are_refused_by_name(name: str, value: Any, tiny_teacher: Teachers, folder: Path) -> None:
    before = (folder / KIND.index).read_bytes()
    with pytest.raises(UserError, match=rf"holds pairs made with {name} \S+, and {value} is asked for"):
        make_pairs(**settings(tiny_teacher("vp"), folder, **{name: value}))
    assert (folder / KIND.index).read_bytes() == before


def test_another_teacher_is_refused(tiny_teacher: Teachers, folder: Path) -> None:
    with pytest.raises(UserError, match="made with fingerprint"):
        make_pairs(**settings(tiny_teacher("edm"), folder))
    make_pairs(**settings(tiny_teacher("vp"), folder, batch_size=1))  # which changes no pair


def test_fingerprints_tell_teachers_apart(tiny_teacher: Teachers) -> None:
    one, two = load_teacher(tiny_teacher("vp")), load_teacher(tiny_teacher("vp"))
    before = fingerprint(one)
    assert before == fingerprint(two)
    two.denoiser.to(torch.float64)
    assert fingerprint(two) != before
    next(one.denoiser.parameters()).data.flatten()[0] += 1e-3
    assert fingerprint(one) != before
    three = load_teacher(tiny_teacher("vp"))
    three.scheduler["rescale_betas_zero_snr"] = not three.scheduler.get("rescale_betas_zero_snr")
    assert fingerprint(three) != before


def test_the_order_is_a_function_of_the_step_and_not_the_datas(
    tiny_teacher: Teachers, folder: Path, tmp_path: Path
) -> None:
    config = FitConfig(batch_size=3, device="cpu")
    accelerator, read = accelerator_for(config, tmp_path), open_pairs(folder)
    teacher = load_teacher(tiny_teacher("vp"))

    def order(**changed: Any) -> list[int]:
        draw = batches(replace(config, **changed), teacher, None, accelerator, pairs=read)
        classes = []
        for step in range(10):
            pair = draw(step).pair
            assert pair is not None and pair.z.shape == (3, 1, 8, 8)
            classes += pair.cond["class_labels"].tolist()  # of 10 pairs the class is the index
        return classes

    first = order()
    assert first == order() and first != order(seed=1)
    assert all(sorted(first[10 * k : 10 * k + 10]) == list(range(10)) for k in range(3)), "epochs"
    from diffdistill.data.batches import batch_indices

    datas = torch.cat([batch_indices(10, 3, step, seed=0) for step in range(10)]).tolist()
    assert first != datas
    assert batches(config, teacher, None, accelerator)(0).pair is None
    both = batches(config, teacher, open_data("digits"), accelerator, pairs=read)(4)
    assert both.x0 is not None and both.pair is not None


def test_what_does_not_fit_a_training_is_refused(
    tiny_teacher: Teachers, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def game(pairs: str | None, parameterization: str = "vp", scale: float = 1.0, needs: bool = True) -> Any:
        return SimpleNamespace(
            method=SimpleNamespace(needs={Need.PAIRS} if needs else set()),
            config=TrainConfig(pairs=pairs),
            recipe=SimpleNamespace(name="mine"),
            objects=NO_OBJECTS,
            teacher=load_teacher(tiny_teacher(parameterization)),
            encoded=None,
            options=lambda: {"guidance_scale": scale},
        )

    assert pairs_for(game(None, needs=False), 4) is None
    assert len(pairs_for(game(str(folder)), 4) or []) == 10
    assert capsys.readouterr().err == ""
    assert pairs_for(game(str(folder), scale=3.0), 4) is not None
    assert "made with guidance_scale 1 and mine's is 3" in capsys.readouterr().err
    for parts, needed, says in (
        (game(None), 4, "needs noise-image pairs; make them with `diffdistill pairs --teacher digits --out DIR`"),
        (game(str(tmp_path / "nowhere")), 4, "has no pairs.json"),
        (game(str(folder)), 11, "holds 10 and a step takes 11"),
        (game(str(folder), "edm"), 4, "was made with another teacher"),
    ):
        with pytest.raises(UserError, match=says) as refused:
            pairs_for(parts, needed)
        assert str(refused.value).startswith("pairs: ") and "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"has samples of shape \(1, 8, 8\); the teacher's are \(3, 8, 8\)"):
        check_pairs(replace(load_teacher(tiny_teacher("vp")), shape=(3, 8, 8)), open_pairs(folder))


def test_a_folder_that_is_none_of_ours_is_refused(tiny_teacher: Teachers, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no folder of pairs; choose another --out"):
        make_pairs(**settings(tiny_teacher("vp"), tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    for text in ("{", "[]", "{}", '{"settings": {}, "shards": {}}'):
        (tmp_path / KIND.index).write_text(text)
        with pytest.raises(UserError, match=r"is not readable JSON|is no index of pairs"):
            open_pairs(tmp_path)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--count", "0"], "count: 0 must be at least 1"),
        (["--solver", "euler"], "solver: 'euler' is not one of ddim, heun"),
        (["--sampling-steps", "5000"], "sampling_steps: 5000 is more than the teacher's 1000 timesteps"),
        (["--teacher", "./nowhere"], "teacher: './nowhere' is not a folder"),
        (["--shards", "3"], "--shards: no such option of pairs; did you mean '--shard-size'?"),
    ],
)
def test_bad_input_gets_one_line(
    option: list[str], says: str, tiny_teacher: Teachers, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["pairs", "--teacher", str(tiny_teacher("vp")), "--device", "cpu", "--out", str(tmp_path / "pairs")]
    assert main([*argv, *option]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1
    assert not (tmp_path / "pairs").exists()


def test_the_index_says_how_they_were_made(tiny_teacher: Teachers, folder: Path) -> None:
    index = json.loads((folder / KIND.index).read_text())
    assert index["teacher"] == str(tiny_teacher("vp"))
    assert index["settings"] | {"fingerprint": ""} == {
        "fingerprint": "",
        "shape": [1, 8, 8],
        "num_classes": 10,
        "data_std": 1.0,
        "count": 10,
        "solver": "ddim",
        "sampling_steps": 2,
        "guidance_scale": 1.0,
        "guidance_scale_2": None,
        "seed": 0,
        "shard_size": 4,
    }
    assert list(index["shards"]) == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert all(len(checksum) == 64 for checksum in index["shards"].values())
