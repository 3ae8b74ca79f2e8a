"""Mistral: Llama with a sliding window in every layer, or in none."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig
from megatron_groupdpo.convert.families.decoder import (
    decoder_config,
    decoder_family,
    decoder_fields,
    window_config,
    window_fields,
)
from megatron_groupdpo.convert.families.rope import FULL, SLIDING


def _to_model(config: HfConfig) -> ModelConfig:
    kind = FULL if config["sliding_window"] is None else SLIDING
    layers = {**config, "layer_types": [kind] * config["num_hidden_layers"]}
    return ModelConfig(**decoder_fields(config), **window_fields(layers))


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    config = decoder_config(model, "mistral", expressed=("window_size",))
    return config | {"sliding_window": window_config(model)["sliding_window"]}


MISTRAL = decoder_family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    to_model=_to_model,
    to_hf=_to_hf,
    reads=("sliding_window",),
)
