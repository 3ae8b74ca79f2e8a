"""Copies from the host to the device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; from host to GPU through pinned memory, in the order of the current stream.

    From pageable memory the host would wait until the copy's turn has come, behind all work queued before it.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        # The allocator of pinned memory keeps the block until the copy has run.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
