"""What one rank finds wrong stops all of them, with its message, instead of leaving the others in a collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megatron_groupdpo.errors import CheckpointError, UserError


@contextmanager
def together() -> Iterator[None]:
    """Every rank runs the block, which holds no collective call; an error of any is raised on all.

    Raises:
        UserError: the first rank's that has one.
    """
    error: Exception | None = None
    try:
        yield
    except (UserError, OSError) as caught:
        error = caught
    _raise_first(error)


def on_first_rank[T](work: Callable[[], T]) -> T:
    """Run on rank 0 alone; what it returns, or raises, on every rank."""
    answer: list[Any] = [None]
    error: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer[0] = work()
        except (UserError, OSError) as caught:
            error = caught
    _raise_first(error)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _raise_first(error: Exception | None) -> None:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    found: list[Any] = [None] * dist.get_world_size()
    told = None if error is None else (type(error) if isinstance(error, UserError) else CheckpointError, str(error))
    dist.all_gather_object(found, told)
    first = next((one for one in found if one is not None), None)
    if first is not None:
        kind, message = first
        raise kind(message) from error
