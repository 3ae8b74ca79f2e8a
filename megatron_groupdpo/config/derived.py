"""Values that follow from the configuration, each computed in one place."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megatron_groupdpo.config.sections.machine import ParallelConfig
from megatron_groupdpo.config.sections.run import ObjectiveConfig
from megatron_groupdpo.config.sections.train_config import TrainConfig
from megatron_groupdpo.objectives import OBJECTIVES, hyperparameter_names

_HYPERPARAMETERS = frozenset(name for objective in OBJECTIVES for name in hyperparameter_names(objective))


def data_parallel_size(config: TrainConfig, world_size: int) -> int:
    """Replicas of the model; ``world_size`` must be a multiple of the model's ranks."""
    return world_size // model_ranks(config.parallel)


def model_ranks(parallel: ParallelConfig) -> int:
    """Ranks of one replica: tensor x pipeline x context."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def train_iters(config: TrainConfig) -> int:
    """Optimizer steps of the run; ``train_samples`` is rounded down to whole global batches, as in Megatron."""
    training = config.training
    if training.train_iters is not None:
        return training.train_iters
    assert training.train_samples is not None, "validate refuses a run of unknown length"
    return training.train_samples // training.global_batch_size


def lr_decay_iters(config: TrainConfig) -> int:
    """Iterations after which the learning rate has reached its end."""
    return config.optimizer.lr_decay_iters or train_iters(config)


def lr_warmup_iters(config: TrainConfig) -> int:
    """Iterations of warm-up."""
    optimizer = config.optimizer
    if optimizer.lr_warmup_fraction is None:
        return optimizer.lr_warmup_iters
    return int(optimizer.lr_warmup_fraction * lr_decay_iters(config))


def objective_hyperparameters(objective: ObjectiveConfig) -> dict[str, Any]:
    """Keywords of ``group_loss`` and its siblings: the options that are set, and beta where the loss reads it."""
    given = {
        field.name: getattr(objective, field.name)
        for field in fields(objective)
        if field.name in _HYPERPARAMETERS - {"beta"} and getattr(objective, field.name) is not None
    }
    if "beta" in hyperparameter_names(objective.objective):
        given["beta"] = objective.beta
    return given
