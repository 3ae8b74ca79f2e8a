"""What preprocessing kept, dropped and changed, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from megatron_groupdpo.errors import DataError


class Reason(NamedTuple):
    """A line of the summary: how many ``unit`` were ``outcome`` because of ``reason``."""

    unit: Literal["groups", "responses", "tokens"]
    outcome: Literal["read", "kept", "dropped", "truncated", "changed"]
    reason: str = ""


Counts = Counter[Reason]

GROUPS_READ = Reason("groups", "read")
GROUPS_KEPT = Reason("groups", "kept")
KEPT_ONE_SIDED = Reason("groups", "kept", "of these one-sided (NLL term only)")
AS_CHAT = Reason("groups", "kept", "of these by the chat template")
AS_TEXT = Reason("groups", "kept", "of these as plain text")
BAD_RECORD = Reason("groups", "dropped", "bad record")
ONE_SIDED = Reason("groups", "dropped", "one-sided: no positive or no negative response")
TIED_OUT = Reason("groups", "dropped", "one-sided: ties took a side")
BECAME_ONE_SIDED = Reason("groups", "dropped", "one-sided after responses were dropped")
LOST_BY_TEMPLATE = Reason("groups", "dropped", "bad record: text that the chat template leaves out")
LOST_BY_TOKENIZER = Reason("groups", "dropped", "bad record: text that the tokenizer has no tokens for")
EMPTY_PROMPT = Reason("groups", "dropped", "empty prompt")
PROMPT_TOO_LONG = Reason("groups", "dropped", "prompt leaves no room for a response")
PROMPT_CUT = Reason("groups", "truncated", "prompt cut from the left")
ESCAPED = Reason("groups", "changed", "spell control tokens in their texts, which stay text")
PROMPT_TRIMMED = Reason("groups", "changed", "prompt: white space trimmed by the chat template")
REASONING_CUT = Reason("groups", "changed", "prompt: reasoning of earlier turns left out by the chat template")
PROMPT_NORMALIZED = Reason("groups", "changed", "prompt: characters replaced by the tokenizer's normalizer")

RESPONSES_READ = Reason("responses", "read")
RESPONSES_KEPT = Reason("responses", "kept")
DUPLICATE = Reason("responses", "dropped", "equal to an earlier response of the group")
CONTRADICTORY = Reason("responses", "dropped", "equal to another response with the other label")
TIED = Reason("responses", "dropped", "tied at the boundary")
TIES_BROKEN = Reason("responses", "read", "of these tied at the boundary and taken by --tie-break")
MIDDLE = Reason("responses", "dropped", "neither among the best nor the worst")
NOT_DRAWN = Reason("responses", "dropped", "not in the drawn pair")
CAPPED = Reason("responses", "dropped", "beyond the most positives, negatives or responses of a group")
EMPTY_RESPONSE = Reason("responses", "dropped", "empty")
TOO_LONG = Reason("responses", "dropped", "longer than the sequence length")
NO_PREFIX = Reason("responses", "dropped", "chat template: the prompt is no prefix")
SAME_TOKENS = Reason("responses", "dropped", "same tokens as an earlier response, once rendered, encoded and cut")
SAME_TOKENS_AS_OTHER_SIDE = Reason("responses", "dropped", "same tokens as a response of the other side")
GROUP_DROPPED = Reason("responses", "dropped", "their group was dropped")
RESPONSE_CUT = Reason("responses", "truncated", "cut at the end")
RETOKENIZED = Reason("responses", "changed", "chat template: tokenized in pieces to keep the prompt a prefix")
SPANNED = Reason("responses", "changed", "a token would span the prompt's end: encoded as after a line break")
RESPONSE_TRIMMED = Reason("responses", "changed", "white space trimmed by the chat template")
RESPONSE_NORMALIZED = Reason("responses", "changed", "characters replaced by the tokenizer's normalizer")

PROMPT_TOKENS = Reason("tokens", "kept", "in prompts")
RESPONSE_TOKENS = Reason("tokens", "kept", "in responses")

_UNREAD = "unknown field with text, not read: "


def unread_field(name: str) -> Reason:
    """Groups that have text in a field that nothing reads."""
    return Reason("groups", "read", _UNREAD + name[:60])


def unread_fields(counts: Counts) -> dict[str, int]:
    """Groups by unknown field with text."""
    return {reason.reason.removeprefix(_UNREAD): n for reason, n in counts.items() if reason.reason.startswith(_UNREAD)}


class CountedError(DataError):
    """A bad record with a line of its own in the summary."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


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
