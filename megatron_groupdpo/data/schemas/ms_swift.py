"""ms-swift: ``{"messages", "rejected_response" | "rejected_messages"}``.

The last message of ``messages`` is the chosen answer. ``rejected_response`` is one text or a list of texts;
``rejected_messages`` is a whole conversation.
"""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.data.schemas.pairs import split_pair
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import NEGATIVE, POSITIVE, GroupRecord, Message, ResponseRecord

FIELDS = KnownFields(
    formats="ms-swift 4",
    read="messages rejected_response rejected_messages",
    harmless={
        "channel": "groups the metrics there",
        "margin": "of reward models",
    },
    refused={
        "label": "of KTO, which has no pairs",
        "teacher_prompt": "of distillation",
    },
)


def matches(record: Record) -> bool:
    """Messages and one of the rejected forms."""
    return "messages" in record and ("rejected_response" in record or "rejected_messages" in record)


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on a missing or ill-typed field, or where ``messages`` holds no prompt."""
    conversation = turns.messages(fields.field(record, "messages", where), "messages", where)
    if record.get("rejected_messages") is not None:
        rejected = turns.messages(record["rejected_messages"], "rejected_messages", where)
        prompt, chosen, refused = split_pair(None, conversation, rejected, where)
        sides = [(chosen, POSITIVE), (refused, NEGATIVE)]
    else:
        if len(conversation) < 2 or conversation[-1].role != "assistant":
            raise DataError(
                f"{where}: messages must be a prompt followed by the chosen assistant answer, "
                f"got roles {[turn.role for turn in conversation]}"
            )
        prompt = conversation[:-1]
        given = fields.field(record, "rejected_response", where)
        texts = given if isinstance(given, list | tuple) else [given]
        sides = [((conversation[-1],), POSITIVE)]
        for i, text in enumerate(texts):
            content = fields.string(text, f"rejected_response[{i}]", where)
            sides.append(((Message(role="assistant", content=content),), NEGATIVE))
    return fields.group(prompt, [ResponseRecord(text=text, label=label) for text, label in sides], where)
