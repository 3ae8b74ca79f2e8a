"""The system turn that a record gives beside its prompt: ``system`` or ``system_prompt``."""

from __future__ import annotations

from dataclasses import replace

from megatron_groupdpo.data.schemas import fields
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupRecord, Message

_KEYS = ("system", "system_prompt")


def with_system_turn(group: GroupRecord, record: Record, options: SchemaOptions) -> GroupRecord:
    """The group with the record's system text as the first turn of its prompt; empty or null: as it is.

    An empty text prompt stays as it is, for the tokenizer to drop and count.

    Raises:
        DataError: the field is no text, two of them differ, the prompt has another system turn, or prompt and
            responses are plain text that no chat template is applied to, so nothing could carry the turn.
    """
    given = {key: fields.string(record[key], key, group.where) for key in _KEYS if record.get(key) not in (None, "")}
    if not given:
        return group
    key, content = next(iter(given.items()))
    if len(set(given.values())) > 1:
        raise DataError(
            f"{group.where}: {' and '.join(given)} differ ({', '.join(map(fields.show, given.values()))}); keep one"
        )
    turn = Message(role="system", content=content)
    prompt = group.prompt
    if isinstance(prompt, str):
        if not prompt.strip():
            return group
        is_text = all(isinstance(response.text, str) for response in group.responses)
        if is_text and options.apply_chat_template is False:
            raise DataError(
                f"{group.where}: {key} ({fields.show(content)}) is a chat turn, but prompt and responses are plain "
                "text; use --apply-chat-template, or remove the field"
            )
        return replace(group, prompt=(turn, Message(role="user", content=prompt)))
    others = [message for message in prompt if message.role == "system"]
    if not others:
        return replace(group, prompt=(turn, *prompt))
    if others != [turn]:
        raise DataError(
            f"{group.where}: {key} ({fields.show(content)}) differs from the system turn of the messages "
            f"({fields.show(others[0].content)}); keep one"
        )
    return group
