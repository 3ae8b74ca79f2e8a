"""One face for SentencePiece and Hugging Face tokenizers.

``encode`` never adds special tokens: where a beginning or an end token goes is decided in ``tokenize.py``,
in the open.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, override

import sentencepiece

from megatron_groupdpo.data.text.control_names import ControlNames
from megatron_groupdpo.data.text.templates import (
    NO_INPUTS,
    TemplateInputs,
    mark,
    names_pattern,
    read_template,
    render,
)
from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import Message

TokenizerType = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"]
_ALIASES = {"GPTSentencePieceTokenizer": "SentencePieceTokenizer", "Llama2Tokenizer": "SentencePieceTokenizer"}
"""Megatron's other spellings for the same files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerOptions:
    """Which tokenizer to load."""

    kind: str
    """``SentencePieceTokenizer`` (also ``GPTSentencePieceTokenizer``) or ``HuggingFaceTokenizer``."""
    model: str
    """A ``.model`` file; for Hugging Face a folder or a hub name."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's own chat template."""


class Tokenizer(Protocol):
    """What the data and the export need from a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; every id is below it."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Beginning token."""
        ...

    @property
    def eos_id(self) -> int | None:
        """End token."""
        ...

    @property
    def pad_id(self) -> int | None:
        """Padding token; None where the tokenizer names none."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own convention puts ``bos_id`` before a text."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens (beginning, end, turn markers)."""
        ...

    @property
    def pieces(self) -> Mapping[str, int]:
        """The vocabulary: the id of every piece, added tokens included."""
        ...

    @property
    def chat_template(self) -> Any:
        """The chat template (of a few tokenizers, several by name); None where there is none."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the ids, the chat template included."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens around it. A name of :attr:`control_names` in it is text; other
        added tokens (``<think>``) are read."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of each text."""
        ...

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of text that a chat template wrote: names of control tokens in it become those tokens, but for marked
        ones. DataError for a marked name that cannot be told from text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        ...

    @property
    def control_names(self) -> tuple[str, ...]:
        """Names of the control tokens: the special ones, and those with which the chat template parts turns."""
        ...

    def mark(self, text: str) -> str:
        """A record's text with the names of control tokens in it marked, for :meth:`encode_rendered`.

        Raises:
            DataError: it has a name that the template uses and that the tokenizer reads from any text.
        """
        ...

    @property
    def chat_source(self) -> str:
        """The chat template's text; DataError where there is none."""
        ...

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, inputs: TemplateInputs = NO_INPUTS
    ) -> str:
        """The conversation as text for :meth:`encode_rendered`, control tokens spelled by the record marked.

        Raises:
            DataError: there is no chat template, or it refuses the messages.
        """
        ...

    @property
    def keeps_all_text(self) -> bool:
        """Whether every character has ids, so that only :meth:`normalize` can change a text."""
        ...

    def normalize(self, text: str) -> str:
        """What the tokenizer makes of a text before it looks for tokens."""
        ...

    def loses_text(self, text: str, ids: Sequence[int]) -> bool:
        """Whether ``ids`` lack some of the normalised text, white space aside, or hold an unknown token for it."""
        ...

    def save(self, folder: Path) -> None:
        """Write files from which ``transformers.AutoTokenizer`` gives the same ids."""
        ...


def canonical_kind(kind: str) -> str:
    """The project's own name of a kind of tokenizer; ConfigError for an unknown one."""
    kind = _ALIASES.get(kind, kind)
    if kind not in get_args(TokenizerType):
        known = ", ".join([*get_args(TokenizerType), *_ALIASES])
        raise ConfigError(f"--tokenizer-type must be one of {known}, got {kind!r}")
    return kind


def load_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """Load the tokenizer.

    Raises:
        ConfigError: unknown kind.
        DataError: the model is not there or is not of that kind.
    """
    kind = canonical_kind(options.kind)
    template = None
    if options.chat_template is not None:
        template = read_template(options.chat_template)
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer(options.model, template)
    from megatron_groupdpo.data.text.hugging_face import HuggingFaceTokenizer  # it builds on this module

    return HuggingFaceTokenizer(options.model, template)


