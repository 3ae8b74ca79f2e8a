"""Groups of messages as text: what the template writes, which of it the assistant says, and whether all is there.

The prompt is the conversation up to and with the generation prompt. A prompt that ends with an assistant's turn is
continued: the generation prompt and that turn's text are the prompt, and the response goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.counts import CountedError, Counts
from megatron_groupdpo.data.text.templates import TemplateInputs, as_dict, check_arguments, unmarked, variables
from megatron_groupdpo.data.text.tokenizer import Tokenizer, squeezed
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupRecord, Message, Text

_REASONING = ("reasoning_content", "thinking", "reasoning")
_END_OF_REASONING = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as text."""

    text: str
    borders: tuple[int, ...]
    """Start, end, start, end, ... of what the assistant wrote, the first start being the prompt's end."""
    trained: tuple[bool, ...]
    """For each of these stretches."""


class Conversations:
    """Renders groups with one tokenizer's template.

    Args:
        tokenizer: whose template.
        inputs: what the template sees in every group.
        verbatim: whether the assistant's turns of responses are written as they are, not as the template has them.
    """

    def __init__(self, tokenizer: Tokenizer, inputs: TemplateInputs, *, verbatim: bool) -> None:
        self._tokenizer = tokenizer
        self._inputs = inputs
        self._verbatim = verbatim

    def of(self, record: GroupRecord) -> Conversation:
        """The group's prompt and responses; DataError where the template cannot show what the record brings."""
        inputs = self._inputs
        if record.tools or record.template_arguments:
            own = json.loads(record.template_arguments or "{}")
            source = self._tokenizer.chat_source
            check_arguments(source, own, f"{record.where}: chat_template_kwargs")
            tools = json.loads(record.tools) if record.tools else None
            if tools is not None and "tools" not in variables(source):
                raise DataError(f"{record.where}: the chat template shows no tools; use another, or remove them")
            inputs = replace(inputs, tools=tools, arguments={**inputs.arguments, **own})
        return Conversation(self._tokenizer, record, inputs, verbatim=self._verbatim)


