"""UltraFeedback: ``{"instruction", "input"?, "completions": [{"response", "overall_score"}]}``."""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.types import GroupRecord, ResponseRecord


def matches(record: Record) -> bool:
    """An instruction and a list of completions that are objects."""
    return "instruction" in record and fields.is_list_of(record, "completions", dict)


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on a missing or ill-typed field."""
    prompt = fields.instruction(record, "instruction", where)
    responses = []
    for i, entry in enumerate(fields.items(fields.field(record, "completions", where), "completions", where)):
        text = fields.text(fields.field(entry, "response", where), f"completions[{i}].response", where)
        score = fields.field(entry, "overall_score", where)
        value = fields.number(score, f"completions[{i}].overall_score", where)
        responses.append(ResponseRecord(text=text, value=value))
    return fields.group(prompt, responses, where)
