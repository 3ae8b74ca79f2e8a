"""Nectar: ``{"prompt", "answers": [{"answer", "rank"}]}``, rank 1 being the best."""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.types import GroupRecord, ResponseRecord

FIELDS = KnownFields(
    formats="Nectar",
    read="prompt answers answers[].answer answers[].rank",
    harmless={
        "turns num_responses good_natured": "notes about the record",
    },
)


def matches(record: Record) -> bool:
    """A prompt and a list of answer objects."""
    return "prompt" in record and fields.is_list_of(record, "answers", dict)


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on a missing or ill-typed field."""
    prompt = turns.asked(record, "prompt", where)
    responses = []
    for i, entry in enumerate(fields.items(fields.field(record, "answers", where), "answers", where)):
        text = turns.text(fields.field(entry, "answer", where), f"answers[{i}].answer", where)
        rank = fields.number(fields.field(entry, "rank", where), f"answers[{i}].rank", where)
        responses.append(ResponseRecord(text=text, value=-rank))
    return fields.group(prompt, responses, where)
