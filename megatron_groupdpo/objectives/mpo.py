"""mpo: the share of the group's softmax mass that lies on the positives.

    phi(s) = LSE_all(s) - LSE_P(s) = -log sigma(LSE_P(s) - LSE_N(s))

The right-hand form is computed: it keeps its precision where the two LSE nearly agree.
Source: GroupDPO, arXiv 2604.15602; the unweighted form of arXiv 2412.04628.
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
)

if TYPE_CHECKING:
    from torch import Tensor


def mpo_loss(scores_GK: Tensor, groups: Groups, hyperparameters: NoHyperparameters) -> Tensor:
    """Loss [G]."""
    scores_GK = above_best_negative(scores_GK, groups)
    positive_G = masked_logsumexp(scores_GK, groups.positives_GK)
    return -logsigmoid(positive_G - masked_logsumexp(scores_GK, groups.negatives_GK))


MPO = Objective(
    name="mpo",
    hyperparameters=NoHyperparameters,
    used=all_members,
    active=has_both_sides,
    loss=mpo_loss,
    equation="LSE_all(s) - LSE_P(s)",
    source="GroupDPO, arXiv 2604.15602",
)
