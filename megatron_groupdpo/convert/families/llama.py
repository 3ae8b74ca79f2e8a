"""Llama 1 to 3, without RoPE scaling, and what shares its code: LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import Family, HfConfig, require, require_model, rotary_base, rule
from megatron_groupdpo.convert.transforms import GATE_UP, QKV
from megatron_groupdpo.errors import ConfigError

_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."

_RULES = {
    "embedding.word_embeddings.weight": rule("model.embed_tokens.weight"),
    "decoder.layers.input_layernorm.weight": rule(_LAYER + "input_layernorm.weight"),
    "decoder.layers.pre_mlp_layernorm.weight": rule(_LAYER + "post_attention_layernorm.weight"),
    "decoder.final_layernorm.weight": rule("model.norm.weight"),
    "output_layer.weight": rule("lm_head.weight"),
    **{
        f"decoder.layers.{name}.{kind}": rule(*(f"{part}.{kind}" for part in parts), **transform)
        for kind in ("weight", "bias")
        for name, parts, transform in (
            (
                "self_attention.linear_qkv",
                (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj"),
                {"transform": QKV},
            ),
            ("self_attention.linear_proj", (_ATTENTION + "o_proj",), {}),
            ("mlp.linear_fc1", (_MLP + "gate_proj", _MLP + "up_proj"), {"transform": GATE_UP}),
            ("mlp.linear_fc2", (_MLP + "down_proj",), {}),
        )
    },
}


def _to_model(config: HfConfig) -> ModelConfig:
    require(config, "hidden_act", "silu", "swish")
    if bool(config["attention_bias"]) != bool(config["mlp_bias"]):
        raise ConfigError(
            f"attention_bias is {config['attention_bias']} and mlp_bias is {config['mlp_bias']}; "
            "the model section has one field for both (add_bias_linear), so they must agree"
        )
    heads = config["num_attention_heads"]
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config["num_key_value_heads"] or heads,
        kv_channels=config["head_dim"] or config["hidden_size"] // heads,
        max_position_embeddings=config["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=rotary_base(config),
        normalization="RMSNorm",
        norm_epsilon=config["rms_norm_eps"],
        swiglu=True,
        add_bias_linear=bool(config["mlp_bias"]),
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
        vocab_size=config["vocab_size"],
        init_method_std=config["initializer_range"],
    )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    require_model(
        model,
        "llama",
        position_embedding_type="rope",
        rotary_percent=1.0,
        normalization="RMSNorm",
        swiglu=True,
        qk_layernorm=False,
    )
    if model.add_qkv_bias and not model.add_bias_linear:
        raise ConfigError("llama has no biases in the query, key and value projections alone (add_qkv_bias)")
    return {
        "hidden_act": "silu",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_theta": float(model.rotary_base), "rope_type": "default"},
        # where readers older than transformers 5 look
        "rope_theta": float(model.rotary_base),
        "attention_bias": model.add_bias_linear,
        "mlp_bias": model.add_bias_linear,
        "attention_dropout": 0.0,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_method_std,
    }


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    rules=_RULES,
    to_model=_to_model,
    to_hf=_to_hf,
    prefix="model.",
    ignorable=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    tied_copies={"lm_head.weight": "model.embed_tokens.weight"},
)
