"""TrainConfig: the sections of a training run, in the order of the help."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_groupdpo.config.sections.machine import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.config.sections.run import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainingConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything a training run is told. Sections are written as YAML mappings; fields are also flags."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
