"""Positives and negatives of a group, from its labels or values. Pure: no file, no token."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import NEGATIVE, POSITIVE, GroupRecord, Message, ResponseRecord, Text

PartitionRule = Literal["label", "topk", "threshold", "mean", "rank", "best-worst", "random-pair"]
OneSided = Literal["drop", "keep", "error"]
Duplicates = Literal["drop", "keep"]
TieBreak = Literal["drop", "random", "length", "first"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """How responses become positives and negatives."""

    rule: PartitionRule = "label"
    """``label``: as the data say. ``topk``: the ``positives`` best values against the ``negatives`` worst,
    fewer in the same ratio in a group that is smaller than both together (:func:`topk_sizes`).
    ``threshold``: value >= ``threshold`` against the rest. ``mean``: above against below the group's mean.
    ``rank``: every response at the best value against the rest. ``best-worst``: one response at the best value
    against one at the worst. ``random-pair``: two responses of different values drawn at random, the better one
    positive; without values, a random positive and a random negative of the labels."""
    positives: int | None = None
    """Number of positives, for ``topk``."""
    negatives: int | None = None
    """Number of negatives, for ``topk``."""
    threshold: float | None = None
    """For ``threshold``."""
    seed: int | None = None
    """For ``random-pair`` and ``tie_break="random"`` (None there: 0). A draw depends on the seed and the group's own
    texts alone."""
    tie_break: TieBreak = "drop"
    """Which of the responses that tie at a boundary of ``topk`` are taken: none; random ones; the shortest; the first
    of the file. A value that would be on both sides is on neither, whatever is chosen."""
    duplicates: Duplicates = "drop"
    """Equal responses of a group: one of them stays, see :func:`distinct_responses`; or all do."""
    max_positives: int | None = None
    """Most positives of a group; see :func:`cap_sides`."""
    max_negatives: int | None = None
    """Most negatives of a group."""
    max_responses: int | None = None
    """Most responses of a group."""
    one_sided: OneSided = "drop"
    """A group left without positives or without negatives: dropped, kept for its NLL term (only where it has
    positives), or refused."""

    def __post_init__(self) -> None:
        _check_choice("--partition", self.rule, get_args(PartitionRule))
        _check_choice("--one-sided", self.one_sided, get_args(OneSided))
        _check_choice("--duplicates", self.duplicates, get_args(Duplicates))
        _check_choice("--tie-break", self.tie_break, get_args(TieBreak))
        for flag, most, least in (
            ("--max-positives", self.max_positives, 1),
            ("--max-negatives", self.max_negatives, 1),
            ("--max-responses", self.max_responses, 2),
        ):
            if most is not None and most < least:
                raise ConfigError(f"{flag} must be at least {least}, got {most}")
        if self.rule != "topk" and self.tie_break != "drop":
            raise ConfigError(f"--tie-break belongs to --partition topk, not to {self.rule!r}; leave it out")
        if self.rule != "random-pair" and self.tie_break != "random" and self.seed is not None:
            raise ConfigError(
                f"--seed belongs to --partition random-pair or --tie-break random, not to {self.rule!r}; leave it out"
            )
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
    num_ties_broken: int = 0
    """Responses kept though they tie at the boundary."""
    num_middle: int = 0
    """Responses dropped because they are neither among the best nor among the worst (``topk``, ``best-worst``)."""
    num_not_drawn: int = 0
    """Responses dropped because they are not in the pair (``random-pair``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distinct:
    """A group's responses without copies."""

    responses: tuple[ResponseRecord, ...]
    num_copies: int = 0
    """Dropped because an earlier response is equal."""
    num_contradictory: int = 0
    """Dropped because an equal response has the other label."""


def distinct_responses(responses: Sequence[ResponseRecord], options: Partition) -> Distinct:
    """One of each set of equal texts: the first stays where it is, with the mean of their values.

    Where the rule goes by labels and equal texts have both, none of them stays: such a text prefers itself to itself.
    """
    copies: dict[Text, list[ResponseRecord]] = {}
    for response in responses:
        copies.setdefault(response.text, []).append(response)
    if len(copies) == len(responses):
        return Distinct(responses=tuple(responses))
    kept, num_contradictory = [], 0
    for same in copies.values():
        if _goes_by_labels(same, options) and len({response.label for response in same}) > 1:
            num_contradictory += len(same)
            continue
        values = [response.value for response in same if response.value is not None]
        if len(set(values)) > 1:  # the mean of equal numbers may differ from them by rounding
            kept.append(replace(same[0], value=math.fsum(values) / len(values)))
        else:
            kept.append(same[0])
    num_copies = len(responses) - len(kept) - num_contradictory
    return Distinct(responses=tuple(kept), num_copies=num_copies, num_contradictory=num_contradictory)


def partition_group(record: GroupRecord, options: Partition) -> Sides:
    """Split one group.

    Raises:
        DataError: the rule needs labels or values that the record does not give.
    """
    responses, where = record.responses, record.where
    if not responses:
        return _sides(())
    if _goes_by_labels(responses, options):
        labels = [response.label for response in responses]
        if any(label is None for label in labels):
            needs = "a label" if options.rule == "label" else "a value or a label"
            raise DataError(
                f"{where}: --partition {options.rule} needs {needs} on every response, but the record gives none; "
                "choose --partition topk, threshold, mean or rank, or add labels"
            )
        signs = tuple(label or 0 for label in labels)
        return _random_of_sides(record, signs, options) if options.rule == "random-pair" else _sides(signs)
    values = [math.nan if response.value is None else response.value for response in responses]
    if any(math.isnan(value) for value in values):
        raise DataError(
            f"{where}: --partition {options.rule} needs a value on every response, but the record gives none; "
            "choose --partition label, or add scores"
        )
    if options.rule == "topk":
        return _topk(record, values, options)
    if options.rule == "best-worst":
        return _best_worst(responses, values)
    if options.rule == "random-pair":
        return _random_pair(record, values, options)
    return _RULES[options.rule](values, options)


def cap_sides(responses: Sequence[ResponseRecord], sides: Sides, options: Partition) -> tuple[Sides, int]:
    """``sides`` within the group's largest sizes, and how many responses that drops.

    Positives with the highest values stay, negatives with the lowest; equal ones, and all where there are no values,
    in the order of the file. Where both together are still more than ``max_responses``, the larger side gives up its
    last, of equal sides the negatives.
    """
    if options.max_positives is options.max_negatives is options.max_responses is None:
        return sides, 0
    positives = [i for i, label in zip(sides.kept, sides.labels) if label == POSITIVE]
    negatives = [i for i, label in zip(sides.kept, sides.labels) if label == NEGATIVE]
    num_positives = min(len(positives), options.max_positives or len(positives))
    num_negatives = min(len(negatives), options.max_negatives or len(negatives))
    while options.max_responses is not None and num_positives + num_negatives > options.max_responses:
        if num_positives > num_negatives:
            num_positives -= 1
        else:
            num_negatives -= 1
    num_dropped = len(sides.kept) - num_positives - num_negatives
    if not num_dropped:
        return sides, 0
    # sorted() keeps the order of the file among equals
    best = sorted(positives, key=lambda i: -(responses[i].value or 0.0))[:num_positives]
    worst = sorted(negatives, key=lambda i: responses[i].value or 0.0)[:num_negatives]
    signs = dict.fromkeys(best, POSITIVE) | dict.fromkeys(worst, NEGATIVE)
    kept = tuple(sorted(signs))
    return replace(sides, kept=kept, labels=tuple(signs[i] for i in kept)), num_dropped


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


def _sides(signs: Sequence[int], *, num_ties: int = 0, num_middle: int = 0, num_not_drawn: int = 0) -> Sides:
    """Signs +1, -1, or 0 for a dropped response."""
    kept = tuple(i for i, sign in enumerate(signs) if sign != 0)
    labels = tuple(signs[i] for i in kept)
    return Sides(kept=kept, labels=labels, num_ties=num_ties, num_middle=num_middle, num_not_drawn=num_not_drawn)


def _topk(record: GroupRecord, values: Sequence[float], options: Partition) -> Sides:
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
    num_broken = 0
    if options.tie_break != "drop" and tied_top != tied_bottom:  # one value on both sides would rank nothing
        for i in _tie_order(record, options):
            side, size = (POSITIVE, positives) if values[i] == tied_top else (NEGATIVE, negatives)
            if values[i] in (tied_top, tied_bottom) and signs.count(side) < size:
                signs[i] = side
                num_broken += 1
    sides = _sides(signs, num_ties=num_ties - num_broken, num_middle=num_middle)
    return replace(sides, num_ties_broken=num_broken)


def _tie_order(record: GroupRecord, options: Partition) -> Sequence[int]:
    """All positions, those that are taken first ahead."""
    if options.tie_break == "first":
        return range(len(record.responses))
    order = _draw_order(record)
    if options.tie_break == "random":
        random.Random(_seed_of(record, options)).shuffle(order)
        return order
    return sorted(order, key=lambda i: _num_characters(record.responses[i].text))


def _num_characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message.content) for message in text)


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


