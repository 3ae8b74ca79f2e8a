"""Copies from the host to the device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; from host to GPU through pinned memory, in the order of the current stream.

    From pageable memory the host would wait until the copy's turn has come, behind all work queued before it.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        # The allocator of pinned memory keeps the block until the copy has run.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
