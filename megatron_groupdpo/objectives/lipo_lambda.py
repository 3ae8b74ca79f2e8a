"""lipo_lambda: pairwise logistic loss, each pair weighted by what swapping it would do to the ranking.

    phi(s)   = sum_{psi_i > psi_j} Delta_ij log(1 + exp(-(s_i - s_j)))
    Delta_ij = |2^psi_i - 2^psi_j| * |1/log(1 + r_i) - 1/log(1 + r_j)|

r is the 1-based rank by score, without gradient; equal scores (all of them at step 0) rank by psi, then by
tie key, then by column. Source: LiPO-lambda, arXiv 2402.01878 (gain 2^psi - 1, discount log(1 + r)).
The scaling of psi to [0, 1] is our reading: the paper's psi are win probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_groupdpo.errors import ConfigError, UserError
from megatron_groupdpo.lazy_torch import torch
from megatron_groupdpo.objectives.base import (
    Groups,
    Objective,
    differences,
    has_distinct_values,
    logsigmoid,
    ranks,
    valued_members,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LipoLambdaHyperparameters:
    """Hyperparameters of ``lipo_lambda``."""

    psi_scaling: Literal["group", "given"] = "group"
    """group: psi is the value scaled so that the group spans [0, 1]. given: psi is the value, which must be in
    [0, 1] already."""

    def __post_init__(self) -> None:
        if self.psi_scaling not in ("group", "given"):
            raise ConfigError(f"psi_scaling must be group or given; it is {self.psi_scaling!r}.")


def check_values(groups: Groups, hyperparameters: LipoLambdaHyperparameters) -> None:
    """Values that are taken as they are must be psi.

    Raises:
        UserError: with ``psi_scaling`` given, a value lies outside [0, 1].
    """
    members_GK, values_GK = groups.members_GK, groups.values_GK
    outside_GK = members_GK & ((values_GK < 0) | (values_GK > 1))
    if hyperparameters.psi_scaling == "given" and bool(outside_GK.any()):
        raise UserError("psi_scaling 'given' needs values in [0, 1]; scale the values or use psi_scaling 'group'.")


def psi_of_values(groups: Groups, hyperparameters: LipoLambdaHyperparameters) -> Tensor:
    """[G, K] float64 in [0, 1]; 0 in padding cells."""
    members_GK, values_GK = groups.members_GK, groups.values_GK
    if hyperparameters.psi_scaling == "given":
        return values_GK.masked_fill(~members_GK, 0.0)
    lowest_G = values_GK.masked_fill(~members_GK, math.inf).amin(1)
    highest_G = values_GK.masked_fill(~members_GK, -math.inf).amax(1)
    psi_GK = (values_GK - lowest_G[:, None]) / (highest_G - lowest_G)[:, None]
    return psi_GK.masked_fill(~members_GK, 0.0)


def lipo_lambda_loss(scores_GK: Tensor, groups: Groups, hyperparameters: LipoLambdaHyperparameters) -> Tensor:
    """Loss [G]."""
    members_GK = groups.members_GK
    psi_GK = psi_of_values(groups, hyperparameters)
    rank_GK = ranks(members_GK, scores_GK.detach(), psi_GK, groups.tie_keys_GK)
    gain_GKK = differences(torch.exp2(psi_GK)).abs()
    discount_GKK = differences(1.0 / torch.log1p(rank_GK.to(torch.float64))).abs()
    ordered_GKK = (psi_GK[:, :, None] > psi_GK[:, None, :]) & members_GK[:, :, None] & members_GK[:, None, :]
    delta_GKK = (gain_GKK * discount_GKK).masked_fill(~ordered_GKK, 0.0)
    return (delta_GKK.to(scores_GK.dtype) * -logsigmoid(differences(scores_GK))).sum((1, 2))


LIPO_LAMBDA = Objective(
    name="lipo_lambda",
    hyperparameters=LipoLambdaHyperparameters,
    used=valued_members,
    active=has_distinct_values,
    loss=lipo_lambda_loss,
    check=check_values,
    needs_values=True,
    equation=(
        "sum_{psi_i > psi_j} |2^psi_i - 2^psi_j| |1/log(1+r_i) - 1/log(1+r_j)| log(1 + e^{-(s_i - s_j)}), "
        "r the rank by s"
    ),
    source="LiPO-lambda, arXiv 2402.01878",
)
