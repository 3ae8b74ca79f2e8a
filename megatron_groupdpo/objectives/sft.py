"""sft: the NLL of the positives alone (warm start; rejection fine-tuning as a baseline).

    phi(s) = 0; the loss is the NLL term

Separable, and without scores at all: no scoring pass, no reference. Negatives get no pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_groupdpo.objectives.base import Groups, NoHyperparameters, Objective

if TYPE_CHECKING:
    from torch import Tensor


def positives_only(groups: Groups, hyperparameters: NoHyperparameters) -> Tensor:
    """[G, K] bool."""
    return groups.positives_GK


def has_a_positive(groups: Groups) -> Tensor:
    """[G] bool."""
    return groups.positives_GK.any(1)


def sft_terms(scores_GK: Tensor, groups: Groups, hyperparameters: NoHyperparameters) -> Tensor:
    """Zeros [G, K], inside the graph."""
    return scores_GK * 0.0


def sft_loss(scores_GK: Tensor, groups: Groups, hyperparameters: NoHyperparameters) -> Tensor:
    """Zeros [G], inside the graph."""
    return sft_terms(scores_GK, groups, hyperparameters).sum(1)


SFT = Objective(
    name="sft",
    hyperparameters=NoHyperparameters,
    used=positives_only,
    active=has_a_positive,
    loss=sft_loss,
    terms=sft_terms,
    needs_reference=False,
    equation="0 (the NLL of the positives is the whole loss)",
    source="maximum likelihood",
)
