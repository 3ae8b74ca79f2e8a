"""Pure functions from scores to group losses, one per objective.

Every function takes ``labels_GK`` [G, K] (+1 positive, -1 negative, 0 padding) and, where an objective reads
them,
- ``values_GK`` [G, K]: higher is better, NaN where absent;
- ``tie_keys_GK`` [G, K] int64, a content hash or any id: among equal values the larger comes first (without
  it, and among equal keys, the lower column does);
- ``group_keys_G`` [G] int64, from :func:`group_keys`: the source of random draws.
The remaining keywords are the objective's hyperparameters.

Errors: ``ConfigError`` for an unknown objective, an option it does not use or a hyperparameter out of range;
``UserError`` for arrays that break a rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_groupdpo.errors import UserError
from megatron_groupdpo.objectives.base import Groups, Objective, make_groups
from megatron_groupdpo.objectives.keys import group_keys
from megatron_groupdpo.objectives.registry import (
    OBJECTIVES,
    get_objective,
    hyperparameter_names,
    hyperparameters_for,
)

__all__ = [
    "OBJECTIVES",
    "Objective",
    "active_groups",
    "coefficients",
    "get_objective",
    "group_keys",
    "group_loss",
    "hyperparameter_names",
    "hyperparameters_for",
    "loss_and_coefficients",
    "nll_responses",
    "separable_terms",
    "used_responses",
]


def group_loss(
    objective: str,
    scores_GK: Tensor,
    labels_GK: Tensor,
    values_GK: Tensor | None = None,
    *,
    tie_keys_GK: Tensor | None = None,
    group_keys_G: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """phi_g(s_g), the preference loss of every group: [G], differentiable in ``scores_GK``.

    Computed in the dtype of the scores, at least fp32. Exactly 0 with a zero gradient for groups that are
    empty for the objective; scores of unused responses and padding cells may be anything, NaN included.
    """
    description = get_objective(objective)
    groups, settings = _prepare(
        description, labels_GK, values_GK, tie_keys_GK, group_keys_G, scores_GK, hyperparameters
    )
    clean_GK, groups, index = _active_part(description, scores_GK, groups, settings)
    # [:, :0] sums to zeros that hang in the graph whatever the scores are, NaN included.
    zeros_G = _at_least_fp32(scores_GK)[:, :0].sum(1)
    return zeros_G.index_add(0, index, description.loss(clean_GK, groups, settings))


def loss_and_coefficients(
    objective: str,
    scores_GK: Tensor,
    labels_GK: Tensor,
    values_GK: Tensor | None = None,
    *,
    tie_keys_GK: Tensor | None = None,
    group_keys_G: Tensor | None = None,
    **hyperparameters: Any,
) -> tuple[Tensor, Tensor]:
    """Losses [G] and coefficients ``c_i = dphi_g/ds_i`` [G, K], both detached, at least fp32.

    One autograd call on the detached scores, the same for every objective; 0 for responses that are unused.
    """
    with torch.enable_grad():
        leaf_GK = _at_least_fp32(scores_GK.detach()).clone().requires_grad_()
        loss_G = group_loss(
            objective,
            leaf_GK,
            labels_GK,
            values_GK,
            tie_keys_GK=tie_keys_GK,
            group_keys_G=group_keys_G,
            **hyperparameters,
        )
        (coefficients_GK,) = torch.autograd.grad(loss_G.sum(), leaf_GK)
    return loss_G.detach(), coefficients_GK


def coefficients(
    objective: str,
    scores_GK: Tensor,
    labels_GK: Tensor,
    values_GK: Tensor | None = None,
    *,
    tie_keys_GK: Tensor | None = None,
    group_keys_G: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """``c_i = dphi_g/ds_i`` [G, K], without the 1/B of the batch; see :func:`loss_and_coefficients`."""
    return loss_and_coefficients(
        objective,
        scores_GK,
        labels_GK,
        values_GK,
        tie_keys_GK=tie_keys_GK,
        group_keys_G=group_keys_G,
        **hyperparameters,
    )[1]


def separable_terms(
    objective: str,
    scores_GK: Tensor,
    labels_GK: Tensor,
    values_GK: Tensor | None = None,
    *,
    tie_keys_GK: Tensor | None = None,
    group_keys_G: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """Each response's own share of a separable loss: [G, K], summing over K to :func:`group_loss`.

    Entry i depends on s_i alone, so it may be taken while the scores of other responses are not yet known.

    Raises:
        UserError: the objective is not separable.
    """
    description = get_objective(objective)
    if description.terms is None:
        separable = ", ".join(o.name for o in OBJECTIVES.values() if o.separable)
        raise UserError(f"objective {objective!r} couples the responses of a group; separable are: {separable}.")
    groups, settings = _prepare(
        description, labels_GK, values_GK, tie_keys_GK, group_keys_G, scores_GK, hyperparameters
    )
    clean_GK, groups, index = _active_part(description, scores_GK, groups, settings)
    zeros_GK = torch.zeros_like(_at_least_fp32(scores_GK))
    return zeros_GK.index_add(0, index, description.terms(clean_GK, groups, settings))


def active_groups(
    objective: str,
    labels_GK: Tensor,
    values_GK: Tensor | None = None,
    *,
    tie_keys_GK: Tensor | None = None,
    group_keys_G: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """Groups that enter the preference term (B of the batch counts them): [G] bool.

    The others are empty for the objective: a side is missing (set objectives), fewer than two distinct values
    (objectives on values), no positive (``sft``).
    """
    description = get_objective(objective)
    groups, settings = _prepare(description, labels_GK, values_GK, tie_keys_GK, group_keys_G, None, hyperparameters)
    return description.active(groups.restrict(description.used(groups, settings)))


def used_responses(
    objective: str,
    labels_GK: Tensor,
    values_GK: Tensor | None = None,
    *,
    tie_keys_GK: Tensor | None = None,
    group_keys_G: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """Responses that need a pass: [G, K] bool, none in a group that is empty for the objective.

    A caller that keeps the NLL of empty groups adds :func:`nll_responses` of those groups.
    """
    description = get_objective(objective)
    groups, settings = _prepare(description, labels_GK, values_GK, tie_keys_GK, group_keys_G, None, hyperparameters)
    used_GK = description.used(groups, settings)
    return used_GK & description.active(groups.restrict(used_GK))[:, None]


def nll_responses(
    objective: str,
    labels_GK: Tensor,
    values_GK: Tensor | None = None,
    *,
    tie_keys_GK: Tensor | None = None,
    group_keys_G: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """Responses that carry the NLL term: [G, K] bool.

    They are the positives the objective reads (``dpo``: the chosen one), also in groups that are empty for
    it; in active groups they are among :func:`used_responses`.
    """
    description = get_objective(objective)
    groups, settings = _prepare(description, labels_GK, values_GK, tie_keys_GK, group_keys_G, None, hyperparameters)
    return description.used(groups, settings) & groups.positives_GK


def _prepare(
    description: Objective,
    labels_GK: Tensor,
    values_GK: Tensor | None,
    tie_keys_GK: Tensor | None,
    group_keys_G: Tensor | None,
    scores_GK: Tensor | None,
    hyperparameters: dict[str, Any],
) -> tuple[Groups, Any]:
    """Checked groups, on the device of the scores if there are any, and the objective's settings."""
    settings = hyperparameters_for(description.name, hyperparameters)
    for argument, tensor in (("labels_GK", labels_GK), ("values_GK", values_GK), ("scores_GK", scores_GK)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise UserError(f"{argument} must be a torch.Tensor, not {type(tensor).__name__}; use torch.as_tensor.")
    if scores_GK is not None:
        if scores_GK.shape != labels_GK.shape:
            raise UserError(
                f"scores_GK must have the shape of labels_GK, {tuple(labels_GK.shape)}; "
                f"it has {tuple(scores_GK.shape)}."
            )
        if not scores_GK.is_floating_point():
            raise UserError(f"scores_GK must be floating point; it is {scores_GK.dtype}.")
    if description.needs_values and values_GK is None:
        raise UserError(f"objective {description.name!r} reads values; pass values_GK.")
    groups = make_groups(
        labels_GK,
        values_GK,
        tie_keys_GK=tie_keys_GK,
        group_keys_G=group_keys_G,
        device=None if scores_GK is None else scores_GK.device,
    )
    return groups, settings


def _active_part(
    description: Objective, scores_GK: Tensor, groups: Groups, settings: Any
) -> tuple[Tensor, Groups, Tensor]:
    """Scores (0 where unused) and groups of the active groups alone, and their indices [A] int64.

    Empty groups are left out rather than masked: no inf or NaN of theirs can reach a gradient.
    """
    seen = groups.restrict(description.used(groups, settings))
    index = description.active(seen).nonzero().squeeze(1)
    seen = seen.select(index)
    clean_GK = _at_least_fp32(scores_GK)[index].masked_fill(~seen.members_GK, 0.0)
    return clean_GK, seen, index


def _at_least_fp32(scores_GK: Tensor) -> Tensor:
    return scores_GK if scores_GK.dtype in (torch.float32, torch.float64) else scores_GK.float()
