"""NeMo-RL preference form: ``{"context": [messages], "completions": [{"rank", "completion": [messages]}]}``.

Rank 0 is the best.
"""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.types import GroupRecord, ResponseRecord

FIELDS = KnownFields(
    formats="NeMo-RL, NeMo Automodel",
    read="context completions completions[].rank completions[].completion",
    refused={
        "completions[].reward completions[].score": "the field is rank",
    },
)


def matches(record: Record) -> bool:
    """A context and a list of completion objects."""
    return "context" in record and fields.is_list_of(record, "completions", dict)


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on a missing or ill-typed field."""
    prompt = turns.asked(record, "context", where)
    responses = []
    for i, entry in enumerate(fields.items(fields.field(record, "completions", where), "completions", where)):
        name = f"completions[{i}]"
        text = turns.text(fields.field(entry, "completion", where), f"{name}.completion", where)
        rank = fields.number(fields.field(entry, "rank", where), f"{name}.rank", where)
        responses.append(ResponseRecord(text=text, value=-rank))
    return fields.group(prompt, responses, where)
