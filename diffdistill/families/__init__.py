"""Diffusers families: how a saved pipeline becomes a teacher, and a network a pipeline again.

To add a family, add a file: which pipeline classes it covers, how its network is called, its latents and prompts. A
family is found by its file's name, or registered from outside the package by `register_family`.
"""

from diffdistill.families._attention import attention_of
from diffdistill.families._family import (
    Autoencoder,
    Family,
    Prompt,
    Source,
    Text,
    diffusers_class,
    prompt_of,
    with_null,
)
from diffdistill.families._folders import (
    NOT_LOADED,
    is_partial,
    is_path,
    local_folder,
    public_name,
    teacher_of,
)
from diffdistill.families._hints import is_single_file
from diffdistill.families._loading import (
    check_weights,
    describe,
    is_student,
    load_pipeline,
    load_student,
    load_teacher,
    record_of,
    student_record,
)
from diffdistill.families._not_yet import NOT_YET
from diffdistill.families._outside import report_unread, skeleton
from diffdistill.families._parts import part_config, parts_of, read_json, weight_files
from diffdistill.families._record import (
    METADATA,
    DiversityRecord,
    Guidance,
    Record,
    StudentRecord,
    TeacherRecord,
    read_record,
    write_record,
)
from diffdistill.families._registry import FAMILIES, family_of, from_outside, register_family
from diffdistill.families._schedules import around_steps, schedule_of
from diffdistill.families._single import read_files_with
from diffdistill.families.unet2d import new_unet2d, unet2d_teacher

__all__ = [
    "FAMILIES",
    "METADATA",
    "NOT_LOADED",
    "NOT_YET",
    "Autoencoder",
    "DiversityRecord",
    "Family",
    "Guidance",
    "Prompt",
    "Record",
    "Source",
    "StudentRecord",
    "TeacherRecord",
    "Text",
    "around_steps",
    "attention_of",
    "check_weights",
    "describe",
    "diffusers_class",
    "family_of",
    "from_outside",
    "is_partial",
    "is_path",
    "is_single_file",
    "is_student",
    "load_pipeline",
    "load_student",
    "load_teacher",
    "local_folder",
    "new_unet2d",
    "part_config",
    "parts_of",
    "prompt_of",
    "public_name",
    "read_files_with",
    "read_json",
    "read_record",
    "record_of",
    "register_family",
    "report_unread",
    "schedule_of",
    "skeleton",
    "student_record",
    "teacher_of",
    "unet2d_teacher",
    "weight_files",
    "with_null",
    "write_record",
]
