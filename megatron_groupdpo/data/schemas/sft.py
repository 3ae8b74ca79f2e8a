"""Single answers: ``{"question", "answer"}``, ``{"prompt", "response" | "completion"}`` or ``{"messages"}``.

Each becomes a group of one positive response, which only the ``sft`` objective can use. So it is never
detected: it must be named.
"""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import POSITIVE, GroupRecord, ResponseRecord

_SPELLINGS = (("question", "answer"), ("prompt", "response"), ("prompt", "completion"))

FIELDS = KnownFields(
    formats="TRL, OpenAI fine-tuning, GSM8K",
    read="prompt question response answer completion messages",
)


def matches(record: Record) -> bool:
    """One of the spellings is there (used to hint at this schema, never to choose it)."""
    return "messages" in record or any(a in record and b in record for a, b in _SPELLINGS)


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on a missing or ill-typed field."""
    if "messages" in record:
        conversation = turns.messages(record["messages"], "messages", where)
        if len(conversation) < 2 or conversation[-1].role != "assistant":
            raise DataError(
                f"{where}: messages must be a prompt followed by one assistant answer, "
                f"got roles {[turn.role for turn in conversation]}"
            )
        # Turns that a weight asks for are trained on; without weights, the last.
        weighted = [i for i, turn in enumerate(conversation) if turn.trained]
        start = max(1, min([*weighted, len(conversation) - 1]))
        prompt, answer = conversation[:start], conversation[start:]
    else:
        asked, answered = next(((a, b) for a, b in _SPELLINGS if a in record and b in record), ("prompt", "response"))
        prompt = turns.asked(record, asked, where)
        answer = turns.text(fields.field(record, answered, where), answered, where)
    return fields.group(prompt, [ResponseRecord(text=answer, label=POSITIVE)], where, allow_one=True)
