"""group_bce: the implicit reward as a binary classifier, each side weighing one half whatever its size.

    phi(s) = -(1/P) sum_p log sigma(s_p) - (1/N) sum_n log sigma(-s_n)

Separable: c_i depends on s_i alone. Source: binary cross-entropy on the implicit reward, as in BCO
(arXiv 2404.04656) without its reward shift, balanced within the group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_groupdpo.lazy_torch import torch
from megatron_groupdpo.objectives.base import (
    Groups,
    NoHyperparameters,
    Objective,
    all_members,
    has_both_sides,
    logsigmoid,
)

if TYPE_CHECKING:
    from torch import Tensor


def group_bce_terms(scores_GK: Tensor, groups: Groups, hyperparameters: NoHyperparameters) -> Tensor:
    """Loss of each response [G, K]."""
    weight_GK = torch.zeros_like(scores_GK)
    for side_GK in (groups.positives_GK, groups.negatives_GK):
        # Cast before dividing: bool / int would round the weight to fp32.
        weight_GK = weight_GK + side_GK.to(scores_GK.dtype) / side_GK.sum(1, keepdim=True)
    return -weight_GK * logsigmoid(groups.labels_GK * scores_GK)


def group_bce_loss(scores_GK: Tensor, groups: Groups, hyperparameters: NoHyperparameters) -> Tensor:
    """Loss [G]."""
    return group_bce_terms(scores_GK, groups, hyperparameters).sum(1)


GROUP_BCE = Objective(
    name="group_bce",
    hyperparameters=NoHyperparameters,
    used=all_members,
    active=has_both_sides,
    loss=group_bce_loss,
    terms=group_bce_terms,
    equation="-(1/P) sum_p log sigma(s_p) - (1/N) sum_n log sigma(-s_n)",
    source="binary cross-entropy; BCO, arXiv 2404.04656, without its reward shift",
)
