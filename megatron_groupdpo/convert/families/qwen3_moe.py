"""Qwen3-MoE: Qwen3 with experts, in all layers or in some."""

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
    one_window_config,
    one_window_fields,
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


def _to_model(config: HfConfig) -> ModelConfig:
    require(config, "attention_bias", False)
    experts = mixture_fields(config, width="moe_intermediate_size", normalized=config["norm_topk_prob"])
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"]
    marks = tuple(int((i + 1) % step == 0 and i not in dense) for i in range(config["num_hidden_layers"]))
    if not any(marks):
        raise ConfigError(f"decoder_sparse_step {step} and mlp_only_layers {dense} leave no layer with experts")
    return ModelConfig(
        **decoder_fields(config),
        **one_window_fields(config),
        **experts,
        moe_layer_freq=() if all(marks) else marks,
        qk_layernorm=True,
    )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    expressed = ("window_size", "moe_router_pre_softmax", "moe_layer_freq", *EXPERTS)
    config = decoder_config(model, "qwen3_moe", expressed=expressed, qk_layernorm=True)
    return (
        config
        | one_window_config(model)
        | mixture_config(model, "qwen3_moe")
        | {
            "moe_intermediate_size": model.moe_ffn_hidden_size,
            "norm_topk_prob": not model.moe_router_pre_softmax,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(model.num_layers) if not model.has_experts(i + 1)],
            "attention_bias": False,
            "use_sliding_window": bool(model.window_size),
        }
    )


QWEN3_MOE = decoder_family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rules={**RULES, **QK_NORMS, **expert_rules("mlp", **LLAMA_PARTS)},
    joined=joined_experts("mlp", **LLAMA_PARTS),
    to_model=_to_model,
    to_hf=_to_hf,
    reads=(
        *("attention_bias", "sliding_window", "use_sliding_window", "moe_intermediate_size", "norm_topk_prob"),
        *("decoder_sparse_step", "mlp_only_layers", *MIXTURE_READS),
    ),
    harmless={**ALL_FULL, **ROUTER_LOSS} | {"max_window_layers": "Qwen3-MoE has one window in all layers"},
)
