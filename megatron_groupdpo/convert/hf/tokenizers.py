"""The tokenizer that goes with a model: found, checked against the embedding, kept with the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.hf.json_text import with_values
from megatron_groupdpo.convert.hf.side_files import check_tokenizer_config
from megatron_groupdpo.data.text.identity import describe, differences, options_of
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions
from megatron_groupdpo.errors import CheckpointError, DataError

FOLDER = "tokenizer"
"""Beside the ``iter_`` folders of an imported checkpoint."""
_TOKENIZER_CONFIG = "tokenizer_config.json"
_FILES = ("tokenizer.json", _TOKENIZER_CONFIG, "tokenizer.model", "vocab.json", "spiece.model")
_KEPT = (
    *_FILES,
    *(
        "tekken.json",
        "sentencepiece.bpe.model",
        "vocab.txt",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
    ),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
)
"""Everything beside a model that ``transformers`` makes its tokenizer from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTokenizer:
    """A tokenizer and where it was loaded from."""

    tokenizer: Tokenizer
    options: TokenizerOptions

    def write(self, folder: Path) -> None:
        """Write it for ``transformers``: byte for byte the files it was loaded from, where those are a folder's.

        A chat template that was given in place of the folder's is all that is then changed.
        """
        home = Path(self.options.model).expanduser()
        if self.options.kind != "HuggingFaceTokenizer" or not home.is_dir():
            self.tokenizer.save(folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in (home / name for name in _KEPT):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            elif path.exists():
                shutil.copyfile(path, folder / path.name)
        if self.options.chat_template is not None:
            _set_chat_template(folder, self.tokenizer.chat_template)


def _set_chat_template(folder: Path, template: str) -> None:
    """Where the folder has its own, so that no reader finds the old one; else in the file that readers look for now."""
    config, field = folder / _TOKENIZER_CONFIG, "chat_template"
    in_config = config.exists() and json.loads(config.read_text(encoding="utf-8")).get(field) is not None
    if in_config:
        config.write_text(with_values(config.read_text(encoding="utf-8"), {field: template}), encoding="utf-8")
    old = folder / "chat_template.json"
    if old.exists():
        old.write_text(with_values(old.read_text(encoding="utf-8"), {field: template}), encoding="utf-8")
    if not (in_config or old.exists()) or (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


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
    _check_config(Path(options.model).expanduser())
    tokenizer = load_tokenizer(options)
    assert model.vocab_size is not None
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"the tokenizer {options.model} has {tokenizer.vocab_size} tokens, the model's embedding "
            f"{model.vocab_size} rows; give the model's own tokenizer with --tokenizer, or enlarge the embedding first "
            "(transformers: model.resize_token_embeddings)"
        )
    return ModelTokenizer(tokenizer=tokenizer, options=options)


def of_folder(folder: Path, chat_template: str | None = None) -> dict[str, Any] | None:
    """What is recorded of a Hugging Face model's own tokenizer; None where it has none.

    Raises:
        DataError: it cannot be loaded.
    """
    if not has_tokenizer(folder):
        return None
    _check_config(folder)
    options = TokenizerOptions(kind="HuggingFaceTokenizer", model=str(folder.resolve()), chat_template=chat_template)
    return describe(load_tokenizer(options), options)


def _check_config(folder: Path) -> None:
    file = folder / _TOKENIZER_CONFIG
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return  # transformers then says so
    check_tokenizer_config(config, file)


def where_it_is_now(recorded: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The record of a checkpoint; of an imported one that has been moved, with the tokenizer beside it.

    Args:
        recorded: what :func:`describe` gave when the checkpoint was written.
        folder: the checkpoint's ``iter_`` folder.
    """
    beside = folder.parent / FOLDER
    if not Path(recorded["model"]).exists() and beside.is_dir():
        moved = {"kind": "HuggingFaceTokenizer", "model": str(beside.resolve()), "chat_template": None}
        return {**recorded, **moved}
    return dict(recorded)


def how_it_is_read(folder: Path, tokenizer: ModelTokenizer) -> str | None:
    """Why AutoTokenizer does not make the tokenizer of a written folder; None where it does.

    transformers 5 takes the class of some models (Qwen2) from their type, whatever tokenizer_config.json says.
    """
    options = TokenizerOptions(kind="HuggingFaceTokenizer", model=str(folder.resolve()))
    try:
        differ = differences(describe(load_tokenizer(options), options), describe(tokenizer.tokenizer, options))
    except DataError as error:
        differ = [str(error).replace(str(folder.resolve()), "it")]
    return "; ".join(differ) or None


def check_same(given: Mapping[str, Any], own: Mapping[str, Any] | None, whose: str, *, remedy: str) -> None:
    """Refuse a tokenizer whose ids mean something else to the model.

    Args:
        given: what is recorded of it.
        own: of the model's own tokenizer; None: the model has none, and any that fits is taken.
        whose: the model, for messages.
        remedy: the way out.

    Raises:
        CheckpointError: what differs.
    """
    differ = [] if own is None else differences(given, own)
    if differ:
        assert own is not None
        raise CheckpointError(
            f"{whose}: its tokenizer {own['model']} is not {given['model']} ({'; '.join(differ)}), so ids would mean "
            f"other tokens; {remedy}"
        )


def check_given(tokenizer: ModelTokenizer, own: Mapping[str, Any] | None, whose: str) -> None:
    """Refuse a tokenizer that was named by a flag and is not the model's own."""
    remedy = "leave --tokenizer out, or pass --no-tokenizer and put a tokenizer into the model's folder yourself"
    check_same(describe(tokenizer.tokenizer, tokenizer.options), own, whose, remedy=remedy)


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
    recorded = where_it_is_now(recorded, folder)
    options = options_of(recorded)
    try:
        loaded = load_checked(options, model)
    except DataError as error:
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be used: {error}; give it with --tokenizer, or pass --no-tokenizer"
        ) from None
    changed = differences(describe(loaded.tokenizer, options), recorded, with_template=True)
    if changed:
        raise CheckpointError(
            f"{folder}: the tokenizer {options.model} has changed since the checkpoint was written "
            f"({'; '.join(changed)}); give the right one with --tokenizer, or this one if only its chat template has "
            "changed and that is meant"
        )
    return loaded
