"""Verified solutions: ``{"question", <name>: {"solution", "is_correct"}, <name>: {...}, ...}``.

Every field that is an object with ``is_correct`` is a response; other fields (``ground_truth``) are ignored.
"""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.types import NEGATIVE, POSITIVE, GroupRecord, ResponseRecord

FIELDS = KnownFields(
    formats="solutions with a verdict",
    read="question <name>.solution <name>.is_correct",
    harmless={
        "ground_truth answer reference_answer": "what the verdicts were found with",
        "<name>.answer <name>.extracted_answer": "what the verdict was found with",
    },
)


def matches(record: Record) -> bool:
    """A question and at least one solution with a verdict."""
    return "question" in record and bool(_solutions(record))


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError where a verdict is not true or false, or a solution has no text."""
    prompt = turns.asked(record, "question", where)
    responses = []
    for name in _solutions(record):
        entry = record[name]
        text = turns.text(fields.field(entry, "solution", where), f"{name}.solution", where)
        correct = fields.boolean(entry["is_correct"], f"{name}.is_correct", where)
        label = POSITIVE if correct else NEGATIVE
        responses.append(ResponseRecord(text=text, value=float(correct), label=label))
    return fields.group(prompt, responses, where)


def _solutions(record: Record) -> list[str]:
    return [name for name, entry in record.items() if isinstance(entry, dict) and "is_correct" in entry]