def _best_worst(responses: Sequence[ResponseRecord], values: Sequence[float]) -> Sides:
    best, worst = max(values), min(values)
    if best == worst:
        return _sides([0] * len(values), num_ties=len(values))
    # Among equals the texts decide, not the order of the file.
    order = sorted(range(len(values)), key=lambda i: _text_key(responses[i].text))
    positive = next(i for i in order if values[i] == best)
    negative = next(i for i in order if values[i] == worst)
    num_ties = sum(value in (best, worst) for value in values) - 2
    signs = [POSITIVE if i == positive else NEGATIVE if i == negative else 0 for i in range(len(values))]
    return _sides(signs, num_ties=num_ties, num_middle=len(values) - 2 - num_ties)


def _random_pair(record: GroupRecord, values: Sequence[float], options: Partition) -> Sides:
    if min(values) == max(values):
        return _sides([0] * len(values), num_ties=len(values))
    order, draw = _draw_order(record), random.Random(_seed_of(record, options))
    first, second = draw.sample(order, 2)
    while values[first] == values[second]:
        first, second = draw.sample(order, 2)
    better, worse = (first, second) if values[first] > values[second] else (second, first)
    return _pair(len(values), better, worse)


def _random_of_sides(record: GroupRecord, signs: Sequence[int], options: Partition) -> Sides:
    if is_one_sided(signs):
        return _sides(signs)
    order = _draw_order(record)
    draw = random.Random(_seed_of(record, options))
    positive, negative = (draw.choice([i for i in order if signs[i] == side]) for side in (POSITIVE, NEGATIVE))
    return _pair(len(signs), positive, negative)


