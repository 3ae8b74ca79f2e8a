"""Qwen2 and Qwen2.5: Llama with biases in the query, key and value projections."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig
from megatron_groupdpo.convert.families.decoder import (
    WINDOW,
    decoder_config,
    decoder_family,
    decoder_fields,
    window_config,
    window_fields,
)


def _to_model(config: HfConfig) -> ModelConfig:
    return ModelConfig(**decoder_fields(config), **window_fields(config), add_qkv_bias=True)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    config = decoder_config(model, "qwen2", expressed=WINDOW, add_qkv_bias=True)
    return config | window_config(model) | {"use_sliding_window": bool(model.window_size)}


QWEN2 = decoder_family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    to_model=_to_model,
    to_hf=_to_hf,
    reads=("sliding_window", "layer_types", "use_sliding_window", "max_window_layers"),
)
