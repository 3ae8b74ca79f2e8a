"""The two-pass contract with FP8: every pass of an optimizer step computes one function.

What a response was scored with must be what its backward pass differentiates. Two things stand against it:

- Layers keep FP8 copies of their weights; a copy made before an update, or by a pass of another kind, must not serve.
- Delayed scaling quantizes with scales that follow from maxima seen before, and Transformer Engine moves them after
  every forward with gradients and after every backward: the second microbatch of pass 2 would see other scales than it
  was scored with.

:class:`TwoPassScaling` holds the scales still over a step, its two passes and all their microbatches, and moves them
once, at the end, by the maxima seen. Passes outside a step (validation, step 0, gradient verification) leave no trace.
The library behind it is an adapter: ``fp8/state.py`` for Transformer Engine, a stand-in on the CPU in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

CALIBRATION_STEPS = 3
"""Steps without an update that set the scales of delayed scaling. All start at 1, where gradients underflow: after the
first step the products that write to the residual stream have their scale, after the second those before them, and the
third measures with all scales set."""


class ScalingState(Protocol):
    """What a library keeps between passes. A recipe without such state holds, restores and advances nothing."""

    def hold(self) -> None:
        """From now on nothing but :meth:`advance` moves a scale."""
        ...

    def forget_weights(self) -> None:
        """Quantize the weights anew at their next use."""
        ...

    def requantize_weights(self) -> None:
        """Quantize weights that are kept in FP8 by the scales of now, which an update does by itself; a collective
        call."""
        ...

    def snapshot(self) -> Any:
        """Copies of scales and maxima."""
        ...

    def restore(self, kept: Any) -> None:
        """Put a snapshot back; what did not exist then starts anew."""
        ...

    def advance(self) -> None:
        """Move all scales once, by the maxima seen since; a collective call."""
        ...

    def is_fresh(self) -> bool:
        """No scale was ever set, on any rank; a collective call. False where nothing is kept."""
        ...


class TwoPassScaling:
    """One function per optimizer step."""

    def __init__(self, state: ScalingState) -> None:
        self._state = state
        self._in_step = False
        state.hold()

    @contextmanager
    def step(self) -> Iterator[None]:
        """The passes in here are those of one optimizer step; their maxima set the scales of the next."""
        assert not self._in_step, "steps do not nest"
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        self._state.advance()

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """One schedule call: weights quantized anew, and outside a step no trace."""
        self._state.forget_weights()
        if self._in_step:
            yield
            return
        kept = self._state.snapshot()
        try:
            yield
        finally:
            self._state.restore(kept)

    def calibrate(self, passes: Callable[[], object]) -> int:
        """Set the scales of a run that has none by ``passes``, those of a step; how often they were made."""
        if not self._state.is_fresh():
            return 0
        for _ in range(CALIBRATION_STEPS):
            with self.step():
                passes()
            self._state.requantize_weights()
        return CALIBRATION_STEPS
