"""Multi-student distillation: Multi-student Diffusion Distillation for Better One-step Generators.

Song, Lorraine, Nie, Kreis, Lucas 2024, arXiv:2410.23274 (no code; stages and losses as others tell them).

The classes are parted, and each part has a student of its own, which makes one step and learns its classes alone, with
a fake score that sees its samples alone. What one student cannot hold, several do; a sample takes one of them, so that
it costs what it did. The losses are DMD's, and DMD2's with its GAN:

    L_k = E_{c in part k} [ KL(q_k(x_t | c) || p(x_t | c)) ],   k = 1 .. K.

The paper's stages: matching (DM), which is the default; matching with a GAN from there (ADM), `--start` the first
stage's student and `gan_weight` above 0. A smaller student cannot begin as the teacher, and first learns to be a
denoiser, the teacher's output at noised images (TSM): that is `guided` without a scale or halving,

    diffdistill train --method guided --student SMALL --guidance-min 1 --guidance-max 1 --start-steps 4 --final-steps 4

whose student is then this method's --student. All K students train at once, each sample of a batch in its own. The
student is exported as one network of diffusers that sends each sample to the network of its class.

Deviations:
- The students share batches: the loss is a mean over all samples, and clipping sees the gradients of all. With Adam
  each learns as alone, with about a K-th of the batch. The authors train each apart, on its own machines.
- Parts are consecutive classes, as many in each. Prompts, which have no classes, are not parted.
- All small students begin as one network; the head of the discriminator is one, on the features of each fake score.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.errors import UserError
from diffdistill.options import AdversarialOptions, DMDOptions, option
from diffdistill.players.class_experts import copies_for_classes, parts_of_classes
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.matching import MatchingMethod

ABOUT = About(
    paper="Song et al. 2024, arXiv:2410.23274",
    data="nothing; real images for its GAN, when gan_weight > 0",
    kind="distribution",
    equations={
        "parts of the conditions": "players.class_experts.parts_of_classes, core.experts.ClassExperts.rows",
        "a student and a fake score for each part": "MultiStudent.begun, players.class_experts.copies_for_classes",
        "distribution matching (stage DM)": "MultiStudent.matching, scaffold.matching.dmd_loss",
        "adversarial distribution matching (stage ADM)": "scaffold.adversary.Adversary",
    },
)


@dataclass(frozen=True)
class Config(DMDOptions, AdversarialOptions, update_ratio=5):
    """MSD's options; those of matching are DMD2's in one step."""

    students: int = option(4, "K, the parts of the classes, each of which has a student", at_least=2)


class MultiStudent(MatchingMethod):
    """Student and fake score are K networks each; no network drops out."""

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **(players or self.begun(teacher, config)))

    @staticmethod
    def begun(teacher: Teacher, config: Config) -> dict[str, Denoiser]:
        """Both players, K times what they would begin as. UserError for a teacher of fewer classes, or LoRA."""
        classes = teacher.num_classes
        if classes is None or classes < config.students:
            there = "has none" if classes is None else f"has {classes}"
            raise UserError(f"students: {config.students} students part the classes, and the teacher {there}")
        if teacher.lora:
            raise UserError("lora: each of several students is a network of its own, trained whole; leave lora out")
        parts = parts_of_classes(classes, config.students)
        return {role: copies_for_classes(teacher.player(role), parts) for role in ("student", "fake_score")}


METHOD = MultiStudent
