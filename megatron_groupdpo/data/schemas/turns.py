"""Texts and chat turns of a record: messages in the forms in use, what stands beside the prompt.

A turn keeps all its fields, for the chat template; what would change its meaning and cannot be honoured is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_groupdpo.data.schemas import known
from megatron_groupdpo.data.schemas.fields import Record, SchemaOptions, field, items, show, string
from megatron_groupdpo.data.text.templates import check_names
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupRecord, Message, Text

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a turn's reasoning, which transformers hands to a template under the one it reads."""
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_REFUSED_SHAREGPT = ("function_call", "observation")
_FIELDS = {*known.TURN_READ.split()} - {"role", "content", "from", "value", "weight", "loss"}
_HARMLESS = {name for names in known.TURN_HARMLESS for name in names.split()}
_REFUSED = {name: reason for names, reason in known.TURN_REFUSED.items() for name in names.split()}


def text(value: Any, name: str, where: str) -> Text:
    """Plain text, or chat messages: a list of them, one alone, or either as JSON text."""
    if isinstance(value, str):
        parsed = _parsed_messages(value)
        return string(value, name, where) if parsed is None else messages(parsed, name, where)
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        return messages([value], name, where)
    return messages(value, name, where) if isinstance(value, list | tuple) else string(value, name, where)


def _parsed_messages(value: str) -> Any:
    """What a JSON text of messages holds; None for any other text."""
    start = value[:64].lstrip()
    if not start.startswith(("[", "{")) or '"' not in value[:256]:
        return None
    try:
        parsed = json.loads(value)
    except ValueError:
        return None
    turns = parsed if isinstance(parsed, list) else [parsed]
    are_turns = all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns)
    return turns if turns and are_turns else None


def messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    """A non-empty list of ``{"role", "content"}`` objects, or of ShareGPT's ``{"from", "value"}``."""
    turns = tuple(_message(turn, f"{name}[{i}]", where) for i, turn in enumerate(items(value, name, where)))
    if not turns:
        raise DataError(f"{where}: {name} must hold at least one message, got an empty list")
    return turns


def _message(turn: Any, name: str, where: str) -> Message:
    if isinstance(turn, Mapping) and "from" in turn and "role" not in turn:
        turn = _from_sharegpt(turn, name, where)
    role = string(field(turn, "role", where), f"{name}.role", where)
    for key, reason in _REFUSED.items():
        if turn.get(key):
            raise DataError(f"{where}: {name} has {key} ({show(turn[key])}), which cannot be used: {reason}")
    extra: dict[str, Any] = {
        key: value
        for key, value in turn.items()
        if value not in (None, []) and key not in ("role", "content", "weight", "loss") and key not in _HARMLESS
    }
    for key in (*REASONING, "name", "tool_call_id"):
        if key in extra:
            string(extra[key], f"{name}.{key}", where)
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(extra["tool_calls"], f"{name}.tool_calls", where)
    content = turn.get("content")
    if content is None and (("tool_calls" in extra) or any(key in extra for key in REASONING)):
        content, extra["content"] = "", None
    else:
        content = _content(field(turn, "content", where), f"{name}.content", where)
    return Message(
        role=role,
        content=content,
        extra=json.dumps(extra, ensure_ascii=False) if extra else "",
        trained=_trained(turn, role, name, where),
    )


def _from_sharegpt(turn: Record, name: str, where: str) -> Record:
    speaker = string(turn["from"], f"{name}.from", where)
    if speaker in _REFUSED_SHAREGPT:
        raise DataError(
            f"{where}: {name} is from {speaker!r}, ShareGPT's form of tools; write it as a message with tool_calls, or "
            "with the role 'tool'"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT_ROLES.get(speaker, speaker), "content": field(turn, "value", where), **rest}


def _content(value: Any, name: str, where: str) -> str:
    """A text, also as the only part of a list of parts."""
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping):
        if value[0].get("type", "text") == "text" and "text" in value[0]:
            return string(value[0]["text"], f"{name}[0].text", where)
        raise DataError(f"{where}: {name}[0] has the type {value[0].get('type')!r}, but only text is trained on")
    if isinstance(value, list | tuple):
        raise DataError(f"{where}: {name} has {len(value)} parts ({show(value)}); write them as one text")
    return string(value, name, where)


