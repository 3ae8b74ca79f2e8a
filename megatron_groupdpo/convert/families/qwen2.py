"""Qwen2 and Qwen2.5: Llama with biases in the query, key and value projections."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import Family, HfConfig, require
from megatron_groupdpo.convert.families.decoder import ROTARY_BUFFERS, RULES, TIED_HEAD, decoder_config, decoder_fields


def _to_model(config: HfConfig) -> ModelConfig:
    require(config, "use_sliding_window", False)
    return ModelConfig(**decoder_fields(config), add_qkv_bias=True)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return decoder_config(model, "qwen2", add_qkv_bias=True) | {"use_sliding_window": False}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    rules=RULES,
    to_model=_to_model,
    to_hf=_to_hf,
    prefix="model.",
    ignorable=ROTARY_BUFFERS,
    tied_copies=TIED_HEAD,
    reads=("sliding_window", "layer_types"),
)
