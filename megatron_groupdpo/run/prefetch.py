"""Batches made ahead of time in worker processes: reading, planning and laying out tensors cost the step nothing.

A batch is a function of its place in the order, so whoever makes it, and in what order, the batches are the same.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from megatron_groupdpo.data.workers import follow_parent
from megatron_groupdpo.errors import UserError
from megatron_groupdpo.run.batches import BatchSource, PlannedBatch

_AHEAD_PER_WORKER = 2


class Prefetcher:
    """The batches of a source one after the other; a context manager.

    Args:
        source: what to read.
        num_workers: processes; 0 makes each batch when it is asked for.
        num_groups: groups of a batch.
        end: consumed groups at which the run ends: nothing after it is made.
    """

    def __init__(self, source: BatchSource, *, num_workers: int, num_groups: int, end: int) -> None:
        self._source, self._num_groups, self._end = source, num_groups, end
        self._ahead = _AHEAD_PER_WORKER * num_workers
        self._pending: deque[tuple[int, Future[bytes]]] = deque()
        self._pool: ProcessPoolExecutor | None = None
        if num_workers:
            # spawn: the parent has threads and may hold a GPU. The reference table is looked up here: it is one gather.
            self._pool = ProcessPoolExecutor(
                num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(pickle.dumps(source.without_reference()),),
            )

    def batch(self, consumed_groups: int) -> PlannedBatch:
        """The batch at a place in the order; its successors are begun.

        Raises:
            UserError: a worker process died; or what making the batch raises.
        """
        if self._pool is None:
            return self._source.batch(consumed_groups, self._num_groups)
        try:
            self._submit(consumed_groups)
            planned: PlannedBatch = pickle.loads(self._pending.popleft()[1].result())
        except BrokenProcessPool as error:
            raise UserError(
                "a process that prepares batches died or could not start (what it printed is above), often for want of "
                "memory; lower --num-workers (0: no such processes)"
            ) from error
        return self._source.with_reference(planned)

    def _submit(self, consumed_groups: int) -> None:
        """Have this place and some after it under way."""
        assert self._pool is not None
        if not self._pending or self._pending[0][0] != consumed_groups:
            self._drop()
        place = self._pending[-1][0] + self._num_groups if self._pending else consumed_groups
        while not self._pending or (len(self._pending) <= self._ahead and place < self._end):
            self._pending.append((place, self._pool.submit(_make, place, self._num_groups)))
            place += self._num_groups

    def _drop(self) -> None:
        for _, future in self._pending:
            future.cancel()
        self._pending.clear()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._drop()
            # After an error nothing is waited for; the workers see this process end.
            self._pool.shutdown(wait=kind is None, cancel_futures=True)


_worker_source: BatchSource | None = None


def _start(source: bytes) -> None:
    global _worker_source
    follow_parent()
    _worker_source = pickle.loads(source)


def _make(consumed_groups: int, num_groups: int) -> bytes:
    assert _worker_source is not None
    # Plain pickle, as bytes: torch would send every small tensor through a file descriptor of its own.
    return pickle.dumps(_worker_source.batch(consumed_groups, num_groups))
