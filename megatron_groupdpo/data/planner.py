"""Placement: responses of the global batch to data-parallel ranks and microbatches.

The coupling of a group is one float per response, so a response goes wherever it fits: a group may span
microbatches and data-parallel ranks. Every rank computes the whole plan from the batch and builds its own part, so
the stages and ranks agree on counts and shapes without talking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_groupdpo.types import GroupBatch, Microbatch, ResponseRow


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the layout asks of a plan."""

    micro_batch_size: int
    """Responses per microbatch."""
    data_parallel_size: int
    microbatch_multiple: int = 1
    """Microbatches per rank are a multiple of this (the pipeline size, when interleaved)."""
    length_multiple: int = 1
    """Sequence lengths are padded to a multiple of this (sequence parallelism: the tensor-parallel size)."""
    same_length: bool = False
    """All microbatches of a step have one length (pipeline messages have one shape)."""
    pad_token: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Rows of each microbatch of each rank, and their padded lengths."""

    rows: tuple[tuple[tuple[ResponseRow, ...], ...], ...]
    """[rank][microbatch] -> rows; an empty microbatch only fills the schedule."""
    lengths: tuple[tuple[int, ...], ...]
    """[rank][microbatch] -> padded sequence length."""

    @property
    def num_microbatches(self) -> int:
        """Per data-parallel rank; equal on all."""
        return len(self.rows[0])


def plan_batch(batch: GroupBatch, options: PlanOptions) -> Plan:
    """Place every response once: neighbours in length share a microbatch, ranks take turns from the longest down."""
    # Ties keep the batch's order, so that the plan is the same on every machine.
    ordered = sorted(batch.rows, key=lambda row: (-len(row.tokens_S), row.index))
    size, ranks = options.micro_batch_size, options.data_parallel_size
    filled = [tuple(ordered[start : start + size]) for start in range(0, len(ordered), size)]
    per_rank: list[list[tuple[ResponseRow, ...]]] = [[] for _ in range(ranks)]
    for index, rows in enumerate(filled):
        turn, place = divmod(index, ranks)
        # Back and forth, so that no rank always takes the longer of two neighbours.
        per_rank[place if turn % 2 == 0 else ranks - 1 - place].append(rows)
    count = max(1, -(-len(filled) // ranks))
    count = -(-count // options.microbatch_multiple) * options.microbatch_multiple
    for own in per_rank:
        own.extend([()] * (count - len(own)))
    longest = len(ordered[0].tokens_S) if ordered else 1
    lengths = tuple(
        tuple(
            _padded(longest if options.same_length or not rows else len(rows[0].tokens_S), options.length_multiple)
            for rows in own
        )
        for own in per_rank
    )
    return Plan(rows=tuple(tuple(own) for own in per_rank), lengths=lengths)


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def build_microbatches(plan: Plan, options: PlanOptions, *, rank: int) -> list[Microbatch]:
    """The tensors of one data-parallel rank's microbatches, each [rows, length], rows <= micro_batch_size."""
    fullest = max(1, *(len(rows) for own in plan.rows for rows in own))
    return [
        _padded_microbatch(
            rows,
            # A short microbatch still has all its rows where pipeline messages have one shape per step.
            num_rows=fullest if options.same_length else max(1, len(rows)),
            length=length,
            pad_token=options.pad_token,
        )
        for rows, length in zip(plan.rows[rank], plan.lengths[rank])
    ]


def _padded_microbatch(rows: Sequence[ResponseRow], *, num_rows: int, length: int, pad_token: int) -> Microbatch:
    tokens_BS = torch.full((num_rows, length), pad_token, dtype=torch.int64)
    hidden_positions, targets, owners = [], [], []
    for b, row in enumerate(rows):
        tokens_S = torch.from_numpy(row.tokens_S.astype("int64"))
        positions_T = torch.from_numpy(row.target_positions_T)
        tokens_BS[b, : len(tokens_S)] = tokens_S
        # Megatron's hidden states are [S, B, H]; the state at t - 1 predicts the token at t.
        hidden_positions.append((positions_T - 1) * num_rows + b)
        targets.append(tokens_S[positions_T])
        owners.append(torch.full_like(positions_T, b))
    none = torch.empty(0, dtype=torch.int64)
    return Microbatch(
        tokens_BS=tokens_BS,
        position_ids_BS=torch.arange(length).expand(num_rows, length).contiguous(),
        hidden_positions_T=torch.cat(hidden_positions or [none]),
        targets_T=torch.cat(targets or [none]),
        owners_T=torch.cat(owners or [none]),
        responses_r=torch.tensor([row.index for row in rows], dtype=torch.int64),
    )
