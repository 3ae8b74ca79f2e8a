"""Mistral: Llama with a sliding window in every layer, or in none."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import HfConfig
from megatron_groupdpo.convert.families.decoder import (
    ALL_FULL,
    decoder_config,
    decoder_family,
    decoder_fields,
    one_window_config,
    one_window_fields,
)


def _to_model(config: HfConfig) -> ModelConfig:
    return ModelConfig(**decoder_fields(config), **one_window_fields(config))


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return decoder_config(model, "mistral", expressed=("window_size",)) | one_window_config(model)


MISTRAL = decoder_family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    to_model=_to_model,
    to_hf=_to_hf,
    reads=("sliding_window",),
    harmless=ALL_FULL,
)
