"""What a method is told of good and bad samples: a reward, or pairs of which one is the better."""

from __future__ import annotations

from diffdistill.data.encoded import Bucketed, open_encoded
from diffdistill.data.examples import Examples, Preferred, TensorExamples, as_examples
from diffdistill.data.images import open_data
from diffdistill.errors import UserError, shown
from diffdistill.scaffold.method import Need
from diffdistill.scaffold.reward import Reward
from diffdistill.training.assemble import Game


def reward_for(game: Game) -> str | Reward | None:
    """The reward that the method needs, by its name or as an object; None where it needs none."""
    name, method = game.config.reward, game.recipe.name
    game.objects.require_objects({"reward": name})
    given = name if game.objects.reward is None else game.objects.reward
    if Need.REWARD not in game.method.needs:
        if given is not None:
            raise UserError(f"reward: {method} with these options reads none; leave it out")
        return None
    if given is None:
        raise UserError(f"reward: {method} with these options needs one; give --reward FILE.py:FUNCTION")
    return given


def preferred(game: Game, winners: Examples | None) -> Examples | None:
    """The data with the worse of each pair, for a method that needs them; UserError where they are none."""
    config, objects, name = game.config, game.objects, game.recipe.name
    objects.require_objects({"losers": config.losers})
    if Need.LOSERS not in game.method.needs:
        if config.losers is not None:
            raise UserError(f"losers: {name} with these options reads none; leave it out")
        return winners
    if config.losers is None and objects.losers is None:
        raise UserError(f"losers: {name} needs pairs, the better by --data or --prompts; give the worse by --losers")
    assert winners is not None
    if isinstance(winners, Bucketed):
        raise UserError(f"prompts: {config.prompts!r} has buckets, and pairs are of one size; encode without --buckets")
    if objects.losers is not None:
        worse = as_examples(objects.losers)
        if isinstance(worse, TensorExamples) and isinstance(winners, TensorExamples) and not worse.cond:
            # Of the conditions of the better; other numbers of them are refused below.
            worse = TensorExamples(worse.x0, winners.cond) if len(worse) == len(winners) else worse
        return Preferred(winners, worse)
    assert config.losers is not None
    if game.encoded is not None:
        worse = open_encoded(config.losers)
        if worse.settings["fingerprint"] != game.encoded.settings["fingerprint"] or not worse.has_images:
            raise UserError(f"losers: {shown(config.losers)} is no folder of images, encoded by the same model")
        return Preferred(winners, worse)
    channels, height, width = game.teacher.shape
    return Preferred(winners, open_data(config.losers, resolution=(height, width), channels=channels))
