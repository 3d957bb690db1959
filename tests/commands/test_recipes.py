"""Recipes: what is published for a model, with its source, and taken by `train` and `plan` as the user names it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import diffdistill
from diffdistill.catalogue import describe_method, describe_recipe, recipes
from diffdistill.commands.cli import main
from diffdistill.commands.plan import _planned
from diffdistill.config import run_options
from diffdistill.errors import UserError
from diffdistill.training.recipe import Objects
from tests.families.test_families import BUILDERS, FRAMES, SIZES

RECIPES = sorted(recipes())
SMALL = ["--batch-size", "2", "--steps", "20"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny stock pipeline of a family."""

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family) / "pipeline"
        BUILDERS[family]().save_pretrained(folder)
        return folder

    return make


def sized(family: str) -> list[str]:
    return ["--resolution", str(SIZES[family]), *(["--frames", str(FRAMES)] if family == "wan" else [])]


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_a_training_of_a_tiny_teacher_of_its_kind(name: str, tiny: Callable[[str], Path]) -> None:
    recipe, folder = describe_recipe(name), tiny(describe_recipe(name).family)
    given = {"accumulate": 1, "lora_rank": 2, "batch_size": 2, "steps": 20, "resolution": SIZES[recipe.family]}
    frames = {"frames": FRAMES} if recipe.family == "wan" else {}
    game, _ = _planned({"recipe": name, "teacher": str(folder), **given, **frames}, Objects())
    assert (game.recipe.name, game.config.teacher, game.config.batch_size) == (recipe.method, str(folder), 2)


# One for each method; the others' plans are more of the same.
PLANNED = {describe_recipe(name).method: name for name in RECIPES}.values()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in PLANNED else pytest.mark.whole) for n in RECIPES])
def test_a_plan_of_each_recipe_is_made_with_a_tiny_teacher_of_its_kind(
    name: str, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffdistill.eval.plan._OCCURRENCES", 1)  # each turn once: nothing is read of what it costs
    monkeypatch.setattr("diffdistill.eval.plan._STEPS", 1)
    family = describe_recipe(name).family
    options = ["--accumulate", "1", "--lora-rank", "2", *SMALL, *sized(family)]
    assert main(["plan", "--recipe", name, "--teacher", str(tiny(family)), *options]) == 0, capsys.readouterr().err
    assert f"{describe_recipe(name).method} of {tiny(family)}, batches of 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_each_value_has_a_source_and_is_no_preset_written_again(name: str) -> None:
    recipe = describe_recipe(name)
    assert all(setting.source.strip() for setting in recipe.settings.values()) and recipe.makes and recipe.data
    own = {option: setting.value for option, setting in recipe.settings.items() if "preset " not in setting.source}
    for preset in describe_method(recipe.method).presets.values():
        same = {option for option, value in preset.options.items() if option in own and own[option] == value}
        assert len(same) < len(preset.options), "it is a preset: name it"


def test_the_list_and_a_recipe_are_printed_with_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert main(["recipes", "sdxl-dmd2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (rate,) = (line for line in lines if "--student-lr" in line)
    assert "5e-07" in rate and "tianweiy/DMD2" in rate
    assert main(["recipes", "sd3-ladd"]) == 0
    assert "(not published; give it)" in capsys.readouterr().out


def test_every_model_of_the_table_has_a_recipe() -> None:
    models = ("sd15", "sdxl", "sd3", "flux-dev", "qwen-image", "z-image", "sana", "pixart", "wan21")
    assert all(any(name.startswith(f"{model}-") for name in RECIPES) for model in models)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "sdxl-dmd"], "recipe: 'sdxl-dmd' is not known; did you mean 'sdxl-dmd2'"),
        (["--recipe", "sdxl-dmd2", "--preset", "digits"], "preset: the recipe 'sdxl-dmd2' has all settings"),
        (["--recipe", "sdxl-dmd2", "--method", "lcm"], "method: the recipe 'sdxl-dmd2' is of dmd2"),
        (["--recipe", "sd3-ladd"], "steps: the source of the recipe 'sd3-ladd' has no number of them"),
        (["--recipe", "sdxl-dmd2", "--teacher", "digits"], "for teachers of sdxl, and 'digits' is one of unet2d"),
    ],
)
def test_what_cannot_be_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "plan"):
        assert main([command, *options]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error) < 300 and error.count("\n") == 1


def test_given_options_go_first_and_a_file_may_name_the_recipe(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out, file = tmp_path / "run", tmp_path / "mine.yaml"
    file.write_text("recipe: sd15-lcm\n")
    (tmp_path / "prompts.txt").write_text("a red fox\na blue hen\n")
    teacher, prompts = str(tiny("stable_diffusion")), str(tmp_path / "prompts.txt")
    options = [*SMALL, *sized("stable_diffusion"), "--student-lr", "0.002", "--out", str(out)]
    given = ["--teacher", teacher, "--prompts", prompts, "--config", str(file), *options]
    assert main(["train", *given]) == 2  # it wants images: what is asked for is of lcm
    plan = diffdistill.plan(recipe="sd15-lcm", teacher=teacher, batch_size=3, resolution=SIZES["stable_diffusion"])
    assert plan.batch_size == 3 and plan.steps == 1000
    with pytest.raises(UserError, match="method: the recipe"):
        diffdistill.plan("dmd2", recipe="sd15-lcm", teacher=teacher)


@pytest.mark.slow
def test_a_training_takes_a_recipe_and_one_without_is_told_of_it(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\na blue hen\n")
    small = ["--steps", "1", "--batch-size", "2", "--sample-every", "0", *sized("stable_diffusion")]
    given = ["--teacher", str(tiny("stable_diffusion")), "--prompts", str(tmp_path / "prompts.txt"), *small]
    assert main(["train", "--recipe", "sd15-dmd2", *given, "--student-lr", "0.002", "--out", str(tmp_path / "a")]) == 0
    assert "--recipe" not in capsys.readouterr().err
    options = run_options(tmp_path / "a")
    assert (options["method"], options["update_ratio"], options["guidance_scale"]) == ("dmd2", 10, 1.75)
    assert (options["student_lr"], options["fake_score_lr"]) == (0.002, 1e-5)
    assert main(["train", "--method", "dmd2", *given, "--out", str(tmp_path / "b")]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "--recipe" in line)
    assert line.startswith("note: published settings for this kind of teacher, by --recipe: sd15-dmd2")