def apply_chat_template(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    """Ids of a conversation."""
    text = tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode_rendered(text)


class SentencePieceTokenizer(Tokenizer):
    """A ``.model`` file. User-defined symbols are read from text; control symbols never are."""

    def __init__(self, model: str, chat_template: str | None = None) -> None:
        self._file = Path(model)
        if not self._file.is_file():
            raise DataError(f"--tokenizer-model {model}: no such file; give the path of a SentencePiece .model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"--tokenizer-model {model}: not a SentencePiece model ({error})") from None
        self._template = chat_template

    @property
    @override
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    @property
    @override
    def bos_id(self) -> int | None:
        return _id_or_none(self._processor.bos_id())

    @property
    @override
    def eos_id(self) -> int | None:
        return _id_or_none(self._processor.eos_id())

    @property
    @override
    def pad_id(self) -> int | None:
        return _id_or_none(self._processor.pad_id())

    @property
    @override
    def adds_bos(self) -> bool:
        return self.bos_id is not None

    @property
    @override
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i in range(self.vocab_size) if self._processor.is_control(i))

    @property
    @override
    def pieces(self) -> Mapping[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}

    @property
    @override
    def chat_template(self) -> str | None:
        return self._template

    @property
    @override
    def digest(self) -> str:
        return digest_of(self._file.read_bytes(), (self._template or "").encode())

    @override
    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    @override
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        # the library's own batch call starts threads each time, which costs more than it saves for a group
        return [self._processor.encode(text) for text in texts]

    @override
    def encode_rendered(self, text: str) -> list[int]:
        return self._names.encode(text, self._processor.encode)

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    @property
    @override
    def chat_source(self) -> str:
        if self._template is None:
            raise DataError(
                f"the SentencePiece tokenizer {self._file} has no chat template, which chat messages need; "
                "give one with --chat-template FILE"
            )
        return self._template

    @override
    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, inputs: TemplateInputs = NO_INPUTS
    ) -> str:
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        names = {name: self._processor.id_to_piece(i) for name, i in named.items() if i is not None}
        return render(
            self.chat_source,
            messages,
            names,
            add_generation_prompt=add_generation_prompt,
            inputs=inputs,
            mark_text=self.mark,
        )

    @functools.cached_property
    @override
    def control_names(self) -> tuple[str, ...]:
        return tuple(self._processor.id_to_piece(i) for i in sorted(self.special_ids))

    @functools.cached_property
    def _names(self) -> ControlNames:
        return ControlNames({self._processor.id_to_piece(i): i for i in self.special_ids})

    @functools.cached_property
    def _controls(self) -> re.Pattern[str] | None:
        return names_pattern(self.control_names)

    @functools.cached_property
    def _written_symbols(self) -> re.Pattern[str] | None:
        """User-defined symbols of the template, which are read from any text."""
        from megatron_groupdpo.data.text.sentencepiece_export import user_defined_symbols

        template = self._template or ""
        return names_pattern([symbol for symbol in user_defined_symbols(self._file) if symbol in template])

    @override
    def mark(self, text: str) -> str:
        if self._written_symbols is not None and (found := self._written_symbols.search(text)):
            raise DataError(
                f"{found[0]!r} in a text is a symbol of the chat template, and SentencePiece reads it as that from any "
                "text; remove it, or drop the record"
            )
        return text if self._controls is None else mark(text, self._controls)

    @functools.cached_property
    @override
    def keeps_all_text(self) -> bool:
        return sum(self._processor.is_byte(i) for i in range(self.vocab_size)) == 256

    @override
    def normalize(self, text: str) -> str:
        return self._processor.normalize(text)

    @override
    def loses_text(self, text: str, ids: Sequence[int]) -> bool:
        # an unknown piece is decoded as " ⁇ "
        return not self.keeps_all_text and squeezed(self.decode(ids)) != squeezed(self.normalize(text))

    @override
    def save(self, folder: Path) -> None:
        from megatron_groupdpo.data.text.sentencepiece_export import export_to_hugging_face

        export_to_hugging_face(self._file, folder, add_bos=self.adds_bos, chat_template=self._template)


def squeezed(text: str) -> str:
    """The text without white space and the sign that stands for it in pieces."""
    return "".join(text.replace("\u2581", " ").split())


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None


def digest_of(*parts: bytes) -> str:
    """SHA-256 over the parts and where they end."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()
