"""Tiny random Hugging Face models, and Megatron started once for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hf_examples import save_random_model

from megatron_groupdpo.config import ParallelConfig
from megatron_groupdpo.mcore.setup import Ranks, initialize, shut_down


@pytest.fixture(scope="module")  # and no longer: other folders' tests start a process group of their own
def ranks() -> Iterator[Ranks]:
    yield initialize(ParallelConfig(device="cpu"), seed=1)
    shut_down()


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``hf_models(name, dtype)``: a folder with a model whose every parameter matters to its log-probabilities."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = save_random_model(name, tmp_path_factory.mktemp("hf") / name, dtype)
        return made[name, dtype]

    return make


@pytest.fixture
def own_copy(hf_models: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a model's folder that the test may break."""
    import shutil

    def copy(name: str) -> Path:
        return Path(shutil.copytree(hf_models(name), tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 101 tokens, as many as the models' embeddings have rows."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"Q: {a} + {b} = ?\nA: the sum is {a + b}" for a in range(40) for b in range(40)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tok"), vocab_size=101, model_type="bpe", pad_id=3,
        minloglevel=2,
    )  # fmt: skip
    return folder / "tok.model"
