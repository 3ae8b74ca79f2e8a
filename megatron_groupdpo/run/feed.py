"""Batches on the device: while a step runs, the next batch is made and copied, and no pass waits for a copy."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_groupdpo.run.batches import PlannedBatch
from megatron_groupdpo.run.prefetch import Prefetcher
from megatron_groupdpo.transfer import to_device


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


def on_device(planned: PlannedBatch, device: torch.device) -> PlannedBatch:
    """The batch with microbatches and reference log-probabilities on ``device``; the rest is read by the host."""
    return replace(
        planned,
        microbatches=[microbatch.to(lambda tensor: to_device(tensor, device)) for microbatch in planned.microbatches],
        ref_logps_R=to_device(planned.ref_logps_R, device),
    )


def device_tensors(planned: PlannedBatch) -> list[Tensor]:
    """What :func:`on_device` moved."""
    found = [planned.ref_logps_R]

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for microbatch in planned.microbatches:
        microbatch.to(note)
    return found
