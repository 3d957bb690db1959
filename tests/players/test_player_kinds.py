"""Family x method x kind of player: trained, exported, and the same images by diffusers without diffdistill."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import distill, export
from diffdistill.catalogue import describe_method, method_names
from diffdistill.commands.cli import main
from diffdistill.core.denoiser import Extra
from diffdistill.data.batches import batches
from diffdistill.data.encoded import encode, open_encoded
from diffdistill.data.pairs import make_pairs
from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, load_teacher
from diffdistill.players.scale_input import plain_network
from diffdistill.training.assemble import load_run, make_game
from diffdistill.training.trainer import Trainer, accelerator_for
from tests import tiny_a
from tests.methods.short_runs import same_when_resumed
from tests.players.every_method import METHODS, OTHERS, SAYS_SO
from tests.players.tiny import DRAWN, PROMPTS, SIZES, apart, drawn_by_a_stranger, ours

LATENT = [name for name, family in FAMILIES.items() if family.autoencoder is not None]
# So that two steps of an adapter show in the image: some of the random networks hardly listen to their attention.
LORA_RATES = {"qwen_image": 2.0, "qwen_image21": 2.0, "sd3": 0.5, "aura_flow": 2.0, "flux2": 2.0, "flux2_dev": 2.0}


def options_for(folder: Path, prompts: Path, name: str, method: str, kind: str) -> dict[str, Any]:
    roles = "student,fake_score" if method in ("dmd2", "sid") else "student"
    lora = {"lora": roles} if kind == "lora" else {}
    frames = {"frames": 5} if name in FAMILIES and FAMILIES[name].videos else {}
    return {
        "method": method, "teacher": str(folder), "prompts": str(prompts), "resolution": SIZES[name], **frames,
        **lora, "lora_rank": 2, "student_lr": 1e-3, "warmup_steps": 0, "batch_size": 2, "steps": 2,
        "sample_every": 0, "device": "cpu", **METHODS[method],
    }  # fmt: skip


CELLS = list(product(METHODS, ("full", "lora")))


def few(name: str) -> list[tuple[str, str]]:
    """One whole student and two of LoRA, each of another method than the next family's."""
    first = 2 * LATENT.index(name)
    return [CELLS[(first + k) % len(CELLS)] for k in (0, 3, 5)]


