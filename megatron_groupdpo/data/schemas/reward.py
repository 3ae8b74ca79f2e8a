"""Reward form: ``{"prompt", "A0", "score_A0", "A1", "score_A1", ...}``."""

from __future__ import annotations

import re

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupRecord, ResponseRecord

_ANSWER = re.compile(r"A(0|[1-9][0-9]*)")
_NUMBERED = re.compile(r"A\d+")

FIELDS = KnownFields(
    formats="AlpacaEval-like groups with scores",
    read="prompt A<n> score_A<n>",
)


def matches(record: Record) -> bool:
    """A prompt, ``A0`` and its score."""
    return {"prompt", "A0", "score_A0"} <= record.keys()


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError where an answer has no score, its number is zero-padded, or a field is ill-typed."""
    prompt = turns.asked(record, "prompt", where)
    for key in record:
        if record[key] is not None and _NUMBERED.fullmatch(key) and not _ANSWER.fullmatch(key):
            raise DataError(f"{where}: answers are named A0, A1, A2, ..., got {key!r}; rename it and its score")
    numbers = sorted(int(m[1]) for key in record if (m := _ANSWER.fullmatch(key)) and record[key] is not None)
    responses = [
        ResponseRecord(
            text=turns.text(record[f"A{i}"], f"A{i}", where),
            value=fields.number(fields.field(record, f"score_A{i}", where), f"score_A{i}", where),
        )
        for i in numbers
    ]
    return fields.group(prompt, responses, where)
