"""nca: every response against noise, on its own score; likelihood of good responses does not fall.

    phi(s) = -sum_i [q_i log sigma(s_i) + (1/K) log sigma(-s_i)],  q = softmax(r / alpha)

Separable: c_i depends on s_i alone. K counts the responses that have a value. Source: NCA, arXiv 2402.05369.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_groupdpo.objectives.base import Groups, Objective, has_distinct_values, logsigmoid, valued_members
from megatron_groupdpo.objectives.info_nca import ValueSoftmaxHyperparameters, target_distribution

if TYPE_CHECKING:
    from torch import Tensor


def nca_terms(scores_GK: Tensor, groups: Groups, hyperparameters: ValueSoftmaxHyperparameters) -> Tensor:
    """Loss of each response [G, K]."""
    members_GK = groups.members_GK
    target_GK = target_distribution(groups, hyperparameters).to(scores_GK.dtype)
    # Cast before dividing: bool / int would round 1/K to fp32.
    noise_GK = members_GK.to(scores_GK.dtype) / members_GK.sum(1, keepdim=True)
    return -target_GK * logsigmoid(scores_GK) - noise_GK * logsigmoid(-scores_GK)


def nca_loss(scores_GK: Tensor, groups: Groups, hyperparameters: ValueSoftmaxHyperparameters) -> Tensor:
    """Loss [G]."""
    return nca_terms(scores_GK, groups, hyperparameters).sum(1)


NCA = Objective(
    name="nca",
    hyperparameters=ValueSoftmaxHyperparameters,
    used=valued_members,
    active=has_distinct_values,
    loss=nca_loss,
    terms=nca_terms,
    needs_values=True,
    equation="-sum_i [q_i log sigma(s_i) + (1/K) log sigma(-s_i)], q = softmax(r / alpha)",
    source="NCA, arXiv 2402.05369",
)
