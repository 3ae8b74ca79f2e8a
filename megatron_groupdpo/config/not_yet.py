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
        field="precision.fp8_param_gather",
        refused=bool,
        reason="weights stored in FP8 are not supported yet: a checkpoint's weights would be rounded to FP8 before the "
        "optimizer takes its fp32 copies from them; leave it out",
    ),
)
