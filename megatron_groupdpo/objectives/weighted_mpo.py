"""weighted_mpo: mpo where a response counts the more, the further its value lies from the group's mean.

    phi(s) = mpo(s + log w),  w_p = exp(a (S_p - mean S)),  w_n = exp(a (mean S - S_n))

Source: SWEPO, arXiv 2412.04628. The labels give the sides; the mean is over the responses that have a value.
A group whose values are all equal has w = 1 everywhere and is plain mpo; it is empty only without one side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.lazy_torch import torch
from megatron_groupdpo.objectives.base import (
    Groups,
    NoHyperparameters,
    Objective,
    above_best_negative,
    has_both_sides,
    masked_mean,
    valued_members,
)
from megatron_groupdpo.objectives.mpo import mpo_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedMpoHyperparameters:
    """Hyperparameters of ``weighted_mpo``."""

    weight_exponent: float = 1.0
    """The a of the equation, per unit of value; 0 is plain mpo."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight_exponent) and self.weight_exponent >= 0):
            raise ConfigError(f"weight_exponent must be finite and >= 0; it is {self.weight_exponent}.")


def weighted_mpo_loss(scores_GK: Tensor, groups: Groups, hyperparameters: WeightedMpoHyperparameters) -> Tensor:
    """Loss [G]."""
    deviation_GK = groups.values_GK - masked_mean(groups.values_GK, groups.members_GK)[:, None]
    sign_GK = groups.labels_GK.to(torch.float64)
    log_weight_GK = hyperparameters.weight_exponent * sign_GK * deviation_GK.masked_fill(~groups.members_GK, 0.0)
    scores_GK = above_best_negative(scores_GK, groups)  # before the weights are added, which it would round away
    return mpo_loss(scores_GK + log_weight_GK.to(scores_GK.dtype), groups, NoHyperparameters())


WEIGHTED_MPO = Objective(
    name="weighted_mpo",
    hyperparameters=WeightedMpoHyperparameters,
    used=valued_members,
    active=has_both_sides,
    loss=weighted_mpo_loss,
    needs_values=True,
    equation="mpo(s + log w), w_p = exp(a (S_p - mean S)), w_n = exp(a (mean S - S_n))",
    source="SWEPO, arXiv 2412.04628",
)
