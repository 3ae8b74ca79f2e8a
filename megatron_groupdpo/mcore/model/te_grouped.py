"""Transformer Engine's grouped linear layers, whose scales go into a checkpoint expert by expert."""

from __future__ import annotations

from typing import Any

import torch

_TENSORS = {"fwd": 3, "bwd": 2}
"""Per expert: input, weight and output; gradient of output and of input."""


def scales_by_expert(layer: type[Any]) -> type[Any]:
    """A Megatron wrapper of Transformer Engine's ``GroupedLinear`` whose scales follow their experts.

    Transformer Engine 2.11 numbers a layer's scales expert by expert (``offset + 3 i`` in its ``GroupedLinear``).
    Megatron-Core 0.19.2 cuts them up, and joins them, as if they came kind by kind (``_split_extra_state`` and
    ``merge_extra_states`` in ``megatron/core/extensions/transformer_engine.py``). On as many experts a rank the two
    undo each other; on another number experts get each other's scales. So they are put in Megatron's order before the
    one, and back after the other.
    """

    class ScalesByExpert(layer):
        def _split_extra_state(self, state: Any) -> Any:
            return super()._split_extra_state(self._reordered(state, by_expert=False))

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            self._merged = f"{prefix}_extra_state1" in state_dict
            try:
                super()._load_from_state_dict(state_dict, prefix, *rest)
            finally:
                self._merged = False

        def set_extra_state(self, state: Any) -> None:
            super().set_extra_state(self._reordered(state, by_expert=True) if self._merged else state)

        def _reordered(self, state: Any, *, by_expert: bool) -> Any:
            values = self._decode_extra_state(state) if state is not None and state.numel() else None
            if values is None or "scale_fwd" not in values:  # no delayed scaling: nothing is kept
                return state
            for way, count in _TENSORS.items():
                cut = (count, self.num_gemms) if by_expert else (self.num_gemms, count)
                for name in (f"scale_{way}", f"amax_history_{way}"):
                    tensor: torch.Tensor = values[name]
                    values[name] = tensor.unflatten(-1, cut).transpose(-1, -2).flatten(-2)
            return self._encode_extra_state(values)

    ScalesByExpert.__name__ = ScalesByExpert.__qualname__ = layer.__name__
    return ScalesByExpert
