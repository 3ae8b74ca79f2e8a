"""A reference model without a second model: its weights lie on the host and take the policy's place while it scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_groupdpo.mcore.fp8.weights import raw_parts, renew_transposes
from megatron_groupdpo.mcore.passes.engine import MegatronEngine
from megatron_groupdpo.mcore.policy import Policy
from megatron_groupdpo.mcore.weights import finish_param_gather, unwrapped
from megatron_groupdpo.types import Microbatch

_ELEMENTS_AT_ONCE = 1 << 26


class SwappedWeights:
    """One host copy of weights, exchanged in place with those of a model and back."""

    def __init__(self, chunks: Sequence[Any], device: torch.device) -> None:
        """Copy what the chunks hold now."""
        self._chunks = chunks
        finish_param_gather(chunks)
        # Buffers too: whatever a forward pass keeps in them belongs to the weights it was made with.
        modules = [unwrapped(chunk) for chunk in chunks]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self._held = [part for tensor in tensors for part in raw_parts(tensor)]
        assert all(tensor.is_contiguous() for tensor in self._held)
        self._host = [_on_host(tensor, pinned=device.type == "cuda") for tensor in self._held]

    def exchange(self) -> None:
        """Swap the contents; twice is no change. No tensor moves, so views of them (gradient hooks, buffers of the
        optimizer) stay what they are, and CUDA graphs of the layers compute with what is there now."""
        finish_param_gather(self._chunks)  # a late gather would mix the two
        for held, host in zip(self._held, self._host):
            here, there = held.view(-1), host.view(-1)
            for start in range(0, here.numel(), _ELEMENTS_AT_ONCE):
                part = slice(start, start + _ELEMENTS_AT_ONCE)
                kept = here[part].clone()
                here[part].copy_(there[part], non_blocking=True)
                there[part].copy_(kept, non_blocking=True)
        renew_transposes(self._chunks)


class SwappedEngine:
    """Scores with swapped weights."""

    def __init__(self, engine: MegatronEngine, weights: SwappedWeights) -> None:
        self._engine, self._weights = engine, weights

    def score(self, microbatches: Sequence[Microbatch], num_responses: int) -> Tensor | None:
        """See :class:`megatron_groupdpo.engine.Engine`; the policy's weights are back, bit for bit, when it returns."""
        self._weights.exchange()
        try:
            return self._engine.score(microbatches, num_responses)
        finally:
            self._weights.exchange()


@dataclass(frozen=True, slots=True, kw_only=True)
class SwappedReference:
    """What a reference :class:`Policy` is to a run, in the memory of one host copy of this rank's weights."""

    engine: SwappedEngine
    digest: str

    def weights_digest(self) -> str:
        """Layout-independent digest of the reference's weights."""
        return self.digest


def swapped_reference(policy: Policy) -> SwappedReference:
    """A reference with the weights that ``policy`` has now; load the policy's own next."""
    weights = SwappedWeights(policy.chunks, policy.ranks.device)
    return SwappedReference(engine=SwappedEngine(policy.engine, weights), digest=policy.weights_digest())


def _on_host(tensor: Tensor, *, pinned: bool) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return copy.copy_(tensor)
