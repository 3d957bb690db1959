"""The options of every command but those that check; no torch is imported here."""

from diffdistill.config.judging import BenchConfig, CompareConfig, DrawConfig, EvalConfig, JudgeConfig, SpeedConfig
from diffdistill.config.machine import AttentionConfig, MachineConfig
from diffdistill.config.making import EncodeConfig, PairsConfig, PruneConfig
from diffdistill.config.models import (
    EVERYTHING,
    DiversityConfig,
    ExportConfig,
    ListConfig,
    MethodsConfig,
    RecipesConfig,
    ReportConfig,
    SampleConfig,
    WatchConfig,
)
from diffdistill.config.training import (
    DERIVED,
    INPUTS,
    SAVING,
    DecoderConfig,
    FitConfig,
    SavingConfig,
    TeacherConfig,
    TrainConfig,
    run_options,
)

__all__ = [
    "DERIVED",
    "EVERYTHING",
    "INPUTS",
    "SAVING",
    "AttentionConfig",
    "BenchConfig",
    "CompareConfig",
    "DecoderConfig",
    "DiversityConfig",
    "DrawConfig",
    "EncodeConfig",
    "EvalConfig",
    "ExportConfig",
    "FitConfig",
    "JudgeConfig",
    "ListConfig",
    "MachineConfig",
    "MethodsConfig",
    "PairsConfig",
    "PruneConfig",
    "RecipesConfig",
    "ReportConfig",
    "SampleConfig",
    "SavingConfig",
    "SpeedConfig",
    "TeacherConfig",
    "TrainConfig",
    "WatchConfig",
    "run_options",
]
