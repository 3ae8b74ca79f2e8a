"""What the step needs of a model: two passes over microbatches. ``mcore.engine`` implements it on Megatron-Core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megatron_groupdpo.types import Microbatch


class ResponseWeights(Protocol):
    """Weight of each response in the backward pass."""

    def __call__(self, responses_r: Tensor, logps_r: Tensor) -> Tensor:
        """Weights [r] float64 of the responses with flat indices ``responses_r`` [r] int64.

        ``logps_r`` [r] float64 are their log-probabilities in this very pass, detached.
        """
        ...


class Engine(Protocol):
    """Runs microbatches through the model, on whatever layout."""

    def score(self, microbatches: Sequence[Microbatch], num_responses: int) -> Tensor | None:
        """Forward only: summed log-probabilities of the responses, [R] float64, over all data-parallel ranks.

        Returned on ranks that hold the output layer, ``None`` elsewhere.
        """
        ...

    def backward(
        self, microbatches: Sequence[Microbatch], num_responses: int, weights: ResponseWeights | None
    ) -> Tensor | None:
        """Accumulate the gradient of ``sum_r weight_r * logp_r`` over every rank; log-probabilities as above.

        ``weights`` is needed where :meth:`score` returns a tensor, and not looked at elsewhere. Gradients are summed,
        never averaged.
        """
        ...
