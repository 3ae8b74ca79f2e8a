"""A small valid configuration, and ways to change it."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_groupdpo.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)

EXAMPLE_YAML = """\
# One line per field; what is not said keeps its default.
model:
  num_layers: 4
  hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  position_embedding_type: rope
  normalization: RMSNorm
  swiglu: true
parallel:
  tensor_model_parallel_size: 2
data:
  data_path: [stores/train, stores/more]
  seq_length: 256
  shuffle: no
objective:
  objective: dpo
  beta: 2
  label_smoothing: 1e-1
  reference_logprobs: stores/reference
optimizer:
  lr: 1e-6
  min_lr: 1.5e-7
  lr_decay_style: cosine
training:
  global_batch_size: 8
  micro_batch_size: 2
  train_samples: 800
checkpoint:
  save: runs/one
logging:
"""


def example(**changes: Any) -> TrainConfig:
    """A configuration that :func:`validate` accepts on one rank, with fields changed by name."""
    config = TrainConfig(
        model=ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4),
        data=DataConfig(data_path=("store",), seq_length=128),
        objective=ObjectiveConfig(reference_logprobs="reference"),
        optimizer=OptimizerConfig(lr=1e-4),
        training=TrainingConfig(global_batch_size=8, micro_batch_size=2, train_iters=100),
    )
    return changed(config, **changes)


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The configuration with fields changed by name, whatever section they are in."""
    for name, value in changes.items():
        section = next(field.name for field in dataclasses.fields(config) if hasattr(getattr(config, field.name), name))
        replaced = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: replaced})
    return config
