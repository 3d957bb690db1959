"""Players that are several networks, each for a part of the teacher's classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.experts import ClassExperts, experts_of
from diffdistill.errors import UserError
from diffdistill.players.teacher import trainable_copy


def parts_of_classes(classes: int, n: int) -> tuple[int, ...]:
    """For each label which of n parts it is in: consecutive classes, as many in each as can be. "No class" is in 0."""
    return (*(label * n // classes for label in range(classes)), 0)


def of_classes(denoiser: Denoiser, networks: Sequence[nn.Module], parts: Sequence[int]) -> Denoiser:
    """The denoiser with several networks like its own in its place, `parts` saying for each label which is its own."""
    named = {f"part_{k}": network for k, network in enumerate(networks)}
    return denoiser.with_network(ClassExperts(named, parts), denoiser.feature_layer)


def copies_for_classes(denoiser: Denoiser, parts: Sequence[int]) -> Denoiser:
    """A trainable copy of the denoiser for each part, or of one that has such networks already, of these parts.

    Raises UserError for one of other parts.
    """
    experts = experts_of(denoiser.network)
    if experts is None:
        return of_classes(denoiser, [trainable_copy(denoiser).network for _ in range(max(parts) + 1)], parts).train()
    if not isinstance(experts, ClassExperts) or experts.parts != tuple(parts):
        n = len(experts.names)
        raise UserError(f"students: the student to begin as is {n} networks for other parts of the classes; give {n}")
    return trainable_copy(denoiser)
