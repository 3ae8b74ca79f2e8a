"""Qwen3: Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig, require
from megatron_groupdpo.convert.families.decoder import (
    QK_NORMS,
    RULES,
    WINDOW,
    decoder_config,
    decoder_family,
    decoder_fields,
    window_config,
    window_fields,
)


def _to_model(config: HfConfig) -> ModelConfig:
    require(config, "attention_bias", False)
    return ModelConfig(**decoder_fields(config), **window_fields(config), qk_layernorm=True)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    config = decoder_config(model, "qwen3", expressed=WINDOW, qk_layernorm=True)
    return config | window_config(model) | {"attention_bias": False, "use_sliding_window": bool(model.window_size)}


QWEN3 = decoder_family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    rules={**RULES, **QK_NORMS},
    to_model=_to_model,
    to_hf=_to_hf,
    reads=("attention_bias", "sliding_window", "layer_types", "use_sliding_window", "max_window_layers"),
)
