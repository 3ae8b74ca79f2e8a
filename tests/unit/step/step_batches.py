"""Ragged batches for the tests of the step."""

from __future__ import annotations

import numpy as np
import torch

from megatron_groupdpo import objectives
from megatron_groupdpo.data.batches.batch import build_batch
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.types import GroupBatch, GroupSample

SIDES = ((1, 1), (2, 3), (0, 2), (3, 1), (2, 0))
"""(positives, negatives) of each group; the third and the fifth have no preference term."""


def options(objective: str = "all_pairs", **changes: object) -> LossOptions:
    defaults: dict[str, object] = {
        "beta": 0.4,
        "score_average": False,
        "nll_coeff": 0.7,
        "nll_average": "response",
        "one_sided_nll": False,
    }
    return LossOptions(objective=objective, **(defaults | changes))  # type: ignore[arg-type]


def make_batch(loss: LossOptions, sides: tuple[tuple[int, int], ...] = SIDES, *, seed: int = 0) -> GroupBatch:
    """Groups of random tokens with random values, positives first."""
    draw = np.random.default_rng(seed)
    samples, first = [], 0
    for group_id, (positives, negatives) in enumerate(sides):
        size = positives + negatives
        samples.append(
            GroupSample(
                group_id=group_id,
                first_response_id=first,
                prompt_tokens=draw.integers(0, 50, size=3, dtype=np.int32),
                response_tokens=tuple(
                    draw.integers(0, 50, size=draw.integers(1, 9), dtype=np.int32) for _ in range(size)
                ),
                response_masks=(None,) * size,
                labels_K=np.array([1] * positives + [-1] * negatives, dtype=np.int8),
                values_K=draw.normal(size=size).astype(np.float32),
            )
        )
        first += size

    def needs_pass(given: dict[str, torch.Tensor]) -> torch.Tensor:
        used_GK = objectives.used_responses(loss.objective, **given, **loss.hyperparameters)
        if loss.one_sided_nll:
            used_GK = used_GK | objectives.nll_responses(loss.objective, **given, **loss.hyperparameters)
        return used_GK

    return build_batch(samples, group_keys_G=torch.arange(len(samples)), needs_pass=needs_pass)


def random_logps(batch: GroupBatch, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Policy and reference log-probabilities [R] float64."""
    draw = torch.Generator().manual_seed(seed)
    logps_R = -3.0 * batch.num_tokens_R - torch.rand(batch.num_responses, generator=draw, dtype=torch.float64)
    return logps_R, logps_R + torch.randn(batch.num_responses, generator=draw, dtype=torch.float64)
