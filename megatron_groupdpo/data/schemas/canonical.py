"""``{"prompt", "responses": [{"text", "score"?, "rank"?, "label"?, "ref_logp"?}]}``: the project's own form.

``score`` may be an object of named scores (see ``--score-weights``). A ``rank`` (1 is best) is used in groups
without scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupRecord, ResponseRecord

FIELDS = KnownFields(
    formats="this project's own",
    read="prompt responses responses[].text responses[].score responses[].rank responses[].label responses[].ref_logp",
    refused={
        "responses[].reward responses[].value responses[].rating": "the field is score",
        "responses[].logp": "the field is ref_logp",
    },
)


def matches(record: Record) -> bool:
    """A prompt and a list of response objects that have a ``text``."""
    if "prompt" not in record or not fields.is_list_of(record, "responses", dict):
        return False
    responses = record["responses"]
    return not responses or "text" in responses[0]


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError on any field that is missing or of another type."""
    prompt = turns.asked(record, "prompt", where)
    responses = fields.items(fields.field(record, "responses", where), "responses", where)
    _check_one_scale(responses, where)
    return fields.group(
        prompt, [_response(r, f"responses[{i}]", where, options) for i, r in enumerate(responses)], where
    )


def _check_one_scale(responses: Sequence[Any], where: str) -> None:
    entries = [entry for entry in responses if isinstance(entry, Mapping)]
    num_scored = sum(entry.get("score") is not None for entry in entries)
    num_ranked = sum(entry.get("score") is None and entry.get("rank") is not None for entry in entries)
    if num_scored and num_ranked:
        raise DataError(
            f"{where}: of the responses, {num_scored} have a score and {num_ranked} only a rank, which cannot be "
            "compared; give all of a group the one or the other"
        )


def _response(entry: Record, name: str, where: str, options: SchemaOptions) -> ResponseRecord:
    text = turns.text(fields.field(entry, "text", where), f"{name}.text", where)
    score, rank = entry.get("score"), entry.get("rank")
    label, ref_logp = entry.get("label"), entry.get("ref_logp")
    if isinstance(score, dict):
        value = fields.value_of_scores(score, options, f"{name}.score", where)
    elif score is not None:
        value = fields.number(score, f"{name}.score", where)
        if options.score_weights is not None:
            raise DataError(
                f"{where}: {name}.score is one number ({score}), but --score-weights weighs named scores; leave the "
                'option out, or write the score as {"name": number}'
            )
    else:
        value = None if rank is None else -fields.number(rank, f"{name}.rank", where)
    return ResponseRecord(
        text=text,
        value=value,
        label=None if label is None else fields.label_of(label, f"{name}.label", where),
        ref_logp=None if ref_logp is None else fields.number(ref_logp, f"{name}.ref_logp", where),
    )
