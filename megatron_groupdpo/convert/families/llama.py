"""Llama 1 to 3, and what shares its code: LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig
from megatron_groupdpo.convert.families.decoder import ALL_FULL, decoder_config, decoder_family, decoder_fields
from megatron_groupdpo.errors import ConfigError


def _to_model(config: HfConfig) -> ModelConfig:
    if bool(config["attention_bias"]) != bool(config["mlp_bias"]):
        raise ConfigError(
            f"attention_bias is {config['attention_bias']} and mlp_bias is {config['mlp_bias']}; "
            "the model section has one field for both (add_bias_linear), so they must agree"
        )
    fields = decoder_fields(config)
    fields["add_bias_linear"] = bool(config["mlp_bias"])
    return ModelConfig(**fields)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    config = decoder_config(model, "llama", expressed=("add_bias_linear", "add_qkv_bias"))
    if model.add_qkv_bias and not model.add_bias_linear:
        raise ConfigError("llama has no biases in the query, key and value projections alone (add_qkv_bias)")
    return config | {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}


LLAMA = decoder_family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    to_model=_to_model,
    to_hf=_to_hf,
    reads=("attention_bias", "mlp_bias"),
    harmless={**ALL_FULL, "pretraining_tp": "the same products, in slices"},
)
