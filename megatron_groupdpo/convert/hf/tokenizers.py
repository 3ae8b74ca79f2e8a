"""The tokenizer that goes with a model: found, checked against the embedding, kept with the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions, load_tokenizer
from megatron_groupdpo.errors import CheckpointError, DataError

FOLDER = "tokenizer"
"""Beside the ``iter_`` folders of an imported checkpoint."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
_KEPT = (
    *_FILES,
    *("vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
)
"""Everything beside a model that ``transformers`` makes its tokenizer from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTokenizer:
    """A tokenizer and where it was loaded from."""

    tokenizer: Tokenizer
    options: TokenizerOptions

    def write(self, folder: Path) -> None:
        """Write it for ``transformers``: byte for byte the files it was loaded from, where those are a folder's."""
        home = Path(self.options.model).expanduser()
        if self.options.kind != "HuggingFaceTokenizer" or self.options.chat_template or not home.is_dir():
            self.tokenizer.save(folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in (home / name for name in _KEPT):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            elif path.exists():
                shutil.copyfile(path, folder / path.name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a Hugging Face folder holds a tokenizer beside the model."""
    return any((folder / name).exists() for name in _FILES)


def options_for(path: str) -> TokenizerOptions:
    """A ``.model`` file is SentencePiece's; anything else a Hugging Face folder or hub name."""
    return TokenizerOptions(
        kind="SentencePieceTokenizer" if Path(path).is_file() else "HuggingFaceTokenizer", model=path
    )


def load_checked(options: TokenizerOptions, model: ModelConfig) -> ModelTokenizer:
    """Load a tokenizer whose every id has a row in the model's embedding.

    Raises:
        DataError: it cannot be loaded, or has more tokens than the embedding has rows.
    """
    tokenizer = load_tokenizer(options)
    assert model.vocab_size is not None
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"the tokenizer {options.model} has {tokenizer.vocab_size} tokens, the model's embedding "
            f"{model.vocab_size} rows; give the model's own tokenizer with --tokenizer, or enlarge the embedding first "
            "(transformers: model.resize_token_embeddings)"
        )
    return ModelTokenizer(tokenizer=tokenizer, options=options)


def describe(tokenizer: Tokenizer, options: TokenizerOptions) -> dict[str, Any]:
    """What a checkpoint and a token store say about their tokenizer."""
    return {
        "kind": options.kind,
        "model": options.model,
        "chat_template": options.chat_template,
        "digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
    }


def of_checkpoint(recorded: Mapping[str, Any] | None, folder: Path, model: ModelConfig) -> ModelTokenizer | None:
    """The tokenizer that a checkpoint names, or None where it names none.

    Args:
        recorded: what :func:`describe` gave when the checkpoint was written.
        folder: the checkpoint's ``iter_`` folder.
        model: the checkpoint's model.

    Raises:
        CheckpointError: the tokenizer has gone or changed since.
        DataError: see :func:`load_checked`.
    """
    if not recorded:
        return None
    options = TokenizerOptions(kind=recorded["kind"], model=recorded["model"], chat_template=recorded["chat_template"])
    moved = folder.parent / FOLDER
    if not Path(options.model).exists() and moved.is_dir():
        options = TokenizerOptions(kind="HuggingFaceTokenizer", model=str(moved))
    try:
        loaded = load_checked(options, model)
    except DataError as error:
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be used: {error}; give it with --tokenizer, or pass --no-tokenizer"
        ) from None
    if loaded.tokenizer.digest != recorded["digest"]:
        raise CheckpointError(
            f"{folder}: the tokenizer {options.model} has changed since the checkpoint was written; "
            "give the right one with --tokenizer, or this one if the change is meant"
        )
    return loaded
