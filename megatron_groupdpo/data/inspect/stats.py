"""Numbers of a data set of groups, gathered block by block in memory that does not grow with it.

Length is counted in tokens for a token store and in characters for records.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_groupdpo.types import NEGATIVE, POSITIVE

NUM_EXAMPLES = 5
"""Groups named as examples of a finding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBlock:
    """Some groups, flat: G groups of R responses together, at least one response each."""

    names: range | tuple[str, ...]
    """G names for messages: rows of a store, or ``file:line``."""
    sizes_G: np.ndarray
    """[G] int64."""
    prompt_lengths_G: np.ndarray
    """[G] int64."""
    lengths_R: np.ndarray
    """[R] int64."""
    labels_R: np.ndarray
    """[R] int8: +1, -1, or 0 where the data say nothing."""
    values_R: np.ndarray
    """[R] float64, NaN where absent."""


class Distribution:
    """Counts of values rounded to three significant digits; integers below 1,000 and all extremes are exact."""

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()
        self.num, self._sum = 0, 0.0
        self.min, self.max = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Take in finite numbers."""
        if not len(values):
            return
        self.num += len(values)
        self._sum += float(values.sum(dtype=np.float64))
        self.min, self.max = min(self.min, float(values.min())), max(self.max, float(values.max()))
        distinct, counts = np.unique(_three_digits(values.astype(np.float64)), return_counts=True)
        for value, count in zip(distinct.tolist(), counts.tolist()):
            self._counts[value] += count

    @property
    def mean(self) -> float:
        """NaN where nothing was added."""
        return self._sum / self.num if self.num else math.nan

    def quantile(self, share: float) -> float:
        """The smallest value (rounded) that ``share`` of all are not above; NaN where nothing was added."""
        if share >= 1 and self.num:
            return self.max
        seen = 0
        for value, count in sorted(self._counts.items()):
            seen += count
            if seen >= share * self.num:
                return value
        return math.nan

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct rounded values [n] float64, rising, and how often each occurs [n] int64."""
        values = sorted(self._counts)
        return np.array(values), np.array([self._counts[value] for value in values], dtype=np.int64)

    def summary(self) -> dict[str, float | int] | None:
        """Number, mean, extremes and quantiles; None where nothing was added."""
        if not self.num:
            return None
        quantiles = {name: self.quantile(share) for name, share in QUANTILES.items()}
        return {"num": self.num, "mean": self.mean, "min": self.min, **quantiles, "max": self.max}


QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}
TITLES = {
    "group_size": "responses per group",
    "positives": "positives per group",
    "negatives": "negatives per group",
    "prompt_length": "prompt length",
    "response_length": "response length",
    "positive_length": "  of positives",
    "negative_length": "  of negatives",
    "row_length": "prompt + response",
    "value_gap": "value gap (best - worst)",
    "length_correlation": "length-value correlation",
}
"""Distributions in the order of the report. The correlation is Pearson's r, within each group, of response length and
value (label where no values are given), over groups in which both vary."""


