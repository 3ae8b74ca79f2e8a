"""A stand-in for FP8 linear layers on the CPU: quantize, dequantize, and keep state by Transformer Engine's rules.

Delayed scaling as it computes it (``FP8GlobalStateManager``): a quantizer uses the scale it is given, and row 0 of
its history collects the largest magnitude it saw; an update takes the amax of the history, sets
``scale = fp8_max / amax / 2^margin`` unless amax is 0 or not finite, rolls the history up by one row and clears row 0.
Left alone, the library updates after every forward with gradients and after every backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Through FP8 and back. Clamped first: beyond its range the cast makes NaN."""
    largest = torch.finfo(dtype).max
    return ((x.float() * scale).clamp(-largest, largest).to(dtype).float() / scale).to(x.dtype)


class DelayedQuantizer:
    """One tensor's place in a recipe state: its scale, and its column of the history."""

    def __init__(self, dtype: torch.dtype, *, history: int, algorithm: str = "max", margin: int = 0) -> None:
        self.dtype, self.algorithm, self.margin = dtype, algorithm, margin
        self.scale = torch.ones(())
        self.amax_history = torch.zeros(history)

    def __call__(self, x: Tensor) -> Tensor:
        self.amax_history[0] = torch.maximum(self.amax_history[0], x.detach().float().abs().max())
        return cast(x, self.scale, self.dtype)

    def update(self) -> None:
        amax = self.amax_history.max() if self.algorithm == "max" else self.amax_history[0].clone()
        self.amax_history.copy_(torch.roll(self.amax_history, -1, 0))
        self.amax_history[0] = 0.0
        if amax > 0 and math.isfinite(amax):
            self.scale.copy_((torch.finfo(self.dtype).max / amax / 2**self.margin).clamp_max(torch.finfo().max))


class CurrentQuantizer:
    """Tensorwise: the scale of the tensor at hand; nothing is kept."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        amax = x.detach().float().abs().max().clamp_min(1e-12)
        return cast(x, torch.finfo(self.dtype).max / amax, self.dtype)


class FakeFp8:
    """The library's global state: all layers' quantizers, and whether it updates them by itself."""

    def __init__(self, recipe: str = "delayed", *, history: int = 4) -> None:
        self.recipe, self.history = recipe, history
        self.layers: list[FakeFp8Product] = []
        self.held = False
        self.cached_weights: dict[int, Tensor] = {}

    def quantizer(self, dtype: torch.dtype) -> Any:
        return DelayedQuantizer(dtype, history=self.history) if self.recipe == "delayed" else CurrentQuantizer(dtype)

    def update(self, *, forward: bool) -> None:
        """What the library calls by itself; nothing while held."""
        if not self.held:
            self._update(forward=forward)

    def _update(self, *, forward: bool) -> None:
        if self.recipe == "delayed":
            for layer in self.layers:
                for quantizer in (layer.of_input, layer.of_weight) if forward else (layer.of_gradient,):
                    quantizer.update()

    # The adapter: megatron_groupdpo.mcore.fp8.passes.ScalingState.

    def hold(self) -> None:
        self.held = True

    def forget_weights(self) -> None:
        self.cached_weights.clear()

    def requantize_weights(self) -> None:
        """None are kept in FP8."""

    def snapshot(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, kept: list[Tensor]) -> None:
        for tensor, before in zip(self._tensors(), kept, strict=True):
            tensor.copy_(before)

    def advance(self) -> None:
        self._update(forward=True)
        self._update(forward=False)

    def is_fresh(self) -> bool:
        return self.recipe == "delayed" and all(bool(tensor == 1) for tensor in self._tensors() if tensor.dim() == 0)

    def _tensors(self) -> Iterator[Tensor]:
        if self.recipe == "delayed":
            for layer in self.layers:
                for quantizer in (layer.of_input, layer.of_weight, layer.of_gradient):
                    yield from (quantizer.scale, quantizer.amax_history)


class FakeFp8Product:
    """``input @ weight^T`` with FP8 operands; the gradient of the output is FP8 as well (hybrid: e5m2)."""

    def __init__(self, library: FakeFp8) -> None:
        self.library = library
        self.of_input, self.of_weight = library.quantizer(E4M3), library.quantizer(E4M3)
        self.of_gradient = library.quantizer(E5M2)
        library.layers.append(self)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        cached = self.library.cached_weights.get(id(self))
        if cached is None:
            cached = self.library.cached_weights[id(self)] = self.of_weight(weight.detach())
        return _Product.apply(x, weight, self.of_input(x.detach()), cached, self)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, x_fp8: Tensor, weight_fp8: Tensor, layer: FakeFp8Product
    ) -> Tensor:
        ctx.save_for_backward(x_fp8, weight_fp8)
        ctx.layer = layer
        return x_fp8 @ weight_fp8.t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x_fp8, weight_fp8 = ctx.saved_tensors
        grad = ctx.layer.of_gradient(grad_outputs[0])
        grad_weight = grad.flatten(0, -2).t() @ x_fp8.flatten(0, -2)
        if ctx.layer is ctx.layer.library.layers[0]:  # the last to be reached, as in the library
            ctx.layer.library.update(forward=False)
        return grad @ weight_fp8, grad_weight, None, None, None
