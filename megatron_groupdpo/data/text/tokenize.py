"""A group of texts to a group of token ids, each prompt being a token prefix of its responses' rows.

Text: the ids are those of prompt and response read as one text, wherever the prompt's end falls between two tokens;
the beginning token leads, the end token closes. Messages: the chat template decides; see ``conversations.py``.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.counts import CountedError, Counts
from megatron_groupdpo.data.text.conversations import Conversations, Rendered
from megatron_groupdpo.data.text.templates import (
    TemplateInputs,
    check_arguments,
    check_names,
    names_pattern,
    reads_clock,
)
from megatron_groupdpo.data.text.tokenizer import Tokenizer, squeezed
from megatron_groupdpo.errors import ConfigError, DataError, StopError
from megatron_groupdpo.types import GroupRecord, Text

LengthPolicy = Literal["drop", "truncate-prompt", "truncate-response", "refuse"]
AddBos = Literal["auto", "yes", "no"]
PrefixMismatch = Literal["drop", "error"]
_BORDER_TOKENS = 8  # how far from its own number of tokens a prompt may end within a longer text
ResponseText = Literal["template", "verbatim"]


RENDERING = 2
"""Version of what records become as tokens, raised by hand whenever the same record and options give others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeOptions:
    """How texts become tokens."""

    seq_length: int
    """Largest number of tokens of prompt and response together, special tokens included."""
    length_policy: LengthPolicy = "drop"
    """What happens to a response that does not fit: ``drop`` it; ``truncate-prompt`` cuts the group's prompt
    from the left, its beginning token excepted; ``truncate-response`` cuts the response's end, end token
    included; ``refuse`` stops."""
    add_bos: AddBos = "auto"
    """Whether plain text starts with the beginning token; ``auto``: as the tokenizer itself does."""
    apply_chat_template: bool = False
    """Present plain-text prompts and responses as a user and an assistant turn."""
    train_on_turn_tail: bool = False
    """Whether what the template writes between an answer's end token and the next turn (a line break) is trained."""
    prefix_mismatch: PrefixMismatch = "drop"
    """A response whose rendered conversation does not start with the rendered prompt."""
    response_text: ResponseText = "template"
    """What of a response is trained: what the template makes of it, or (``verbatim``) all of it as it is, between
    what the template writes around it."""
    template_arguments: str = ""
    """JSON object of arguments of the chat template; a record's own come before them."""
    template_date: str | None = None
    """YYYY-MM-DD, for templates that ask for the date (:func:`asks_for_date`); None: today."""

    def __post_init__(self) -> None:
        if self.seq_length < 2:
            raise ConfigError(f"--seq-length must be at least 2 (a prompt and an end), got {self.seq_length}")
        for flag, value, choices in (
            ("--length-policy", self.length_policy, get_args(LengthPolicy)),
            ("--add-bos", self.add_bos, get_args(AddBos)),
            ("--prefix-mismatch", self.prefix_mismatch, get_args(PrefixMismatch)),
            ("--response-text", self.response_text, get_args(ResponseText)),
        ):
            if value not in choices:
                raise ConfigError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")
        if self.template_date is not None:
            try:
                datetime.datetime.strptime(self.template_date, "%Y-%m-%d")
            except ValueError:
                raise ConfigError(f"--template-date must be YYYY-MM-DD, got {self.template_date!r}") from None


