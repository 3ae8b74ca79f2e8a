"""What every objective is made of: the groups it reads, its description, and masked reductions.

G groups, K responses (padded), scores ``s_i = beta * (log pi - log pi_ref)``; values are what the data say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_groupdpo.errors import ConfigError, UserError
from megatron_groupdpo.lazy_torch import torch
from megatron_groupdpo.types import NEGATIVE, PADDING, POSITIVE

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """What is known of the groups before any score: the second argument of every objective."""

    labels_GK: Tensor
    """[G, K] int8: +1, -1, 0 padding."""
    values_GK: Tensor
    """[G, K] float64, higher is better; NaN where the data give none."""
    tie_keys_GK: Tensor
    """[G, K] int64: among tied responses the larger key comes first, then the lower column."""
    group_keys_G: Tensor | None
    """[G] int64: source of a group's random draw; None where nothing is drawn."""

    @property
    def members_GK(self) -> Tensor:
        """[G, K] bool: cells that hold a response."""
        return self.labels_GK != PADDING

    @property
    def positives_GK(self) -> Tensor:
        """[G, K] bool."""
        return self.labels_GK == POSITIVE

    @property
    def negatives_GK(self) -> Tensor:
        """[G, K] bool."""
        return self.labels_GK == NEGATIVE

    def restrict(self, kept_GK: Tensor) -> Groups:
        """The same groups with every response outside ``kept_GK`` turned into padding."""
        return replace(self, labels_GK=torch.where(kept_GK, self.labels_GK, PADDING))

    def select(self, index_G: Tensor) -> Groups:
        """The groups at ``index_G``, in that order."""
        return Groups(
            labels_GK=self.labels_GK[index_G],
            values_GK=self.values_GK[index_G],
            tie_keys_GK=self.tie_keys_GK[index_G],
            group_keys_G=None if self.group_keys_G is None else self.group_keys_G[index_G],
        )


