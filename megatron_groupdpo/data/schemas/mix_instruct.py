"""Mix-instruct: ``{"instruction", "input", "candidates": [{"text", "scores": {name: number}}]}``.

``--score-weights`` names the scores that make the value; it may be left out where there is only one.
"""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.types import GroupRecord, ResponseRecord

FIELDS = KnownFields(
    formats="MixInstruct",
    read="instruction candidates candidates[].text candidates[].scores",
    harmless={
        "output reference": "an answer without scores",
        "candidates[].decoding_method": "how the candidate was sampled",
        "cmp_results": "comparisons beside the scores",
    },
)


def matches(record: Record) -> bool:
    """An instruction and a list of candidate objects."""
    return "instruction" in record and fields.is_list_of(record, "candidates", dict)


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on a missing or ill-typed field, or several scores without weights."""
    prompt = turns.asked(record, "instruction", where)
    responses = []
    for i, entry in enumerate(fields.items(fields.field(record, "candidates", where), "candidates", where)):
        name = f"candidates[{i}]"
        text = turns.text(fields.field(entry, "text", where), f"{name}.text", where)
        scores = fields.field(entry, "scores", where)
        value = fields.value_of_scores(scores, options, f"{name}.scores", where)
        responses.append(ResponseRecord(text=text, value=value))
    return fields.group(prompt, responses, where)
