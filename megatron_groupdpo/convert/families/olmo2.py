"""OLMo-2: norms after attention and MLP, and norms over the queries and the keys of all heads."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig, require
from megatron_groupdpo.convert.families.decoder import (
    ALL_FULL,
    POST_NORMS,
    QK_NORMS,
    RULES,
    decoder_config,
    decoder_family,
    decoder_fields,
)

NORMS: dict[str, Any] = {"norm_position": "post", "qk_layernorm": True, "qk_layernorm_across_heads": True}


def _to_model(config: HfConfig) -> ModelConfig:
    require(config, "attention_bias", False)
    return ModelConfig(**decoder_fields(config), **NORMS)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return decoder_config(model, "olmo2", **NORMS) | {"attention_bias": False}


OLMO2 = decoder_family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    rules={**RULES, **QK_NORMS, **POST_NORMS},
    to_model=_to_model,
    to_hf=_to_hf,
    reads=("attention_bias",),
    harmless=ALL_FULL,
)
