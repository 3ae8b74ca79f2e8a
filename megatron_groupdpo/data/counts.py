"""What preprocessing kept, dropped and changed, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple


class Reason(NamedTuple):
    """A line of the summary: how many ``unit`` were ``outcome`` because of ``reason``."""

    unit: Literal["groups", "responses", "tokens"]
    outcome: Literal["read", "kept", "dropped", "truncated", "changed"]
    reason: str = ""


Counts = Counter[Reason]

GROUPS_READ = Reason("groups", "read")
GROUPS_KEPT = Reason("groups", "kept")
KEPT_ONE_SIDED = Reason("groups", "kept", "of these one-sided (NLL term only)")
BAD_RECORD = Reason("groups", "dropped", "bad record")
ONE_SIDED = Reason("groups", "dropped", "one-sided: no positive or no negative response")
BECAME_ONE_SIDED = Reason("groups", "dropped", "one-sided after responses were dropped")
EMPTY_PROMPT = Reason("groups", "dropped", "empty prompt")
PROMPT_TOO_LONG = Reason("groups", "dropped", "prompt leaves no room for a response")
PROMPT_CUT = Reason("groups", "truncated", "prompt cut from the left")

RESPONSES_READ = Reason("responses", "read")
RESPONSES_KEPT = Reason("responses", "kept")
DUPLICATE = Reason("responses", "dropped", "equal to an earlier response of the group")
CONTRADICTORY = Reason("responses", "dropped", "equal to another response with the other label")
TIED = Reason("responses", "dropped", "tied at the boundary")
MIDDLE = Reason("responses", "dropped", "neither among the best nor the worst")
NOT_DRAWN = Reason("responses", "dropped", "not in the drawn pair")
CAPPED = Reason("responses", "dropped", "beyond the most positives, negatives or responses of a group")
EMPTY_RESPONSE = Reason("responses", "dropped", "empty")
TOO_LONG = Reason("responses", "dropped", "longer than the sequence length")
NO_PREFIX = Reason("responses", "dropped", "chat template: the prompt is no prefix")
GROUP_DROPPED = Reason("responses", "dropped", "their group was dropped")
RESPONSE_CUT = Reason("responses", "truncated", "cut at the end")
RETOKENIZED = Reason("responses", "changed", "chat template: tokenized in pieces to keep the prompt a prefix")

PROMPT_TOKENS = Reason("tokens", "kept", "in prompts")
RESPONSE_TOKENS = Reason("tokens", "kept", "in responses")

_UNITS = ("groups", "responses", "tokens")
_OUTCOMES = ("read", "kept", "dropped", "truncated", "changed")


def summary_table(counts: Counts) -> str:
    """The non-zero counts as aligned lines, groups first."""
    order = sorted(
        (reason for reason, count in counts.items() if count),
        key=lambda r: (_UNITS.index(r.unit), _OUTCOMES.index(r.outcome), r.reason),
    )
    width = max((len(f"{counts[reason]:,}") for reason in order), default=1)
    return "\n".join(
        f"{reason.unit:<10} {reason.outcome:<10} {counts[reason]:>{width},}  {reason.reason}".rstrip()
        for reason in order
    )


def counts_as_json(counts: Counts) -> list[list[str | int]]:
    """``[[unit, outcome, reason, count], ...]`` in a fixed order."""
    return [[*reason, count] for reason, count in sorted(counts.items()) if count]


def counts_from_json(record: Iterable[Sequence[Any]]) -> Counts:
    """Inverse of :func:`counts_as_json`."""
    return Counts({Reason(unit, outcome, reason): count for unit, outcome, reason, count in record})
