"""margin: DPO's loss on the difference of the two sides' mean scores.

    phi(s) = -log sigma(m),  m = mean_P(s) - mean_N(s)

Source: GroupDPO, arXiv 2604.15602. With label smoothing: ``-(1-e) log sigma(m) - e log sigma(-m)``, the
whole group's order being flipped with probability e.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_groupdpo.objectives.base import (
    Groups,
    Objective,
    PairwiseHyperparameters,
    above_best_negative,
    all_members,
    has_both_sides,
    masked_mean,
    preference_loss,
)

if TYPE_CHECKING:
    from torch import Tensor


def margin_loss(scores_GK: Tensor, groups: Groups, hyperparameters: PairwiseHyperparameters) -> Tensor:
    """Loss [G]."""
    scores_GK = above_best_negative(scores_GK, groups)
    margin_G = masked_mean(scores_GK, groups.positives_GK) - masked_mean(scores_GK, groups.negatives_GK)
    return preference_loss(margin_G, hyperparameters.label_smoothing)


MARGIN = Objective(
    name="margin",
    hyperparameters=PairwiseHyperparameters,
    used=all_members,
    active=has_both_sides,
    loss=margin_loss,
    equation="-log sigma(mean_P s - mean_N s)",
    source="GroupDPO, arXiv 2604.15602",
)
