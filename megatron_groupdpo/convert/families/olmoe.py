"""OLMoE: Llama with experts, weighed by a softmax over all, and norms over the queries and the keys of all heads."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig, require
from megatron_groupdpo.convert.families.decoder import (
    ALL_FULL,
    QK_NORMS,
    RULES,
    decoder_config,
    decoder_family,
    decoder_fields,
)
from megatron_groupdpo.convert.families.mixture import (
    EXPERTS,
    LLAMA_PARTS,
    MIXTURE_READS,
    ROUTER_LOSS,
    expert_rules,
    joined_experts,
    mixture_config,
    mixture_fields,
)
from megatron_groupdpo.errors import ConfigError

_NORMS: dict[str, Any] = {"qk_layernorm": True, "qk_layernorm_across_heads": True}


def _to_model(config: HfConfig) -> ModelConfig:
    require(config, "attention_bias", False)
    require(config, "clip_qkv", None)
    experts = mixture_fields(config, width="intermediate_size", normalized=config["norm_topk_prob"])
    return ModelConfig(**decoder_fields(config), **_NORMS, **experts)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    config = decoder_config(model, "olmoe", expressed=(*EXPERTS, "moe_router_pre_softmax"), **_NORMS)
    if model.kv_channels != model.hidden_size // model.num_attention_heads:
        raise ConfigError(f"olmoe has kv_channels hidden_size / num_attention_heads, the model {model.kv_channels}")
    return (
        config
        | mixture_config(model, "olmoe")
        | {
            "intermediate_size": model.moe_ffn_hidden_size,
            "norm_topk_prob": not model.moe_router_pre_softmax,
            "attention_bias": False,
            "clip_qkv": None,
        }
    )


OLMOE = decoder_family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    rules={**RULES, **QK_NORMS, **expert_rules("mlp", **LLAMA_PARTS)},
    joined=joined_experts("mlp", **LLAMA_PARTS),
    to_model=_to_model,
    to_hf=_to_hf,
    reads=("attention_bias", "clip_qkv", "norm_topk_prob", *MIXTURE_READS),
    harmless=ALL_FULL | ROUTER_LOSS,
)
