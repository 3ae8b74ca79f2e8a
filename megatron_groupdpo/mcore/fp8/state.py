"""Transformer Engine's side of FP8: what it keeps between passes, and what this machine can run. Imports it lazily.

Relied on, in Transformer Engine 2.11 (``transformer_engine/pytorch``) and Megatron-Core 0.19.2:

- ``FP8GlobalStateManager`` of its ``quantization`` module: all scale updates go through
  ``reduce_and_update_fp8_tensors``, looked up on the class: ``autocast_exit`` calls it after a forward with gradients,
  the first module's backward (``Linear``, ``LayerNormLinear``, ``GroupedLinear``) after a backward. It reduces row 0 of
  every history over the amax group, sets the scales, and rolls the histories.
- ``DelayedScalingRecipeState``: scale and history are tensors in ``fp8_meta["scaling_fwd" | "scaling_bwd"]``, which the
  quantizers and the global buffers alias, so they are read and written in place. Kernels take the maximum of row 0 and
  what they see, so it collects over microbatches until the next update clears it.
- ``get_weight_workspace`` of its base module: FP8 weights are cached in ``_fp8_workspaces``, and made again when
  ``is_first_microbatch`` is set; Megatron's ``MegatronModule.set_is_first_microbatch`` sets it, and its schedules call
  that at the first microbatch of each call. A copy made without gradients may lack the transpose that a backward reads,
  so the cache is emptied as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_groupdpo.mcore.fp8.weights import quantize_anew

_held_update: Any = None
"""Transformer Engine's update, once it is held back."""


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be used, or None."""
    try:
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception as error:  # a partial installation raises RuntimeError or FileNotFoundError, not ImportError
        return f"importing it fails ({error})"
    return None


def device_capability(device: torch.device) -> tuple[int, int]:
    """The least compute capability among the devices of the run; a collective call."""
    own = torch.tensor(torch.cuda.get_device_capability(device), device=device)
    every = own.new_empty(dist.get_world_size(), 2)
    dist.all_gather_into_tensor(every, own[None])
    return min((int(major), int(minor)) for major, minor in every.tolist())


def recipe_problem_here(recipe: str) -> str | None:
    """What Transformer Engine itself has against a recipe on this device (versions of CUDA and cuBLAS), or None."""
    from transformer_engine.pytorch import quantization  # pyright: ignore[reportMissingImports]

    asked = {"blockwise": quantization.is_fp8_block_scaling_available, "mxfp8": quantization.is_mxfp8_available}
    able, reason = asked.get(recipe, quantization.is_fp8_available)(return_reason=True)
    return None if able else f"fp8_recipe {recipe!r} cannot run here: {reason} Choose another, or train in bf16"


def flash_attention_is_installed() -> bool:
    """Whether Transformer Engine finds flash-attn 2 or 3."""
    from transformer_engine.pytorch.attention.dot_product_attention.utils import (  # pyright: ignore[reportMissingImports]
        FlashAttentionUtils,
    )

    return bool(FlashAttentionUtils.is_installed or FlashAttentionUtils.v3_is_installed)


def fuse_weight_gradients(chunk: torch.nn.Module) -> int:
    """Let Transformer Engine's linear layers add to ``main_grad`` themselves; how many there are.

    Set on the modules, not in Megatron's configuration: there it would ask for Apex in the output layer, whose product
    with the hidden states is not taken here (``passes/engine.py``).
    """
    linears = [module for module in chunk.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    for module in linears:
        module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
    return len(linears)


class TransformerEngineState:
    """A :class:`megatron_groupdpo.mcore.fp8.passes.ScalingState` of a model's chunks."""

    def __init__(self, chunks: Sequence[Any], *, recipe: str, device: torch.device) -> None:
        self._chunks = list(chunks)
        self._delayed = recipe == "delayed"
        self._device = device

    def hold(self) -> None:
        """See :class:`ScalingState`. For the process: Transformer Engine's state is global."""
        global _held_update
        if not self._delayed or _held_update is not None:
            return
        manager = _manager()
        _held_update = manager.reduce_and_update_fp8_tensors
        manager.reduce_and_update_fp8_tensors = classmethod(_no_update)

    def forget_weights(self) -> None:
        """See :class:`ScalingState`."""
        for chunk in self._chunks:
            chunk.set_is_first_microbatch()
            for module in chunk.modules():
                workspaces = getattr(module, "_fp8_workspaces", None)
                if workspaces:
                    workspaces.clear()

    def requantize_weights(self) -> None:
        """See :class:`ScalingState`."""
        quantize_anew(self._chunks)

    def snapshot(self) -> dict[int, Tensor]:
        """See :class:`ScalingState`; copies by the identity of the tensor, which lives as long as its module."""
        return {id(tensor): tensor.clone() for _, tensor in self._tensors()}

    @torch.no_grad()
    def restore(self, kept: dict[int, Tensor]) -> None:
        """See :class:`ScalingState`. Modules make their state at their first forward: scales 1, maxima 0."""
        for start, tensor in self._tensors():
            if id(tensor) in kept:
                tensor.copy_(kept[id(tensor)])
            else:
                tensor.fill_(start)

    def advance(self) -> None:
        """See :class:`ScalingState`."""
        if self._delayed:
            assert _held_update is not None, "hold() comes first"
            _held_update(forward=True)
            _held_update(forward=False)

    def is_fresh(self) -> bool:
        """See :class:`ScalingState`. A checkpoint brings its scales as the modules' extra state."""
        if not self._delayed:
            return False
        is_set = any(bool((tensor != start).any()) for start, tensor in self._tensors() if start == 1.0)
        found = torch.tensor(int(is_set), device=self._device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return not int(found)

    def _tensors(self) -> Iterator[tuple[float, Tensor]]:
        """Every scale and history with what it starts as; nothing for recipes without."""
        if not self._delayed:
            return
        for chunk in self._chunks:
            for module in chunk.modules():
                for key in ("scaling_fwd", "scaling_bwd"):
                    state: Any = getattr(module, "fp8_meta", {}).get(key)
                    if hasattr(state, "amax_history"):
                        yield 1.0, state.scale
                        yield 0.0, state.amax_history


def forget_models() -> None:
    """Empty Transformer Engine's globals, which name the scales and process groups of this process's models."""
    from transformer_engine.pytorch import distributed  # pyright: ignore[reportMissingImports]
    from transformer_engine.pytorch.attention import (  # pyright: ignore[reportMissingImports]
        dot_product_attention,
    )

    _manager().reset()
    dot_product_attention._attention_backends["attention_params"] = None  # of the last attention; it is chosen anew
    for cached in (distributed.get_distributed_world_size, distributed.get_distributed_rank):
        cached.cache_clear()


def _manager() -> Any:
    from transformer_engine.pytorch.quantization import (  # pyright: ignore[reportMissingImports]
        FP8GlobalStateManager,
    )

    return FP8GlobalStateManager


def _no_update(_manager_class: Any, forward: bool = True) -> None:
    """What runs in place of the update while it is held back."""
