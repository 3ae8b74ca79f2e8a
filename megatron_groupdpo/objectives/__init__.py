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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_groupdpo.errors import UserError
from megatron_groupdpo.lazy_torch import torch
from megatron_groupdpo.objectives.base import Groups, Objective, make_groups
from megatron_groupdpo.objectives.keys import group_keys
from megatron_groupdpo.objectives.registry import (
    OBJECTIVES,
    get_objective,
    hyperparameter_names,
    hyperparameters_for,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "OBJECTIVES",
    "Objective",
    "PreparedGroups",
    "active_groups",
    "coefficients",
    "get_objective",
    "group_keys",
    "group_loss",
    "hyperparameter_names",
    "hyperparameters_for",
    "loss_and_coefficients",
    "nll_responses",
    "prepare",
    "separable_terms",
    "used_responses",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedGroups:
    """Everything an objective reads of a batch but its scores: it follows from the data, before any score is known.

    Made on the host and moved, :meth:`loss` asks the device for nothing that the host would have to wait for.
    """

    description: Objective
    settings: Any
    groups: Groups
    """The active groups alone, A of them, with only the responses that are used."""
    index_A: Tensor
    """[A] int64: their places among the G."""
    active_G: Tensor
    """[G] bool."""
    nll_GK: Tensor
    """[G, K] bool: see :func:`nll_responses`."""

    def to(self, move: Callable[[Tensor], Tensor]) -> PreparedGroups:
        """The same with every tensor moved by ``move``."""
        groups = self.groups
        return replace(
            self,
            groups=Groups(
                labels_GK=move(groups.labels_GK),
                values_GK=move(groups.values_GK),
                tie_keys_GK=move(groups.tie_keys_GK),
                group_keys_G=None if groups.group_keys_G is None else move(groups.group_keys_G),
            ),
            index_A=move(self.index_A),
            active_G=move(self.active_G),
            nll_GK=move(self.nll_GK),
        )

    def loss(self, scores_GK: Tensor) -> Tensor:
        """:func:`group_loss` of these scores: [G]."""
        # [:, :0] sums to zeros that hang in the graph whatever the scores are, NaN included.
        zeros_G = _at_least_fp32(scores_GK)[:, :0].sum(1)
        clean_AK = self.active_scores(scores_GK)
        return zeros_G.index_add(0, self.index_A, self.description.loss(clean_AK, self.groups, self.settings))

    def loss_and_coefficients(self, scores_GK: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`loss_and_coefficients` of these scores: [G] and [G, K]."""
        with torch.enable_grad():
            leaf_GK = _at_least_fp32(scores_GK.detach()).clone().requires_grad_()
            loss_G = self.loss(leaf_GK)
            (coefficients_GK,) = torch.autograd.grad(loss_G.sum(), leaf_GK)
        return loss_G.detach(), coefficients_GK

    def active_scores(self, scores_GK: Tensor) -> Tensor:
        """[A, K]: the active groups' scores, 0 where unused.

        Empty groups are left out rather than masked: no inf or NaN of theirs can reach a gradient.
        """
        return _at_least_fp32(scores_GK)[self.index_A].masked_fill(~self.groups.members_GK, 0.0)


def prepare(
    objective: str,
    labels_GK: Tensor,
    values_GK: Tensor | None = None,
    *,
    tie_keys_GK: Tensor | None = None,
    group_keys_G: Tensor | None = None,
    scores_GK: Tensor | None = None,
    **hyperparameters: Any,
) -> PreparedGroups:
    """What the objective reads of these groups, on the device of ``labels_GK``.

    ``scores_GK``, if given, are only checked.
    """
    description = get_objective(objective)
    groups, settings = _prepare(
        description, labels_GK, values_GK, tie_keys_GK, group_keys_G, scores_GK, hyperparameters
    )
    used_GK = description.used(groups, settings)
    seen = groups.restrict(used_GK)
    active_G = description.active(seen)
    index_A = active_G.nonzero().squeeze(1)
    seen = seen.select(index_A)
    if description.check is not None:
        description.check(seen, settings)
    return PreparedGroups(
        description=description,
        settings=settings,
        groups=seen,
        index_A=index_A,
        active_G=active_G,
        nll_GK=used_GK & groups.positives_GK,
    )


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
    prepared = _prepared(objective, scores_GK, labels_GK, values_GK, tie_keys_GK, group_keys_G, hyperparameters)
    return prepared.loss(scores_GK)


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
    prepared = _prepared(objective, scores_GK, labels_GK, values_GK, tie_keys_GK, group_keys_G, hyperparameters)
    return prepared.loss_and_coefficients(scores_GK)


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
    prepared = _prepared(objective, scores_GK, labels_GK, values_GK, tie_keys_GK, group_keys_G, hyperparameters)
    terms_AK = description.terms(prepared.active_scores(scores_GK), prepared.groups, prepared.settings)
    zeros_GK = torch.zeros_like(_at_least_fp32(scores_GK))
    return zeros_GK.index_add(0, prepared.index_A, terms_AK)


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
    """Checked groups, on the device of the labels, and the objective's settings."""
    settings = hyperparameters_for(description.name, hyperparameters)
    for argument, tensor in (("labels_GK", labels_GK), ("values_GK", values_GK), ("scores_GK", scores_GK)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
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
    )
    return groups, settings


def _prepared(
    objective: str,
    scores_GK: Tensor,
    labels_GK: Tensor,
    values_GK: Tensor | None,
    tie_keys_GK: Tensor | None,
    group_keys_G: Tensor | None,
    hyperparameters: dict[str, Any],
) -> PreparedGroups:
    """As :func:`prepare`, on the device of the scores."""
    prepared = prepare(
        objective,
        labels_GK,
        values_GK,
        tie_keys_GK=tie_keys_GK,
        group_keys_G=group_keys_G,
        scores_GK=scores_GK,
        **hyperparameters,
    )
    return prepared.to(lambda tensor: tensor.to(scores_GK.device))


def _at_least_fp32(scores_GK: Tensor) -> Tensor:
    return scores_GK if scores_GK.dtype in (torch.float32, torch.float64) else scores_GK.float()