def asks_for_date(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's chat template reads the clock."""
    try:
        return reads_clock(tokenizer.chat_source)
    except DataError:  # no template
        return False


def arguments_from(given: str | None) -> str:
    """``--chat-template-kwargs`` as :attr:`TokenizeOptions.template_arguments` keeps it."""
    try:
        parsed = json.loads(given or "{}")
    except ValueError as error:
        raise ConfigError(f"--chat-template-kwargs must be a JSON object, got {given!r} ({error})") from None
    arguments = check_names(parsed, "--chat-template-kwargs")
    return json.dumps(arguments, sort_keys=True) if arguments else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedResponse:
    """One response that stays."""

    index: int
    """Position in the record."""
    tokens: np.ndarray
    """[L] int32, the end token included unless cut off."""
    mask: np.ndarray | None = None
    """[L] bool, False on other speakers' tokens; None: all True."""
    is_whole: bool = True
    """False where it was truncated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedGroup:
    """The prompt and the responses that stay, in the record's order."""

    prompt_tokens: np.ndarray
    """[P] int32."""
    responses: tuple[TokenizedResponse, ...]
    is_prompt_whole: bool = True
    """False where the prompt was truncated."""


class GroupTokenizer:
    """Tokenizes groups with one tokenizer and one set of options.

    Raises:
        DataError: the tokenizer has no end token, or ``add_bos="yes"`` and it has no beginning token.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenizeOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        if tokenizer.eos_id is None:
            raise DataError("the tokenizer must have an end token; add eos_token to it")
        self._eos_id: int = tokenizer.eos_id
        add_bos = tokenizer.adds_bos if options.add_bos == "auto" else options.add_bos == "yes"
        if add_bos and tokenizer.bos_id is None:
            raise DataError("--add-bos yes needs a tokenizer with a beginning token; use --add-bos no")
        self._leading: list[int] = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        self._special_ids = tokenizer.special_ids | {self._eos_id}
        self._controls = names_pattern(tokenizer.control_names)
        arguments = json.loads(options.template_arguments or "{}")
        if arguments:
            check_arguments(tokenizer.chat_source, arguments, "--chat-template-kwargs")
        date = None if options.template_date is None else datetime.date.fromisoformat(options.template_date)
        inputs = TemplateInputs(arguments=arguments, date=date)
        self._conversations = Conversations(tokenizer, inputs, verbatim=options.response_text == "verbatim")

    def tokenize(self, record: GroupRecord, counts: Counts) -> TokenizedGroup | None:
        """The group's tokens within the sequence length, or None where nothing of it can stay.

        ``counts`` receives every drop and truncation.

        Raises:
            DataError: ``refuse`` and a row is too long; ``error`` and the prompt is no prefix; a response's
                messages do not start with the assistant; no chat template; text that the template or the tokenizer
                loses.
        """
        texts = [record.prompt, *(response.text for response in record.responses)]
        if self._is_empty(record.prompt):
            counts[why.EMPTY_PROMPT] += 1
            return None
        is_chat = self.is_chat(record)
        if not is_chat:
            self._check_is_plain(record)
        if self._controls is not None and not record.is_rendered and any(map(self._spells_control, texts)):
            counts[why.ESCAPED] += 1
        self._check_characters(record, counts)
        rows = self._chat_rows(record, counts) if is_chat else self._text_rows(record, counts)
        if rows is None:
            return None
        return self._fit(rows, record.where, counts)

    def is_chat(self, record: GroupRecord) -> bool:
        """Whether the group is rendered by the chat template."""
        texts = (record.prompt, *(response.text for response in record.responses))
        return self._options.apply_chat_template or any(not isinstance(text, str) for text in texts)

    def _is_empty(self, text: Text) -> bool:
        """Whether there is nothing to read: white space, or what the tokenizer leaves out (a zero-width space)."""
        if not isinstance(text, str):
            return all(not message.extra and self._is_empty(message.content) for message in text)
        # A letter or a digit is always something, and is nearly always soon found.
        return not any(map(str.isalnum, text)) and not squeezed(self._tokenizer.normalize(text))

    def _spells_control(self, text: Text) -> bool:
        contents = [text] if isinstance(text, str) else [message.content + message.extra for message in text]
        return self._controls is not None and any(map(self._controls.search, contents))

    def _check_is_plain(self, record: GroupRecord) -> None:
        for name, given in (
            ("--chat-template-kwargs", self._options.template_arguments),
            ("tools", record.tools),
            ("chat_template_kwargs", record.template_arguments),
        ):
            if given:
                raise DataError(
                    f"{record.where}: {name} ({given}) is for a chat template, but prompt and responses are plain "
                    "text; use --apply-chat-template, or leave it out"
                )

    def _check_characters(self, record: GroupRecord, counts: Counts) -> None:
        """Whether the tokenizer has tokens for all that is said; what its normalizer replaces is counted."""
        if self._is_normalized(record.prompt, "the prompt", record.where):
            counts[why.PROMPT_NORMALIZED] += 1
        for index, response in enumerate(record.responses):
            if self._is_normalized(response.text, f"response {index}", record.where):
                counts[why.RESPONSE_NORMALIZED] += 1

    def _is_normalized(self, text: Text, place: str, where: str) -> bool:
        tokenizer, found = self._tokenizer, False
        for content in [text] if isinstance(text, str) else [message.content for message in text]:
            if self._is_empty(content):
                continue
            normal = tokenizer.normalize(content)
            found = found or (normal != content and squeezed(normal) != squeezed(content))
            if not tokenizer.keeps_all_text and tokenizer.loses_text(content, tokenizer.encode(content)):
                raise CountedError(
                    f"{where}: the tokenizer has no tokens for some of {place} ({content[:60]!r}); use a tokenizer "
                    "with byte tokens, or remove the text",
                    why.LOST_BY_TOKENIZER,
                )
        return found

    def _text_rows(self, record: GroupRecord, counts: Counts) -> TokenizedGroup | None:
        assert isinstance(record.prompt, str)
        texts, kept = [record.prompt], []
        for index, response in enumerate(record.responses):
            assert isinstance(response.text, str)
            if self._is_empty(response.text):
                counts[why.EMPTY_RESPONSE] += 1
                continue
            texts.append(response.text)
            kept.append(index)
        if record.is_rendered:
            return self._rendered_rows(texts, kept)
        prompt = self._tokenizer.encode(texts[0])
        if not self._leading and not prompt:
            counts[why.EMPTY_PROMPT] += 1
            return None
        responses = tuple(
            TokenizedResponse(index=index, tokens=_int32([*tokens, self._eos_id]))
            for index, tokens in zip(kept, self._after(texts[0], prompt, texts[1:], counts))
        )
        return TokenizedGroup(prompt_tokens=_int32(self._leading + prompt), responses=responses)

    def _after(self, prompt: str, prompt_ids: list[int], texts: Sequence[str], counts: Counts) -> list[list[int]]:
        """Ids of each text as they are after the prompt.

        Where a token would span the prompt's end, the text is encoded as after a line break: by itself, but without
        the space that some tokenizers put before the first word of a text.
        """
        found = []
        for text, whole in zip(texts, self._tokenizer.encode_many([prompt + text for text in texts])):
            border = self._border(whole, prompt_ids)
            if border is None:
                counts[why.SPANNED] += 1
            found.append(self._after_break(text) if border is None else whole[border:])
        return found

    def _border(self, whole: list[int], prompt_ids: list[int]) -> int | None:
        """Where the prompt ends in the ids of prompt and response; None where a token spans its end."""
        num = len(prompt_ids)
        if whole[:num] == prompt_ids and len(whole) > num:
            return num
        text = self._tokenizer.decode(prompt_ids)
        near = range(max(1, num - _BORDER_TOKENS), min(len(whole) - 1, num + _BORDER_TOKENS) + 1)
        return next((i for i in near if self._tokenizer.decode(whole[:i]) == text), None)

    def _after_break(self, text: str, encode: Callable[[str], list[int]] | None = None) -> list[int]:
        encode = encode or self._tokenizer.encode
        line_break, ids = encode("\n"), encode("\n" + text)
        return ids[len(line_break) :] if ids[: len(line_break)] == line_break else encode(text)

    def _rendered_rows(self, texts: Sequence[str], kept: Sequence[int]) -> TokenizedGroup:
        """Rows of a chat template's own output: beginning and end tokens only where it has none."""
        prompt, *encoded = [self._tokenizer.encode_rendered(text) for text in texts]
        if prompt[:1] != self._leading:
            prompt = self._leading + prompt
        responses = []
        for index, tokens in zip(kept, encoded):
            ends = bool(tokens) and tokens[-1] in self._special_ids
            responses.append(TokenizedResponse(index=index, tokens=_int32(tokens if ends else [*tokens, self._eos_id])))
        return TokenizedGroup(prompt_tokens=_int32(prompt), responses=tuple(responses))

    def _chat_rows(self, record: GroupRecord, counts: Counts) -> TokenizedGroup | None:
        """Rows by the chat template.

        Where the prompt's ids are not the first ids of the whole conversation (a merge across the border), the
        pieces are tokenized apart. Where even its text is not a prefix, the response is dropped and counted, or
        refused.
        """
        conversation = self._conversations.of(record)
        conversation.check_prompt(counts)
        prompt_tokens = self._tokenizer.encode_rendered(conversation.prompt)
        responses = []
        for index, response in enumerate(record.responses):
            if self._is_empty(response.text):
                counts[why.EMPTY_RESPONSE] += 1
                continue
            rendered = conversation.response(response.text, index, counts)
            if rendered is None:
                if self._options.prefix_mismatch == "error":
                    raise StopError(
                        f"{record.where}: the chat template renders response {index} so that the prompt is no "
                        "prefix of it; use another --chat-template, or --prefix-mismatch drop"
                    )
                counts[why.NO_PREFIX] += 1
                continue
            tokens, mask, in_pieces = self._encode_spans(rendered)
            counts.update({why.RETOKENIZED} if in_pieces else ())
            responses.append(TokenizedResponse(index=index, tokens=tokens, mask=mask))
        if not prompt_tokens:
            counts[why.EMPTY_PROMPT] += 1
            return None
        return TokenizedGroup(prompt_tokens=_int32(prompt_tokens), responses=tuple(responses))

    def _encode_spans(self, rendered: Rendered) -> tuple[np.ndarray, np.ndarray | None, bool]:
        """Response tokens, their mask, and whether the text had to be tokenized in pieces."""
        encode, text, borders = self._tokenizer.encode_rendered, rendered.text, rendered.borders
        whole = encode(text)
        heads = [encode(text[:border]) for border in borders]
        in_pieces = any(whole[: len(head)] != head for head in heads)
        if in_pieces:
            edges = [0, *borders, len(text)]
            first, *rest = [text[a:b] for a, b in itertools.pairwise(edges)]
            pieces = [encode(first), *(self._after_break(piece, encode) if piece else [] for piece in rest)]
            whole = [token for piece in pieces for token in piece]
            cuts = list(itertools.accumulate(len(piece) for piece in pieces))[: len(borders)]
        else:
            cuts = [len(head) for head in heads]
        start = cuts[0]
        mask = np.zeros(len(whole) - start, dtype=bool)
        has_end = False
        for first, last, is_trained in zip(cuts[::2], cuts[1::2], rendered.trained):
            stop = self._end_of_turn(whole, first, last)
            has_end = stop > first and whole[stop - 1] in self._special_ids
            mask[first - start : (last if self._options.train_on_turn_tail else stop) - start] = is_trained
        end = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
        tokens, mask = whole[start : start + end], mask[:end]
        if not tokens or not has_end:
            tokens = [*tokens, self._eos_id]
            mask = np.append(mask, True)
        return _int32(tokens), None if mask.all() else mask, in_pieces

    def _end_of_turn(self, tokens: list[int], first: int, last: int) -> int:
        """End of the trained part of a turn: after its last special token, if only white space follows it."""
        for position in range(last - 1, first - 1, -1):
            if tokens[position] in self._special_ids:
                blank = not self._tokenizer.decode(tokens[position + 1 : last]).strip()
                return position + 1 if blank else last
        return last

    def _fit(self, group: TokenizedGroup, where: str, counts: Counts) -> TokenizedGroup | None:
        """Apply the length policy."""
        limit, policy = self._options.seq_length, self._options.length_policy
        num_prompt = len(group.prompt_tokens)
        longest = max((len(r.tokens) for r in group.responses), default=0)
        if num_prompt + longest <= limit:
            return group
        if policy == "refuse":
            raise StopError(
                f"{where}: prompt and response must fit --seq-length {limit}, got {num_prompt} + {longest} tokens; "
                "raise it, or choose --length-policy drop, truncate-prompt or truncate-response"
            )
        if policy == "truncate-prompt":
            return self._cut_prompt(group, counts)
        room = limit - num_prompt
        if room < 1:
            counts[why.PROMPT_TOO_LONG] += 1
            return None
        if policy == "drop":
            fitting = tuple(r for r in group.responses if len(r.tokens) <= room)
            counts[why.TOO_LONG] += len(group.responses) - len(fitting)
            return replace(group, responses=fitting)
        return replace(group, responses=tuple(_cut_responses(group.responses, room, counts)))

    def _cut_prompt(self, group: TokenizedGroup, counts: Counts) -> TokenizedGroup:
        prompt = group.prompt_tokens
        num_kept_ahead = int(len(prompt) > 0 and prompt[0] == self._tokenizer.bos_id)
        shortest = min(len(prompt), num_kept_ahead + 1)
        room = self._options.seq_length - shortest
        fitting = tuple(r for r in group.responses if len(r.tokens) <= room)
        counts[why.TOO_LONG] += len(group.responses) - len(fitting)
        longest = max((len(r.tokens) for r in fitting), default=0)
        num_excess = len(prompt) + longest - self._options.seq_length
        if num_excess <= 0 or not fitting:
            return replace(group, responses=fitting)
        counts[why.PROMPT_CUT] += 1
        cut = np.concatenate([prompt[:num_kept_ahead], prompt[num_kept_ahead + num_excess :]])
        return replace(group, prompt_tokens=cut, responses=fitting, is_prompt_whole=False)


def _cut_responses(responses: Sequence[TokenizedResponse], room: int, counts: Counts) -> list[TokenizedResponse]:
    kept = []
    for response in responses:
        if len(response.tokens) <= room:
            kept.append(response)
            continue
        mask = None if response.mask is None else response.mask[:room]
        counts[why.RESPONSE_CUT] += 1
        kept.append(replace(response, tokens=response.tokens[:room], mask=mask, is_whole=False))
    return kept


def _int32(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)
