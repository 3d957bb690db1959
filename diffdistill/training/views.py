"""Data of which the teacher sees other conditions than the student."""

from __future__ import annotations

from diffdistill.data.encoded import Bucketed, open_encoded
from diffdistill.data.examples import Examples, TwoViews, as_examples
from diffdistill.errors import UserError, shown
from diffdistill.scaffold.method import Need
from diffdistill.training.assemble import Game


def in_two_views(game: Game, data: Examples | None) -> Examples | None:
    """The data with the teacher's conditions, for a method that needs them; UserError where they are none."""
    name, given, own = game.recipe.name, game.config.teacher_data, game.objects.teacher_data
    game.objects.require_objects({"teacher_data": given})
    if Need.TEACHER_DATA not in game.method.needs:
        if given is not None:
            raise UserError(f"teacher_data: {name} reads none; leave it out")
        return data
    if given is None and own is None:
        raise UserError(f"teacher_data: {name} needs what its teacher sees of each sample; give --teacher-data")
    assert data is not None
    if own is not None:
        return TwoViews(data, as_examples(own))
    assert given is not None
    if game.encoded is None:
        raise UserError(
            f"teacher_data: {shown(given)} is for a latent teacher; give examples as an object, from Python"
        )
    other = open_encoded(given)
    if isinstance(other, Bucketed) or isinstance(data, Bucketed):
        raise UserError(f"teacher_data: {name} takes samples of one size; encode without --buckets")
    if other.settings["fingerprint"] != game.encoded.settings["fingerprint"] or not other.has_images:
        raise UserError(f"teacher_data: {shown(given)} is no folder of images, encoded by the same model")
    return TwoViews(data, other)
