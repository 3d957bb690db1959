"""A student of two times whose jumps are of several lengths: the same images by diffusers without diffdistill."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffdistill import UserError, distill, load_student
from diffdistill.core.denoiser import Extra
from diffdistill.data.encoded import open_encoded
from diffdistill.players.sampler import DDIM, Gamma, Renoise, Sampler
from diffdistill.players.two_times import second_times
from diffdistill.training.assemble import load_run
from tests.players.test_player_kinds import apart, drawn_by_a_stranger, options_for, ours
from tests.players.tiny import PROMPTS

JUMPS = {"method": "ctm", "grid_points": 5, "dsm_weight": 0.0, "student_steps": 4, "student_lr": 0.05, "steps": 3}


def options(folder: Path, prompts: Path, name: str) -> dict[str, object]:
    return {k: v for k, v in options_for(folder, prompts, name, "sid", "full").items()} | JUMPS


@pytest.mark.parametrize(
    ("name", "gamma", "scheduler"),
    [
        ("sd_v", 0.3, "TCDScheduler"),
        ("stable_diffusion", 0.6, "TCDScheduler"),
        ("sd_v", 1.0, "LCMScheduler"),
        ("sd_v", 0.0, "DDIMScheduler"),
        ("sd3", 1.0, "FlowMatchLCMScheduler"),
    ],
)
def test_a_stranger_draws_the_students_images(
    name: str, gamma: float, scheduler: str, encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded(name)
    data, run = open_encoded(prompts), tmp_path / "run"
    student = distill(**options(folder, prompts, name), gamma=gamma, out=str(run)).student
    assert json.loads((student / "model_index.json").read_text())["scheduler"][1] == scheduler
    image = ours(run, data.get(torch.tensor([1])).cond, tuple(data.settings["shape"]))
    job = {"student": str(student), "base": "", "what": {"prompt": PROMPTS[1]}, "type": "latent"}
    (drawn,) = drawn_by_a_stranger([job], tmp_path)
    assert apart(drawn.reshape(image.shape), image) < 1e-3
    sampler = load_run(run)[0].method.sampler()
    assert sampler.step == {0.0: DDIM(), 1.0: Renoise()}.get(gamma, Gamma(gamma))
    loaded, _ = load_student(student)
    assert (loaded.levels, loaded.step) == (sampler.levels, sampler.step)
    angles = [[each.denoiser.schedule.angle(level) for level in sampler.levels] for each in (sampler, loaded)]
    assert torch.allclose(torch.stack(angles[0]), torch.stack(angles[1]), atol=1e-6)


def test_one_network_of_one_time_makes_jumps_of_several_lengths(
    encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """At each level it says what the student says on the way to where its own jump leads, and only there."""
    folder, prompts = encoded("sd_v")
    distill(**options(folder, prompts, "sd_v"), gamma=0.5, out=str(tmp_path / "run"))
    game = load_run(tmp_path / "run")[0]
    sampler, teacher = game.method.sampler(), game.teacher
    cond = teacher.sample_cond(4)
    torch.manual_seed(0)
    for layer in second_times(sampler.denoiser.network):
        torch.nn.init.normal_(layer.mlp[-1].weight, std=3.0)
    plain = sampler.denoiser.with_network(sampler.network(teacher.shape, cond), None)
    t = torch.stack([plain.schedule.angle(level) for level in sampler.levels])
    r = torch.stack([sampler.leads(k) for k in range(4)])
    x = torch.randn(4, *teacher.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, equal_jumps = sampler.denoiser(x, t, cond, Extra(r=r)).y, sampler.denoiser(x, t, cond).y
        got = Sampler(plain, sampler.levels, sampler.step).predict(x, t, 0, cond).y
    assert apart(got, expected) < 1e-4
    assert apart(equal_jumps, expected) > 1e-2, "the lengths matter"


def test_a_pipeline_without_eta_is_refused_before_training(
    encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded("sd3")
    with pytest.raises(UserError, match=r"gamma 0\.3: of the stock pipelines only those with discrete timesteps"):
        distill(**options(folder, prompts, "sd3"), gamma=0.3, out=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()
