"""One face for SentencePiece and Hugging Face tokenizers.

``encode`` never adds special tokens: where a beginning or an end token goes is decided in ``tokenize.py``,
in the open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from megatron_groupdpo.data.text.templates import (
    NO_INPUTS,
    TemplateInputs,
)
from megatron_groupdpo.errors import ConfigError
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


def squeezed(text: str) -> str:
    """The text without white space and the sign that stands for it in pieces."""
    return "".join(text.replace("\u2581", " ").split())


def digest_of(*parts: bytes) -> str:
    """SHA-256 over the parts and where they end."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()
