"""Tiny random Hugging Face models, and Megatron started once for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_groupdpo.config import ParallelConfig
from megatron_groupdpo.mcore.setup import Ranks, initialize, shut_down


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    yield initialize(ParallelConfig(device="cpu"), seed=1)
    shut_down()


def llama(**fields: Any) -> Any:
    """GQA, heads wider than hidden_size / heads, a vocabulary that needs padding."""
    from transformers import LlamaConfig

    config = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "rms_norm_eps": 1e-3,
    }
    return LlamaConfig(**(config | fields))


def gpt2(**fields: Any) -> Any:
    from transformers import GPT2Config

    config = {
        "vocab_size": 101,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "layer_norm_epsilon": 1e-3,
    }
    return GPT2Config(**(config | fields))


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama-untied": lambda: llama(),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True, head_dim=8, num_key_value_heads=6),
    "gpt2": lambda: gpt2(),
    "gpt2-untied-relu": lambda: gpt2(tie_word_embeddings=False, activation_function="relu", n_inner=72),
}


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``hf_models(name, dtype)``: a folder with a model whose every parameter matters to its log-probabilities."""
    from transformers import AutoModelForCausalLM

    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            generator = torch.Generator().manual_seed(7)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            for parameter in model.parameters():  # biases start at 0 and norms at 1, which would hide a mix-up
                drawn = torch.empty(parameter.shape, device="cpu").normal_(std=0.3, generator=generator)
                parameter.data.copy_(drawn + (parameter.data == 1).float())
            folder = tmp_path_factory.mktemp("hf") / name
            model.to(dtype).save_pretrained(folder)
            made[name, dtype] = folder
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
