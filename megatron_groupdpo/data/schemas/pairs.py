"""``{"prompt"?, "chosen", "rejected", "score_chosen"?, "score_rejected"?}``: text or messages.

Messages that repeat the prompt are cut after it. Without the field ``prompt``, the prompt is

1. the turns that two conversations share at their start;
2. else ``question`` or ``instruction``, with ``input`` appended;
3. else ``conversations`` or ``messages`` that end before the answer;
4. else what two texts share up to their last common ``Assistant:`` at the start of a line, as in HH-RLHF.

Other texts are refused: answers to one question often begin alike, and that beginning is no prompt.
"""

from __future__ import annotations

from megatron_groupdpo.data.schemas import fields, turns
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.data.schemas.known import KnownFields
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import NEGATIVE, POSITIVE, GroupRecord, Message, ResponseRecord, Text

FIELDS = KnownFields(
    formats="TRL 1.x, LLaMA-Factory (alpaca, sharegpt), OpenRLHF, open-instruct, HH-RLHF, UltraFeedback binarized",
    read="prompt question instruction conversations messages chosen rejected score_chosen score_rejected",
    harmless={
        "chosen_model rejected_model chosen_model_name rejected_model_name": "who wrote the responses",
        "chosen_rating rejected_rating chosen_score rejected_score margin": "values are score_chosen, score_rejected",
        "all_generated_responses completions generations ratings": "the group that the pair was taken from",
    },
    refused={
        "query": "LLaMA-Factory's other name of input; name it so",
        "completion": "an answer without a preference; use the schema sft",
        "chosen_reasoning rejected_reasoning chosen_thinking rejected_thinking": "it belongs into messages, as "
        "reasoning_content",
    },
)


def matches(record: Record) -> bool:
    """Both sides of a pair are there."""
    return "chosen" in record and "rejected" in record


def parse(record: Record, where: str, options: SchemaOptions) -> GroupRecord:
    """Raises DataError where a side is missing, the sides are of different kinds, or share no prompt."""
    chosen = turns.text(fields.field(record, "chosen", where), "chosen", where)
    rejected = turns.text(fields.field(record, "rejected", where), "rejected", where)
    prompt = _prompt(record, where)
    if prompt is None and not _share_turns(chosen, rejected):
        prompt = _question(record, where) or _conversation(record, where)
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


def _prompt(record: Record, where: str) -> Text | None:
    """The field ``prompt``, None where there is no such field."""
    if "prompt" not in record:
        return None
    if record["prompt"] in (None, ""):
        raise DataError(
            f"{where}: prompt is {fields.show(record['prompt'])}; fill it in, or remove the field where chosen and "
            "rejected are whole conversations"
        )
    return turns.asked(record, "prompt", where)


def _question(record: Record, where: str) -> Text | None:
    """``question`` or ``instruction`` with its ``input``; None where there is neither."""
    keys = [key for key in ("question", "instruction") if record.get(key) not in (None, "")]
    if len({fields.show(record[key], 10**9) for key in keys}) > 1:
        raise DataError(f"{where}: without a prompt field, question and instruction differ; add the field 'prompt'")
    return turns.asked(record, keys[0], where) if keys else None


def _conversation(record: Record, where: str) -> Text | None:
    """Messages that end with another turn than the answer's: LLaMA-Factory's ``conversations``, or ``messages``."""
    for key in ("conversations", "messages"):
        if record.get(key):
            given = turns.messages(record[key], key, where)
            if given[-1].role != "assistant":
                return given
    return None


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
        f"{where}: the prompt is missing: there is no field prompt, question or instruction, and chosen and rejected "
        "do not share a conversation at their start (equal turns, or a text up to 'Assistant:' at the start of a "
        "line); add the field 'prompt'"
    )


def _shared_messages(first: tuple[Message, ...], second: tuple[Message, ...]) -> int:
    """Number of equal leading messages, at least one being left on both sides and the prompt not ending
    with the answer's own role."""
    limit = min(len(first), len(second)) - 1
    count = 0
    while count < limit and _is_same(first[count], second[count]):
        count += 1
    while count > 0 and first[count - 1].role == "assistant":
        count -= 1
    return count


def _is_same(first: Message, second: Message) -> bool:
    return (first.role, first.content, first.extra) == (second.role, second.content, second.extra)


def _share_turns(chosen: Text, rejected: Text) -> bool:
    return isinstance(chosen, tuple) and isinstance(rejected, tuple) and _shared_messages(chosen, rejected) > 0


def _repeats(prompt: Text, shared: tuple[Message, ...]) -> bool:
    """Whether the shared messages are the explicit prompt once more (UltraFeedback-binarized does this)."""
    if isinstance(prompt, str):
        return any(message.content == prompt for message in shared)
    return len(shared) >= len(prompt) and all(map(_is_same, shared, prompt))


def _shared_text(first: str, second: str) -> int:
    """Length of the shared text up to the last ``Assistant:`` that begins a line after other text; 0: none."""
    limit = min(len(first), len(second))
    count = next((i for i in range(limit) if first[i] != second[i]), limit)
    marker = "\nAssistant:"
    start = first.rfind(marker, 0, count)
    return start + len(marker) if start >= 0 and first[:start].strip() else 0
