"""Run: the parts of a training run, as ``build.py`` puts them together and the loop uses them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_groupdpo.config import TrainConfig
from megatron_groupdpo.mcore.checkpoint.folders import Progress
from megatron_groupdpo.mcore.passes.optimizer import Updater
from megatron_groupdpo.mcore.policy import Policy
from megatron_groupdpo.mcore.setup import Ranks
from megatron_groupdpo.reference.swapped import SwappedReference
from megatron_groupdpo.run.batches import BatchSource
from megatron_groupdpo.step.coefficients import LossOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything the loop uses."""

    config: TrainConfig
    ranks: Ranks
    policy: Policy
    reference_policy: Policy | SwappedReference | None
    """A second model, or weights that take the policy's place, for ``reference: resident``."""
    updater: Updater
    progress: Progress
    train: BatchSource
    valid: BatchSource | None
    loss: LossOptions
    train_iters: int
    starts_from_reference: bool
    """At iteration 0 the policy has the reference's weights, so every score must be 0."""
    weights_from: Path | None
    """The checkpoint or Hugging Face folder that was loaded; none: seeded initial weights."""
    changes: tuple[str, ...]
    """``field: old -> new`` of optimizer and schedule, where the run goes on from a checkpoint made with others."""
    tokenizer: dict[str, Any]
    """The tokenizer of the data, as checkpoints record it for sampling and export."""
    order: dict[str, Any]
    """What the order of the data follows from; a resumed run must have the same."""
    origin: dict[str, Any] | None
    """What the import recorded of the Hugging Face model the weights come from; checkpoints pass it on to an export."""