def _pair(num_responses: int, positive: int, negative: int) -> Sides:
    signs = [POSITIVE if i == positive else NEGATIVE if i == negative else 0 for i in range(num_responses)]
    return _sides(signs, num_not_drawn=num_responses - 2)


def _draw_order(record: GroupRecord) -> list[int]:
    """Positions in an order that the file's order has no part in."""
    return sorted(range(len(record.responses)), key=lambda i: _text_key(record.responses[i].text))


def _seed_of(record: GroupRecord, options: Partition) -> int:
    """Of the seed and the group's texts, so that neither the file's order nor the number of workers plays a part."""
    keys = sorted(_text_key(response.text) for response in record.responses)
    whole = b"".join([str(options.seed or 0).encode(), b":", _text_key(record.prompt), *keys])
    return int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest())


def _said(message: Message) -> tuple[str, ...]:
    return (message.role, message.content, *([message.extra] if message.extra else []))


def _text_key(text: Text) -> bytes:
    plain = text if isinstance(text, str) else repr([_said(message) for message in text])
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _goes_by_labels(responses: Sequence[ResponseRecord], options: Partition) -> bool:
    if options.rule == "random-pair":
        return any(response.value is None for response in responses)
    return options.rule == "label"


_RULES: dict[str, Callable[[Sequence[float], Partition], Sides]] = {
    "threshold": _threshold,
    "mean": _mean,
    "rank": _rank,
}


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")
