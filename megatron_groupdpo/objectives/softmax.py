"""softmax: every positive on its own against all negatives.

    phi(s) = (1/P) sum_p [LSE(s_p, s_N) - s_p] = (1/P) sum_p -log sigma(s_p - LSE_N(s))

Source: GroupDPO, arXiv 2604.15602.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_groupdpo.objectives.base import (
    Groups,
    NoHyperparameters,
    Objective,
    above_best_negative,
    all_members,
    has_both_sides,
    logsigmoid,
    masked_logsumexp,
    masked_mean,
)

if TYPE_CHECKING:
    from torch import Tensor


def softmax_loss(scores_GK: Tensor, groups: Groups, hyperparameters: NoHyperparameters) -> Tensor:
    """Loss [G]."""
    scores_GK = above_best_negative(scores_GK, groups)
    negative_G = masked_logsumexp(scores_GK, groups.negatives_GK)
    return masked_mean(-logsigmoid(scores_GK - negative_G[:, None]), groups.positives_GK)


SOFTMAX = Objective(
    name="softmax",
    hyperparameters=NoHyperparameters,
    used=all_members,
    active=has_both_sides,
    loss=softmax_loss,
    equation="(1/P) sum_p [LSE(s_p, s_N) - s_p]",
    source="GroupDPO, arXiv 2604.15602",
)
