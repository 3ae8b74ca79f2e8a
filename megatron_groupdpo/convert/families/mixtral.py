"""Mixtral: Mistral with experts in every layer, weighed by a softmax over those that a token goes to."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig, require
from megatron_groupdpo.convert.families.decoder import (
    ALL_FULL,
    RULES,
    decoder_config,
    decoder_family,
    decoder_fields,
    one_window_config,
    one_window_fields,
)
from megatron_groupdpo.convert.families.mixture import (
    EXPERTS,
    MIXTURE_READS,
    ROUTER_LOSS,
    expert_rules,
    joined_experts,
    mixture_config,
    mixture_fields,
)

_BLOCK = "block_sparse_moe"
_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}


def _to_model(config: HfConfig) -> ModelConfig:
    require(config, "router_jitter_noise", 0.0)
    experts = mixture_fields(config, width="intermediate_size", normalized=True)
    return ModelConfig(**decoder_fields(config), **one_window_fields(config), **experts)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    config = decoder_config(model, "mixtral", expressed=("window_size", *EXPERTS))
    return (
        config
        | one_window_config(model)
        | mixture_config(model, "mixtral")
        | {"intermediate_size": model.moe_ffn_hidden_size}
    )


MIXTRAL = decoder_family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    rules={**RULES, **expert_rules(_BLOCK, **_PARTS)},
    joined=joined_experts(_BLOCK, **_PARTS),
    renamed=((f".{_BLOCK}.gate.", ".mlp.gate."),),
    to_model=_to_model,
    to_hf=_to_hf,
    reads=("sliding_window", "router_jitter_noise", *MIXTURE_READS),
    harmless=ALL_FULL | ROUTER_LOSS,
)
