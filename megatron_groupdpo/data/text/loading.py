"""A tokenizer of either kind from where it lies."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_groupdpo.data.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_groupdpo.data.text.templates import (
    read_template,
)
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions, canonical_kind
from megatron_groupdpo.types import Message


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
