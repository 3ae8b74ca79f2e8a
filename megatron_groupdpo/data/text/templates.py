"""Chat templates: what they see, the date they read, and control tokens that people typed.

Names of control tokens in what a record says are marked before rendering, with the private characters of
``transformers``' ``mark_control_tokens``; where ids are made of the text, a marked name is text.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import Message

START, END = "\U000f0000", "\U000f0001"
"""Around a marked name; as in ``transformers.utils.chat_template_utils``."""
_MARKS = str.maketrans("", "", START + END)

_RESERVED = ("messages", "conversation", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateInputs:
    """What a template sees beside the messages."""

    tools: Sequence[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None
    """What ``strftime_now`` tells; None: now."""


NO_INPUTS = TemplateInputs()


def read_template(file: str) -> str:
    """The text of ``--chat-template``."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat-template {file}: cannot be read ({error})") from None


def render(
    template: str,
    messages: Sequence[Message],
    names: Mapping[str, str],
    *,
    add_generation_prompt: bool,
    inputs: TemplateInputs = NO_INPUTS,
    mark_text: Callable[[str], str] | None = None,
) -> str:
    """The conversation as text; ``mark_text`` marks what the record says, message by message.

    Raises:
        DataError: the template refuses the messages, or a role spells a control token.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    turns = [as_dict(message) for message in messages]
    tools: Any = inputs.tools
    given = dict(inputs.arguments)
    if mark_text is not None:
        for message in messages:
            if mark_text(message.role) != message.role:
                raise DataError(f"the role {message.role!r} spells a control token; correct the record")
        turns = [_marked(turn, mark_text) for turn in turns]
        tools, given = _marked(tools, mark_text), _marked(given, mark_text)
    now = datetime.datetime.now() if inputs.date is None else datetime.datetime.combine(inputs.date, datetime.time())
    arguments: dict[str, Any] = {**names, **given, "add_generation_prompt": add_generation_prompt}
    with _template_errors(messages):
        # A function given as an argument would reach the template as a string.
        _compile_jinja_template(template).globals["strftime_now"] = now.strftime
        rendered = render_jinja_template([turns], tools=tools, chat_template=template, **arguments)
    return rendered[0][0]


def as_dict(message: Message) -> dict[str, Any]:
    """A message as templates want it: every field that it has, none that is null."""
    extra = json.loads(message.extra) if message.extra else {}
    turn = {"role": message.role, "content": message.content, **extra}
    return {key: value for key, value in turn.items() if value is not None}


@contextmanager
def _template_errors(messages: Sequence[Message]) -> Iterator[None]:
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, TypeError, AttributeError) as error:
        roles = [message.role for message in messages]
        raise DataError(f"the chat template refuses a conversation with the roles {roles}: {error}") from None


def variables(template: str) -> frozenset[str]:
    """Names that a template reads from its arguments."""
    import jinja2.meta

    return frozenset(jinja2.meta.find_undeclared_variables(_parsed(template)))


def reads_clock(template: str) -> bool:
    """Whether a template asks for the date."""
    import jinja2.nodes

    return any(name.name == "strftime_now" for name in _parsed(template).find_all(jinja2.nodes.Name))


def _parsed(template: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template).environment.parse(template)


def check_names(given: Any, name: str) -> dict[str, Any]:
    """Arguments of a chat template, without nulls; DataError for another type or a name that is not theirs."""
    if not isinstance(given, Mapping):
        raise DataError(f"{name} must be an object of arguments, got {given!r}")
    for key in given:
        if key in _RESERVED:
            raise DataError(f"{name} may not set {key!r}, which is decided elsewhere; remove it")
    return {key: value for key, value in given.items() if value is not None}


def check_arguments(template: str, arguments: Mapping[str, Any], name: str) -> None:
    """DataError for an argument that the template does not read."""
    known = variables(template)
    for key in arguments:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(f"{name}: the chat template reads no argument {key!r}; {hint}remove it")


# Control tokens in what a record says


def names_pattern(names: Sequence[str]) -> re.Pattern[str] | None:
    """Finds any of the names, longer ones first; None without names."""
    longest_first = sorted({name for name in names if name.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def mark(text: str, controls: re.Pattern[str]) -> str:
    """The text with the names marked; marks that were there before are taken away."""
    return controls.sub(f"{START}\\g<0>{END}", unmarked(text))


def _marked(value: Any, mark_text: Callable[[str], str]) -> Any:
    """A value with all its texts marked."""
    if isinstance(value, str):
        return mark_text(value)
    if isinstance(value, Mapping):
        return {key: _marked(each, mark_text) for key, each in value.items()}
    return [_marked(each, mark_text) for each in value] if isinstance(value, list | tuple) else value


def unmarked(text: str) -> str:
    """The text without marks."""
    return text.translate(_MARKS) if START in text or END in text else text
