"""What lies inside the wrappers that Megatron puts around models and optimizers."""

from __future__ import annotations

from typing import Any


def unwrapped(chunk: Any) -> Any:
    """The GPTModel inside gradient buffers and half precision."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The optimizers that Megatron chains, say one of the experts' weights and one of the others; or the one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])
