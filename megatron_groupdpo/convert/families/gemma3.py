"""Gemma 3's text model: norms on both sides, windows with a RoPE of their own, scaled embeddings, norms less 1."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import Family, HfConfig, require, rule
from megatron_groupdpo.convert.families.decoder import (
    LAYER,
    POST_NORMS,
    QK_NORMS,
    READS,
    ROTARY_BUFFERS,
    RULES,
    WINDOW,
    decoder_config,
    decoder_fields,
    window_config,
    window_fields,
)
from megatron_groupdpo.convert.families.rope import two_rope_config, two_rope_fields
from megatron_groupdpo.errors import ConfigError

_FIXED: dict[str, Any] = {
    "norm_position": "sandwich",
    "apply_layernorm_1p": True,
    "qk_layernorm": True,
    "swiglu": False,
    "gated_linear_unit": True,
    "activation": "gelu-tanh",
    "scale_embeddings": True,
}


def _to_model(config: HfConfig) -> ModelConfig:
    require(config, "hidden_activation", "gelu_pytorch_tanh")
    require(config, "attention_bias", False)
    require(config, "use_bidirectional_attention", False, None)
    fields = decoder_fields(config, rope=two_rope_fields(config), silu=False)
    scalar = config["query_pre_attn_scalar"]
    scale = None if scalar == fields["kv_channels"] else scalar**-0.5
    return ModelConfig(**{**fields, **window_fields(config), **_FIXED}, softmax_scale=scale)


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    expressed = (*WINDOW, "rotary_base_local", "softmax_scale")
    config = decoder_config(model, "gemma3", expressed=expressed, **_FIXED)
    del config["hidden_act"]
    return (
        config
        | window_config(model)
        | two_rope_config(model)
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "query_pre_attn_scalar": _query_scalar(model),
        }
    )


def _query_scalar(model: ModelConfig) -> int:
    """The whole number whose inverse root is the model's softmax scale."""
    if model.softmax_scale is None:
        assert model.kv_channels is not None
        return model.kv_channels
    scalar = round(model.softmax_scale**-2)
    if scalar < 1 or scalar**-0.5 != model.softmax_scale:
        raise ConfigError(f"gemma3 has a softmax_scale of 1 / sqrt(whole number), the model {model.softmax_scale!r}")
    return scalar


GEMMA3 = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    rules={
        **RULES,
        **QK_NORMS,
        **POST_NORMS,
        "decoder.layers.pre_mlp_layernorm.weight": rule(LAYER + "pre_feedforward_layernorm.weight"),
    },
    to_model=_to_model,
    to_hf=_to_hf,
    prefix="model.",
    ignorable=(*ROTARY_BUFFERS, r"(model\.)*(vision_tower|multi_modal_projector)\..*"),
    tied_copies=dict.fromkeys(("lm_head.weight", "language_model.lm_head.weight"), "model.embed_tokens.weight"),
    wrapper="Gemma3ForConditionalGeneration",
    renamed=(
        ("model.", "language_model.model."),
        ("model.", "model.language_model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    reads=(
        *READS,
        *("hidden_activation", "attention_bias", "use_bidirectional_attention", "query_pre_attn_scalar"),
        *("sliding_window", "layer_types", "_sliding_window_pattern", "sliding_window_pattern", "rope_local_base_freq"),
    ),
    wrapper_reads=("text_config", "vision_config"),
    harmless=dict.fromkeys(
        ("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image"), "of images"
    )
    | {"hidden_act": "transformers reads hidden_activation"},
)
