"""`diffdistill methods`, `recipes`, `families` and `protocols`: what there is to choose from."""

from __future__ import annotations

import dataclasses

from diffdistill.catalogue import describe_method, describe_recipe, method_names
from diffdistill.catalogue import recipes as all_recipes
from diffdistill.config import ListConfig, MethodsConfig, RecipesConfig


def methods(config: MethodsConfig) -> None:
    """Print all methods, or one with its equations, options and presets."""
    if config.method is None:
        for info in map(describe_method, method_names()):
            print(f"{info.name:22} {info.doc.splitlines()[0]}")
            print(f"{'':22} {info.about.paper}; data: {info.about.data}")
        return
    info = describe_method(config.method)
    print(info.doc.strip(), f"\npaper: {info.about.paper}", f"data:  {info.about.data}", "\nequations:", sep="\n")
    for equation, where in info.about.equations.items():
        print(f"  {equation}\n      {where}")
    print("\noptions:")
    for f in dataclasses.fields(info.config):
        print(f"  --{f.name.replace('_', '-'):22} {f.metadata['help']} (default: {f.default})")
    print("\npresets:")
    for name, preset in info.presets.items():
        print(f"  {name:22} {'  '.join(f'{k}={v}' for k, v in preset.options.items())}")
        print(f"  {'':22} source: {preset.source}")


def recipes(config: RecipesConfig) -> None:
    """Print all recipes, or one with the source of each value."""
    if config.recipe is None:
        for each in all_recipes().values():
            print(f"{each.name:24} {each.title}, {each.method}: {each.makes}")
        return
    recipe = describe_recipe(config.recipe)
    print(f"{recipe.name}: {recipe.title}", f"makes:  {recipe.makes}", f"data:   {recipe.data}", sep="\n")
    if recipe.other:
        print(f"other:  {recipe.other}")
    print(f"\nmethod: {recipe.method}")
    for name, setting in recipe.settings.items():
        value = "(not published; give it)" if setting.value is None else repr(setting.value)
        print(f"  --{name.replace('_', '-'):24} {value:28} {setting.source}")
    print(f"\ndiffdistill train --recipe {recipe.name}  (options that you give go first)")


def families(config: ListConfig) -> None:
    """Print the families of diffusers pipelines, and why those are missing that people ask for."""
    from diffdistill.families import FAMILIES, NOT_YET

    for family in FAMILIES.values():
        targets = ", ".join(family.lora_targets or ["all linear layers and convolutions"])
        print(f"{family.name:18} {family.models}")
        print(f"{'':18} pipelines: {', '.join(family.class_names)}; conditions: {family.conditions}")
        print(f"{'':18} network: {family.component}, {family.network}; LoRA: {targets}")
        print(f"{'':18} stock guidance: {family.stock_guidance}")
        if family.text is not None and (negative := family.text.negative) is not None:
            print(f"{'':18} without a negative prompt: {negative!r}, as its makers have it")
        if family.text is not None and family.text.advised is not None:
            print(f"{'':18} its makers draw with --negative-prompt {family.text.advised!r}")
    print("\nnot there yet:")
    for entry in NOT_YET:
        print(f"  {entry.models}: {entry.reason}")


def protocols(config: ListConfig) -> None:
    """Print the protocols of evaluation."""
    from diffdistill.eval.protocol import load, names

    for protocol in map(load, names()):
        what = ", ".join(metric.name for metric in protocol.metrics)
        print(f"{protocol.name:14} {protocol.title}")
        print(f"{'':14} {what}; for models of {' or '.join(protocol.conditions)}")
