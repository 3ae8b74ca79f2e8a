"""``{"prompt"?, "chosen", "rejected", "score_chosen"?, "score_rejected"?}``: text or messages.

Without a prompt, or with messages that repeat it, the prompt is what the two sides share at their start.
"""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import NEGATIVE, POSITIVE, GroupRecord, Message, ResponseRecord, Text


def matches(record: Record) -> bool:
    """Both sides of a pair are there."""
    return "chosen" in record and "rejected" in record


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError where a side is missing, the sides are of different kinds, or share no prompt."""
    chosen = fields.text(fields.field(record, "chosen", where), "chosen", where)
    rejected = fields.text(fields.field(record, "rejected", where), "rejected", where)
    prompt = None
    if record.get("prompt") is not None:
        prompt = fields.text(record["prompt"], "prompt", where)
    prompt, chosen, rejected = split_pair(prompt, chosen, rejected, where)
    values = [
        fields.number(record[key], key, where) if record.get(key) is not None else None
        for key in ("score_chosen", "score_rejected")
    ]
    responses = [
        ResponseRecord(text=chosen, value=values[0], label=POSITIVE),
        ResponseRecord(text=rejected, value=values[1], label=NEGATIVE),
    ]
    return fields.group(prompt, responses, where)


def split_pair(prompt: Text | None, chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
    """``(prompt, chosen, rejected)`` with the shared prompt taken off both sides."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{where}: chosen and rejected must both be text or both be messages")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            return prompt, chosen, rejected
        cut = _shared_text(chosen, rejected)
        if cut == 0:
            raise _no_prompt(where)
        return chosen[:cut], chosen[cut:], rejected[cut:]
    assert isinstance(chosen, tuple)
    assert isinstance(rejected, tuple)
    shared = _shared_messages(chosen, rejected)
    if prompt is not None and not _repeats(prompt, chosen[:shared]):
        return prompt, chosen, rejected
    if shared == 0:
        raise _no_prompt(where)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _no_prompt(where: str) -> DataError:
    return DataError(
        f"{where}: without a prompt field, chosen and rejected must start with the same prompt, "
        "but they share nothing; add the field 'prompt'"
    )


def _shared_messages(first: tuple[Message, ...], second: tuple[Message, ...]) -> int:
    """Number of equal leading messages, at least one being left on both sides and the prompt not ending
    with the answer's own role."""
    limit = min(len(first), len(second)) - 1
    count = 0
    while count < limit and first[count] == second[count]:
        count += 1
    while count > 0 and first[count - 1].role == "assistant":
        count -= 1
    return count


def _repeats(prompt: Text, shared: tuple[Message, ...]) -> bool:
    """Whether the shared messages are the explicit prompt once more (UltraFeedback-binarized does this)."""
    if isinstance(prompt, str):
        return any(message.content == prompt for message in shared)
    return shared[: len(prompt)] == prompt


def _shared_text(first: str, second: str) -> int:
    """Length of the shared text up to the last ``Assistant:`` in it, or else to its last line or word end."""
    limit = min(len(first), len(second))
    count = next((i for i in range(limit) if first[i] != second[i]), limit)
    marker = first.rfind("Assistant:", 0, count)
    if marker >= 0:
        return marker + len("Assistant:")
    return max(first.rfind("\n", 0, count), first.rfind(" ", 0, count)) + 1
