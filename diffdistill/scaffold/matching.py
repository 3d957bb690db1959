"""The game of the methods that match distributions: a student, and a fake score that learns its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.distances import elementwise
from diffdistill.core.divided import approach
from diffdistill.core.guidance import guided
from diffdistill.core.losses import denoising_loss, gradient_injection, l1_normaliser, per_sample_mean
from diffdistill.core.ode import Denoise, ddim_step, solve
from diffdistill.core.prediction import Prediction, diffuse, expand
from diffdistill.core.times import edm_karras, edm_log_normal, native_uniform
from diffdistill.errors import UserError
from diffdistill.options import (
    AdversarialOptions,
    AlignmentOptions,
    AnchorOptions,
    EDMTimes,
    MatchingOptions,
    MidpointOptions,
    RatioOptions,
    RewardOptions,
    SimulationOptions,
)
from diffdistill.players.lora import is_lora
from diffdistill.players.sampler import STEPS, Sampler, Step, one_step_sampler
from diffdistill.players.teacher import Teacher, frozen, trainable_copy
from diffdistill.scaffold.adversary import Adversary
from diffdistill.scaffold.method import Batch, Method, Need, Optimizer, Outcome, Pair, Turn
from diffdistill.scaffold.ratio import RatioWeight
from diffdistill.scaffold.reward import reward_weights, weighted_gradient
from diffdistill.scaffold.simulation import drawn_level, simulated_input


class MatchingMethod(Method):
    """Players: student and fake_score. The fake score moves in every step, the student in every `update_ratio`-th.

    A method says the student's loss (`matching`); the rest are defaults. Times are uniform in the teacher's own, the
    student's within `MatchingTimes`, or with `EDMTimes` among its options SiD's. With `AdversarialOptions` among them
    the fake score carries a discriminator, which is trained with it; with `SimulationOptions` the student may take
    several steps, each with a fake score and discriminator of its own if `fake_scores` is per_level (players
    fake_score, fake_score_2, ..): then the levels take turns, and `fake_score` is that of the level whose turn it is.
    With `RatioOptions` there are weights by the ratio of the densities that the discriminators tell, with
    `RewardOptions` and a beta by a reward.
    """

    student_first: ClassVar[bool] = True
    # Whether the fake score learns from the samples that the student was judged by, where both move.
    shares_samples: ClassVar[bool] = True
    # off: in no network; own: in the fake score in its own turn alone, since in the student's it would be noise in the
    # difference of two networks; mover: in the player whose turn it is.
    dropout: ClassVar[Literal["off", "own", "mover"]] = "off"

    # From a level to the next, of a student of several steps.
    move: Step = STEPS["renoise"]

    # The fake score's random streams.
    fake_score_stream: ClassVar[str] = "fake_score"

    def __init__(
        self,
        teacher: Teacher,
        config: MatchingOptions,
        *,
        student: Denoiser | None = None,
        fake_score: Denoiser | None = None,
    ):
        super().__init__(teacher, config)
        self.teacher = self.followed = guided(frozen(teacher.denoiser), config.guidance_scale)
        self.student = student or teacher.player("student")
        self.fake_score = fake_score or teacher.player("fake_score")
        self.fake_scores = [self.fake_score]
        self.edm_times = isinstance(config, EDMTimes)
        self.place = 0  # of the fake score and the discriminator whose turn it is
        self.steps, self.per_level = 1, False
        if isinstance(config, SimulationOptions):
            self.steps, self.per_level = config.student_steps, config.fake_scores == "per_level"
        self.anchor_weight = config.anchor_weight if isinstance(config, AnchorOptions) else 0.0
        if self.anchor_weight:
            if self.steps == 1:
                raise UserError(
                    "anchor_weight: the first step of one alone cannot follow the teacher; use student_steps"
                )
            self.move = STEPS["ddim"]
        if self.per_level:
            if self.steps == 1:
                raise UserError("fake_scores: per_level is for several levels, and student_steps is 1; use shared")
            self.fake_scores += [trainable_copy(self.fake_score) for _ in self.matched_levels()[1:]]
        self.players = {"student": self.student}
        self.adversaries: list[Adversary] = []
        if isinstance(config, AdversarialOptions) and config.gan_weight > 0:
            self.needs = frozenset({Need.IMAGES})
            self.adversaries = [
                Adversary(fake_score, teacher, config.discriminator_depths) for fake_score in self.fake_scores
            ]
            self.gan_weight, self.discriminator_weight = config.gan_weight, config.discriminator_weight
        for k, fake_score in enumerate(self.fake_scores):
            player: nn.Module = fake_score
            if self.adversaries:
                player = nn.ModuleDict({"denoiser": fake_score, "head": self.adversaries[k].head})
            self.players[_fake_score_role(k)] = player
        self.weights: list[RatioWeight] = []
        if isinstance(config, RatioOptions):
            self.weights = [RatioWeight(config) for _ in self.adversaries]
            self.state = {"weights": nn.ModuleList(self.weights)}
        self.reward_beta = config.reward_beta if isinstance(config, RewardOptions) else None
        if self.reward_beta is not None:
            self.needs = self.needs | {Need.REWARD}
        self.midpoint_weight = config.midpoint_weight if isinstance(config, MidpointOptions) else 0.0
        self.alignment = config.alignment if isinstance(config, AlignmentOptions) else 0.0
        if self.alignment and any(map(is_lora, (self.student.network, self.fake_score.network))):
            raise UserError(
                "alignment: the mean of two LoRAs' matrices is not that of the LoRAs; use 0, or train both whole"
            )
        if self.alignment and not _of_one_kind(self.student, self.fake_score):
            raise UserError("alignment: student and fake score are networks of different kinds, without a mean; use 0")
        self._set_dropout("student")

    # -- what a method says --------------------------------------------------------------------------------

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        """The student's loss on its samples x (B, ...), noised to the angles t (B,) with eps (B, ...).

        DMD's, unless a method has another.
        """
        return dmd_loss(x, t, eps, cond, self.teacher, self.fake_score, self.config.normalise)

    def times(self, player: str, batch: Batch) -> Tensor:
        """(B,) the angles of a player's loss."""
        if self.edm_times:
            return batch.draw(f"{player}/t", partial(self._edm_angles, player))
        stream, span = self.fake_score_stream, (0.0, 1.0)
        if player == "student":
            stream, span = player, (self.config.time_low, self.config.time_high)
        shift = self.config.time_shift
        return batch.draw(f"{stream}/t", lambda n, draw: native_uniform(self.schedule, n, draw, *span, shift))

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """The fake score's loss on the student's samples x (B, ...), which get no gradient."""
        return fake_score_loss(self.fake_score, x, t, eps, cond, self.config.fake_score_loss)

    def fake_score_cond(self, batch: Batch) -> Cond:
        """The conditions that the fake score is trained with."""
        return batch.cond

    def matched_levels(self) -> range:
        """Those of a student's levels whose samples are matched, of several; the others have other losses."""
        return range(1 if self.anchor_weight else 0, self.steps)

    def other_turns(self, step: int) -> Sequence[Turn]:
        """The moves of further players in a training step, after the student's and the fake score's."""
        return ()

    def rests(self, step: int) -> bool:
        """Whether the student rests in a training step that would be its own."""
        return False

    def simulated(self, k: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_t (B, ...) and t (B,) that a student of several steps reads after k of them; no gradient passes."""
        return simulated_input(self.sampler(), k, batch)

    def reached(self, predicted: Prediction, k: int) -> Tensor:
        """The samples (B, ...) that a student of several steps is judged by, of its prediction at level k."""
        return predicted.x0

    def student_loss(self, batch: Batch) -> tuple[Tensor, Outcome]:
        """Samples (B, ...) of the student, and its loss on them."""
        predicted = self.predicted(batch, "student")
        x = self.samples_of(predicted, batch)
        weighted, shown = self.by_reward(x, batch)
        outcome = self.matching(weighted, self.times("student", batch), batch.randn("student/eps"), batch.cond)
        return x, self.with_targets(Outcome(outcome.loss, {**outcome.shown, **shown}), predicted, batch)

    def after_step(self, step: int) -> None:
        """The means of ratios and weights take in the step's samples; the fake score is drawn along by the student."""
        for weight in self.weights:
            weight.update()
        if self.alignment and not step % self.config.update_ratio:
            align(self.fake_scores[self._mine(step)], self.student, self.alignment)

    # -- the game --------------------------------------------------------------------------------------------

    @final
    def optimizer(self, player: str) -> Optimizer:
        """AdamW with a rate for each player."""
        c = self.config
        rate = c.student_lr if player == "student" else getattr(c, f"{player}_lr", c.fake_score_lr)
        return Optimizer(rate, (c.beta1, 0.999), c.weight_decay)

    @final
    def turns(self, step: int) -> Sequence[Turn]:
        """Who moves in a training step, and in which order."""
        drawn: dict[int, Tensor] = {}
        student = Turn("student", partial(self.student_turn, drawn))
        fake_score = Turn(_fake_score_role(self._mine(step)), partial(self.fake_score_turn, drawn))
        if step % self.config.update_ratio or self.rests(step):
            return [fake_score, *self.other_turns(step)]
        first, second = (student, fake_score) if self.student_first else (fake_score, student)
        return [first, second, *self.other_turns(step)]

    @final
    def sampler(self) -> Sampler:
        """One step from the level of the options, or several from there down with `move` between."""
        if self.steps > 1:
            return Sampler(self.student, self.levels_in(), self.move)
        return one_step_sampler(self.student, self.config.student_level)

    @final
    def generate(self, batch: Batch, player: str, cond: Cond | None = None) -> Tensor:
        """x (B, ...) for a player's turn, of the level of this step; gradients flow through its one pass.

        `cond` stands for the batch's conditions.
        """
        batch = batch if cond is None else replace(batch, cond=cond)
        return self.samples_of(self.predicted(batch, player), batch)

    @final
    def generate_at(self, k: int, batch: Batch) -> Tensor:
        """x (B, ...) of level k of a student of several steps; gradients flow through its one pass."""
        return self.reached(self._predicted_at(k, batch), k)

    @final
    def predicted(self, batch: Batch, player: str) -> Prediction:
        """What the student says in a player's turn, at the level of this step; gradients flow through its one pass."""
        if self.steps > 1:
            return self._predicted_at(self.level(batch), batch)
        sampler = self.sampler()
        x_t, t = sampler.start(batch.randn("z" if self.shares_samples else f"{player}/z"))
        return sampler.predict(x_t, t, len(sampler.levels), batch.cond)

    @final
    def samples_of(self, predicted: Prediction, batch: Batch) -> Tensor:
        """x (B, ...), of what the student says at the level of this step."""
        return self.reached(predicted, self.level(batch)) if self.steps > 1 else predicted.x0

    @final
    def beside(self, batch: Batch, pair: Pair | None) -> tuple[Tensor, ...]:
        """Samples (B, ...) of a one-step student and, of the same pass, those of a pair's noise, or none."""
        z, cond = batch.randn("z"), batch.cond
        if pair is not None:
            z, cond = torch.cat([z, pair.z]), {key: torch.cat([value, pair.cond[key]]) for key, value in cond.items()}
        return self.sampler().one_step(z, cond).tensor_split([batch.size])

    def _predicted_at(self, k: int, batch: Batch) -> Prediction:
        x_t, t = self.simulated(k, batch)
        return self.student(x_t, t, batch.cond)

    @final
    def by_reward(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples x (B, ...) whose gradients count exp(reward/beta) times, and what is shown of it.

        x and nothing without a beta (Re-DMD: Lu et al. 2025, arXiv:2512.04678).
        """
        if self.reward_beta is None:
            return x, {}
        rewards = self.scored(x, batch)
        weights = reward_weights(rewards, self.reward_beta)
        return weighted_gradient(x, weights), {"reward": rewards.mean(), "reward weight": weights.mean()}

    @final
    def level(self, batch: Batch) -> int:
        """Which of its sampler's levels the student is trained at in this step."""
        if self.steps == 1:
            return 0
        levels = self.matched_levels()
        return levels[self._mine(batch.key[1]) if self.per_level else drawn_level(len(levels), batch)]

    @final
    def with_targets(self, outcome: Outcome, predicted: Prediction, batch: Batch) -> Outcome:
        """The student's loss with what holds its steps besides, of what it says at this step's level: see both."""
        return self.with_anchor(self.with_midpoint(outcome, predicted, batch), batch)

    @final
    def with_midpoint(self, outcome: Outcome, predicted: Prediction, batch: Batch) -> Outcome:
        """The student's loss with its step's distance from the way by a point inside of it, if there is a weight.

        The teacher steps from t to t_m, the student from there to s, the next level or clean data; the student's one
        step from t to s is to come there (Ge et al. 2025, arXiv:2506.00523, intra-segment guidance).
        """
        if not self.midpoint_weight:
            return outcome
        t = predicted.t
        s = Sampler(self.student, self.sampler().levels, STEPS["ddim"]).leads(self.level(batch)).to(t).expand_as(t)
        with torch.no_grad():
            t_m = self.midpoints(t, s, batch)
            x_m = ddim_step(self.followed, predicted.x_t, t, t_m, batch.cond)
            target = ddim_step(self.student, x_m, t_m, s, batch.cond)
        distance = elementwise("huber", predicted.at(s), target, 0.001)
        return Outcome(outcome.loss + self.midpoint_weight * distance, {**outcome.shown, "midpoint": distance})

    @final
    def midpoints(self, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """(B,) angles between s and t (B,), uniform in the teacher's own time; in a short step its middle."""
        first, last = self.schedule.fraction(s), self.schedule.fraction(t)
        margin = ((last - first) / 2).clamp(max=self.config.midpoint_margin)
        u = torch.lerp(first + margin, last - margin, batch.uniform("midpoint/t"))
        return torch.minimum(self.schedule.at_fraction(u), t)

    @final
    def with_anchor(self, outcome: Outcome, batch: Batch) -> Outcome:
        """The student's loss with its first step's distance from the teacher's trajectory, if that is an anchor.

        Both go from the same noise to the second level, the teacher in `anchor_steps`; the distance is that of the
        velocities that lead straight there, |x_s - z_s|^2/sin(t - s)^2 (DP-DMD, arXiv:2602.03139).
        """
        if not self.anchor_weight:
            return outcome
        sampler, z = self.sampler(), batch.randn("anchor/z")
        (x_t, t), s = sampler.start(z), self.schedule.angle(sampler.levels[1]).to(z.device)
        with torch.no_grad():
            start, end = self.schedule.fraction(t[:1]), self.schedule.fraction(s[None])
            fractions = torch.lerp(start, end, self._anchor_grid(t))
            theirs = solve(ddim_step, self.followed, x_t, self.schedule.at_fraction(fractions), batch.cond)
        ours = self.student(x_t, t, batch.cond).at(s.expand_as(t))
        anchor = ((ours - theirs) / expand(torch.sin(t - s), ours)).square().mean()
        return Outcome(outcome.loss + self.anchor_weight * anchor, {**outcome.shown, "anchor": anchor})

    def _anchor_grid(self, t: Tensor) -> Tensor:
        return torch.linspace(0, 1, self.config.anchor_steps + 1, dtype=t.dtype, device=t.device)

    @final
    def student_turn(self, drawn: dict[int, Tensor], batch: Batch) -> Outcome:
        """The student's loss, with the discriminator's if there is one; `drawn` keeps its samples by their place."""
        adversary = self._turn_of("student", batch)
        x, outcome = self.student_loss(batch)
        if self.shares_samples:
            drawn[batch.first] = x.detach()
        if adversary is None:
            return outcome
        gan = adversary.student_loss(x, batch)
        return Outcome(outcome.loss + self.gan_weight * gan, {**outcome.shown, "gan": gan})

    @final
    def fake_score_turn(self, drawn: dict[int, Tensor], batch: Batch) -> Outcome:
        """The fake score's loss on the samples that `drawn` holds, or on new ones."""
        adversary, cond = self._turn_of("fake_score", batch), self.fake_score_cond(batch)
        with torch.no_grad():
            # Samples that are drawn for this turn alone have its conditions; those of the student's turn had theirs.
            own = None if self.shares_samples else cond
            x = drawn[batch.first] if drawn else self.generate(batch, "fake_score", own)
        t = self.times("fake_score", batch)
        loss = self.denoising(x, t, batch.randn(f"{self.fake_score_stream}/eps"), cond)
        if adversary is None:
            return Outcome(loss, {"denoising": loss})
        gan = adversary.critic_loss(x, batch)
        return Outcome(loss + self.discriminator_weight * gan, {"denoising": loss, "gan": gan})

    def ratio_logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """(B,) or (heads, B) the logits of the discriminator whose turn it is, without a gradient."""
        with torch.no_grad():
            return self.adversaries[self.place].logits(x, t, eps, cond)

    def _edm_angles(self, player: str, n: int, draw: torch.Generator) -> Tensor:
        """EDM's grid for the student, and its log-normal levels for the fake score (Zhou et al. 2024, SiD)."""
        if player == "student":
            return edm_karras(self.schedule, n, draw, self.config.time_low, self.config.time_high)
        return edm_log_normal(self.schedule, n, draw, -1.2, 1.2)

    def _mine(self, step: int) -> int:
        """Which fake score a step trains: each one for as many steps as lie between two of the student's."""
        return step // self.config.update_ratio % len(self.fake_scores)

    def _turn_of(self, player: str, batch: Batch) -> Adversary | None:
        """Set the step's fake score and the dropout of a player's turn; the discriminator, if there is one."""
        k = self.place = self._mine(batch.key[1])
        self.fake_score = self.fake_scores[k]
        self._set_dropout(player)
        return self.adversaries[k] if self.adversaries else None

    def _set_dropout(self, player: str) -> None:
        drops = {"off": (), "own": ("student", player), "mover": (player,)}[self.dropout]
        self.student.train("student" in drops)
        self.fake_score.train("fake_score" in drops)


@torch.no_grad()
def align(fake_score: Denoiser, student: Denoiser, share: float) -> None:
    """The fake score's weights become (1 - share) of themselves and a share of the student's.

    Ge et al. 2025, arXiv:2506.00523 (implicit distribution alignment).
    """
    approach(fake_score.network.parameters(), student.network.parameters(), share)


def _of_one_kind(one: Denoiser, other: Denoiser) -> bool:
    """Whether a weight of the one is the same weight in the other."""
    shapes = [[weight.shape for weight in player.network.parameters()] for player in (one, other)]
    return shapes[0] == shapes[1] and one.output.name == other.output.name


def _fake_score_role(k: int) -> str:
    return f"fake_score_{k + 1}" if k else "fake_score"


def dmd_loss(
    x: Tensor, t: Tensor, eps: Tensor, cond: Cond, teacher: Denoise, fake_score: Denoiser, normalise: bool
) -> Outcome:
    """DMD's loss of samples x (B, ...) at the angles t (B,) with noise eps (B, ...)."""
    matched = matching_loss(x, t, eps, cond, teacher, fake_score, normalise)
    return Outcome(_dmd_unit(fake_score, normalise) * matched.loss, matched.shown)


def injected(x: Tensor, gradient: Tensor, fake_score: Denoiser, normalise: bool) -> Tensor:
    """A scalar that pushes samples x (B, ...) along -gradient (B, ...), in DMD's unit."""
    return _dmd_unit(fake_score, normalise) * gradient_injection(x, gradient)


def _dmd_unit(fake_score: Denoiser, normalise: bool) -> float:
    """The normalised gradient has no unit; the authors' is that of images, and other terms' weights go by it."""
    return fake_score.schedule.data_std if normalise else 1.0


def matching_loss(
    x: Tensor, t: Tensor, eps: Tensor, cond: Cond, teacher: Denoise, fake_score: Denoise, normalise: bool
) -> Outcome:
    """The same in units of the normal form."""
    gradient, gap = distribution_matching_gradient(x, diffuse(x, t, eps), t, cond, teacher, fake_score, normalise)
    return Outcome(gradient_injection(x, gradient), {"gap": gap.mean()})


def distribution_matching_gradient(
    x: Tensor, x_t: Tensor, t: Tensor, cond: Cond, teacher: Denoise, fake_score: Denoise, normalise: bool
) -> tuple[Tensor, Tensor]:
    """The direction (B, ...) in which x is pushed away, and its mean size (B,) relative to |x - D_teacher|.

    The score gap s_fake - s_teacher is cos(t)/sin(t)^2 (D_fake - D_teacher), and x enters x_t with cos(t);
    so the gradient of KL(q_t || p_t) is cot(t)^2 (D_fake - D_teacher). DMD replaces cot(t)^2 by
    1/mean|x - D_teacher|. No gradient passes through either network.
    """
    with torch.no_grad():
        x0_teacher, x0_fake = teacher(x_t, t, cond).x0, fake_score(x_t, t, cond).x0
        gap = x0_fake - x0_teacher
        normaliser = l1_normaliser(x, x0_teacher)
        relative = per_sample_mean(gap.abs()) / normaliser
        weight = 1 / normaliser if normalise else torch.tan(t) ** -2
        return expand(weight, gap) * gap, relative


def fake_score_loss(fake_score: Denoise, x: Tensor, t: Tensor, eps: Tensor, cond: Cond, kind: str = "v") -> Tensor:
    """Denoising score matching of the fake score on the student's samples x (B, ...), which get no gradient."""
    x = x.detach()
    return denoising_loss(fake_score(diffuse(x, t, eps), t, cond), x, eps, kind)