@dataclass(slots=True)
class Statistics:
    """Sums over all groups."""

    num: Counter[str] = field(default_factory=Counter)
    """groups, responses, positives, negatives, unlabelled, valued_groups (a value on every response), and groups with
    a finding: one-sided, equal-values, contradicting-labels."""
    distributions: dict[str, Distribution] = field(default_factory=lambda: {name: Distribution() for name in TITLES})
    examples: dict[str, list[str]] = field(default_factory=dict)
    num_compared: int = 0
    """Groups with both sides."""
    num_positives_longer: float = 0.0
    """Of these, in which positives are longer on average; a tie counts half."""
    sum_log_ratio: float = 0.0
    """Sum over them of log(mean length of positives / mean length of negatives)."""

    def add(self, block: GroupBlock) -> None:
        """Take in a block."""
        sizes_G = block.sizes_G
        if not len(sizes_G):
            return
        starts_G = np.concatenate([[0], np.cumsum(sizes_G)[:-1]])
        positive_R, negative_R = block.labels_R == POSITIVE, block.labels_R == NEGATIVE
        num_positive_G = np.add.reduceat(positive_R.astype(np.int64), starts_G)
        num_negative_G = np.add.reduceat(negative_R.astype(np.int64), starts_G)
        is_labelled_G = num_positive_G + num_negative_G == sizes_G
        is_valued_G = np.logical_and.reduceat(~np.isnan(block.values_R), starts_G)
        self.num.update(
            groups=len(sizes_G),
            responses=int(sizes_G.sum()),
            positives=int(num_positive_G.sum()),
            negatives=int(num_negative_G.sum()),
            unlabelled=int(sizes_G.sum() - num_positive_G.sum() - num_negative_G.sum()),
            labelled_groups=int(is_labelled_G.sum()),
            valued_groups=int(is_valued_G.sum()),
        )
        add = {name: distribution.add for name, distribution in self.distributions.items()}
        add["group_size"](sizes_G)
        add["prompt_length"](block.prompt_lengths_G)
        add["response_length"](block.lengths_R)
        add["row_length"](np.repeat(block.prompt_lengths_G, sizes_G) + block.lengths_R)
        add["positives"](num_positive_G[is_labelled_G])
        add["negatives"](num_negative_G[is_labelled_G])
        add["positive_length"](block.lengths_R[positive_R])
        add["negative_length"](block.lengths_R[negative_R])
        both_G = (num_positive_G > 0) & (num_negative_G > 0)
        self._find("one-sided", is_labelled_G & ~both_G, block)
        self._compare_lengths(block, starts_G, positive_R, negative_R, both_G)
        self._look_at_values(block, starts_G, is_valued_G, is_labelled_G)

    def _find(self, code: str, found_G: np.ndarray, block: GroupBlock) -> None:
        self.num[code] += int(found_G.sum())
        kept = self.examples.setdefault(code, [])
        kept.extend(str(block.names[i]) for i in np.flatnonzero(found_G)[: NUM_EXAMPLES - len(kept)])

    def _compare_lengths(
        self,
        block: GroupBlock,
        starts_G: np.ndarray,
        positive_R: np.ndarray,
        negative_R: np.ndarray,
        both_G: np.ndarray,
    ) -> None:
        def mean_G(side_R: np.ndarray) -> np.ndarray:
            total_G = np.add.reduceat(block.lengths_R * side_R, starts_G)[both_G]
            return total_G / np.add.reduceat(side_R.astype(np.int64), starts_G)[both_G]

        if not both_G.any():
            return
        positives, negatives = mean_G(positive_R), mean_G(negative_R)
        self.num_compared += len(positives)
        self.num_positives_longer += float((positives > negatives).sum() + 0.5 * (positives == negatives).sum())
        self.sum_log_ratio += float(np.log(np.maximum(positives, 1) / np.maximum(negatives, 1)).sum())

    def _look_at_values(
        self, block: GroupBlock, starts_G: np.ndarray, is_valued_G: np.ndarray, is_labelled_G: np.ndarray
    ) -> None:
        valued_R = np.repeat(is_valued_G, block.sizes_G)
        values_R = np.where(valued_R, block.values_R, 0.0)
        gap_G = np.maximum.reduceat(values_R, starts_G) - np.minimum.reduceat(values_R, starts_G)
        several_G = block.sizes_G >= 2
        self.distributions["value_gap"].add(gap_G[is_valued_G & several_G])
        self._find("equal-values", is_valued_G & several_G & (gap_G == 0), block)
        worst_positive_G = np.minimum.reduceat(np.where(block.labels_R == POSITIVE, values_R, np.inf), starts_G)
        best_negative_G = np.maximum.reduceat(np.where(block.labels_R == NEGATIVE, values_R, -np.inf), starts_G)
        self._find("contradicting-labels", is_valued_G & is_labelled_G & (best_negative_G > worst_positive_G), block)
        # a group with neither all values nor all labels ranks nothing: its constant row drops out below
        labelled_R = np.repeat(is_labelled_G, block.sizes_G)
        ranks_R = np.where(valued_R, values_R, np.where(labelled_R, block.labels_R, 0))
        r_G = _correlation_within(block.lengths_R, ranks_R, block.sizes_G, starts_G)
        self.distributions["length_correlation"].add(r_G[~np.isnan(r_G)])

    @property
    def length_ratio(self) -> float:
        """Geometric mean over two-sided groups of mean positive length / mean negative length; NaN without any."""
        return math.exp(self.sum_log_ratio / self.num_compared) if self.num_compared else math.nan

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, without NaN."""
        compared = self.num_compared or None
        return {
            **{name: self.num[name] for name in ("groups", "responses", "positives", "negatives", "unlabelled")},
            "one_sided_groups": self.num["one-sided"],
            "equal_value_groups": self.num["equal-values"],
            "length_ratio": self.length_ratio if compared else None,
            "share_positives_longer": self.num_positives_longer / compared if compared else None,
            **{name: distribution.summary() for name, distribution in self.distributions.items()},
        }


def _correlation_within(
    x_R: np.ndarray, y_R: np.ndarray, sizes_G: np.ndarray, starts_G: np.ndarray
) -> np.ndarray:  # fmt: skip
    """[G] Pearson's r within each group; NaN where x or y does not vary."""

    def centred(z_R: np.ndarray) -> np.ndarray:
        z_R = z_R.astype(np.float64)
        varies_G = np.maximum.reduceat(z_R, starts_G) > np.minimum.reduceat(z_R, starts_G)
        mean_G = np.add.reduceat(z_R, starts_G) / sizes_G
        # exactly 0 in groups that do not vary, whatever their mean is rounded to
        return (z_R - np.repeat(mean_G, sizes_G)) * np.repeat(varies_G, sizes_G)

    dx_R, dy_R = centred(x_R), centred(y_R)
    xx_G, yy_G, xy_G = (np.add.reduceat(z_R, starts_G) for z_R in (dx_R * dx_R, dy_R * dy_R, dx_R * dy_R))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(xy_G / (np.sqrt(xx_G) * np.sqrt(yy_G)), -1.0, 1.0)


def _three_digits(values: np.ndarray) -> np.ndarray:
    """Rounded to three significant digits."""
    with np.errstate(divide="ignore"):
        power = np.where(values == 0, 0, np.floor(np.log10(np.abs(values))))
    scale = 10.0 ** np.clip(power - 2, -300, 300)
    # scales below 1 are divided by as integers' inverses would miss: 0.29 / 0.01 is not 29
    inverse = 10.0 ** np.clip(2 - power, -300, 300)
    return np.where(power > 2, np.round(values / scale) * scale, np.round(values * inverse) / inverse)