class Conversation:
    """One group: its prompt as text, and each response."""

    def __init__(self, tokenizer: Tokenizer, record: GroupRecord, inputs: TemplateInputs, *, verbatim: bool) -> None:
        self._tokenizer, self._inputs, self._where = tokenizer, inputs, record.where
        self._verbatim = verbatim
        self._turns = as_messages(record.prompt, "user")
        self._prefill = ""
        if self._turns[-1].role == "assistant" and len(self._turns) > 1:
            if self._turns[-1].extra:
                raise DataError(
                    f"{record.where}: the prompt ends with an assistant's turn, which the response continues, and it "
                    f"has more than content ({self._turns[-1].extra}); give the whole turn as the response"
                )
            self._prefill = self._turns[-1].content
            self._turns = self._turns[:-1]
        self._head = self._render(self._turns, True)
        self.prompt = self._head + self._marked_prefill()

    def check_prompt(self, counts: Counts) -> None:
        """Whether the text has every turn of the prompt; CountedError where one is missing."""
        found = self._check(self._turns, self._head, "the prompt", is_context=True)
        counts.update({why.PROMPT_TRIMMED} if "trimmed" in found else ())
        counts.update({why.REASONING_CUT} if "reasoning" in found else ())
        if self._inputs.tools:
            text = squeezed(unmarked(self._head))
            for tool in self._inputs.tools:
                name = tool.get("function", tool).get("name", "")
                if squeezed(str(name)) not in text:
                    raise self._lost(f"the tool {name!r}", "the prompt")

    def response(self, answer: Text, index: int, counts: Counts) -> Rendered | None:
        """The conversation with a response; None where a beginning of it is not a beginning of its text.

        Raises:
            DataError: the response does not begin with the assistant.
            CountedError: the template leaves out some of the response.
        """
        turns = as_messages(answer, "assistant")
        if turns[0].role != "assistant":
            raise DataError(
                f"{self._where}: a response's messages must start with the role 'assistant', got {turns[0].role!r} in "
                f"response {index}; move the turns before it into the prompt"
            )
        if self._prefill:
            turns = (replace(turns[0], content=self._prefill + turns[0].content), *turns[1:])
        rendered = self._written_out(turns) if self._verbatim else self._templated(turns)
        if rendered is not None:
            starts, ends = rendered.borders[::2], rendered.borders[1::2]
            said = [turn for turn in turns if turn.role == "assistant"]
            others = [turn for turn in turns if turn.role != "assistant"]
            found = self._check(others, rendered.text[len(self._head) :], f"response {index}")
            for turn, start, end in zip(said, (len(self._head), *starts[1:]), ends):
                # what is written as it is, is there
                turn = replace(turn, content="") if self._verbatim else turn
                found |= self._check([turn], rendered.text[start:end], f"response {index}")
            counts.update({why.RESPONSE_TRIMMED} if found else ())
        return rendered

    def _templated(self, turns: tuple[Message, ...]) -> Rendered | None:
        text = self._render((*self._turns, *turns), False)
        borders: list[int] = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = (*self._turns, *turns[:number])
            head = self._render(before, True) if number else self.prompt
            upto = text if number + 1 == len(turns) else self._render((*before, turn), False)
            if not (text.startswith(upto) and upto.startswith(head)):
                return None
            borders += [len(head), len(upto)]
        return Rendered(text=text, borders=tuple(borders), trained=_trained(turns))

    def _written_out(self, turns: tuple[Message, ...]) -> Rendered | None:
        """What the template writes around the assistant's turns, and these as they are.

        A stand-in takes the place of each turn's content; the turn is written after the generation prompt, without
        what that ends with already (``<think>`` and a line break), and what follows the stand-in follows the turn.
        """
        text, borders, written, before = "", [], "", self._turns
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                before = (*before, turn)
                continue
            head = self._render(before, True)
            if not head.startswith(written):
                return None
            stand_in = replace(turn, content=f"qq{number}qq")
            after = self._render((*before, stand_in), False)
            if after.count(stand_in.content) != 1:
                return None
            text += head[len(written) :]
            content = self._marked(turn.content)
            start = len(text) + (len(self._marked_prefill()) if not number else 0)
            text += content[_overlap(head, content) :] + after.partition(stand_in.content)[2]
            borders += [start, len(text)]
            written, before = after, (*before, stand_in)
        return Rendered(text=text, borders=tuple(borders), trained=_trained(turns))

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return self._tokenizer.render_chat(messages, add_generation_prompt=generation_prompt, inputs=self._inputs)
        except DataError as error:
            raise DataError(f"{self._where}: {error}") from None

    def _marked_prefill(self) -> str:
        return self._marked(self._prefill)

    def _marked(self, content: str) -> str:
        return self._tokenizer.mark(content) if content else ""

    def _check(self, turns: Sequence[Message], text: str, place: str, *, is_context: bool = False) -> set[str]:
        """Whether ``text`` has all that the turns say; what of ``trimmed`` and ``reasoning`` it lacks.

        Reasoning of earlier turns that the template leaves out is not there at inference either.
        """
        text, tight, found = unmarked(text), "", set[str]()
        for turn in turns:
            for name, part in _parts(turn):
                if part in text or (name == "tool_calls" and json.dumps(part, ensure_ascii=False)[1:-1] in text):
                    continue
                tight = tight or squeezed(text)
                if squeezed(part) in tight:
                    found.add("trimmed")
                    continue
                rest = part.rpartition(_END_OF_REASONING)[2] if name == "content" else part
                if is_context and (name in _REASONING or (rest != part and squeezed(rest) in tight)):
                    found.add("reasoning")
                    continue
                raise self._lost(f"the {name} of a turn of {turn.role!r}", place)
        return found

    def _lost(self, what: str, place: str) -> CountedError:
        return CountedError(
            f"{self._where}: the chat template leaves out some of {what} in {place}; use a --chat-template that shows "
            "it, --response-text verbatim where a response is cut, or remove the text",
            why.LOST_BY_TEMPLATE,
        )


def as_messages(text: Text, role: str) -> tuple[Message, ...]:
    """Plain text as one turn of ``role``."""
    return (Message(role=role, content=text),) if isinstance(text, str) else text


def _trained(turns: Sequence[Message]) -> tuple[bool, ...]:
    return tuple(turn.trained is not False for turn in turns if turn.role == "assistant")


def _overlap(head: str, content: str) -> int:
    """Characters of an opening ``<think>`` that ``head`` ends with and ``content`` begins with."""
    opening = "<think>"
    if not (head.rstrip("\n").endswith(opening) and content.startswith(opening)):
        return 0
    num_breaks = len(head) - len(head.rstrip("\n"))
    return len(opening) + (num_breaks if content[len(opening) :].startswith("\n" * num_breaks) else 0)


def _parts(turn: Message) -> Iterator[tuple[str, str]]:
    """What a turn says, by the name of the field; texts inside tool calls one by one."""
    if turn.content:
        yield "content", unmarked(turn.content)
    if not turn.extra:
        return
    extra = as_dict(turn)
    said = {extra[key]: key for key in reversed(_REASONING) if key in extra}
    for part, key in said.items():
        yield key, unmarked(part)
    for call in extra.get("tool_calls", ()):
        function: Mapping[str, Any] = call.get("function", call)
        yield "tool_calls", unmarked(function["name"])
        yield from (("tool_calls", unmarked(each)) for each in _leaves(function.get("arguments")))


def _leaves(value: Any) -> Iterator[str]:
    """All texts inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(each)
