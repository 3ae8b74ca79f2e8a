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
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_groupdpo import objectives
from megatron_groupdpo.tensors import to_device
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
    nll_terms: Tensor
    """[] float64: what it was divided by, B_nll or the positives' tokens; 0 where nothing carries it."""
    loss_G: Tensor
    """[G] float64: phi per group, 0 where the group is not active."""
    active_G: Tensor
    """[G] bool: the groups counted by B."""
    scores_R: Tensor
    """[R] float64."""
    weights_R: Tensor
    """[R] float64: ``k_i``, the derivative of the loss by each log-probability."""

    def to_host(self) -> GroupLoss:
        """The same on the host, which waits for it."""
        return replace(self, **{field.name: getattr(self, field.name).cpu() for field in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPlan:
    """What the loss of a batch takes from the data and the options: made on the host, before any score is known.

    With it on the device, scores become weights without a number that the host would have to wait for.
    """

    groups: objectives.PreparedGroups
    num_active: int
    """B, at least 1."""
    scale_R: Tensor
    """[R] float64: a response's score is this times its log-ratio."""
    flat_index_GK: Tensor
    """[G, K] int64: as in the batch."""
    cells_R: Tensor
    """[R] int64: each response's cell in the flattened [G, K]; G x K for one that has none."""
    nll_weights_R: Tensor
    """[R] float64: d NLL / d(-logp)."""
    nll_terms: Tensor
    """[] float64 on the host: as in :class:`GroupLoss`."""

    def scores_GK(self, scores_R: Tensor) -> Tensor:
        """[R] to [G, K], 0 in padding cells."""
        if not scores_R.numel():
            return scores_R.new_zeros(self.flat_index_GK.shape)
        gathered_GK = scores_R[self.flat_index_GK.clamp_min(0)]
        return torch.where(self.flat_index_GK >= 0, gathered_GK, torch.zeros_like(gathered_GK))

    def flat_R(self, per_cell_GK: Tensor) -> Tensor:
        """[G, K] to [R]."""
        return _flat(per_cell_GK, self.cells_R)


def plan_loss(batch: GroupBatch, options: LossOptions, device: torch.device) -> LossPlan:
    """The loss of ``batch``, on ``device``."""
    host = torch.device("cpu")
    groups = objectives.prepare(options.objective, **objective_arguments(batch, options, host))
    held_GK = batch.flat_index_GK >= 0
    cells_R = torch.full((batch.num_responses,), held_GK.numel(), dtype=torch.int64)
    cells_R[batch.flat_index_GK[held_GK]] = held_GK.flatten().nonzero().squeeze(1)
    # A response whose tokens are all masked counts none of them: its log-probability and score are 0, not 0/0.
    counts_R = batch.num_tokens_R.double().clamp_min(1)
    scale_R = options.beta / counts_R if options.score_average else torch.full_like(counts_R, options.beta)
    nll_weights_R, nll_terms = _nll_weights(options, groups, held_GK, cells_R, counts_R)
    return LossPlan(
        groups=groups.to(lambda tensor: to_device(tensor, device)),
        num_active=max(int(groups.active_G.sum()), 1),
        scale_R=to_device(scale_R, device),
        flat_index_GK=to_device(batch.flat_index_GK, device),
        cells_R=to_device(cells_R, device),
        nll_weights_R=to_device(nll_weights_R, device),
        nll_terms=nll_terms,
    )


def group_loss(
    logps_R: Tensor, ref_logps_R: Tensor, batch: GroupBatch, options: LossOptions, *, plan: LossPlan | None = None
) -> GroupLoss:
    """Loss and per-response weights of a global batch.

    Args:
        logps_R: [R] float64 summed log-probabilities under the policy.
        ref_logps_R: [R] float64 under the reference; zeros for a reference-free objective.
        batch: the global batch.
        options: the loss.
        plan: :func:`plan_loss` of them, where it was made before.
    """
    plan = plan or plan_loss(batch, options, logps_R.device)
    scores_R = plan.scale_R * (logps_R - ref_logps_R)
    loss_G, coefficients_GK = plan.groups.loss_and_coefficients(plan.scores_GK(scores_R))
    weights_R = plan.scale_R * plan.flat_R(coefficients_GK) / plan.num_active
    preference_loss = loss_G.sum() / plan.num_active
    nll_loss = (plan.nll_weights_R * -logps_R).sum()
    return GroupLoss(
        loss=preference_loss + options.nll_coeff * nll_loss,
        preference_loss=preference_loss,
        nll_loss=nll_loss,
        nll_terms=plan.nll_terms,
        loss_G=loss_G,
        active_G=plan.groups.active_G,
        scores_R=scores_R,
        weights_R=weights_R - options.nll_coeff * plan.nll_weights_R,
    )


def coupled_loss(
    logps_R: Tensor, ref_logps_R: Tensor, batch: GroupBatch, options: LossOptions, *, plan: LossPlan | None = None
) -> Tensor:
    """L as one differentiable function of ``logps_R``: the loss :func:`group_loss` takes apart. Arguments as there."""
    plan = plan or plan_loss(batch, options, logps_R.device)
    loss_G = plan.groups.loss(plan.scores_GK(plan.scale_R * (logps_R - ref_logps_R)))
    nll_loss = (plan.nll_weights_R * -logps_R).sum()
    return loss_G.sum() / plan.num_active + options.nll_coeff * nll_loss


def _flat(per_cell_GK: Tensor, cells_R: Tensor) -> Tensor:
    flat = per_cell_GK.flatten()
    return torch.cat([flat, flat.new_zeros(1)])[cells_R]


def objective_arguments(batch: GroupBatch, options: LossOptions, device: torch.device) -> dict[str, Any]:
    """Everything but the scores that the functions of :mod:`megatron_groupdpo.objectives` take."""
    return {
        "labels_GK": batch.labels_GK.to(device),
        "values_GK": batch.values_GK.to(device),
        "tie_keys_GK": batch.tie_keys_GK.to(device),
        "group_keys_G": batch.group_keys_G.to(device),
        **options.hyperparameters,
    }


def _nll_weights(
    options: LossOptions, groups: objectives.PreparedGroups, held_GK: Tensor, cells_R: Tensor, counts_R: Tensor
) -> tuple[Tensor, Tensor]:
    """[R] float64, d NLL / d(-logp) of each response, and [] float64, the number the NLL is divided by."""
    carries_GK = groups.nll_GK & held_GK
    if not options.one_sided_nll:
        carries_GK = carries_GK & groups.active_G[:, None]
    carries_GK = carries_GK.double()
    if options.nll_average == "batch-tokens":
        carries_R = _flat(carries_GK, cells_R)
        num_tokens = (carries_R * counts_R).sum()
        return carries_R / num_tokens.clamp_min(1), num_tokens
    num_positive_G = carries_GK.sum(dim=1)
    num_groups = (num_positive_G > 0).sum().double()
    weights_R = _flat(carries_GK / num_positive_G.clamp_min(1)[:, None], cells_R) / num_groups.clamp_min(1)
    return (weights_R / counts_R if options.nll_average == "response" else weights_R), num_groups
