"""Samples with rewards: ``{"prompt", "all_generated_responses", "all_rm_scores" | "scores"}`` or
``{"prompt", "responses", "rewards"}``, two parallel lists.
"""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.types import GroupRecord, ResponseRecord

FIELDS = KnownFields(
    formats="samples of a policy with rewards",
    read="prompt all_generated_responses all_rm_scores scores responses rewards",
    harmless={
        "chosen rejected messages": "the best and the worst once more",
    },
)


def matches(record: Record) -> bool:
    """A prompt and one of the two spellings."""
    if "prompt" not in record:
        return False
    generated = "all_generated_responses" in record and ("all_rm_scores" in record or "scores" in record)
    return generated or ("responses" in record and "rewards" in record)


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on a missing field, lists of different lengths, or a score that is no number."""
    if "all_generated_responses" in record:
        texts_key = "all_generated_responses"
        values_key = "scores" if "all_rm_scores" not in record and "scores" in record else "all_rm_scores"
    else:
        texts_key, values_key = "responses", "rewards"
    prompt = turns.asked(record, "prompt", where)
    texts = fields.items(fields.field(record, texts_key, where), texts_key, where)
    values = fields.items(fields.field(record, values_key, where), values_key, where)
    fields.same_length(texts, values, f"{texts_key} and {values_key}", where)
    responses = [
        ResponseRecord(
            text=turns.text(text, f"{texts_key}[{i}]", where),
            value=fields.number(value, f"{values_key}[{i}]", where),
        )
        for i, (text, value) in enumerate(zip(texts, values))
    ]
    return fields.group(prompt, responses, where)
