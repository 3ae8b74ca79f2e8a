"""How a sequence is cut over context-parallel ranks.

Megatron-Core and Transformer Engine cut every sequence (each packed one on its own) into 2 x size chunks; rank r holds
chunks r and 2 x size - 1 - r, so that all ranks have the same share of a causal mask's work
(megatron/core/models/common/embeddings/rope_utils.py, ``get_pos_emb_on_this_cp_rank``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def positions_of_rank(length: int, rank: int, size: int, *, device: torch.device | None = None) -> Tensor:
    """[length / size] int64: positions of one sequence that a rank holds, in its order; on the host by default.

    ``length`` is a multiple of ``2 * size``, or anything when ``size`` is 1.
    """
    if size == 1:
        return torch.arange(length, device=device)
    chunk, rest = divmod(length, 2 * size)
    assert rest == 0, f"a sequence of {length} cannot be cut into {2 * size} equal chunks"
    positions = torch.arange(length, device=device).view(2 * size, chunk)
    return torch.cat([positions[rank], positions[2 * size - 1 - rank]])


def packed_positions_of_rank(bounds: Sequence[int], rank: int, size: int) -> Tensor:
    """[total / size] int64: places in a packed row that a rank holds, for sequences between ``bounds``."""
    return torch.cat([start + positions_of_rank(end - start, rank, size) for start, end in pairwise(bounds)])
