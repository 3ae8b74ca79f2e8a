"""UltraFeedback: ``{"instruction", "input"?, "completions": [{"response", "overall_score"}]}``."""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.types import GroupRecord, ResponseRecord

FIELDS = KnownFields(
    formats="UltraFeedback",
    read="instruction completions completions[].response completions[].overall_score",
    harmless={
        "correct_answers incorrect_answers": "references of TruthfulQA",
        "completions[].annotations completions[].critique completions[].fine-grained_score": "how the score came about",
        "completions[].rating completions[].rationale": "how the score came about",
        "completions[].custom_system_prompt completions[].principle": "how the completion was sampled: the published "
        "pairs leave it out",
    },
)


def matches(record: Record) -> bool:
    """An instruction and a list of completions that are objects."""
    return "instruction" in record and fields.is_list_of(record, "completions", dict)


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on a missing or ill-typed field."""
    prompt = turns.asked(record, "instruction", where)
    responses = []
    for i, entry in enumerate(fields.items(fields.field(record, "completions", where), "completions", where)):
        text = turns.text(fields.field(entry, "response", where), f"completions[{i}].response", where)
        score = fields.field(entry, "overall_score", where)
        value = fields.number(score, f"completions[{i}].overall_score", where)
        responses.append(ResponseRecord(text=text, value=value))
    return fields.group(prompt, responses, where)
