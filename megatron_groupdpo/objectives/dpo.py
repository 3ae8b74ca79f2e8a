"""dpo: one positive against one negative of the group; the others get no pass.

    phi(s) = -log sigma(s_w - s_l)

Source: DPO, arXiv 2305.18290, Eq. 7. With label smoothing, conservative DPO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_groupdpo.errors import ConfigError, UserError
from megatron_groupdpo.objectives.base import (
    Groups,
    Objective,
    PairwiseHyperparameters,
    has_both_sides,
    masked_mean,
    preference_loss,
    ranks,
)
from megatron_groupdpo.objectives.keys import draw

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoHyperparameters(PairwiseHyperparameters):
    """Hyperparameters of ``dpo``."""

    pair_selection: Literal["best_worst", "random"] = "best_worst"
    """best_worst: the positive of highest and the negative of lowest value (one without a value is taken only
    when its side has none with a value). random: one of each side, drawn from the group's key."""

    def __post_init__(self) -> None:
        # Not super(): slots=True rebuilds the class, which breaks the zero-argument form.
        PairwiseHyperparameters.__post_init__(self)
        if self.pair_selection not in ("best_worst", "random"):
            raise ConfigError(f"pair_selection must be best_worst or random; it is {self.pair_selection!r}.")


def pair_GK(groups: Groups, hyperparameters: DpoHyperparameters) -> Tensor:
    """[G, K] bool: at most one positive and one negative per group.

    Ties of value go to the larger tie key, then to the lower column.

    Raises:
        UserError: pairs are to be drawn and the groups have no keys.
    """
    if hyperparameters.pair_selection == "random":
        if groups.group_keys_G is None:
            raise UserError("pair_selection 'random' draws from the group's key; pass group_keys_G (see group_keys).")
        chosen_GK, rejected_GK = (
            side_GK
            & (ranks(side_GK, groups.tie_keys_GK) == 1 + draw(groups.group_keys_G, side_GK.sum(1), stream=i)[:, None])
            for i, side_GK in enumerate((groups.positives_GK, groups.negatives_GK))
        )
    else:
        best_first_GK = groups.values_GK.nan_to_num(nan=-math.inf)
        worst_first_GK = (-groups.values_GK).nan_to_num(nan=-math.inf)
        positives_GK, negatives_GK = groups.positives_GK, groups.negatives_GK
        chosen_GK = positives_GK & (ranks(positives_GK, best_first_GK, groups.tie_keys_GK) == 1)
        rejected_GK = negatives_GK & (ranks(negatives_GK, worst_first_GK, groups.tie_keys_GK) == 1)
    return chosen_GK | rejected_GK


def dpo_loss(scores_GK: Tensor, groups: Groups, hyperparameters: DpoHyperparameters) -> Tensor:
    """Loss [G]; each group holds one positive and one negative."""
    margin_G = masked_mean(scores_GK, groups.positives_GK) - masked_mean(scores_GK, groups.negatives_GK)
    return preference_loss(margin_G, hyperparameters.label_smoothing)


DPO = Objective(
    name="dpo",
    hyperparameters=DpoHyperparameters,
    used=pair_GK,
    active=has_both_sides,
    loss=dpo_loss,
    equation="-log sigma(s_w - s_l)",
    source="DPO, arXiv 2305.18290, Eq. 7",
)
