"""`diffdistill diversity`: a student whose teacher takes the first steps."""

from __future__ import annotations

from diffdistill.config import DiversityConfig
from diffdistill.environment import use_machine
from diffdistill.eval.models import model_folder
from diffdistill.pipelines.diversity import write_diversity


def run(config: DiversityConfig) -> None:
    """The command."""
    use_machine(config.device, config.threads)
    student = model_folder(config.student)
    print(f"saved {write_diversity(student, config.out, config.teacher, config.base_steps, config.base_guidance)}")
