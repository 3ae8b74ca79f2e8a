"""Counts the bytes that autograd holds for the backward, and says how many a pipeline stage should hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_groupdpo.engine import Engine, MicrobatchLoss
from megatron_groupdpo.types import Microbatch


class SavedBytes:
    """Bytes of the unique storages that graphs made in this context keep for their backward, now and at the peak.

    Every tensor an operation saves passes ``torch.autograd.graph.saved_tensors_hooks``: it counts from there until the
    graph lets go of it. What is counted is the storage, since a saved view keeps all of it; a storage saved by
    several operations counts once; ``excluded`` (parameters, buffers) never. Operations that keep tensors elsewhere
    than in ``save_for_backward`` would be missed; neither this package nor Megatron's CPU path has any.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self.live = self.peak = self.num_saved = 0
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._holders: dict[int, int] = {}
        self._hooks: Any = None

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(tensor, self), _Held.get)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def hold(self, storage: torch.UntypedStorage) -> int | None:
        """Count one more holder of a storage; its key, or ``None`` where it does not count."""
        key = storage.data_ptr()
        if not key or key in self._excluded:
            return None
        self.num_saved += 1
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return key

    def release(self, key: int, num_bytes: int) -> None:
        """One holder less."""
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.live -= num_bytes


class _Held:
    """What the graph keeps in place of a saved tensor; dies with the graph's node, or when its backward has run."""

    __slots__ = ("counter", "key", "num_bytes", "tensor")

    def __init__(self, tensor: Tensor, counter: SavedBytes) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.counter = tensor, counter
        self.num_bytes, self.key = storage.nbytes(), counter.hold(storage)

    def get(self) -> Tensor:
        return self.tensor

    def __del__(self) -> None:
        if self.key is not None:
            self.counter.release(self.key, self.num_bytes)


class ForwardBytes:
    """Bytes each module's forward adds to what is saved: its largest call."""

    def __init__(self, modules: Sequence[torch.nn.Module], counter: SavedBytes) -> None:
        self.added = [0] * len(modules)
        self._handles: list[Any] = []
        for index, module in enumerate(modules):
            before: list[int] = []
            self._handles += [
                module.register_forward_pre_hook(lambda *_, before=before: before.append(counter.live)),
                module.register_forward_hook(self._after(index, before, counter)),
            ]

    def _after(self, index: int, before: list[int], counter: SavedBytes) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.added[index] = max(self.added[index], counter.live - before.pop())

        return hook

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for handle in self._handles:
            handle.remove()


class CountedEngine:
    """An :class:`Engine` that notes what was saved when its scoring pass ended."""

    def __init__(self, engine: Engine, counter: SavedBytes) -> None:
        self.engine = engine
        self.counter = counter
        self.num_saved_scoring: int | None = None
        """Tensors the scoring pass saved; none while there was no such pass."""

    def score(self, microbatches: Sequence[Microbatch], num_responses: int) -> Tensor | None:
        before = self.counter.num_saved
        logps_R = self.engine.score(microbatches, num_responses)
        self.num_saved_scoring = self.counter.num_saved - before
        return logps_R

    def backward(
        self, microbatches: Sequence[Microbatch], num_responses: int, loss: MicrobatchLoss | None
    ) -> Tensor | None:
        return self.engine.backward(microbatches, num_responses, loss)


def expected_peak(chunk_bytes: Sequence[int], *, stage: int, num_stages: int, num_microbatches: int) -> int:
    """Bytes a stage holds at its fullest, from what a microbatch saves in each of its model chunks.

    One chunk: 1F1B, in which stage p runs ``min(num_stages - p, M)`` forwards before the first backward. Several: the
    interleaved schedule, whose chunk passes go round in turns of ``num_stages`` microbatches a chunk, backwards through
    the chunks in reverse; ``2 (num_stages - p - 1) + (chunks - 1) num_stages`` of them warm up.
    """
    num_chunks = len(chunk_bytes)
    if num_chunks == 1:
        return min(num_stages - stage, num_microbatches) * chunk_bytes[0]
    total = num_chunks * num_microbatches
    chunk_of = [(k % (num_stages * num_chunks)) // num_stages for k in range(total)]
    warm_up = min(2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages, total)
    held = sum(chunk_bytes[chunk_of[k]] for k in range(warm_up))
    peak = held
    for k in range(warm_up, total):
        held += chunk_bytes[chunk_of[k]]
        peak = max(peak, held)
        held -= chunk_bytes[num_chunks - 1 - chunk_of[k - warm_up]]
    return peak