@pytest.mark.parametrize(
    "cells", [few, pytest.param(lambda name: set(CELLS) - set(few(name)), marks=pytest.mark.whole)]
)
@pytest.mark.parametrize("name", LATENT)
def test_the_stranger_gets_the_students_images(
    name: str,
    cells: Callable[[str], Collection[tuple[str, str]]],
    encoded: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    folder, prompts = encoded(name)
    data = open_encoded(prompts)
    cond, shape = data.get(torch.tensor([1])).cond, tuple(data.settings["shape"])
    jobs, expected = [], []
    before: dict[str, torch.Tensor] = {}
    for method, kind in sorted(cells(name)):
        run = tmp_path / f"{method}-{kind}"
        options = options_for(folder, prompts, name, method, kind) | {"out": str(run)}
        if kind == "lora":
            options |= {"student_lr": LORA_RATES.get(name, 0.1), "lora_alpha": 6.0}
        # What makes no sense says so.
        output = load_teacher(folder, resolution=SIZES[name]).denoiser.output
        if method == "progressive" and output.name == "epsilon":
            with pytest.raises(UserError, match="predicts the noise"):
                distill(**options)
            continue
        if method in ("consistency", "progressive") and not data.has_images:
            with pytest.raises(UserError, match="needs images too"):
                distill(**options)
            continue
        student = distill(**options).student
        image = ours(run, cond, shape)
        if method not in before:  # both kinds begin as the teacher
            before[method] = ours(run, cond, shape, trained=False)
        # Ten times what is allowed below: weights that went missing would show.
        assert apart(image, before[method]) > 1e-2, (method, kind)
        alone = [str(folder)] if kind == "lora" and FAMILIES[name].loads_lora else []
        for base in ["", *alone]:
            what = {"class_labels": cond["class_labels"].tolist()} if name == "dit" else {"prompt": PROMPTS[1]}
            if name in FAMILIES and FAMILIES[name].reads_image:
                file = "videos/1/0.png" if FAMILIES[name].videos else "edits/from/1.png"
                what["image"] = str(folder.parent / file)
            kept = "np" if name in DRAWN else "latent"
            setup = (
                "import tests.tiny_processor as p; p.stand_in()" if name.startswith(("qwen_image", "kandinsky")) else ""
            )
            jobs.append({"student": str(student), "base": base, "what": what, "type": kept, "setup": setup})
            expected.append(image)
    assert jobs
    wrong = []
    for job, got, image in zip(jobs, drawn_by_a_stranger(jobs, tmp_path), expected, strict=True):
        error = apart(got.reshape(image.shape), image)
        if not error < 1e-3:
            wrong.append((job["student"], job["base"], error))
    assert not wrong, wrong


def test_a_lora_student_of_pixels_is_exported_as_it_was_trained(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder, run = tmp_path / "teacher", tmp_path / "run"
    tiny_a.unet2d_ddim().save_pretrained(folder)
    adapters = {"lora": "student,fake_score", "lora_rank": 2, "lora_alpha": 6.0, "student_lr": 0.1}
    shared = {"teacher": str(folder), "batch_size": 2, "steps": 2, "sample_every": 0, "device": "cpu"}
    student = distill(method="sid", **shared, **adapters, out=str(run)).student
    pipeline = DiffusionPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "output_type": "np", "generator": torch.Generator().manual_seed(3)}
    got = torch.as_tensor(pipeline(**call).images)
    shape = tuple(load_teacher(folder).shape)
    trained, before = (
        (ours(run, {}, shape, trained) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) for trained in (True, False)
    )
    assert apart(trained, before) > 1e-2
    assert apart(got, trained) < 1e-3


def test_the_base_is_stored_once_and_stays_as_it_was(
    encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded("sd3")
    options = options_for(folder, prompts, "sd3", "dmd2", "lora")
    game = make_game(options)
    base = game.teacher.denoiser.network
    before = {k: v.clone() for k, v in base.state_dict().items() if ".lora_" not in k}
    own = {name: {id(p) for p in module.parameters()} for name, module in game.method.players.items()}
    assert own["student"] and own["fake_score"] and not own["student"] & own["fake_score"]
    storages = {p.data_ptr() for module in (*game.method.players.values(), base) for p in module.parameters()}
    whole = sum(v.numel() for v in before.values())
    every = sum(p.numel() for p in {p.data_ptr(): p for p in base.parameters()}.values())
    assert len(storages) == len(list(base.parameters()))  # all that the players have lies in the one network
    assert every < 1.5 * whole
    accelerator = accelerator_for(game.config, tmp_path)
    trainer = Trainer(
        game.method, batches(game.config, game.teacher, game.encoded, accelerator), game.config, tmp_path, accelerator
    )
    for _ in range(2):
        trainer.iteration()
    after = base.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpointed_activations_give_the_same_gradients_and_a_resumed_run_the_same_bits(
    kind: str, encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded("sd3")
    options = options_for(folder, prompts, "sd3", "dmd2", kind) | {"steps": 3, "lr_schedule": "constant"}
    whole = distill(**options, out=str(tmp_path / "whole")).student
    spared = distill(**options, out=str(tmp_path / "spared"), gradient_checkpointing=True).student
    distill(**(options | {"steps": 1}), out=str(tmp_path / "run"))
    resumed = distill(resume=tmp_path / "run", steps=3).student
    file = "transformer/diffusion_pytorch_model.safetensors"
    expected = load_file(whole / file)
    for other, limit in ((spared, 1e-6), (resumed, 0.0), (export(tmp_path / "run", out=tmp_path / "again"), 0.0)):
        got = load_file(other / file)
        assert got.keys() == expected.keys()
        assert max(float((got[k] - expected[k]).abs().max()) for k in got) <= limit


def test_every_method_is_listed() -> None:
    assert sorted(OTHERS) == method_names()


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("method", OTHERS)
def test_every_method_runs_with_both_kinds_or_says_why_not(
    method: str, kind: str, encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded("sd_v")
    options = options_for(folder, prompts, "sd_v", "progressive", kind) | {"method": method}
    for name in METHODS["progressive"]:
        options.pop(name)
    options |= OTHERS[method]
    if kind == "lora" and describe_method(method).about.kind == "distribution" and method not in ("gdd", "ladd"):
        options["lora"] = "student,fake_score"
    if method in ("dmd", "get", "reflow", "sdxs", "sims", "slim_flow"):
        made = {"teacher": str(folder), "prompts": str(prompts), "count": 4, "sampling_steps": 2, "device": "cpu"}
        options["pairs"] = str(make_pairs(**made, out=str(tmp_path / "pairs")))
    if method == "yonos":  # the same images under other prompts
        shutil.copytree(prompts.parent / "images", tmp_path / "images")
        (tmp_path / "images" / "metadata.jsonl").unlink()
        for i in range(4):
            (tmp_path / "images" / f"{i}.txt").write_text(f"number {i}")
        made = {"teacher": str(folder), "data": str(tmp_path / "images"), "resolution": SIZES["sd_v"], "device": "cpu"}
        options["teacher_data"] = str(encode(**made, out=str(tmp_path / "seen by the teacher")))
    if (method, kind) in SAYS_SO:
        with pytest.raises(UserError, match=SAYS_SO[method, kind]):
            distill(**options, out=str(tmp_path / "run"))
        return
    before = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    student = distill(**options, out=str(tmp_path / "run")).student
    after = load_file(student / "unet/diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    alone = method not in ("arc_flow", "pdd", "pi_flow")  # whose LoRA has a last layer of its own besides
    assert (student / "lora").is_dir() == ((alone and kind == "lora") or method == "lora_guidance")


def test_a_fake_score_where_there_is_none_is_refused(
    encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded("sd_v")
    options = options_for(folder, prompts, "sd_v", "progressive", "full") | {"lora": "fake_score"}
    with pytest.raises(UserError, match="lora: progressive has no player 'fake_score'"):
        distill(**options, out=str(tmp_path / "run"))


def test_a_full_student_is_a_single_file_too(encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    folder, prompts = encoded("sd_v")
    student = distill(**options_for(folder, prompts, "sd_v", "progressive", "full"), out=str(tmp_path / "run")).student
    file = student / "unet/diffusion_pytorch_model.safetensors"
    network = UNet2DConditionModel.from_single_file(str(file), config=str(student), subfolder="unet")
    kept = load_file(file)
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items())


def test_moments_in_eight_bits_resume_to_the_same_bits(
    encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded("sd_v")
    options = options_for(folder, prompts, "sd_v", "dmd2", "full")
    options |= {"optimizer": "adamw8bit"}
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="optimizer: adamw8bit needs the package bitsandbytes"):
            distill(**options, out=str(tmp_path / "run"))
        return
    same_when_resumed(tmp_path, stop=1, end=3, **options)


def test_a_bf16_teacher_that_keeps_some_weights_in_float32(
    encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded("wan")
    options = options_for(folder, prompts, "wan", "dmd2", "lora") | {"teacher_dtype": "bfloat16"}
    kinds = {p.dtype for n, p in make_game(options).teacher.denoiser.named_parameters() if ".lora_" not in n}
    assert kinds == {torch.bfloat16, torch.float32}
    distill(**options, out=str(tmp_path / "run"))


def test_a_bf16_teacher_with_float32_adapters(encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    folder, prompts = encoded("sd3")
    options = options_for(folder, prompts, "sd3", "dmd2", "lora")
    game = make_game(options | {"teacher_dtype": "bfloat16"})
    base = [p for n, p in game.teacher.denoiser.named_parameters() if ".lora_" not in n]
    assert {p.dtype for p in base} == {torch.bfloat16}
    assert {p.dtype for p in game.method.players["student"].parameters()} == {torch.float32}
    for precision in ("bf16", "no"):
        config = options | {"teacher_dtype": "bfloat16", "mixed_precision": precision, "sample_every": 1}
        student = distill(**config, out=str(tmp_path / precision)).student
        weights = load_file(student / "lora/pytorch_lora_weights.safetensors")
        assert weights and all(bool(value.isfinite().all()) for value in weights.values())
    # What is exported is the base and the adapter, not their sum in bf16, which would round the adapter away.
    network = game.method.players["student"].network
    for p in network.parameters():
        torch.nn.init.normal_(p, std=1e-3)
    name, layer = next((n, m) for n, m in network.base.named_modules() if hasattr(m, "lora_A"))
    expected = layer.base_layer.weight.float() + layer.get_delta_weight(network.adapter)
    assert torch.equal(plain_network(network).get_submodule(name).weight, expected)


def test_from_the_command_line(
    encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    folder, _ = encoded("sd_v")
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("\n".join(PROMPTS))
    assert main(["families"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in FAMILIES)
    shared = ["--teacher", str(folder), "--resolution", str(SIZES["sd_v"]), "--device", "cpu"]
    train = ["train", "--method", "dmd2", "--prompts", str(prompts), "--lora", "student,fake_score"]
    assert main([*train, *shared, "--steps", "2", "--batch-size", "2", "--out", str(run)]) == 0
    assert (run / "encoded" / "encode.json").is_file()
    assert len(list((run / "samples").glob("step-*.png"))) == 2  # decoded
    for model in (run, folder):
        out = tmp_path / f"{model.name}.png"
        prompt_options = ["--prompt", "a red square", "--prompt", "two dogs", "--count", "3", "--out", str(out)]
        assert main(["sample", str(model), *prompt_options]) == 0
        assert Image.open(out).size[0] > 3 * 16
    card = (run / "student" / "README.md").read_text()
    assert 'pipeline("a prompt", num_inference_steps=1, guidance_scale=1.0, height=16, width=16)' in card
    capsys.readouterr()
    for arguments, message in (
        (["sample", str(run)], "prompt:"),
        (["sample", str(run), "--prompt", "x", "--steps", "3"], "steps:"),
        (["sample", "digits", "--prompt", "x"], "prompt:"),
        (["train", "--method", "dmd2", *shared, "--out", str(tmp_path / "none")], "prompts:"),
        (
            ["train", "--prompts", str(prompts), "--out", str(tmp_path / "none")],
            "prompts: 'digits' is a model of pixels",
        ),
        (["pairs", "--teacher", str(folder), "--out", str(tmp_path / "none")], "prompts:"),
    ):
        assert main(arguments) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], lines


@pytest.mark.parametrize("name", ["stable_diffusion", "sdxl"])
def test_a_student_that_is_told_the_scale_takes_it_from_the_stock_pipeline(
    name: str, encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    folder, prompts = encoded(name)
    options = options_for(folder, prompts, name, "progressive", "full") | OTHERS["lcm"] | {"method": "lcm"}
    for other in METHODS["progressive"]:
        options.pop(other)
    options |= {"guidance_min": 1.0, "guidance_max": 3.0, "guidance_scale": 2.0, "student_lr": 0.1}
    student = distill(**options, out=str(tmp_path / "run")).student
    call = json.loads((student / "diffdistill.json").read_text())["call"]
    data = open_encoded(prompts)
    pipeline = DiffusionPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    images = {}
    for scale in (2.0, 3.0):
        arguments = call | {"guidance_scale": scale, "output_type": "latent"}
        images[scale] = pipeline(PROMPTS[1], generator=torch.Generator().manual_seed(3), **arguments).images
    got = ours(tmp_path / "run", data.get(torch.tensor([1])).cond, tuple(data.settings["shape"]))
    assert call["guidance_scale"] == 2.0
    assert float((images[2.0] - got).abs().max()) < 1e-3 * max(1, float(got.abs().max()))
    assert float((images[3.0] - images[2.0]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["sana", "sd3", "dit"])
def test_a_student_that_was_told_the_scale_is_exported_at_one(
    name: str, encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Where the stock network has no input for it: added to what it embeds of the time."""
    teacher, prompts = encoded(name)
    data = open_encoded(prompts)
    cond, shape = data.get(torch.tensor([1])).cond, tuple(data.settings["shape"])
    jobs, expected = [], []
    for kind in ("full", "lora"):
        options = options_for(teacher, prompts, name, "sid", kind) | OTHERS["tbcm"] | {"method": "tbcm"}
        options |= {"lora": "student"} if kind == "lora" else {}
        options |= {"guidance_min": 1.0, "guidance_max": 3.0, "guidance_scale": 2.0, "student_lr": 0.1}
        folder = distill(**options, out=str(tmp_path / kind)).student
        what = {"class_labels": cond["class_labels"].tolist()} if name == "dit" else {"prompt": PROMPTS[1]}
        jobs.append({"student": str(folder), "base": "", "what": what, "type": "np" if name == "dit" else "latent"})
        expected.append(ours(tmp_path / kind, cond, shape))
        game = load_run(tmp_path / kind)[0]
        z, t = torch.randn(1, *shape), torch.full((1,), 1.2)
        student = game.method.sampler().denoiser
        low, high = (student(z, t, cond, Extra(torch.tensor([s]))).y.detach() for s in (1.0, 3.0))
        assert apart(low, high) > 1e-4, kind
    for got, image in zip(drawn_by_a_stranger(jobs, tmp_path), expected, strict=True):
        assert apart(got.reshape(image.shape), image) < 1e-3


@pytest.mark.parametrize("method", ["sana_sprint", "tbcm"])
def test_the_preset_for_sana_trains_it(
    method: str, encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded("sana")
    options = {"teacher": str(folder), "prompts": str(prompts), "resolution": SIZES["sana"], "steps": 1}
    run = distill(method=method, preset="sana-0.6b", **options, sample_every=0, device="cpu", out=str(tmp_path / "run"))
    assert json.loads((run.student / "diffdistill.json").read_text())["guidance"]["scale"] == 4.5


def test_a_student_of_a_level_inside_the_chain_starts_there_in_the_stock_pipeline(
    encoded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    folder, prompts = encoded("stable_diffusion")
    options = options_for(folder, prompts, "stable_diffusion", "sid", "full") | {"student_level": 750}
    student = distill(**options, out=str(tmp_path / "run")).student
    pipeline = DiffusionPipeline.from_pretrained(student)
    call = json.loads((student / "diffdistill.json").read_text())["call"]
    arguments = call | {"generator": torch.Generator().manual_seed(3), "output_type": "latent"}
    got = pipeline(PROMPTS[1], **arguments).images
    assert pipeline.scheduler.timesteps.tolist() == [750]
    data = open_encoded(prompts)
    expected = ours(tmp_path / "run", data.get(torch.tensor([1])).cond, tuple(data.settings["shape"]))
    assert float((got - expected).abs().max()) < 1e-3 * max(1, float(expected.abs().max()))
