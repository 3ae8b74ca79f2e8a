"""plackett_luce: the likelihood of the whole ranking by value.

    phi(s) = -sum_k [s_tau(k) - LSE_{j >= k} s_tau(j)],  tau from best to worst value

Source: DPO, arXiv 2305.18290, appendix A.3, Eq. 20. The model has no ties: equal values are put in the order
of their tie keys, then of their columns. Labels are not read (they choose the responses of the NLL term).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_groupdpo.objectives.base import (
    Groups,
    NoHyperparameters,
    Objective,
    differences,
    has_distinct_values,
    ranks,
    valued_members,
)

if TYPE_CHECKING:
    from torch import Tensor


def plackett_luce_loss(scores_GK: Tensor, groups: Groups, hyperparameters: NoHyperparameters) -> Tensor:
    """Loss [G]."""
    members_GK = groups.members_GK
    rank_GK = ranks(members_GK, groups.values_GK.nan_to_num(nan=0.0), groups.tie_keys_GK)
    remaining_GKK = (rank_GK[:, None, :] >= rank_GK[:, :, None]) & members_GK[:, None, :]
    # LSE_j(s_j) - s_i as LSE_j(s_j - s_i), which does not round at the size of the scores.
    ahead_GK = (-differences(scores_GK)).masked_fill(~remaining_GKK, -math.inf).logsumexp(2)
    return ahead_GK.masked_fill(~members_GK, 0.0).sum(1)


PLACKETT_LUCE = Objective(
    name="plackett_luce",
    hyperparameters=NoHyperparameters,
    used=valued_members,
    active=has_distinct_values,
    loss=plackett_luce_loss,
    needs_values=True,
    equation="-sum_k [s_tau(k) - LSE_{j>=k} s_tau(j)], tau best to worst",
    source="DPO, arXiv 2305.18290, appendix A.3, Eq. 20",
)
