"""Placement: responses of the global batch to data-parallel ranks and microbatches.

The coupling of a group is one float per response, so a response goes wherever it fits: a group may span
microbatches and data-parallel ranks. Every rank computes the whole plan from the batch and builds its own part, so
the stages and ranks agree on counts and shapes without talking.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
from megatron_groupdpo.config.fp8 import length_multiple, row_multiple
from megatron_groupdpo.types import GroupBatch, ResponseRow


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the layout asks of a plan. Exactly one of the two sizes is given."""

    micro_batch_size: int | None = None
    """Responses per microbatch, padded to one length."""
    max_tokens_per_microbatch: int | None = None
    """Tokens per microbatch, responses packed into one row."""
    data_parallel_size: int
    context_parallel_size: int = 1
    microbatch_multiple: int = 1
    """Microbatches per rank are a multiple of this (the pipeline size, when interleaved)."""
    length_multiple: int = 1
    """Lengths of microbatches are a multiple of this."""
    length_step: int = 1
    """Padded: lengths are rounded up to a multiple of this before, so that they repeat (CUDA graphs)."""
    longest_length: int | None = None
    """But not beyond this, which no response is."""
    same_rows: bool = False
    """Padded: all microbatches of the run have ``micro_batch_size`` rows, for the same reason."""
    same_length: bool = False
    """All microbatches of a step have one shape (messages between ranks have)."""
    pad_token: int = 0
    attention_cost: float = 0.0
    """Cost of a response of length L is L + this x L^2; see :func:`megatron_groupdpo.run.logs.flops.attention_cost`."""

    def __post_init__(self) -> None:
        assert (self.micro_batch_size is None) != (self.max_tokens_per_microbatch is None)
        assert self.length_multiple % self.row_multiple == 0
        assert not self.packed or (self.length_step == 1 and not self.same_rows)

    @property
    def packed(self) -> bool:
        """Responses lie one after the other in one row."""
        return self.max_tokens_per_microbatch is not None

    @property
    def row_multiple(self) -> int:
        """A response's own length is padded to a multiple of this, so that context parallelism can cut it."""
        return row_multiple(self.context_parallel_size)

    def row_length(self, row: ResponseRow) -> int:
        """Padded length of a response in a packed row."""
        return _padded(len(row.tokens_S), self.row_multiple)

    def stepped(self, length: int) -> int:
        """``length`` rounded up to the step."""
        stepped = _padded(max(1, length), self.length_step)
        return stepped if self.longest_length is None else max(length, min(stepped, self.longest_length))


def plan_options(
    parallel: ParallelConfig,
    *,
    data_parallel_size: int,
    precision: PrecisionConfig | None = None,
    micro_batch_size: int | None = None,
    max_tokens_per_microbatch: int | None = None,
    seq_length: int | None = None,
    attention_cost: float = 0.0,
    pad_token: int = 0,
) -> PlanOptions:
    """Options of a layout. ``precision`` matters where it is FP8, whose tiles lengths must fill, and with CUDA graphs,
    whose shapes must repeat: they are at most ``seq_length`` long."""
    pp = parallel.pipeline_model_parallel_size
    graphs = precision is not None and precision.cuda_graphs
    return PlanOptions(
        micro_batch_size=micro_batch_size,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        data_parallel_size=data_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        microbatch_multiple=pp if parallel.virtual_pipeline_model_parallel_size is not None else 1,
        length_multiple=length_multiple(parallel, precision),
        length_step=precision.cuda_graph_length_multiple if precision is not None and graphs else 1,
        longest_length=seq_length if graphs else None,
        same_rows=graphs,
        # The all-gather of tokens takes as many from each rank.
        same_length=pp > 1
        or (parallel.expert_model_parallel_size > 1 and parallel.moe_token_dispatcher_type == "allgather"),
        pad_token=pad_token,
        attention_cost=attention_cost,
    )


