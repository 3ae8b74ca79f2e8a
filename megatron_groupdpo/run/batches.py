"""Global batches of a run, in order: sampler, batch, plan, microbatches of this rank, reference log-probabilities."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import copy
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from megatron_groupdpo import objectives
from megatron_groupdpo.data.batches.batch import build_batch
from megatron_groupdpo.data.batches.microbatches import build_microbatches
from megatron_groupdpo.data.batches.planner import PlanOptions, plan_batch, plan_whole_groups
from megatron_groupdpo.data.batches.sampler import Sampler
from megatron_groupdpo.data.store.reader import GroupDataset
from megatron_groupdpo.errors import UserError
from megatron_groupdpo.processes import follow_parent
from megatron_groupdpo.reference.store import ReferenceLogProbs
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.tensors import to_device
from megatron_groupdpo.types import GroupBatch, Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBatch:
    """A global batch with this data-parallel rank's part of the work."""

    batch: GroupBatch
    microbatches: list[Microbatch]
    ref_logps_R: torch.Tensor
    """[R] float64 on the host; zeros where nothing is read from disk."""
    num_tokens: int
    """Prompt and response tokens of the global batch, padding excluded."""
    group_ids: list[int]


class BatchSource:
    """Makes the batch of any place in the order; every rank makes the same one."""

    def __init__(
        self,
        dataset: GroupDataset,
        group_ids: Sequence[int] | np.ndarray,
        *,
        loss: LossOptions,
        plan: PlanOptions,
        sampler: Sampler,
        seed: int,
        data_parallel_rank: int,
        context_parallel_rank: int = 0,
        reference: ReferenceLogProbs | None,
        every_response: bool = False,
    ) -> None:
        """``every_response``: all get a pass, also those that the loss does not read, as a validation needs them."""
        self.dataset = dataset
        self.group_ids = np.asarray(group_ids)
        self.loss = loss
        self.plan = plan
        self.data_parallel_rank = data_parallel_rank
        self.context_parallel_rank = context_parallel_rank
        self.seed = seed
        self.sampler = sampler
        self.reference = reference
        self.every_response = every_response

    def batch(self, consumed_groups: int, num_groups: int) -> PlannedBatch:
        """The ``num_groups`` groups after the first ``consumed_groups``."""
        taken = self.sampler.take(consumed_groups, num_groups)
        ids = [int(self.group_ids[index]) for index, _ in taken]
        samples = [self.dataset[group_id] for group_id in ids]
        keys_G = torch.cat(
            [
                objectives.group_keys(torch.tensor([group_id]), seed=self.seed, epoch=epoch)
                for group_id, (_, epoch) in zip(ids, taken)
            ]
        )
        batch = build_batch(samples, group_keys_G=keys_G, needs_pass=self._needs_pass)
        planned = PlannedBatch(
            batch=batch,
            microbatches=self.microbatches(batch),
            ref_logps_R=torch.zeros(batch.num_responses, dtype=torch.float64),
            num_tokens=sum(len(row.tokens_S) for row in batch.rows),
            group_ids=ids,
        )
        return self.with_reference(planned)

    def with_reference(self, planned: PlannedBatch) -> PlannedBatch:
        """The batch with the stored reference log-probabilities, where there are any."""
        if self.reference is None:
            return planned
        ref_logps_R = self.reference[planned.batch.response_ids_R.numpy()]
        return replace(planned, ref_logps_R=torch.from_numpy(ref_logps_R))

    def without_reference(self) -> BatchSource:
        """A copy to make batches elsewhere, and :meth:`with_reference` here."""
        other = copy(self)
        other.reference = None
        return other

    def microbatches(self, batch: GroupBatch, *, whole_groups: bool = False) -> list[Microbatch]:
        """This rank's microbatches; with ``whole_groups`` each holds one group, for a loss that is not decoupled."""
        plan = plan_whole_groups(batch, self.plan) if whole_groups else plan_batch(batch, self.plan)
        return build_microbatches(
            plan, self.plan, rank=self.data_parallel_rank, context_rank=self.context_parallel_rank
        )

    def once(self, num_groups: int, *, limit: int | None = None) -> Iterator[PlannedBatch]:
        """Every group once, in order, ``num_groups`` at a time (the last batch may be short)."""
        total = len(self.group_ids)
        count = -(-total // num_groups)
        for index in range(count if limit is None else min(limit, count)):
            start = index * num_groups
            yield self.batch(start, min(num_groups, total - start))

    def trained_GK(self, batch: GroupBatch) -> torch.Tensor:
        """[G, K] bool: the responses that the loss of these groups reads."""
        arrays = {name: getattr(batch, name) for name in ("labels_GK", "values_GK", "tie_keys_GK", "group_keys_G")}
        return self._trained(arrays)

    def _needs_pass(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return given["labels_GK"] != 0 if self.every_response else self._trained(given)

    def _trained(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """The responses the loss reads: those of the objective, and the positives that carry an NLL of their own."""
        options = self.loss
        used_GK = objectives.used_responses(options.objective, **given, **options.hyperparameters)
        if options.one_sided_nll and options.nll_coeff:
            used_GK = used_GK | objectives.nll_responses(options.objective, **given, **options.hyperparameters)
        return used_GK


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


class DeviceFeed:
    """The batches of a prefetcher, one after the other, with their microbatches and reference on ``device``.

    On a GPU the copies go from pinned memory through a stream of their own.
    """

    def __init__(self, batches: Prefetcher, device: torch.device, *, end: int) -> None:
        """``end``: consumed groups at which the run ends."""
        self._batches, self._device, self._end = batches, device, end
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: tuple[int, PlannedBatch | Exception] | None = None

    def batch(self, consumed_groups: int) -> PlannedBatch:
        """The batch at a place in the order.

        Raises:
            UserError: what making it raised, also when that was ahead of time.
        """
        if self._next is None or self._next[0] != consumed_groups:
            self._next = (consumed_groups, self._make(consumed_groups))
        (_, made), self._next = self._next, None
        if isinstance(made, Exception):
            raise made
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in device_tensors(made):
                tensor.record_stream(current)  # the allocator must not reuse it while the step reads it
        return made

    def prepare(self, consumed_groups: int) -> None:
        """Begin the batch at this place: called with the passes of the one before already queued."""
        if consumed_groups < self._end and self._next is None:
            self._next = (consumed_groups, self._make(consumed_groups))

    def _make(self, consumed_groups: int) -> PlannedBatch | Exception:
        # Kept for when the batch is asked for: the step that is under way is still good, and may be saved.
        try:
            planned = self._batches.batch(consumed_groups)
        except Exception as error:
            return error
        if self._stream is None:
            return on_device(planned, self._device)
        with torch.cuda.stream(self._stream):
            return on_device(planned, self._device)


_ON_DEVICE = ("tokens_BS", "position_ids_BS", "hidden_positions_T", "targets_T", "owners_T", "responses_r")
"""Of a microbatch; the numbers of ``cu_seqlens`` are read by the host."""


def on_device(planned: PlannedBatch, device: torch.device) -> PlannedBatch:
    """The batch with microbatches and reference log-probabilities on ``device``; the rest is read by the host."""
    return replace(
        planned,
        microbatches=[
            replace(microbatch, **{name: to_device(getattr(microbatch, name), device) for name in _ON_DEVICE})
            for microbatch in planned.microbatches
        ],
        ref_logps_R=to_device(planned.ref_logps_R, device),
    )


def device_tensors(planned: PlannedBatch) -> list[Tensor]:
    """What :func:`on_device` moved."""
    of_microbatches = [getattr(microbatch, name) for microbatch in planned.microbatches for name in _ON_DEVICE]
    return [planned.ref_logps_R, *of_microbatches]
