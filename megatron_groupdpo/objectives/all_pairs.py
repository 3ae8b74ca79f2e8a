"""all_pairs: DPO's loss averaged over every (positive, negative) pair of the group.

    phi(s) = (1 / PN) sum_p sum_n -log sigma(s_p - s_n)

Source: GroupDPO, arXiv 2604.15602. With label smoothing each ``-log sigma`` is conservative DPO's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_groupdpo.objectives.base import (
    Groups,
    Objective,
    PairwiseHyperparameters,
    all_members,
    differences,
    has_both_sides,
    mean_over_pairs,
    preference_loss,
)

if TYPE_CHECKING:
    from torch import Tensor


def all_pairs_loss(scores_GK: Tensor, groups: Groups, hyperparameters: PairwiseHyperparameters) -> Tensor:
    """Loss [G]."""
    return mean_over_pairs(preference_loss(differences(scores_GK), hyperparameters.label_smoothing), groups)


ALL_PAIRS = Objective(
    name="all_pairs",
    hyperparameters=PairwiseHyperparameters,
    used=all_members,
    active=has_both_sides,
    loss=all_pairs_loss,
    equation="(1/PN) sum_p sum_n -log sigma(s_p - s_n)",
    source="GroupDPO, arXiv 2604.15602",
)
