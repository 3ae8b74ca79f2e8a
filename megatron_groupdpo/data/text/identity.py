"""What makes two tokenizers the same one: equal ids for equal text, whatever kind of file they come from.

A SentencePiece ``.model``, the Hugging Face folder made of it and a folder saved again by another version of
``transformers`` differ in every byte. They are compared by what they do: the pieces of the vocabulary by id, the
beginning and the end token, and the ids of texts that tell normalisers, merges and scores apart. A token store and a
checkpoint keep this beside the file's digest, so it can be compared where the files have gone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions, canonical_kind
from megatron_groupdpo.errors import DataError

TEXTS = (
    "Hello, world! It's fine; isn't it?", "The QUICK brown fox\njumps over  two   lazy dogs.", "a\n\nb\tc\n    d",
    "x\r\ny", "0123456789 3.14 -7e9 12+34=46", "naïve café Ünïcödé ß", "ﬁ ½ Ⅷ ① Ａ ª", "日本語のテキスト", "Привет",
    "🙂 smile", "wide\u3000and\u00a0narrow", "(1 + 2) * [3] / {4} # $ % & @ ~ ^ | _", "aaaaaaaaaaaaaaaa", "HTML &amp;",
)  # fmt: skip
"""None begins or ends with white space or spells a token: there ``transformers``' classes for SentencePiece models take
liberties that change no token's meaning."""
_SPACES = "▁Ġ"
"""How pieces spell a space."""
_NUM_PIECES = 256
"""Pieces of the vocabulary that are read as text, too."""

Record = Mapping[str, Any]
"""What :func:`describe` gives, as a store or a checkpoint holds it."""


def describe(tokenizer: Tokenizer, options: TokenizerOptions) -> dict[str, Any]:
    """What a checkpoint and a token store say about their tokenizer."""
    return {
        "kind": canonical_kind(options.kind),
        "model": options.model,
        "chat_template": options.chat_template,
        "digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "identity": identity_of(tokenizer),
    }


def identity_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Digests of the vocabulary, of the ids of :data:`TEXTS` and of the chat template."""
    pieces = sorted((index, piece) for piece, index in tokenizer.pieces.items())
    words = [word for _, piece in pieces if len(word := piece.strip(_SPACES)) > 1 and word.isalnum()]
    shown = " ".join(words[:: max(1, len(words) // _NUM_PIECES)])
    template = tokenizer.chat_template
    return {
        "vocabulary": _digest(pieces),
        "texts": _digest([list(map(int, tokenizer.encode(text))) for text in (*TEXTS, shown)]),
        "chat_template": None if template is None else _digest(template),
    }


def differences(here: Record, there: Record, *, with_template: bool = False) -> list[str]:
    """What tells two tokenizers apart, for people; empty where they are one.

    Args:
        here: what is named second in each difference.
        there: what is named first.
        with_template: whether the chat template counts. It does not for what a model's ids mean.
    """
    if here["digest"] == there["digest"]:
        return []
    ours, theirs = (_identity(record) for record in (here, there))
    if ours is None or theirs is None:
        return [f"digest {there['digest'][:16]} there, {here['digest'][:16]} here"]
    found = [
        f"{name} {there[name]} there, {here[name]} here"
        for name in ("vocab_size", "bos_id", "eos_id")
        if there.get(name) != here.get(name)
    ]
    if ours["vocabulary"] != theirs["vocabulary"] and not found:
        found.append("vocabularies of one size with other pieces")
    if ours["texts"] != theirs["texts"] and not found:
        found.append("one vocabulary, but other ids for the same text (normaliser, merges or scores)")
    if with_template and ours["chat_template"] != theirs["chat_template"]:
        found.append("another chat template")
    return found


def options_of(record: Record) -> TokenizerOptions:
    """Where a recorded tokenizer was."""
    return TokenizerOptions(kind=record["kind"], model=record["model"], chat_template=record["chat_template"])


def _identity(record: Record) -> Mapping[str, Any] | None:
    """The recorded one; of a record that is older than it, that of the tokenizer, if that is still there."""
    if "identity" in record:
        return record["identity"]
    try:
        tokenizer = load_tokenizer(options_of(record))
    except DataError:
        return None
    return identity_of(tokenizer) if tokenizer.digest == record["digest"] else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
