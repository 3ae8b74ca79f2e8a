"""Weights whose gather is still under way (``--overlap-param-gather``): who reads them waits first.

The distributed optimizer leaves each rank with its part of the new weights. Megatron gathers the rest when a module's
forward is about to run, once after each reduction of the gradient: in the scoring pass, not in the backward's.
Whatever reads a weight otherwise must ask here, or it gets the weights of the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


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
