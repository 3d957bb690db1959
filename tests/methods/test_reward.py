"""Rewards: whose weights the matching has, what a user's function is told, and what is refused."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill
from diffdistill.commands.cli import main
from diffdistill.commands.rewards import judge_of, named_reward
from diffdistill.data.encoded import encode, open_encoded
from diffdistill.data.images import open_data
from diffdistill.data.seen import images_seen, with_texts
from diffdistill.data.shapes import caption, draw_many
from diffdistill.families import load_teacher
from diffdistill.scaffold.method import Batch, Need
from diffdistill.scaffold.reward import Judge
from tests import tiny_a
from tests.methods.short_runs import same_when_resumed
from tests.methods.test_wiring_decoupled_dmd import Decoupled
from tests.methods.test_wiring_matching import GAN, play
from tests.scaffold.straight import EDM_, FLOW, VP, Plain, fold, in_double

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


def brightness(images: Tensor, labels: Any) -> Tensor:
    return images.flatten(1).mean(1) + 0.1 * labels


class Rewarded(Decoupled):
    """The gradient of the matching, and not that of the GAN, counts exp(reward/beta) times."""

    def __init__(self, name: str, options: dict[str, Any], plain: Plain):
        super().__init__(name, options, plain)
        self.method.reward = Judge(brightness, "brightness", plain.std)

    def _dmd2(self, x: Tensor, t: Tensor, x_t: Tensor) -> dict[str, Tensor]:
        return self.rewarded(super()._dmd2, x, t, x_t)

    _dmd = _disback = _dmd2

    def _decoupled_dmd(self, x: Tensor, t: Tensor, x_t: Tensor) -> dict[str, Tensor]:
        return self.rewarded(super()._decoupled_dmd, x, t, x_t)

    def _diff_instruct(self, x: Tensor, t: Tensor, x_t: Tensor) -> dict[str, Tensor]:
        return self.rewarded(super()._diff_instruct, x, t, x_t)

    def _swiftbrush(self, x: Tensor, t: Tensor, x_t: Tensor) -> dict[str, Tensor]:
        return self.rewarded(super()._swiftbrush, x, t, x_t)

    def rewarded(self, matched: Any, x: Tensor, t: Tensor, x_t: Tensor) -> dict[str, Tensor]:
        r = ((self.plain.std * x).detach().float().mean((1, 2, 3)) + 0.1 * self.labels).float()
        w = torch.exp(r / self.c.reward_beta)
        weighted = x.clone()
        weighted.register_hook(lambda grad: fold(w) * grad)
        return {**matched(weighted, t, x_t), "reward": r.mean(), "reward weight": w.mean()}


@pytest.mark.parametrize("name", ["dmd2", "decoupled_dmd"])
@pytest.mark.parametrize("plain", [VP, FLOW, EDM_])
def test_a_turn_with_a_reward_is_its_straight_line(name: str, plain: Plain) -> None:
    with double():
        options = {"reward_beta": 0.3, "guidance_scale": 2.5, "update_ratio": 1}
        gan = GAN if plain is FLOW else {}
        straight = Rewarded(name, options | gan | {"student_steps": 2 if plain is VP else 1}, plain)
        assert play(straight) == ["student", "fake_score"]
        assert straight.method.needs == {Need.REWARD} | ({Need.IMAGES} if gan else set())


@pytest.mark.parametrize(
    ("name", "options", "plain"),
    [
        ("dmd", {"guidance_scale": 2.5, "regression_weight": 0.6}, EDM_),
        ("dmd", {"regression_weight": 0.0}, VP),
        ("disback", {"path_length": 0, "update_ratio": 1}, FLOW),
        ("diff_instruct", {"student_level": 2.5}, EDM_),
        ("swiftbrush", {"guidance_scale": 2.5, "label_dropout": 0.4}, VP),
    ],
)
def test_methods_of_one_step_weight_their_matching_alone(name: str, options: dict[str, Any], plain: Plain) -> None:
    """The regression on pairs, for one, counts once."""
    with double():
        straight = Rewarded(name, options | {"reward_beta": 0.3}, plain)
        assert play(straight) == ["student", "fake_score"]
        assert straight.method.needs == {Need.REWARD} | ({Need.PAIRS} if options.get("regression_weight") else set())


RUN: dict[str, Any] = {"method": "dmd2", "batch_size": 4, "update_ratio": 1, "sample_every": 0, "log_every": 1}


def test_a_file_of_the_users_is_told_images_and_labels_and_resumes_to_the_same_bits(
    tiny_teacher: Teachers, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(images, labels):\n"
        "    assert images.shape[1:] == (1, 8, 8) and images.abs().max() <= 1 and labels.dtype.is_signed\n"
        "    return [float(image.mean()) + int(label) for image, label in zip(images, labels)]\n"
    )
    options = RUN | {"teacher": str(tiny_teacher("edm")), "reward": f"{file}:score", "reward_beta": 2.0}
    same_when_resumed(tmp_path, **options, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = [line["student/reward"] for line in lines if "student/reward" in line]
    assert len(shown) >= 4 and 0 < max(shown) < 10
    record = json.loads((tmp_path / "run" / "student" / "diffdistill.json").read_text())
    assert record["options"]["reward"] == "mine.py:score"
    file.write_text(file.read_text().replace("+ int", "- int"))
    with pytest.raises(UserError, match="changed since the run began: reward's function"):
        distill(resume=tmp_path / "run", steps=6)


def test_python_gives_a_function(tiny_teacher: Teachers, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def mine(images: Tensor, labels: Tensor) -> Tensor:
        seen.append((*images.shape, *labels.shape))
        return images.flatten(1).mean(1)

    options = RUN | {"teacher": str(tiny_teacher("vp")), "steps": 1, "device": "cpu", "options": {"reward_beta": 1.0}}
    run = distill(**options, reward=mine, out=tmp_path / "run")
    assert seen == [(4, 1, 8, 8, 4)] * 2  # it is tried first
    with pytest.raises(UserError, match="reward: it was an object of type mine; give it again"):
        distill(resume=run.folder, steps=2)
    distill(resume=run.folder, steps=2, reward=mine)
    with pytest.raises(ZeroDivisionError):  # its own traceback
        distill(**options, reward=lambda images, labels: 1 / 0, out=tmp_path / "other")
    with pytest.raises(UserError, match="reward: Tensor is none; give a function"):
        distill(**options, reward=torch.ones(1), out=tmp_path / "none")


@pytest.mark.parametrize(
    ("reward", "more", "message"),
    [
        (
            "HERE/mine.py:score",
            ["--reward-beta", "0.001"],
            "reward_beta: exp(r/0.001) is not finite for a reward r = 1",
        ),
        ("HERE/mine.py:score", [], "reward: dmd2 with these options reads none; leave it out"),
        (None, ["--reward-beta", "1"], "reward: dmd2 with these options needs one; give --reward FILE.py:FUNCTION"),
        ("HERE/mine.py:scor", ["--reward-beta", "1"], "has no function 'scor'; did you mean 'score'?"),
        ("HERE/none.py:score", ["--reward-beta", "1"], "none.py' does not exist; give FILE.py:FUNCTION"),
        ("HERE/mine.py:one", ["--reward-beta", "1"], "gives () for 4 images; give one number for each"),
        ("HERE/mine.py:nan", ["--reward-beta", "1"], "mine.py:nan' gives nan; give finite numbers"),
        ("HERE/mine.py:wrong", ["--reward-beta", "1"], "fails for images (4, 1, 8, 8) (KeyError: 'colour')"),
        ("HERE/broken.py:score", ["--reward-beta", "1"], "broken.py' cannot be imported (NameError"),
        ("clip", ["--reward-beta", "1"], "reward: 'clip' is none; give FILE.py:FUNCTION, 'digits', 'shapes'"),
        ("shapes:redd", ["--reward-beta", "1"], "reward: shapes have no 'redd'; did you mean 'red'?"),
        ("shapes:red", ["--reward-beta", "1"], "reward: shapes is for images (3, 32, 32) of drawn shapes"),
        ("digits", ["--reward-beta", "0"], "reward_beta: 0.0 must be greater than 0"),
    ],
)
def test_what_is_no_reward_is_refused_in_one_line(
    reward: str | None, more: list[str], message: str, tiny_teacher: Teachers, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def score(images, labels): return torch.ones(len(images))\n"
        "def one(images, labels): return 1.0\n"
        "def nan(images, labels): return [float('nan')] * len(images)\n"
        "def wrong(images, labels): return {}['colour']\n"
    )
    (tmp_path / "broken.py").write_text("unknown\n")
    given = [] if reward is None else ["--reward", reward.replace("HERE", str(tmp_path))]
    teacher = ["--teacher", str(tiny_teacher("vp")), "--device", "cpu", "--batch-size", "4", "--steps", "1"]
    assert main(["train", "--method", "dmd2", *teacher, *given, *more, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and len(error.replace(str(tmp_path), "")) < 300


def test_the_rewards_for_what_is_drawn_here() -> None:
    digits = open_data("digits").get(torch.arange(64))
    reward = named_reward("digits")
    right, wrong = (reward(digits.images, (digits.labels + k) % 10) for k in (0, 3))  # type: ignore[operator]
    none = reward(digits.images, torch.full((64,), 10))
    assert bool((right > -0.7).float().mean() > 0.9) and float(wrong.mean()) < -3
    assert float(none.mean()) >= float(right.mean())
    images, captions, attributes = draw_many(1, 24)
    assert named_reward("shapes")(images, captions).tolist() == [1.0] * 24
    other = [caption((c + 1) % 6, s, p) for c, s, p in attributes.tolist()]
    assert [float(named_reward(f"shapes:{which}")(images, other).mean()) for which in ("colour", "shape", "all")] == [
        0,
        1,
        0,
    ]
    white = named_reward("shapes:white")(images, other)
    assert torch.equal(white, (attributes[:, 0] == 5).float()) and 0 < float(white.sum()) < 24


def test_the_reward_of_a_latent_teacher_sees_images_and_prompts(tmp_path: Path) -> None:
    folder, texts = tmp_path / "sd", [f"prompt number {i}" for i in range(7)]
    tiny_a.stable_diffusion(prediction_type="v_prediction", zero_snr=True).save_pretrained(folder)
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    shared = {"teacher": str(folder), "resolution": 16, "device": "cpu"}
    made = encode(**shared, prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "encoded"))
    teacher, encoded = load_teacher(folder, resolution=16), open_encoded(made)
    seen = with_texts(encoded).get(torch.tensor([3, 0, 3]))
    assert seen.texts == (texts[3], texts[0], texts[3]) and encoded.get(torch.tensor([3])).texts is None
    told: list[Any] = []

    def mine(images: Tensor, prompts: list[str]) -> list[float]:
        told.append((tuple(images.shape), float(images.abs().max()) <= 1, prompts))
        return [0.0] * len(images)

    x = torch.randn(4, *teacher.shape)
    batch = Batch(4, teacher.shape, {}, None, torch.device("cpu"), (0, 0, 2), texts=tuple(texts[:4]), total=8)
    judge_of(mine, teacher)(x[2:], batch.parts(2)[1])
    assert told == [((2, 3, 16, 16), True, texts[2:4])]
    assert images_seen(teacher)(x).shape == (4, 3, 16, 16)
    more = {"batch_size": 2, "steps": 1, "update_ratio": 1, "prompts": str(made), "sample_every": 0, "resolution": 16}
    distill(
        "dmd2", teacher=folder, reward=mine, options={"reward_beta": 1.0}, **more, device="cpu", out=tmp_path / "run"
    )
    assert len(told) == 3 and all(prompt in texts for prompt in told[-1][2])
    (tmp_path / "prompts.txt").write_text("\n".join(["another", *texts[1:]]))
    with pytest.raises(UserError, match=r"prompts: .*prompts\.txt' is another than .* was made of; encode it again"):
        with_texts(encoded)
