"""Rewards: what a function of the user's thinks of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffdistill.errors import UserError, first_line, shown
from diffdistill.scaffold.method import Batch

Reward = Callable[[Tensor, Any], Any]
"""(images, conditions) -> a number for each image, the higher the better.

Images (B, C, H, W), or (B, C, F, H, W) of videos, are float32 in [-1, 1], those of a latent teacher decoded; a network
of one's own has its samples as they are. Conditions are B prompts, class labels (B,) int64, the network's conditions by
name where they are others, or None. What it gives must be a function of the two, so that a resumed run has the same.
"""


class Judge:
    """A reward with what it needs of the teacher."""

    def __init__(
        self, reward: Reward, name: str, data_std: float, images: Callable[[Tensor], Tensor] = lambda x: x,
        *, own: bool = True,
    ):  # fmt: skip
        """`images`: samples (B, ...) in the teacher's units -> what the reward sees. `own`: its errors are raised."""
        self.reward, self.name, self.data_std, self.images, self.own = reward, name, data_std, images, own

    def __call__(self, x: Tensor, batch: Batch, *, gradient: bool = False) -> Tensor:
        """(B,) float32 rewards of samples x (B, ...) of unit variance under the batch's conditions.

        Raises UserError where the reward gives anything else than a finite number for each, or no `gradient` to x.
        """
        try:
            # A reward is no network of the training.
            with torch.autocast(x.device.type, enabled=False), torch.set_grad_enabled(gradient):
                images = self.images((x if gradient else x.detach()) * self.data_std).float()
                given = self.reward(images, conditions_of(batch))
            scores = torch.as_tensor(given, dtype=torch.float32, device=x.device)
        except UserError:
            raise
        except Exception as error:
            if self.own:  # one's own object, whose traceback says more
                raise
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"reward: {shown(self.name)} fails for images {tuple(images.shape)} ({what})") from error
        if scores.shape != (len(x),):
            raise UserError(
                f"reward: {shown(self.name)} gives {tuple(scores.shape)} for {len(x)} images; give one number for each"
            )
        if gradient and not scores.requires_grad:
            raise UserError(
                f"reward: {shown(self.name)} gives numbers without a gradient, which reward_weight needs; give a "
                "function of torch, or tune the student by pso, which needs none"
            )
        if not bool(scores.isfinite().all()):
            raise UserError(
                f"reward: {shown(self.name)} gives {float(scores.detach()[~scores.isfinite()][0])}; give finite numbers"
            )
        return scores


def conditions_of(batch: Batch) -> Any:
    """The batch's conditions as a reward sees them."""
    if batch.texts is not None:
        return list(batch.texts)
    if set(batch.cond) == {"class_labels"}:
        return batch.cond["class_labels"]
    return dict(batch.cond) or None


def reward_weights(rewards: Tensor, beta: float) -> Tensor:
    """(B,) exp(r/beta) for rewards r (B,); UserError where that is not finite."""
    weights = torch.exp(rewards / beta)
    if not bool(weights.isfinite().all()):
        raise UserError(
            f"reward_beta: exp(r/{beta:g}) is not finite for a reward r = {float(rewards.max()):g}; give a larger beta"
        )
    return weights


def weighted_gradient(x: Tensor, weights: Tensor) -> Tensor:
    """x (B, ...) itself, whose gradient reaches what it was made of `weights` (B,) times."""
    fixed = x.detach()
    return fixed + weights.to(x).reshape(-1, *[1] * (x.ndim - 1)) * (x - fixed)
