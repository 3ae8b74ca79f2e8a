"""From a plan to tensors: padded or packed, and cut over context-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from megatron_groupdpo.data.batches.planner import Plan, PlanOptions, Rows
from megatron_groupdpo.tensors import packed_positions_of_rank, positions_of_rank
from megatron_groupdpo.types import Microbatch

_NONE = np.empty(0, dtype=np.int64)


def build_microbatches(plan: Plan, options: PlanOptions, *, rank: int, context_rank: int = 0) -> list[Microbatch]:
    """The tensors of one rank's microbatches.

    Args:
        plan: of the whole batch.
        options: the plan's.
        rank: data-parallel rank.
        context_rank: context-parallel rank.
    """
    build = _packed if options.packed else _padded
    fullest = max(1, *(len(rows) for own in plan.rows for rows in own))
    microbatches = []
    for rows, length in zip(plan.rows[rank], plan.lengths[rank]):
        # A short padded microbatch still has all its rows where pipeline messages have one shape per step.
        num_rows = fullest if options.same_length else max(1, len(rows))
        if options.same_rows:  # CUDA graphs are of one shape for the whole run
            assert options.micro_batch_size is not None
            num_rows = max(options.micro_batch_size, num_rows)
        microbatch = build(rows, length, num_rows, options)
        if options.context_parallel_size > 1:
            microbatch = context_shard(microbatch, context_rank, options.context_parallel_size)
        microbatches.append(microbatch)
    return microbatches


def _padded(rows: Rows, length: int, num_rows: int, options: PlanOptions) -> Microbatch:
    """[num_rows, length], a response a row."""
    # Megatron's hidden states are [S, B, H]: row b has its state of position t at t * B + b.
    return _filled(rows, (num_rows, length), [(b, 0) for b in range(len(rows))], options.pad_token)


def _packed(rows: Rows, length: int, num_rows: int, options: PlanOptions) -> Microbatch:
    """[1, length], responses one after the other; what is left is one more sequence, of padding."""
    ends = list(accumulate(options.row_length(row) for row in rows))
    starts = [0, *ends]
    bounds = starts if starts[-1] == length else [*starts, length]
    return _filled(
        rows,
        (1, length),
        [(0, start) for start in starts[: len(rows)]],
        options.pad_token,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
    )


def _filled(
    rows: Rows,
    shape: tuple[int, int],
    places: Sequence[tuple[int, int]],
    pad_token: int,
    cu_seqlens: torch.Tensor | None = None,
) -> Microbatch:
    """Each response from its place (row, column) on."""
    # numpy: hundreds of small copies, each several times quicker than a tensor operation.
    tokens_BS = np.full(shape, pad_token, dtype=np.int64)
    # Padding has position 0, which every table of positions has.
    position_ids_BS = np.zeros(shape, dtype=np.int64)
    hidden_positions, targets = [_NONE], [_NONE]
    for row, (b, start) in zip(rows, places):
        length, positions_T = len(row.tokens_S), row.target_positions_T
        tokens_BS[b, start : start + length] = row.tokens_S
        position_ids_BS[b, start : start + length] = np.arange(length)
        # The state at t - 1 predicts the token at t.
        hidden_positions.append((start + positions_T - 1) * shape[0] + b)
        targets.append(row.tokens_S[positions_T])
    counts = [len(row.target_positions_T) for row in rows]
    return Microbatch(
        tokens_BS=torch.from_numpy(tokens_BS),
        position_ids_BS=torch.from_numpy(position_ids_BS),
        hidden_positions_T=torch.from_numpy(np.concatenate(hidden_positions)),
        targets_T=torch.from_numpy(np.concatenate(targets, dtype=np.int64)),
        owners_T=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
        responses_r=torch.tensor([row.index for row in rows], dtype=torch.int64),
        cu_seqlens=cu_seqlens,
    )


def context_shard(microbatch: Microbatch, rank: int, size: int) -> Microbatch:
    """The part of a context-parallel rank: its columns, and the response tokens whose hidden states they are.

    ``responses_r`` stays whole: a rank without a token of a response contributes 0 to it.
    """
    num_rows, length = microbatch.tokens_BS.shape
    if microbatch.cu_seqlens is None:
        columns_S = positions_of_rank(length, rank, size)
    else:
        columns_S = packed_positions_of_rank(microbatch.cu_seqlens.tolist(), rank, size)
    local_of_column = torch.full((length,), -1, dtype=torch.int64)
    local_of_column[columns_S] = torch.arange(len(columns_S))
    column_T, row_T = microbatch.hidden_positions_T // num_rows, microbatch.hidden_positions_T % num_rows
    local_T = local_of_column[column_T]
    here_T = local_T >= 0
    return Microbatch(
        tokens_BS=microbatch.tokens_BS[:, columns_S].contiguous(),
        position_ids_BS=microbatch.position_ids_BS[:, columns_S].contiguous(),
        hidden_positions_T=(local_T * num_rows + row_T)[here_T],
        targets_T=microbatch.targets_T[here_T],
        owners_T=microbatch.owners_T[here_T],
        responses_r=microbatch.responses_r,
        cu_seqlens=microbatch.cu_seqlens,
    )
