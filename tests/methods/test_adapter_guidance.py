"""AGD: its exact checks hold, known mistakes are caught, and its adapters leave the base model as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill import UserError, distill, load_student, load_teacher
from diffdistill.catalogue import describe_method
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guide
from diffdistill.core.prediction import OUTPUTS, Prediction
from diffdistill.core.schedule import TrigFlow
from diffdistill.data.examples import ClassLabels
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods.adapter_guidance import AdapterGuidance, Config
from diffdistill.methods.checks import adapter_guidance as checks
from diffdistill.methods.checks.adapter_guidance import verify
from diffdistill.players.adapter_networks import AdaptedNetwork, GuidanceAdapters
from diffdistill.players.guidance_adapters import adapted, load_adapters, new_adapters, save_adapters
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators
from diffdistill.scaffold import imitating
from diffdistill.scaffold.chains import GuidedChains
from diffdistill.scaffold.method import Batch
from tests.methods.short_runs import same_when_resumed
from tests.stranger import stranger

Teachers = Callable[[str], Path]
SMALL = {"adapter_width": 8, "trajectory_steps": 5, "sampling_steps": 4, "student_lr": 1e-2}


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def all_at_the_beginning(self: GuidedChains, batch: Batch, teacher: Denoiser) -> None:
    self.grid, grid = self.grid[[0, -1]], self.grid
    REAL_START(self, batch, teacher)
    self.grid = grid


def unguided(self: GuidedChains, batch: Batch, guided: Prediction) -> None:
    REAL_ADVANCE(self, batch, guided.with_output(guided.y * 0.9))


def never_restarting(self: GuidedChains, batch: Batch, guided: Prediction) -> None:
    fresh = self.x_t
    REAL_ADVANCE(self, batch, guided)
    self.x_t = torch.where((self.step == 0)[:, None], fresh, self.x_t)
    self.scale = torch.ones_like(self.scale)


def off_by_one(self: GuidanceAdapters, scale: Tensor, time: Tensor, labels: Tensor) -> Any:
    return REAL_CORRECTIONS(self, scale + 1, time, labels)


def default_scale(self: AdaptedNetwork, x: Tensor, time: Tensor, **kwargs: Any) -> Any:
    return REAL_FORWARD(self, x, time, **kwargs | {"guidance_scale": None})


REAL_START, REAL_ADVANCE = GuidedChains._start, GuidedChains.advance
REAL_CORRECTIONS, REAL_FORWARD = GuidanceAdapters.forward, AdaptedNetwork.forward
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the target's scale is w": (imitating, "guide", lambda d, x, t, c, s: guide(d, x, t, c, s + 1)),
    "the student's scale is w": (GuidanceAdapters, "forward", off_by_one),
    "the student does not see the scale": (AdaptedNetwork, "forward", default_scale),
    "the target is the conditional output": (
        imitating,
        "guide",
        lambda d, x, t, c, s: guide(d, x, t, c, torch.ones_like(s)),
    ),
    "the conditions are swapped": (
        imitating,
        "guide",
        lambda d, x, t, c, s: guide(d, x, t, {k: v - 1 for k, v in c.items()}, s),
    ),
    "the chains are not staggered": (GuidedChains, "_start", all_at_the_beginning),
    "the chains leave the guided trajectory": (GuidedChains, "advance", unguided),
    "the chains do not begin anew": (GuidedChains, "advance", never_restarting),
    "the sampler adds noise": (
        AdapterGuidance,
        "sampler",
        lambda self: Sampler(self.student, self.schedule.levels(self.config.sampling_steps).tolist()),
    ),
    "training does not begin at the base": (nn.init, "zeros_", lambda tensor: tensor),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


def options(teacher: Path, out: Path, **changes: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {"method": "adapter_guidance", "teacher": str(teacher), "steps": 2, "batch_size": 4}
    return shared | SMALL | {"sample_every": 0, "device": "cpu", "out": str(out)} | changes


# What a stranger would run: stock diffusers, the model card's call, one generator an image.
STOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffdistill":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
images = {}
for name, scale in (("default", {}), ("off", {"guidance_scale": 1.0}), ("each", {"guidance_scale": [1.0, 2.0] * 4})):
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    made = pipeline(batch_size=8, class_labels=list(range(8)), generator=generators, output_type="pt", **scale)
    images[name] = made.images.contiguous()
save_file(images, sys.argv[2])
assert len(pipeline(batch_size=2, class_labels=[1, 2], num_inference_steps=2).images) == 2
assert not any(name.split(".")[0] == "diffdistill" for name in sys.modules)
print(len(pipeline.scheduler.timesteps), type(pipeline).__name__, type(pipeline.unet).__name__)
"""


