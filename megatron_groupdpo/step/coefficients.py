"""From log-probabilities to one scalar per response: the coupling of the group, and nothing else.

Loss over a global batch (B groups whose preference term is active, B_nll groups with a positive):

    L = (1/B) sum_g phi_g(s_g) + lambda * NLL            s_i = beta * (log pi(y_i|x) - log pi_ref(y_i|x)) [/ |y_i|]

    NLL = (1/B_nll) sum_g (1/P_g) sum_{i positive} -log pi(y_i|x) [/ |y_i|]        nll_average sum | response
    NLL = sum_{i positive} -log pi(y_i|x) / sum_{i positive} |y_i|                 nll_average batch-tokens

so that dL/d log pi(y_i|x) is ``k_i``, with c_i = dphi_g/ds_i:

    k_i = beta * c_i / (B * (|y_i| if averaged else 1)) - lambda * dNLL/d(-log pi(y_i|x))

and the gradient of L is the gradient of ``sum_i k_i log pi(y_i|x)`` with k held fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_groupdpo import objectives
from megatron_groupdpo.types import GroupBatch

NllAverage = Literal["sum", "response", "batch-tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """What the loss is: the objective, how log-probabilities become scores, and the NLL term."""

    objective: str
    beta: float
    score_average: bool
    """Divide a response's log-ratio by its number of tokens."""
    nll_coeff: float
    nll_average: NllAverage
    one_sided_nll: bool
    """Groups that are empty for the objective keep their NLL term."""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLoss:
    """Result of :func:`group_loss`, on the ranks that hold log-probabilities."""

    loss: Tensor
    """[] float64: the true loss of the global batch."""
    preference_loss: Tensor
    """[] float64: ``(1/B) sum_g phi_g``; 0 where no group is active."""
    nll_loss: Tensor
    """[] float64, not multiplied by its coefficient."""
    loss_G: Tensor
    """[G] float64: phi per group, 0 where the group is not active."""
    active_G: Tensor
    """[G] bool: the groups counted by B."""
    scores_R: Tensor
    """[R] float64."""
    weights_R: Tensor
    """[R] float64: ``k_i``, the derivative of the loss by each log-probability."""


def group_loss(logps_R: Tensor, ref_logps_R: Tensor, batch: GroupBatch, options: LossOptions) -> GroupLoss:
    """Loss and per-response weights of a global batch.

    Args:
        logps_R: [R] float64 summed log-probabilities under the policy.
        ref_logps_R: [R] float64 under the reference; zeros for a reference-free objective.
        batch: the global batch.
        options: the loss.
    """
    device = logps_R.device
    scale_R = _score_scale(batch, options, device)
    scores_R = scale_R * (logps_R - ref_logps_R)

    scores_GK = batch.to_groups(scores_R)
    given = objective_arguments(batch, options, device)
    loss_G, coefficients_GK = objectives.loss_and_coefficients(options.objective, scores_GK, **given)
    active_G = objectives.active_groups(options.objective, **given)
    num_active = int(active_G.sum())
    weights_R = scale_R * batch.to_flat(coefficients_GK) / max(num_active, 1)
    preference_loss = loss_G.sum() / max(num_active, 1)

    nll_weights_R = _nll_weights(batch, options, active_G, given)
    nll_loss = (nll_weights_R * -logps_R).sum()
    return GroupLoss(
        loss=preference_loss + options.nll_coeff * nll_loss,
        preference_loss=preference_loss,
        nll_loss=nll_loss,
        loss_G=loss_G,
        active_G=active_G,
        scores_R=scores_R,
        weights_R=weights_R - options.nll_coeff * nll_weights_R,
    )


def coupled_loss(logps_R: Tensor, ref_logps_R: Tensor, batch: GroupBatch, options: LossOptions) -> Tensor:
    """L as one differentiable function of ``logps_R``: the loss :func:`group_loss` takes apart. Arguments as there."""
    scores_R = _score_scale(batch, options, logps_R.device) * (logps_R - ref_logps_R)
    given = objective_arguments(batch, options, logps_R.device)
    loss_G = objectives.group_loss(options.objective, batch.to_groups(scores_R), **given)
    active_G = objectives.active_groups(options.objective, **given)
    preference_loss = loss_G.sum() / active_G.sum().clamp_min(1)
    nll_loss = (_nll_weights(batch, options, active_G, given) * -logps_R).sum()
    return preference_loss + options.nll_coeff * nll_loss


def _score_scale(batch: GroupBatch, options: LossOptions, device: torch.device) -> Tensor:
    """[R] float64: a response's score is this times its log-ratio."""
    # A response whose tokens are all masked counts none of them: its log-probability and score are 0, not 0/0.
    counts_R = batch.num_tokens_R.to(device, torch.float64).clamp_min(1)
    return options.beta / counts_R if options.score_average else torch.full_like(counts_R, options.beta)


def objective_arguments(batch: GroupBatch, options: LossOptions, device: torch.device) -> dict[str, Any]:
    """Everything but the scores that the functions of :mod:`megatron_groupdpo.objectives` take."""
    return {
        "labels_GK": batch.labels_GK.to(device),
        "values_GK": batch.values_GK.to(device),
        "tie_keys_GK": batch.tie_keys_GK.to(device),
        "group_keys_G": batch.group_keys_G.to(device),
        **options.hyperparameters,
    }


def _nll_weights(batch: GroupBatch, options: LossOptions, active_G: Tensor, given: dict[str, Any]) -> Tensor:
    """[R] float64: d NLL / d(-logp) of each response; sums to 1 per group that has a positive, over B_nll."""
    carries_GK = objectives.nll_responses(options.objective, **given) & (batch.flat_index_GK >= 0).to(active_G.device)
    if not options.one_sided_nll:
        carries_GK = carries_GK & active_G[:, None]
    carries_GK = carries_GK.double()
    counts_R = batch.num_tokens_R.to(carries_GK.device, torch.float64).clamp_min(1)
    if options.nll_average == "batch-tokens":
        carries_R = batch.to_flat(carries_GK)
        return carries_R / (carries_R * counts_R).sum().clamp_min(1)
    num_positive_G = carries_GK.sum(dim=1)
    num_groups = (num_positive_G > 0).sum().clamp_min(1)
    weights_R = batch.to_flat(carries_GK / num_positive_G.clamp_min(1)[:, None]) / num_groups
    return weights_R / counts_R if options.nll_average == "response" else weights_R
