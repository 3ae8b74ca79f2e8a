"""Tokenizers trained on the spot, and a shortcut from records to a store."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from data_makers import CORPUS

from megatron_groupdpo.data.preprocess.partition import Partition
from megatron_groupdpo.data.preprocess.pipeline import Listeners, PreprocessReport, preprocess
from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
from megatron_groupdpo.data.text.tokenize import TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions

TrainSentencePiece = Callable[..., Path]


@pytest.fixture(scope="session")
def train_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> TrainSentencePiece:
    """``train(model_type="bpe", byte_fallback=True, ...)``: the file of a model trained on a few hundred lines."""

    def train(**options: Any) -> Path:
        defaults = {
            "model_type": "bpe",
            "vocab_size": 420,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "hard_vocab_limit": False,
            "pad_id": 3,
            "minloglevel": 9,
        }
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=model, **(defaults | options)
        )
        path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
        path.write_bytes(model.getvalue())
        return path

    return train


@pytest.fixture(scope="session")
def sentencepiece_model(train_sentencepiece: TrainSentencePiece) -> Path:
    return train_sentencepiece()


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """``write_lines(records)``: a JSON Lines file; text records are written as they are."""

    def write(records: Sequence[Any], name: str = "groups.jsonl") -> Path:
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def build(sentencepiece_model: Path, tmp_path: Path) -> Callable[..., PreprocessReport]:
    """``build(input, ...)``: a store at ``tmp_path / "store"``, by default with one long sequence length."""

    def run(
        source: Path | str,
        *,
        partition: Partition | None = None,
        tokenize: TokenizeOptions | None = None,
        workers: int = 1,
        overwrite: bool = False,
        output: Path | None = None,
        listeners: Listeners | None = None,
        commit_seconds: float = 60.0,
        **options: Any,
    ) -> PreprocessReport:
        tokenizer = TokenizerOptions(kind="SentencePieceTokenizer", model=str(sentencepiece_model))
        return preprocess(
            [str(source)],
            output or tmp_path / "store",
            PreprocessOptions(
                tokenizer=tokenizer,
                tokenize=tokenize or TokenizeOptions(seq_length=4096),
                partition=partition or Partition(),
                **options,
            ),
            workers=workers,
            overwrite=overwrite,
            listeners=listeners,
            commit_seconds=commit_seconds,
        )

    return run
