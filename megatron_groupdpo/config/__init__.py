"""Configuration of a run: frozen dataclasses, a YAML file, and flags with Megatron's names."""

from __future__ import annotations

from megatron_groupdpo.config.derived import (
    data_parallel_size,
    lr_decay_iters,
    lr_warmup_iters,
    objective_hyperparameters,
    train_iters,
)
from megatron_groupdpo.config.flags import CommandParser, add_fields, given_fields
from megatron_groupdpo.config.load import load_config, to_yaml
from megatron_groupdpo.config.rules.validate import validate, validate_machine
from megatron_groupdpo.config.sections.machine import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.config.sections.run import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_groupdpo.config.sections.train_config import TrainConfig

__all__ = [
    "CheckpointConfig",
    "CommandParser",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "TrainConfig",
    "TrainingConfig",
    "add_fields",
    "data_parallel_size",
    "given_fields",
    "load_config",
    "lr_decay_iters",
    "lr_warmup_iters",
    "objective_hyperparameters",
    "to_yaml",
    "train_iters",
    "validate",
    "validate_machine",
]