Rows = tuple[ResponseRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Rows of each microbatch of each rank, and the microbatches' lengths."""

    rows: tuple[tuple[Rows, ...], ...]
    """[rank][microbatch] -> rows; an empty microbatch only fills the schedule."""
    lengths: tuple[tuple[int, ...], ...]
    """[rank][microbatch] -> sequence length, padding included (packed: of all responses together)."""

    @property
    def num_microbatches(self) -> int:
        """Per data-parallel rank; equal on all."""
        return len(self.rows[0])


def plan_batch(batch: GroupBatch, options: PlanOptions) -> Plan:
    """Place every response once.

    Padded: neighbours in length share a microbatch. Packed: as few microbatches as fit the token budget, the responses
    spread over them by cost. Either way the microbatches go to the ranks by cost.
    """
    if options.packed:
        return plan_units([(row,) for row in batch.rows], options)
    size = options.micro_batch_size
    assert size is not None
    # Ties keep the batch's order, so that the plan is the same on every machine.
    ordered = sorted(batch.rows, key=lambda row: (-len(row.tokens_S), row.index))
    filled = [tuple(ordered[start : start + size]) for start in range(0, len(ordered), size)]
    return _deal([_unit(rows, options) for rows in filled], options)


def plan_units(units: Sequence[Rows], options: PlanOptions) -> Plan:
    """Pack units, each of which stays in one microbatch. Here a unit is a response; for pairwise losses, a pair."""
    budget = options.max_tokens_per_microbatch
    assert budget is not None
    budget -= budget % options.length_multiple
    sized = sorted((_unit(rows, options) for rows in units), key=lambda unit: (-unit.length, unit.rows[0].index))
    tight = _best_fit(sized, budget)
    # Every rank runs the same number of microbatches anyway: use them all.
    count = _padded(len(tight), options.data_parallel_size * options.microbatch_multiple)
    return _deal(_spread(sized, count, budget) or tight, options)


class _Unit(NamedTuple):
    """Responses that share a microbatch, or fill one."""

    rows: Rows
    length: int
    """Of the row they share when packed, of the longest when padded."""
    cost: float


def _unit(rows: Rows, options: PlanOptions) -> _Unit:
    multiple, factor = options.row_multiple, options.attention_cost
    lengths = [-(-len(row.tokens_S) // multiple) * multiple for row in rows]
    if options.packed:
        length = sum(lengths)
        return _Unit(rows, length, length + factor * sum(own * own for own in lengths))
    length = max(lengths)
    num_rows, computed = options.micro_batch_size if options.same_rows else len(rows), options.stepped(length)
    assert num_rows is not None
    return _Unit(rows, length, num_rows * computed * (1.0 + factor * computed))


def plan_whole_groups(batch: GroupBatch, options: PlanOptions) -> Plan:
    """One group, whole, in each microbatch, whatever its size: what a loss that is not decoupled needs."""
    options = replace(options, length_step=1)  # groups have as many sizes as the data: no shape would repeat
    rows = {row.index: row for row in batch.rows}
    groups = [tuple(rows[index] for index in own if index >= 0) for own in batch.flat_index_GK.tolist()]
    return _deal([_unit(group, options) for group in groups if group], options)


def whole_group_tokens(batch: GroupBatch, options: PlanOptions) -> list[int]:
    """[G]: tokens, padding included, of each group's microbatch in :func:`plan_whole_groups`, alone in its plan."""
    rows = {row.index: row for row in batch.rows}
    tokens = []
    for own in batch.flat_index_GK.tolist():
        group = tuple(rows[index] for index in own if index >= 0)
        tokens.append(_unit(group, options).length * (1 if options.packed else len(group)) if group else 0)
    return tokens


def microbatch_capacity(batch: GroupBatch, options: PlanOptions) -> int:
    """The most tokens, padding included, that a microbatch of :func:`plan_batch` may hold."""
    if options.max_tokens_per_microbatch is not None:
        return options.max_tokens_per_microbatch
    assert options.micro_batch_size is not None
    return options.micro_batch_size * max((options.row_length(row) for row in batch.rows), default=0)


def _best_fit(ordered: Sequence[_Unit], budget: int) -> list[_Unit]:
    """Few bins: the longest first, each to the fullest bin that has room."""
    bins: list[list[_Unit]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for unit in ordered:
        assert unit.length <= budget, "a response longer than the token budget is refused before"
        place = bisect.bisect_left(room, (unit.length, 0))
        if place == len(room):
            left, index = budget, len(bins)
            bins.append([])
        else:
            left, index = room.pop(place)
        bins[index].append(unit)
        bisect.insort(room, (left - unit.length, index))
    return [_joined(units) for units in bins]


def _spread(ordered: Sequence[_Unit], count: int, budget: int) -> list[_Unit] | None:
    """The longest first, each to the bin with the least work that has room; none where that leaves one without."""
    bins: list[list[_Unit]] = [[] for _ in range(count)]
    room = [budget] * count
    work = [(0.0, i) for i in range(count)]
    for unit in ordered:
        skipped = []
        while work and room[work[0][1]] < unit.length:
            skipped.append(heapq.heappop(work))
        if not work:
            return None
        load, index = work[0]
        heapq.heapreplace(work, (load + unit.cost, index))
        bins[index].append(unit)
        room[index] -= unit.length
        for entry in skipped:
            heapq.heappush(work, entry)
    return [_joined(units) for units in bins if units]


def _joined(units: Sequence[_Unit]) -> _Unit:
    return _Unit(
        tuple(row for unit in units for row in unit.rows),
        sum(unit.length for unit in units),
        sum(unit.cost for unit in units),
    )


def _deal(filled: Sequence[_Unit], options: PlanOptions) -> Plan:
    """Microbatches to ranks: the costliest first, each to the rank with the least work that has a place left."""
    ranks = options.data_parallel_size
    count = _padded(max(1, math.ceil(len(filled) / ranks)), options.microbatch_multiple)
    per_rank: list[list[_Unit]] = [[] for _ in range(ranks)]
    load = [(0.0, rank) for rank in range(ranks)]
    for unit in sorted(filled, key=lambda unit: (-unit.cost, unit.rows[0].index)):
        work, rank = heapq.heappop(load)
        per_rank[rank].append(unit)
        if len(per_rank[rank]) < count:
            heapq.heappush(load, (work + unit.cost, rank))
    longest = max((unit.length for unit in filled), default=0)
    # Nothing to compute: as short as can be, but no shape of its own where shapes shall repeat.
    shortest = min((unit.length for unit in filled), default=1) if options.same_rows else 1
    empty = _Unit((), shortest, 0.0)
    for own in per_rank:
        own.extend([empty] * (count - len(own)))

    def padded_length(unit: _Unit) -> int:
        length = longest if options.same_length else unit.length
        return _padded(max(1, options.stepped(length)), options.length_multiple)

    return Plan(
        rows=tuple(tuple(unit.rows for unit in own) for own in per_rank),
        lengths=tuple(tuple(padded_length(unit) for unit in own) for own in per_rank),
    )


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
