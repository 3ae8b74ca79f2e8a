"""HelpSteer3: ``{"context": [messages], "response1", "response2", "overall_preference"}``.

The preference runs from -3 (response 1 is much better) to 3 (response 2 is). At 0 neither is preferred: both
are labelled negative, so the group is one-sided and counted as such.
"""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.types import NEGATIVE, POSITIVE, GroupRecord, ResponseRecord

FIELDS = KnownFields(
    formats="HelpSteer3 (preference)",
    read="context response1 response2 overall_preference",
    harmless={
        "individual_preference": "what the overall preference was made of",
        "feedback1 feedback2": "of HelpSteer3's feedback set",
    },
)


def matches(record: Record) -> bool:
    """Two responses and a preference."""
    return {"context", "response1", "response2", "overall_preference"} <= record.keys()


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on a missing or ill-typed field."""
    prompt = turns.asked(record, "context", where)
    preference = fields.number(fields.field(record, "overall_preference", where), "overall_preference", where)
    responses = []
    for key, value in (("response1", -preference), ("response2", preference)):
        text = turns.text(fields.field(record, key, where), key, where)
        label = POSITIVE if value > 0 else NEGATIVE
        responses.append(ResponseRecord(text=text, value=value, label=label))
    return fields.group(prompt, responses, where)
