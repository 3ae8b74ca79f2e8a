"""Is the gradient of the two passes that of the loss? Compared on a few groups of the live batch (--verify-gradients).

One side is the step's own path: planner, two passes, Megatron's reduction. The other is the coupled loss, one graph a
group, its gradient summed without Megatron (:class:`megatron_groupdpo.mcore.passes.gradient.PlainEngine`). They share
the model's forward and its operators' backward, and what the data and the options say the loss is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_groupdpo import objectives
from megatron_groupdpo.data.batches.planner import PlanOptions, microbatch_capacity, whole_group_tokens
from megatron_groupdpo.engine import GradientPiece
from megatron_groupdpo.step.coefficients import LossOptions, objective_arguments
from megatron_groupdpo.types import GroupBatch

FP32_TOLERANCE = 1e-5
BF16_TOLERANCE = 1e-1
"""Of ||difference|| / ||gradient||; docs/proofs.md has what was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientGap:
    """Norms over the whole model, equal on all ranks."""

    decoupled_norm: float
    coupled_norm: float
    difference_norm: float
    worst: str
    """The parameter with the largest part of the difference."""

    @property
    def relative(self) -> float:
        """||difference|| / ||coupled||; 0 where both gradients are 0."""
        if self.coupled_norm:
            return self.difference_norm / self.coupled_norm
        return math.inf if self.difference_norm else 0.0


def choose_groups(batch: GroupBatch, plan: PlanOptions, options: LossOptions) -> list[int]:
    """Groups to verify on, in the batch's order; none where no group is active. The same on every rank.

    Of the groups with an active preference term, those whose whole-group microbatch has the fewest tokens: one, and up
    to max(2, data-parallel size) while each has at most max(2 x the smallest, a live microbatch's capacity) tokens.
    """
    given = objective_arguments(batch, options, torch.device("cpu"))
    active_G = objectives.active_groups(options.objective, **given)
    tokens_G = whole_group_tokens(batch, plan)
    smallest = sorted((tokens_G[g], g) for g in active_G.nonzero().flatten().tolist() if tokens_G[g])
    if not smallest:
        return []
    limit = max(2 * smallest[0][0], microbatch_capacity(batch, plan))
    wanted = smallest[: max(2, plan.data_parallel_size)]
    return sorted(g for tokens, g in wanted if tokens <= limit)


def compare_gradients(
    decoupled: Callable[[], object],
    coupled: Callable[[], object],
    pieces: Callable[[], Iterable[GradientPiece]],
    *,
    device: torch.device,
) -> GradientGap:
    """Run both backwards, one after the other into the same buffers; a collective call.

    Args:
        decoupled: leaves the two passes' gradient in the buffers.
        coupled: leaves the one graph's there.
        pieces: this rank's part of what is in the buffers, in a fixed order.
        device: of the ranks' collectives.
    """
    decoupled()
    # On the host: the verification must not need device memory that the step does not.
    kept = [piece.values.detach().to("cpu", copy=True) for piece in pieces()]
    coupled()
    return _gap(kept, list(pieces()), device)


def _gap(kept: Sequence[Tensor], found: Sequence[GradientPiece], device: torch.device) -> GradientGap:
    squares: dict[str, float] = {}
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for ours_E, piece in zip(kept, found, strict=True):
        ours_E = ours_E.to(piece.values.device, copy=True)
        norms = [_norm(ours_E), _norm(piece.values), _norm(ours_E.sub_(piece.values))]
        parts = torch.stack(norms).square()
        sums += piece.weight * parts
        squares[piece.name] = squares.get(piece.name, 0.0) + piece.weight * float(parts[2])
    dist.all_reduce(sums)
    decoupled, coupled, difference = sums.sqrt().tolist()
    everyones: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyones, squares)
    totals: dict[str, float] = {}
    for own in everyones:
        for name, value in own.items():
            totals[name] = totals.get(name, 0.0) + value
    # NaN compares with nothing: it is the worst there is.
    worst = max(totals, key=lambda name: math.inf if math.isnan(totals[name]) else totals[name])
    return GradientGap(decoupled_norm=decoupled, coupled_norm=coupled, difference_norm=difference, worst=worst)


def _norm(values_E: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values_E, dtype=torch.float64)
