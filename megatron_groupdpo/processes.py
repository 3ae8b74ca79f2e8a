"""What the processes of one run owe each other: a worker ends with its parent, an error of one rank stops all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_groupdpo.errors import CheckpointError, UserError


def follow_parent() -> None:
    """What every worker process does first: ignore Ctrl-C, which the parent acts on, and end when the parent ends.

    A worker that outlives its parent would hold the parent's output and files open for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def errors_reach_all_ranks() -> Iterator[None]:
    """Every rank runs the block, which holds no collective call; an error of any is raised on all.

    Without it a rank that stops would leave the others waiting in their next collective.

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
    import torch.distributed as dist

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
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    own = None if error is None else (type(error) if isinstance(error, UserError) else CheckpointError, str(error))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    first = next((one for one in found if one is not None), None)
    if first is not None:
        kind, message = first
        raise kind(message) from error
