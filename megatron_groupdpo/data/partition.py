"""Positives and negatives of a group, from its labels or values. Pure: no file, no token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import NEGATIVE, POSITIVE, ResponseRecord

PartitionRule = Literal["label", "topk", "threshold", "mean", "rank"]
OneSided = Literal["drop", "keep", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """How responses become positives and negatives."""

    rule: PartitionRule = "label"
    """``label``: as the data say. ``topk``: the ``positives`` best values against the ``negatives`` worst.
    ``threshold``: value >= ``threshold`` against the rest. ``mean``: above against below the group's mean.
    ``rank``: every response at the best value against the rest."""
    positives: int | None = None
    """Number of positives, for ``topk``."""
    negatives: int | None = None
    """Number of negatives, for ``topk``."""
    threshold: float | None = None
    """For ``threshold``."""
    one_sided: OneSided = "drop"
    """A group left without positives or without negatives: dropped, kept for its NLL term (only where it has
    positives), or refused."""

    def __post_init__(self) -> None:
        _check_choice("--partition", self.rule, get_args(PartitionRule))
        _check_choice("--one-sided", self.one_sided, get_args(OneSided))
        sizes = (self.positives, self.negatives)
        if self.rule == "topk" and any(size is None or size < 1 for size in sizes):
            raise ConfigError(
                f"--partition topk needs --positives and --negatives of at least 1, got {sizes[0]} and {sizes[1]}"
            )
        if self.rule != "topk" and sizes != (None, None):
            raise ConfigError(
                f"--positives and --negatives belong to --partition topk, not to {self.rule!r}; leave them out"
            )
        if (self.rule == "threshold") != (self.threshold is not None):
            raise ConfigError(
                "--partition threshold and --threshold X go together, "
                f"got --partition {self.rule} and threshold {self.threshold}"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold must be a finite number, got {self.threshold}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """The outcome for one group."""

    kept: tuple[int, ...]
    """Positions of the kept responses, ascending."""
    labels: tuple[int, ...]
    """+1 or -1 for each kept response."""
    num_ties: int = 0
    """Responses dropped because they tie at the boundary."""
    num_middle: int = 0
    """Responses dropped because they are neither among the best nor among the worst (``topk``)."""


def partition_group(responses: Sequence[ResponseRecord], options: Partition, where: str) -> Sides:
    """Split one group.

    Raises:
        DataError: the rule needs labels or values that the record does not give.
    """
    if options.rule == "label":
        labels = [response.label for response in responses]
        if any(label is None for label in labels):
            raise DataError(
                f"{where}: --partition label needs a label on every response, but the record gives none; "
                "choose --partition topk, threshold, mean or rank, or add labels"
            )
        return _sides(tuple(label or 0 for label in labels))
    values = [math.nan if response.value is None else response.value for response in responses]
    if any(math.isnan(value) for value in values):
        raise DataError(
            f"{where}: --partition {options.rule} needs a value on every response, but the record gives none; "
            "choose --partition label, or add scores"
        )
    return _RULES[options.rule](values, options)


def is_one_sided(labels: Sequence[int]) -> bool:
    """Whether a side is missing."""
    return POSITIVE not in labels or NEGATIVE not in labels


def topk_sizes(num_responses: int, positives: int, negatives: int) -> tuple[int, int]:
    """Positives and negatives to take from a group of ``num_responses``.

    A group smaller than ``positives + negatives`` is divided in that ratio, at least one on either side and
    rounded down, so that no response is on both sides.
    """
    total = positives + negatives
    if num_responses >= total:
        return positives, negatives
    return max(1, num_responses * positives // total), max(1, num_responses * negatives // total)


def _sides(signs: Sequence[int], *, num_ties: int = 0, num_middle: int = 0) -> Sides:
    """Signs +1, -1, or 0 for a dropped response."""
    kept = tuple(i for i, sign in enumerate(signs) if sign != 0)
    labels = tuple(signs[i] for i in kept)
    return Sides(kept=kept, labels=labels, num_ties=num_ties, num_middle=num_middle)


def _topk(values: Sequence[float], options: Partition) -> Sides:
    assert options.positives is not None
    assert options.negatives is not None
    positives, negatives = topk_sizes(len(values), options.positives, options.negatives)
    if len(values) < positives + negatives:
        return _sides([0] * len(values), num_middle=len(values))
    best_first = sorted(values, reverse=True)
    last_in, first_out = best_first[positives - 1], best_first[positives]
    tied_top = last_in if last_in == first_out else None
    last_out, first_in = best_first[-negatives - 1], best_first[-negatives]
    tied_bottom = first_in if last_out == first_in else None
    signs, num_ties, num_middle = [], 0, 0
    for value in values:
        # Which of the tied responses is in would be an accident of the file's order: none is.
        if value in (tied_top, tied_bottom):
            signs.append(0)
            num_ties += 1
        elif value >= last_in:
            signs.append(POSITIVE)
        elif value <= first_in:
            signs.append(NEGATIVE)
        else:
            signs.append(0)
            num_middle += 1
    return _sides(signs, num_ties=num_ties, num_middle=num_middle)


def _threshold(values: Sequence[float], options: Partition) -> Sides:
    assert options.threshold is not None
    return _sides([POSITIVE if value >= options.threshold else NEGATIVE for value in values])


def _mean(values: Sequence[float], options: Partition) -> Sides:
    if min(values) == max(values):  # their rounded mean may differ from every one of them
        return _sides([0] * len(values), num_ties=len(values))
    mean = math.fsum(values) / len(values)
    signs = [POSITIVE if value > mean else NEGATIVE if value < mean else 0 for value in values]
    return _sides(signs, num_ties=signs.count(0))


def _rank(values: Sequence[float], options: Partition) -> Sides:
    best = max(values)
    return _sides([POSITIVE if value == best else NEGATIVE for value in values])


_RULES: dict[str, Callable[[Sequence[float], Partition], Sides]] = {
    "topk": _topk,
    "threshold": _threshold,
    "mean": _mean,
    "rank": _rank,
}


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")
