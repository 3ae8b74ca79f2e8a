"""Tiny random Hugging Face models of every family, for the tests of conversion and of layouts.

Sizes are awkward on purpose: grouped heads, heads wider than hidden_size / heads, a vocabulary that needs padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 101


def decoder(kind: str, **fields: Any) -> Any:
    """The configuration class of a family that shares Llama's fields, by the class's name."""
    import transformers

    config: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": None,  # else its row would get no gradient from transformers
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
    return getattr(transformers, kind)(**(config | fields))


def gpt2(**fields: Any) -> Any:
    from transformers import GPT2Config

    config = {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "layer_norm_epsilon": 1e-3,
    }
    return GPT2Config(**(config | fields))


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
    # lengths and bases at which some channels are stretched, some left and some in between
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 40,
        "low_freq_factor": 0.5,
        "high_freq_factor": 3.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 40,
        "beta_fast": 6.0,
        "beta_slow": 0.5,
    },
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama-untied": lambda: decoder("LlamaConfig"),
    "llama-tied": lambda: decoder("LlamaConfig", tie_word_embeddings=True),
    "llama-biases": lambda: decoder(
        "LlamaConfig", attention_bias=True, mlp_bias=True, head_dim=8, num_key_value_heads=6
    ),
    "llama3-scaled": lambda: decoder("LlamaConfig", rope_parameters=SCALED["llama3"], tie_word_embeddings=True),
    "llama-linear": lambda: decoder("LlamaConfig", rope_parameters=SCALED["linear"]),
    "qwen2-tied": lambda: decoder("Qwen2Config", tie_word_embeddings=True),
    "qwen3": lambda: decoder("Qwen3Config", num_key_value_heads=1, rope_parameters=SCALED["yarn"]),
    "qwen3-windows": lambda: decoder(
        "Qwen3Config", num_hidden_layers=4, use_sliding_window=True, sliding_window=6, max_window_layers=2
    ),
    "mistral": lambda: decoder("MistralConfig", sliding_window=7),
    "olmo2": lambda: decoder("Olmo2Config", num_key_value_heads=1),
    "olmo3": lambda: decoder(
        "Olmo3Config",
        num_hidden_layers=4,
        sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": SCALED["yarn"],
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    "gemma3": lambda: decoder(
        "Gemma3TextConfig",
        num_hidden_layers=4,
        sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=24,
        rope_parameters={
            "full_attention": SCALED["linear"],
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    # narrow experts: their outputs, products of three weights drawn wide, would drown the rest and add rounding
    "mixtral": lambda: decoder(
        "MixtralConfig", num_local_experts=4, num_experts_per_tok=2, intermediate_size=24, sliding_window=7
    ),
    "qwen3-moe": lambda: decoder(
        "Qwen3MoeConfig",
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        intermediate_size=32,
        norm_topk_prob=True,
        mlp_only_layers=[2],
    ),
    "olmoe": lambda: decoder(
        "OlmoeConfig", head_dim=8, num_experts=8, num_experts_per_tok=2, intermediate_size=24, eos_token_id=None
    ),
    "gpt2": lambda: gpt2(),
    "gpt2-untied-relu": lambda: gpt2(tie_word_embeddings=False, activation_function="relu", n_inner=72),
}


def random_model(name: str) -> Any:
    """A model whose every parameter matters to its log-probabilities, the same on every call."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name](), attn_implementation="eager", experts_implementation="eager"
    )
    for parameter in model.parameters():  # biases start at 0 and norms at 1, which would hide a mix-up
        drawn = torch.empty(parameter.shape, device="cpu").normal_(std=0.3, generator=generator)
        parameter.data.copy_(drawn + (parameter.data == 1).float())
    return model


def save_random_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write :func:`random_model` as a Hugging Face folder."""
    random_model(name).to(dtype).save_pretrained(folder)
    return folder


def named_as_in_files(tensors: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Experts, which ``transformers`` joins in memory, one by one and under the names that it writes to files."""
    own_words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if model_type == "mixtral" else {}
    named: dict[str, Any] = {}
    for key, tensor in tensors.items():
        key = key.replace(".mlp.", ".block_sparse_moe.") if model_type == "mixtral" else key
        before, mark, joined = key.partition(".experts.")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(joined, ())
        if not parts:
            named[key] = tensor
        for expert, own in enumerate(tensor if parts else ()):
            for part, piece in zip(parts, own.chunk(len(parts)), strict=True):
                named[f"{before}{mark}{expert}.{own_words.get(part, part)}.weight"] = piece
    return named
