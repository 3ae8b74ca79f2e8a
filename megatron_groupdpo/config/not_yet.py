"""Fields that are accepted by name and refused by value, because nothing acts on them yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class NotYet:
    """One refusal."""

    field: str
    """``section.name``."""
    refused: Callable[[Any], bool]
    """Which values are refused."""
    reason: str
    """What is missing, and the way out."""


NOT_YET = (
    NotYet(
        field="precision.fp8_format",
        refused=lambda fp8_format: fp8_format is not None,
        reason="FP8 is not supported yet (and without Transformer Engine Megatron would ignore it in silence); "
        "leave it out and use bf16",
    ),
)
