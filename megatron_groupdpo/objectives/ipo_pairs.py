"""ipo_pairs: IPO's squared distance of the log-ratio gap from its target, over every pair.

    phi(s) = (1 / PN) sum_p sum_n (h_p - h_n - 1/(2 beta))^2,  h = s / beta, the raw log-ratio

Source: IPO, arXiv 2310.12036, Eq. 17.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.objectives.base import (
    Groups,
    Objective,
    all_members,
    differences,
    has_both_sides,
    mean_over_pairs,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class IpoPairsHyperparameters:
    """Hyperparameters of ``ipo_pairs``."""

    beta: float
    """The beta that made the scores, ``s = beta * h``; required, so that it cannot differ by a default."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"beta must be finite and > 0; it is {self.beta}.")


def ipo_pairs_loss(scores_GK: Tensor, groups: Groups, hyperparameters: IpoPairsHyperparameters) -> Tensor:
    """Loss [G]."""
    beta = hyperparameters.beta
    return mean_over_pairs((differences(scores_GK) / beta - 1.0 / (2.0 * beta)).square(), groups)


IPO_PAIRS = Objective(
    name="ipo_pairs",
    hyperparameters=IpoPairsHyperparameters,
    used=all_members,
    active=has_both_sides,
    loss=ipo_pairs_loss,
    equation="(1/PN) sum_p sum_n (h_p - h_n - 1/(2 beta))^2, h = s / beta",
    source="IPO, arXiv 2310.12036, Eq. 17",
)
