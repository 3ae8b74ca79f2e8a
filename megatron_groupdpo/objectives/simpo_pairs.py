"""simpo_pairs: all pairs without a reference, each asked for a margin gamma.

    phi(s) = (1 / PN) sum_p sum_n -log sigma(s_p - s_n - gamma),  s = (beta / |y|) log pi(y|x)

The caller makes s: averaged over the response's tokens, reference left out. Source: SimPO, arXiv 2405.14734,
Eq. 6. With label smoothing: ``-(1-e) log sigma(z) - e log sigma(-z)``, z = s_p - s_n - gamma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_groupdpo.errors import ConfigError
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SimpoPairsHyperparameters(PairwiseHyperparameters):
    """Hyperparameters of ``simpo_pairs``."""

    simpo_gamma: float = 0.5
    """The target margin gamma, in units of the score."""

    def __post_init__(self) -> None:
        PairwiseHyperparameters.__post_init__(self)
        if not (math.isfinite(self.simpo_gamma) and self.simpo_gamma >= 0):
            raise ConfigError(f"simpo_gamma must be finite and >= 0; it is {self.simpo_gamma}.")


def simpo_pairs_loss(scores_GK: Tensor, groups: Groups, hyperparameters: SimpoPairsHyperparameters) -> Tensor:
    """Loss [G]."""
    margin_GKK = differences(scores_GK) - hyperparameters.simpo_gamma
    return mean_over_pairs(preference_loss(margin_GKK, hyperparameters.label_smoothing), groups)


SIMPO_PAIRS = Objective(
    name="simpo_pairs",
    hyperparameters=SimpoPairsHyperparameters,
    used=all_members,
    active=has_both_sides,
    loss=simpo_pairs_loss,
    needs_reference=False,
    needs_score_average=True,
    equation="(1/PN) sum_p sum_n -log sigma(s_p - s_n - gamma), s = (beta/|y|) log pi",
    source="SimPO, arXiv 2405.14734, Eq. 6",
)
