"""Distilabel and Argilla: ``{"instruction", "input"?, "generations": [...], "ratings": [...]}``, two parallel lists."""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.types import GroupRecord, ResponseRecord

FIELDS = KnownFields(
    formats="distilabel, Argilla",
    read="instruction generations ratings",
    harmless={
        "rationales rationale raw_labelling_response labelling_model labelling_prompt": "how the ratings came about",
        "raw_generation_responses raw_generation_response generation_prompt": "how the generations came about",
        "types rationales-for-ratings order chosen rejected chosen-rating rejected-rating": "derived from the ratings",
    },
)


def matches(record: Record) -> bool:
    """An instruction, generations and ratings."""
    return {"instruction", "generations", "ratings"} <= record.keys()


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on a missing field, lists of different lengths, or a rating that is no number."""
    prompt = turns.asked(record, "instruction", where)
    texts = fields.items(fields.field(record, "generations", where), "generations", where)
    ratings = fields.items(fields.field(record, "ratings", where), "ratings", where)
    fields.same_length(texts, ratings, "generations and ratings", where)
    responses = [
        ResponseRecord(
            text=turns.text(text, f"generations[{i}]", where),
            value=fields.number(rating, f"ratings[{i}]", where),
        )
        for i, (text, rating) in enumerate(zip(texts, ratings))
    ]
    return fields.group(prompt, responses, where)