def _tool_calls(value: Any, name: str, where: str) -> list[Any]:
    """Calls as templates want them: arguments as an object, which the chat APIs give as JSON text."""
    calls = []
    for i, call in enumerate(items(value, name, where)):
        if not isinstance(call, Mapping):
            raise DataError(f"{where}: {name}[{i}] must be an object with a function, got {show(call)}")
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: {name}[{i}] must name a function, got {show(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except ValueError:
                parsed = None
            function = {**function, "arguments": parsed if isinstance(parsed, dict) else arguments}
        calls.append({**call, "function": function} if "function" in call else dict(function))
    return calls


def _trained(turn: Record, role: str, name: str, where: str) -> bool | None:
    """``weight`` (OpenAI) or ``loss`` (ms-swift): whether an assistant's turn is trained on."""
    given = {key: turn[key] for key in ("weight", "loss") if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise DataError(
                f"{where}: {name}.{key} must be 0 or 1, got {show(value)}; no share of a turn is trained on"
            )
        if value and role != "assistant":
            raise DataError(f"{where}: {name}.{key} is {value}, but only the assistant's turns are trained on")
    if len({bool(value) for value in given.values()}) > 1:
        raise DataError(f"{where}: {name} has a weight and a loss that differ ({given}); keep one")
    return bool(next(iter(given.values()))) if given else None


def asked(record: Record, key: str, where: str) -> Text:
    """The text or messages under ``key``; to a text, a non-empty ``input`` is appended on a line of its own."""
    given = text(field(record, key, where), key, where)
    if record.get("input") in (None, "", given):
        return given
    context = string(record["input"], "input", where)
    if not isinstance(given, str):
        raise DataError(f"{where}: input ({show(context)}) cannot be appended to messages; write it into {key}")
    return "\n".join(part for part in (given, context) if part)


def check_weights(group: GroupRecord) -> None:
    """DataError where a turn of the prompt asks to be trained on, or nothing of a response does."""
    for turn in () if isinstance(group.prompt, str) else group.prompt:
        if turn.trained:
            raise DataError(
                f"{group.where}: a turn of the prompt has a weight or loss of 1 ({show(turn.content)}), but prompts "
                "are context here; give it 0, or move it into the response"
            )
    for i, response in enumerate(group.responses):
        if not isinstance(response.text, str):
            given = [turn.trained for turn in response.text if turn.role == "assistant"]
            if given and all(trained is False for trained in given):
                raise DataError(f"{group.where}: weights leave nothing of response {i} to train on; drop the record")


def unread_in_turns(group: GroupRecord) -> tuple[str, ...]:
    """Unknown fields of turns that hold text. They go to the template, which may know them."""
    texts = [group.prompt, *(response.text for response in group.responses)]
    found: dict[str, None] = {}
    for message in (message for each in texts if not isinstance(each, str) for message in each):
        if message.extra:
            given = json.loads(message.extra)
            found |= dict.fromkeys(
                f"message.{key}" for key, value in given.items() if key not in _FIELDS and known.holds_text(value)
            )
    found.pop("message.content", None)
    return tuple(found)


# What stands beside the prompt


def with_what_stands_beside(group: GroupRecord, record: Record, options: SchemaOptions) -> GroupRecord:
    """The group with the record's earlier turns, system turn, tools and template arguments."""
    if options.apply_chat_template or not _is_plain(group):
        group = _with_dialogue(group)
    group = _with_history(group, record, options)
    group = with_system_turn(group, record, options)
    tools = _json(record, "tools", group.where)
    arguments = _json(record, "chat_template_kwargs", group.where)
    if tools is not None:
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise DataError(f"{group.where}: tools must be a list of objects, got {show(tools)}")
        group = replace(group, tools=json.dumps(tools, ensure_ascii=False))
    if arguments is not None:
        arguments = check_names(arguments, f"{group.where}: chat_template_kwargs")
        group = replace(group, template_arguments=json.dumps(arguments, ensure_ascii=False) if arguments else "")
    for key, given in (("tools", group.tools), ("chat_template_kwargs", group.template_arguments)):
        if given and _is_plain(group) and options.apply_chat_template is False:
            raise _needs_template(key, given, group.where)
    rendered = record.get("rendered")
    if rendered not in (None, True, False):
        raise DataError(f"{group.where}: rendered must be true or false, got {show(rendered)}")
    if rendered and (options.apply_chat_template or not _is_plain(group)):
        raise DataError(f"{group.where}: rendered is true, but a chat template would be applied; give plain text")
    return replace(group, is_rendered=bool(rendered))


def _json(record: Record, key: str, where: str) -> Any:
    """A field that may be JSON text; None where it is absent or empty."""
    value = record.get(key)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: {key} is text, but no JSON ({show(value)}); write it as JSON") from None
    return value or None


def _is_plain(group: GroupRecord) -> bool:
    return isinstance(group.prompt, str) and all(isinstance(response.text, str) for response in group.responses)


def _needs_template(key: str, given: str, where: str) -> DataError:
    return DataError(
        f"{where}: {key} ({show(given)}) is for a chat template, but prompt and responses are plain text; use "
        "--apply-chat-template, or remove the field"
    )


def _with_dialogue(group: GroupRecord) -> GroupRecord:
    """A text prompt that is a dialogue of ``Human:`` and ``Assistant:`` lines (HH-RLHF, Nectar) as turns.

    It begins with ``Human:``, the two take turns, and ``Assistant:`` is its end. A space before an answer goes.
    """
    prompt = group.prompt
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("Human:"):
        return group
    _, *parts = _SPEAKER.split(prompt.strip())
    speakers, said = parts[::2], [part.strip() for part in parts[1::2]]
    takes_turns = all(speaker == ("Human", "Assistant")[i % 2] for i, speaker in enumerate(speakers))
    if not takes_turns or len(speakers) % 2 or said[-1]:
        return group
    turns = tuple(
        Message(role="user" if speaker == "Human" else "assistant", content=content)
        for speaker, content in zip(speakers[:-1], said)
    )
    answers = [
        replace(response, text=response.text.removeprefix(" ")) if isinstance(response.text, str) else response
        for response in group.responses
    ]
    return replace(group, prompt=turns, responses=tuple(answers))


def _with_history(group: GroupRecord, record: Record, options: SchemaOptions) -> GroupRecord:
    """Earlier turns (LLaMA-Factory's ``history``: pairs of question and answer, or messages) before a text prompt."""
    given = record.get("history")
    if not given:
        return group
    earlier: list[Message] = []
    for i, entry in enumerate(items(given, "history", group.where)):
        if isinstance(entry, Mapping):
            earlier.append(_message(entry, f"history[{i}]", group.where))
            continue
        pair = items(entry, f"history[{i}]", group.where)
        if len(pair) != 2:
            raise DataError(f"{group.where}: history[{i}] must be a question and its answer, got {show(entry)}")
        for role, content in zip(("user", "assistant"), pair):
            earlier.append(Message(role=role, content=string(content, f"history[{i}]", group.where)))
    if not isinstance(group.prompt, str):
        raise DataError(f"{group.where}: history ({show(given)}) stands beside messages; write it into them")
    if _is_plain(group) and options.apply_chat_template is False:
        raise _needs_template("history", str(given), group.where)
    return replace(group, prompt=(*earlier, Message(role="user", content=group.prompt)))


_SYSTEM_KEYS = ("system", "system_prompt")


def with_system_turn(group: GroupRecord, record: Record, options: SchemaOptions) -> GroupRecord:
    """The group with the record's system text as the first turn of its prompt; empty or null: as it is.

    An empty text prompt stays as it is, for the tokenizer to drop and count.

    Raises:
        DataError: the field is no text, two of them differ, the prompt has another system turn, or prompt and
            responses are plain text that no chat template is applied to, so nothing could carry the turn.
    """
    given = {key: string(record[key], key, group.where) for key in _SYSTEM_KEYS if record.get(key) not in (None, "")}
    if not given:
        return group
    key, content = next(iter(given.items()))
    if len(set(given.values())) > 1:
        raise DataError(
            f"{group.where}: {' and '.join(given)} differ ({', '.join(map(show, given.values()))}); keep one"
        )
    turn = Message(role="system", content=content)
    prompt = group.prompt
    if isinstance(prompt, str):
        if not prompt.strip():
            return group
        is_text = all(isinstance(response.text, str) for response in group.responses)
        if is_text and options.apply_chat_template is False:
            raise DataError(
                f"{group.where}: {key} ({show(content)}) is a chat turn, but prompt and responses are plain "
                "text; use --apply-chat-template, or remove the field"
            )
        return replace(group, prompt=(turn, Message(role="user", content=prompt)))
    others = [message for message in prompt if message.role == "system"]
    if not others:
        return replace(group, prompt=(turn, *prompt))
    if others != [turn]:
        raise DataError(
            f"{group.where}: {key} ({show(content)}) differs from the system turn of the messages "
            f"({show(others[0].content)}); keep one"
        )
    return group
