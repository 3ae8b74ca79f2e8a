"""What lies inside the wrappers that Megatron puts around models and optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def unwrapped(chunk: Any) -> Any:
    """The GPTModel inside gradient buffers and half precision."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The optimizers that Megatron chains, say one of the experts' weights and one of the others; or the one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def wait_for_parameter(chunks: Sequence[Any], parameter: Any) -> None:
    """Before one weight is used outside its module's forward."""
    for chunk in chunks:
        if _gathers_late(chunk) and parameter in chunk.param_to_bucket_group:
            chunk.param_to_bucket_group[parameter].finish_param_sync()


def finish_param_gather(chunks: Sequence[Any]) -> None:
    """Before the weights are read or replaced; a collective call."""
    for chunk in chunks:
        if _gathers_late(chunk):
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)


def _gathers_late(chunk: Any) -> bool:
    config = getattr(chunk, "ddp_config", None)
    return config is not None and config.overlap_param_gather
