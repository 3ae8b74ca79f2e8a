"""info_nca: cross-entropy between the softmax of the values and that of the scores.

    phi(s) = -sum_i q_i log softmax(s)_i,  q = softmax(r / alpha), r the values

Source: InfoNCA, arXiv 2402.05369.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.objectives.base import (
    Groups,
    Objective,
    differences,
    has_distinct_values,
    valued_members,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueSoftmaxHyperparameters:
    """Hyperparameters of ``info_nca`` and ``nca``."""

    value_temperature: float = 1.0
    """The alpha of ``q = softmax(values / alpha)``, in the values' unit; towards 0 only the best counts."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value_temperature) and self.value_temperature > 0):
            raise ConfigError(f"value_temperature must be finite and > 0; it is {self.value_temperature}.")


def target_distribution(groups: Groups, hyperparameters: ValueSoftmaxHyperparameters) -> Tensor:
    """q: [G, K] float64, 0 in padding cells."""
    logits_GK = groups.values_GK / hyperparameters.value_temperature
    return logits_GK.masked_fill(~groups.members_GK, -math.inf).softmax(1)


def info_nca_loss(scores_GK: Tensor, groups: Groups, hyperparameters: ValueSoftmaxHyperparameters) -> Tensor:
    """Loss [G]."""
    target_GK = target_distribution(groups, hyperparameters).to(scores_GK.dtype)
    # sum_i q_i = 1, so the LSE can stand inside the sum; LSE_j(s_j) - s_i as LSE_j(s_j - s_i), which does not round
    # at the size of the scores.
    members_GKK = groups.members_GK[:, None, :]
    return (target_GK * (-differences(scores_GK)).masked_fill(~members_GKK, -math.inf).logsumexp(2)).sum(1)


INFO_NCA = Objective(
    name="info_nca",
    hyperparameters=ValueSoftmaxHyperparameters,
    used=valued_members,
    active=has_distinct_values,
    loss=info_nca_loss,
    needs_values=True,
    equation="-sum_i q_i log softmax(s)_i, q = softmax(r / alpha)",
    source="InfoNCA, arXiv 2402.05369",
)
