"""OLMo-3: OLMo-2 with sliding windows in some layers, whose RoPE is not scaled."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig, require
from megatron_groupdpo.convert.families.decoder import (
    POST_NORMS,
    QK_NORMS,
    RULES,
    WINDOW,
    decoder_config,
    decoder_family,
    decoder_fields,
    window_config,
    window_fields,
)
from megatron_groupdpo.convert.families.olmo2 import NORMS
from megatron_groupdpo.convert.families.rope import two_rope_config, two_rope_fields


def _to_model(config: HfConfig) -> ModelConfig:
    require(config, "attention_bias", False)
    return ModelConfig(**decoder_fields(config, rope=two_rope_fields(config)), **window_fields(config), **NORMS)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    config = decoder_config(model, "olmo3", expressed=(*WINDOW, "rotary_base_local"), **NORMS)
    return config | window_config(model) | two_rope_config(model) | {"attention_bias": False}


OLMO3 = decoder_family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    rules={**RULES, **QK_NORMS, **POST_NORMS},
    to_model=_to_model,
    to_hf=_to_hf,
    reads=("attention_bias", "sliding_window", "layer_types"),
)