@pytest.mark.parametrize(
    ("parameterization", "adapter"),
    [
        ("vp", "additive"),
        pytest.param("edm", "attention", marks=pytest.mark.slow),
        pytest.param("flow", "mlp_gate", marks=pytest.mark.slow),
    ],
)
def test_the_export_gives_the_same_images_in_stock_diffusers(
    parameterization: str, adapter: str, tiny_teacher: Teachers, tmp_path: Path
) -> None:
    teacher = tiny_teacher(parameterization)
    folder = distill(
        **options(teacher, tmp_path / "run", adapter=adapter, adapted_layers="blocks", student_lr=0.3)
    ).student
    done = stranger(STOCK, folder, tmp_path / "images.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "AdaptedPipeline", "UNet2DModel"]
    assert "Expected types" not in done.stderr, done.stderr
    stock = load_file(tmp_path / "images.safetensors")
    sampler, student = load_student(folder)
    labels = torch.arange(8)
    for name, cond in (
        ("default", {}),
        ("off", {"guidance_scale": torch.ones(8)}),
        ("each", {"guidance_scale": torch.tensor([1.0, 2.0] * 4)}),
    ):
        ours = sampler(student.shape, {"class_labels": labels, **cond}, image_generators(0, range(8)))
        assert torch.allclose(ours.clamp(-1, 1), stock[name] * 2 - 1, rtol=0, atol=1e-4), name
    base = load_teacher(teacher)
    plain = Sampler(base.denoiser, sampler.levels, DDIM())
    unguided = plain(base.shape, {"class_labels": labels}, image_generators(0, range(8)))
    assert torch.allclose(unguided.clamp(-1, 1), stock["off"] * 2 - 1, rtol=0, atol=1e-4)
    assert not torch.allclose(stock["default"], stock["off"], atol=1e-3), "the adapters do something"
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    before, after = load_file(teacher / weights), load_file(folder / weights)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    assert "guidance_scale=3" in (folder / "README.md").read_text()


@pytest.mark.parametrize("parameterization", ["edm", "flow"])
def test_it_trains_every_parameterisation(parameterization: str, tiny_teacher: Teachers, tmp_path: Path) -> None:
    folder = distill(**options(tiny_teacher(parameterization), tmp_path / "run")).student
    names = ["README.md", "adapter", "adapted_pipeline.py", "diffdistill.json", "model_index.json", "scheduler", "unet"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    """Chains and all: they pass the end of their trajectories in these steps."""
    same_when_resumed(tmp_path, stop=3, end=8, **options(tiny_teacher("vp"), tmp_path, ema=0.9))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000008"
    assert load_file(checkpoint / "state.chains.safetensors")["x_t"].shape == (4, 1, 8, 8)
    assert not any("base" in name for name in load_file(checkpoint / "student.safetensors")), "adapters alone"
    assert (tmp_path / "run" / "student" / "adapter" / "adapter.safetensors").is_file()


def batch_of(teacher: Teacher, size: int, step: int) -> Batch:
    cond = ClassLabels(teacher.num_classes).draw(size, torch.Generator().manual_seed(step)).cond
    return Batch(size, teacher.shape, cond, None, torch.device("cpu"), (0, step, 0))


def trained(method: AdapterGuidance, teacher: Teacher, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in method.student.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        method.on_trajectories(batch_of(teacher, 64, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["additive", "attention", "mlp_gate"])
def test_trained_adapters_follow_the_guided_trajectory_of_gaussians(kind: str) -> None:
    """One pass a step, at scales and on noise that training did not see, ends where two passes end."""
    teacher = class_teacher()
    torch.manual_seed(0)
    method = AdapterGuidance(teacher, Config(adapter=kind, trajectory_steps=10, sampling_steps=10))  # type: ignore[arg-type]
    z = torch.randn(200, 2, dtype=torch.float64)
    cond, scale = {"class_labels": torch.arange(200) % 2}, 1 + 5 * torch.rand(200).double()
    grid = method.chains.grid
    guided, plain = z, z
    for t, s in zip(grid[:-1].expand(200, -1).T, grid[1:].expand(200, -1).T, strict=True):
        guided = guide(teacher.denoiser, guided, t, cond, scale).at(s)
        plain = teacher.denoiser(plain, t, cond).at(s)

    def error() -> float:
        cond_a = cond | {"guidance_scale": scale}
        with torch.no_grad():
            x, t = method.sampler().input_at(9, z, cond_a, lambda j: z)
            made = method.student(x, t, cond_a).x0
        return float((made - guided).norm() / (plain - guided).norm())

    assert error() == pytest.approx(1)
    trained(method, teacher, 400, 1e-2)
    assert error() < 0.05


def test_training_leaves_the_base_untouched(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    before = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    method = AdapterGuidance(teacher, Config(adapter="attention", adapted_layers="blocks", trajectory_steps=6))
    trained(method, teacher, 3, 1e-2)
    method.student.train()
    assert not method.teacher.training, "the teacher has dropout"
    after = teacher.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not any(module._forward_hooks for module in teacher.denoiser.modules())


def test_one_guided_call_and_one_pass_a_step(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    method = AdapterGuidance(teacher, Config(trajectory_steps=4))
    calls: list[int] = []
    teacher.denoiser.network.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    for step in range(6):
        cond = {"class_labels": torch.arange(8)}
        method.on_trajectories(Batch(8, teacher.shape, cond, None, torch.device("cpu"), (0, step, 0)))
    # The first batch leads chains to steps 1, 2 and 3: six of them, four, two; each guided.
    assert calls == [12, 8, 4] + [16, 8] * 6


def test_the_chains_of_other_samples_begin_anew() -> None:
    teacher = class_teacher()
    chains = GuidedChains(teacher, 4, 1.0, 3.0)

    def batch(step: int, rank: int) -> Batch:
        key = (0, step, 4 * rank)
        return Batch(4, (2,), {"class_labels": torch.zeros(4).long()}, None, torch.device("cpu"), key, total=8)

    first = chains.points(batch(0, 0), teacher.denoiser)
    resumed = GuidedChains(teacher, 4, 1.0, 3.0)
    resumed.load_state_dict(chains.state_dict())
    assert torch.equal(resumed.points(batch(1, 0), teacher.denoiser).x_t, first.x_t)
    assert not torch.equal(resumed.points(batch(1, 1), teacher.denoiser).x_t, first.x_t)


def class_teacher() -> Teacher:
    means = torch.tensor([[0.7, -0.4], [-0.9, 0.3], [0.1, 0.2]]).double()
    return checks._Classes(means, torch.ones(3, 2).double()).teacher()


@pytest.mark.parametrize("kind", ["additive", "attention", "mlp_gate"])
def test_adapters_are_small_and_saved_apart(kind: str, tmp_path: Path) -> None:
    teacher = load_teacher("digits")
    network = teacher.denoiser.network
    preset = describe_method("adapter_guidance").presets["digits"].options
    adapters = new_adapters(teacher, kind, 12, str(preset["adapted_layers"]))
    denoiser = adapted(teacher.denoiser, adapters, 2.0)
    with torch.no_grad():
        for p in adapters.parameters():
            p.normal_(std=0.1)
    save_adapters(tmp_path / "adapter", denoiser)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    fresh = load_teacher("digits")
    loaded = load_adapters(tmp_path / "adapter", fresh.denoiser)
    x, t = torch.randn(4, 1, 8, 8), torch.linspace(0.1, 1.5, 4).double()
    cond = {"class_labels": torch.arange(4)}
    with torch.no_grad():
        for both in (cond, cond | {"guidance_scale": torch.tensor([1.0, 2.0, 3.0, 4.0])}):
            assert torch.equal(loaded(x, t, both).y, denoiser(x, t, both).y)
        off = loaded(x, t, cond | {"guidance_scale": torch.ones(4)}).y
        assert torch.equal(off, teacher.denoiser(x, t, cond).y)
        assert not torch.equal(loaded(x, t, cond).y, off)
    assert sum(p.numel() for p in adapters.parameters()) < 0.05 * sum(p.numel() for p in network.parameters())


def test_the_digits_preset_adds_less_than_five_per_cent() -> None:
    teacher = load_teacher("digits")
    preset = describe_method("adapter_guidance").presets["digits"].options
    adapters = new_adapters(teacher, *(preset[k] for k in ("adapter", "adapter_width", "adapted_layers")))  # type: ignore[arg-type]
    size = sum(p.numel() for p in teacher.denoiser.parameters())
    assert 0.02 * size < sum(p.numel() for p in adapters.parameters()) < 0.05 * size


def test_adapters_go_on_a_student_of_few_steps_and_on_nothing_else(tiny_teacher: Teachers, tmp_path: Path) -> None:
    teacher = tiny_teacher("vp")
    with_adapters = distill(**options(teacher, tmp_path / "agd", adapter_width=8, student_lr=0.1)).student
    shared = {"teacher": str(teacher), "steps": 1, "batch_size": 4, "sample_every": 0, "device": "cpu"}
    few = distill(method="dmd2", **shared, out=str(tmp_path / "dmd2")).student
    sampler, student = load_student(few)
    denoiser = load_adapters(with_adapters / "adapter", sampler.denoiser)
    both = Sampler(denoiser, sampler.levels)
    cond, draw = {"class_labels": torch.arange(4)}, image_generators(0, range(4))
    alone = sampler(student.shape, cond, image_generators(0, range(4)))
    assert not torch.equal(both(student.shape, cond, draw), alone)
    off = cond | {"guidance_scale": torch.ones(4)}
    assert torch.equal(both(student.shape, off, image_generators(0, range(4))), alone)

    with pytest.raises(UserError, match=r"is for another network .*UNet2DModel.*; use a checkpoint of the same base"):
        load_adapters(with_adapters / "adapter", load_teacher("digits").denoiser)
    with pytest.raises(UserError, match="not a whole folder of guidance adapters"):
        load_adapters(tmp_path, sampler.denoiser)
    config = with_adapters / "adapter" / "adapter.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"adapters": {"kind": "other"}}))
    with pytest.raises(UserError, match="not a whole folder of guidance adapters"):
        load_adapters(with_adapters / "adapter", sampler.denoiser)
    with pytest.raises(UserError, match="a UNet2DModel has none"):
        save_adapters(tmp_path / "none", sampler.denoiser)


def test_features_of_a_discriminator_are_found_in_the_base(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    denoiser = adapted(teacher.denoiser, new_adapters(teacher, "additive", 8, "attention"), 2.0)
    x, t, cond = torch.randn(2, 1, 8, 8), torch.ones(2).double(), {"class_labels": torch.arange(2)}
    assert torch.equal(denoiser.features(x, t, cond), teacher.denoiser.features(x, t, cond))


class MLP(nn.Module):
    """A plain network in double precision, without attention or residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(4, 2)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        return self.net(torch.cat([x + self.labels(class_labels), time[:, None]], 1))


@pytest.mark.parametrize("kind", ["additive", "attention", "mlp_gate"])
def test_a_plain_network_is_corrected_at_its_output(kind: str) -> None:
    def null(cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"class_labels": torch.full_like(cond["class_labels"], 3)}

    teacher = Teacher(Denoiser(MLP().double(), TrigFlow(), OUTPUTS["v_prediction"], null=null), (2,), 3)
    method = AdapterGuidance(teacher, Config(adapter=kind, trajectory_steps=4))  # type: ignore[arg-type]
    batch = Batch(6, (2,), {"class_labels": torch.arange(6) % 3}, None, torch.device("cpu"), (0, 0, 0))
    loss = method.on_trajectories(batch).loss
    loss.backward()
    grads = [p.grad for p in method.student.parameters() if p.requires_grad and p.grad is not None]
    assert loss.dtype == torch.float64 and any(bool(g.abs().sum() > 0) for g in grads)


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(UserError, match=r"guidance_min: 4.0 must be at most guidance_max \(2.0\)"):
        AdapterGuidance(class_teacher(), Config(guidance_min=4.0, guidance_max=2.0))
    with pytest.raises(UserError, match="guidance needs a class-conditional teacher with a null class"):
        AdapterGuidance(gaussian_teacher([0.0], 1.0), Config())
