"""What every part of the GPU suite is given, and what it yields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

Point = dict[str, Any]
"""One measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Where and at what size a part runs."""

    device: str
    tiny: bool
    output: Path

    def pick(self, full: Any, tiny: Any) -> Any:
        """The value at this scale."""
        return tiny if self.tiny else full
