"""What a resumed run changes of the optimizer and the schedule that a checkpoint was made with."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from megatron_groupdpo.config.derived import lr_decay_iters, lr_warmup_iters
from megatron_groupdpo.config.sections.train_config import TrainConfig

_DERIVED = {"lr_decay_iters": lr_decay_iters, "lr_warmup_iters": lr_warmup_iters}
"""Left out or given as a fraction, these follow from the length of the run: what they come to counts."""


def optimizer_changes(saved: str | None, config: TrainConfig) -> list[str]:
    """``field: old -> new`` for every field of the optimizer section, and the global batch size, that differs.

    Args:
        saved: the checkpoint's configuration as YAML; None where it has none.
        config: the run's.
    """
    written: dict[str, Any] = {} if saved is None else yaml.safe_load(saved)
    if "optimizer" not in written or "training" not in written:
        return []
    before = dataclasses.replace(
        config,
        optimizer=_section(type(config.optimizer), written["optimizer"]),
        training=_section(type(config.training), written["training"]),
    )
    pairs = [
        (name, _DERIVED[name](before), _DERIVED[name](config))
        if name in _DERIVED
        else (name, getattr(before.optimizer, name), getattr(config.optimizer, name))
        for name in (field.name for field in dataclasses.fields(config.optimizer))
    ]
    pairs.append(("global_batch_size", before.training.global_batch_size, config.training.global_batch_size))
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]


def _section(kind: Any, written: dict[str, Any]) -> Any:
    """A section as another version may have written it: without fields added since, with others that are gone."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in written.items() if name in known})