def make_groups(
    labels_GK: Tensor,
    values_GK: Tensor | None = None,
    *,
    tie_keys_GK: Tensor | None = None,
    group_keys_G: Tensor | None = None,
    device: torch.device | None = None,
) -> Groups:
    """Check the arrays a caller gives and bring them to one device and the dtypes of :class:`Groups`.

    Raises:
        UserError: a shape differs from that of ``labels_GK``, a label is not +1, -1 or 0, a value infinite.
    """
    if labels_GK.dim() != 2 or labels_GK.shape[1] == 0:
        raise UserError(
            f"labels_GK must be [groups, responses], at least one response; its shape is {tuple(labels_GK.shape)}."
        )
    if labels_GK.dtype == torch.bool:  # False would be padding
        raise UserError("labels_GK must hold +1, -1 or 0, not booleans; use torch.where(positive_GK, 1, -1).")
    device = device or labels_GK.device
    for name, tensor, shape in (
        ("values_GK", values_GK, labels_GK.shape),
        ("tie_keys_GK", tie_keys_GK, labels_GK.shape),
        ("group_keys_G", group_keys_G, labels_GK.shape[:1]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise UserError(f"{name} must have shape {tuple(shape)} like labels_GK; it has {tuple(tensor.shape)}.")
    labels_GK = labels_GK.to(device)
    if not bool(((labels_GK == POSITIVE) | (labels_GK == NEGATIVE) | (labels_GK == PADDING)).all()):
        raise UserError("labels_GK must hold +1 (positive), -1 (negative) or 0 (padding) only.")
    if values_GK is None:
        values_GK = torch.full(labels_GK.shape, math.nan, dtype=torch.float64, device=device)
    values_GK = values_GK.to(device=device, dtype=torch.float64)
    if bool((torch.isinf(values_GK) & (labels_GK != PADDING)).any()):
        raise UserError("values_GK must be finite, or NaN where the data give none; an infinite value was given.")
    if tie_keys_GK is None:
        tie_keys_GK = torch.zeros(labels_GK.shape, dtype=torch.int64, device=device)
    return Groups(
        labels_GK=labels_GK.to(torch.int8),
        values_GK=values_GK,
        tie_keys_GK=tie_keys_GK.to(device=device, dtype=torch.int64),
        group_keys_G=None if group_keys_G is None else group_keys_G.to(device=device, dtype=torch.int64),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoHyperparameters:
    """An objective without hyperparameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairwiseHyperparameters:
    """Hyperparameters of a loss made of ``-log sigma(z)``, z a margin for the given order."""

    label_smoothing: float = 0.0
    """Probability e in [0, 0.5) that a preference is flipped: ``-(1-e) log sigma(z) - e log sigma(-z)``
    (conservative DPO; E. Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing must be in [0, 0.5), a flip probability; it is {self.label_smoothing}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One entry of the registry.

    The functions are given a :class:`Groups` and, for the losses, ``scores_GK`` (fp32 or fp64; 0 in padding
    cells). ``used`` sees every group; the others see only the responses that are used, and the losses only
    active groups, so no reduction in them is over an empty set.
    """

    name: str
    hyperparameters: type
    """Frozen dataclass; the objective's only options and their defaults."""
    used: Callable[[Groups, Any], Tensor]
    """[G, K] bool: the responses this objective reads; the positives among them carry the NLL term."""
    active: Callable[[Groups], Tensor]
    """[G] bool: groups that are not empty for this objective."""
    loss: Callable[[Tensor, Groups, Any], Tensor]
    """phi: [G]."""
    terms: Callable[[Tensor, Groups, Any], Tensor] | None = None
    """For a separable objective, [G, K] with entry i a function of s_i alone and phi the sum over K."""
    check: Callable[[Groups, Any], None] | None = None
    """Raises UserError for active groups that break a rule of the objective's own."""
    needs_reference: bool = True
    """False: the score is ``beta * log pi``, no reference model is read."""
    needs_values: bool = False
    """True: responses without a value are left out, as if they were padding."""
    needs_score_average: bool = False
    """True: defined for a score averaged over the response's tokens only."""
    equation: str
    source: str

    @property
    def separable(self) -> bool:
        """True: c_i depends on s_i alone, so no scoring pass is needed."""
        return self.terms is not None


# What makes a response used, and a group active


def all_members(groups: Groups, hyperparameters: object) -> Tensor:
    """Every response: [G, K] bool."""
    return groups.members_GK


def valued_members(groups: Groups, hyperparameters: object) -> Tensor:
    """Every response that has a value: [G, K] bool."""
    return groups.members_GK & ~groups.values_GK.isnan()


def has_both_sides(groups: Groups) -> Tensor:
    """At least one positive and one negative: [G] bool."""
    return groups.positives_GK.any(1) & groups.negatives_GK.any(1)


def has_distinct_values(groups: Groups) -> Tensor:
    """At least two different values: [G] bool. Every member must have a value."""
    members_GK, values_GK = groups.members_GK, groups.values_GK
    highest_G = values_GK.masked_fill(~members_GK, -math.inf).amax(1)
    lowest_G = values_GK.masked_fill(~members_GK, math.inf).amin(1)
    return highest_G > lowest_G


# Reductions over the responses of a group. Every group must have a response under the mask.


def logsigmoid(x: Tensor) -> Tensor:
    """``log sigma(x)``, without overflow on either side."""
    return torch.nn.functional.logsigmoid(x)


def masked_logsumexp(scores_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """LSE over the masked-in responses: [G]."""
    return scores_GK.masked_fill(~mask_GK, -math.inf).logsumexp(1)


def above_best_negative(scores_GK: Tensor, groups: Groups) -> Tensor:
    """[G, K]: scores less the group's highest negative one, for losses that a common shift leaves as they are.

    Sums then round at the size of the differences, not at that of the scores.
    """
    highest_G = scores_GK.detach().masked_fill(~groups.negatives_GK, -math.inf).amax(1)
    return scores_GK - highest_G[:, None]


def masked_mean(x_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """Mean over the masked-in responses: [G]."""
    return x_GK.masked_fill(~mask_GK, 0.0).sum(1) / mask_GK.sum(1)


def mean_over_pairs(loss_GKK: Tensor, groups: Groups) -> Tensor:
    """Mean of ``loss_GKK[g, p, n]`` over positives p and negatives n: [G]."""
    pairs_GKK = groups.positives_GK[:, :, None] & groups.negatives_GK[:, None, :]
    return loss_GKK.masked_fill(~pairs_GKK, 0.0).sum((1, 2)) / pairs_GKK.sum((1, 2))


def differences(scores_GK: Tensor) -> Tensor:
    """[G, K, K]: entry (i, j) is ``s_i - s_j``."""
    return scores_GK[:, :, None] - scores_GK[:, None, :]


def preference_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    """``-(1-e) log sigma(z) - e log sigma(-z)``, elementwise; see :class:`PairwiseHyperparameters`."""
    if label_smoothing == 0.0:
        return -logsigmoid(margin)
    return -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def ranks(mask_GK: Tensor, *keys_GK: Tensor) -> Tensor:
    """1-based rank among the masked-in responses, the largest key first: [G, K] int64.

    Later keys break ties of earlier ones; what still ties goes by column, so ranks never tie. Cells outside
    the mask get some rank that no other cell depends on.
    """
    column_K = torch.arange(mask_GK.shape[1], device=mask_GK.device)
    ahead_GKK = (column_K[:, None] < column_K[None, :]).expand(mask_GK.shape[0], -1, -1)
    for key_GK in reversed(keys_GK):
        first_GKK, second_GKK = key_GK[:, :, None], key_GK[:, None, :]
        ahead_GKK = (first_GKK > second_GKK) | ((first_GKK == second_GKK) & ahead_GKK)
    return 1 + (ahead_GKK & mask_GK[:, :, None]).sum(1)
