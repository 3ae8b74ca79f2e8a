"""What the step needs of a model: two passes over microbatches. ``mcore.passes.engine`` does it on Megatron-Core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_groupdpo.types import Microbatch


class MicrobatchLoss(Protocol):
    """What the backward pass differentiates, a microbatch at a time."""

    def __call__(self, responses_r: Tensor, logps_r: Tensor) -> Tensor:
        """Scalar loss of a microbatch.

        Args:
            responses_r: [r] int64 flat indices of its responses.
            logps_r: [r] float64 their summed log-probabilities, with the graph that made them.
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
        self, microbatches: Sequence[Microbatch], num_responses: int, loss: MicrobatchLoss | None
    ) -> Tensor | None:
        """Accumulate the gradient of the sum of ``loss`` over all microbatches and ranks; log-probabilities as above.

        ``loss`` is needed where :meth:`score` returns a tensor, and not looked at elsewhere. Gradients are summed,
        never averaged.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientPiece:
    """A piece of the reduced gradient on one rank."""

    name: str
    """Of the parameter, layers numbered as in the whole model."""
    values: Tensor
    """Flat view of the gradient buffer."""
    weight: float
    """1 over the number of ranks that hold the same elements."""
