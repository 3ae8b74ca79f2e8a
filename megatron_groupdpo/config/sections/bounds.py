"""Numeric ranges as types: ``PositiveInt`` says in the annotation what the loader checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Closed at ``least`` and ``most``, open at ``above`` and ``below``."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def broken_by(self, number: float) -> str | None:
        """The rule that ``number`` breaks, as words; None where it lies inside."""
        if self.least is not None and not number >= self.least:
            return f">= {self.least:g}"
        if self.above is not None and not number > self.above:
            return f"> {self.above:g}"
        if self.most is not None and not number <= self.most:
            return f"<= {self.most:g}"
        if self.below is not None and not number < self.below:
            return f"< {self.below:g}"
        return None


PositiveInt = Annotated[int, Bounds(least=1)]
NonNegativeInt = Annotated[int, Bounds(least=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(least=0)]
Fraction = Annotated[float, Bounds(least=0, most=1)]
"""Both ends included."""
ProperFraction = Annotated[float, Bounds(least=0, below=1)]
"""1 excluded."""
