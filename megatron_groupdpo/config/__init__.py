"""Configuration of a run: frozen dataclasses, a YAML file, and flags with Megatron's names."""

from __future__ import annotations

from megatron_groupdpo.config.machine_sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.config.run_sections import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_groupdpo.config.train_config import TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "TrainConfig",
    "TrainingConfig",
]
