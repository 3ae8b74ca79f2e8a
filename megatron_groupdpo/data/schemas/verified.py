"""Verified solutions: ``{"question", <name>: {"solution", "is_correct"}, <name>: {...}, ...}``.

Every field that is an object with ``is_correct`` is a response; other fields (``ground_truth``) are ignored.
"""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.types import NEGATIVE, POSITIVE, GroupRecord, ResponseRecord


def matches(record: Record) -> bool:
    """A question and at least one solution with a verdict."""
    return "question" in record and bool(_solutions(record))


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError where a verdict is not true or false, or a solution has no text."""
    prompt = fields.text(fields.field(record, "question", where), "question", where)
    responses = []
    for name in _solutions(record):
        entry = record[name]
        text = fields.text(fields.field(entry, "solution", where), f"{name}.solution", where)
        correct = fields.boolean(entry["is_correct"], f"{name}.is_correct", where)
        label = POSITIVE if correct else NEGATIVE
        responses.append(ResponseRecord(text=text, value=float(correct), label=label))
    return fields.group(prompt, responses, where)


def _solutions(record: Record) -> list[str]:
    return [name for name, entry in record.items() if isinstance(entry, dict) and "is_correct" in entry]
