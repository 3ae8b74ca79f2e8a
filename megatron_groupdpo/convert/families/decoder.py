"""What the families with gated MLPs, RoPE and RMS norms share: Llama's tensor names and fields, and how they vary.

A family adds its own rules to :data:`RULES`, and its own fields to :func:`decoder_fields` and :func:`decoder_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import Family, HfConfig, Rule, require, require_model, rule
from megatron_groupdpo.convert.families.rope import FULL, ROPE, SLIDING, rope_config, rope_fields
from megatron_groupdpo.convert.families.transforms import GATE_UP, QKV
from megatron_groupdpo.errors import ConfigError

LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = LAYER + "self_attn.", LAYER + "mlp."

RULES: Mapping[str, Rule] = {
    "embedding.word_embeddings.weight": rule("model.embed_tokens.weight"),
    "decoder.layers.input_layernorm.weight": rule(LAYER + "input_layernorm.weight"),
    "decoder.layers.pre_mlp_layernorm.weight": rule(LAYER + "post_attention_layernorm.weight"),
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
"""Llama's, all biases included; a family overrides what it names otherwise."""

QK_NORMS: Mapping[str, Rule] = {
    f"decoder.layers.self_attention.{ours}.weight": rule(f"{_ATTENTION}{theirs}.weight")
    for ours, theirs in (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm"))
}
POST_NORMS: Mapping[str, Rule] = {
    "decoder.layers.post_self_attn_layernorm.weight": rule(LAYER + "post_attention_layernorm.weight"),
    "decoder.layers.post_mlp_layernorm.weight": rule(LAYER + "post_feedforward_layernorm.weight"),
}
ROTARY_BUFFERS = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
"""Buffers in files of old versions."""
TIED_HEAD = {"lm_head.weight": "model.embed_tokens.weight"}


READS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling",
)  # fmt: skip
"""Fields of config.json that :func:`decoder_fields` reads, the last three in their place of transformers 5 or 4."""


def decoder_family(*, rules: Mapping[str, Rule] = RULES, reads: tuple[str, ...] = (), **own: Any) -> Family:
    """A :class:`Family` whose files are laid out as Llama's; ``own`` are its other fields."""
    reads = (*READS, "hidden_act", *reads)
    return Family(rules=rules, reads=reads, prefix="model.", ignorable=ROTARY_BUFFERS, tied_copies=TIED_HEAD, **own)


ALL_FULL: Mapping[str, str] = {"layer_types": "full attention in every layer, which is checked"}
"""Of a family that does not read the field."""

WINDOW = ("window_size", "window_attn_skip_freq")
"""Fields of ModelConfig that :func:`window_config` writes."""

_EXPRESSED = (*ROPE, "untie_embeddings_and_output_weights")


def decoder_fields(config: HfConfig, *, rope: Mapping[str, Any] | None = None, silu: bool = True) -> dict[str, Any]:
    """Fields of ModelConfig that every such family's config.json decides in the same way.

    Args:
        config: config.json.
        rope: the rotary fields, of a family whose layers do not all have the same.
        silu: whether the activation is that of ``hidden_act``; else the caller says which.
    """
    if silu:
        require(config, "hidden_act", "silu", "swish")
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config["num_key_value_heads"] or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "swiglu": silu,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "vocab_size": config["vocab_size"],
        "init_method_std": config["initializer_range"],
        **(rope_fields(config["rope_parameters"]) if rope is None else rope),
    }


def decoder_config(
    model: ModelConfig, family: str, *, expressed: tuple[str, ...] = (), **values: Any
) -> dict[str, Any]:
    """The config.json fields of such a model.

    Args:
        model: the model.
        family: its name, for messages.
        expressed: fields of ModelConfig, beside those that all such families have, that the caller writes.
        values: fields of ModelConfig that the family fixes, in place of ModelConfig's defaults.

    Raises:
        ConfigError: the model has a field that the family lacks.
    """
    fixed = {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
    } | values
    fixed = {name: value for name, value in fixed.items() if name not in expressed}
    require_model(model, family, expressed=(*_EXPRESSED, *expressed), **fixed)
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
        "rope_parameters": rope_config(model),
        # where readers older than transformers 5 look
        "rope_theta": float(model.rotary_base),
        "rope_scaling": rope_config(model) if model.rope_scaling_type else None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_method_std,
    }


def window_fields(config: HfConfig) -> dict[str, Any]:
    """The sliding window of a config.json with ``sliding_window`` and ``layer_types``; empty without one."""
    kinds, window = config["layer_types"], config["sliding_window"]
    if set(kinds) - {FULL, SLIDING} or len(kinds) != config["num_hidden_layers"]:
        raise ConfigError(
            f"layer_types is {kinds!r}; it must name {config['num_hidden_layers']} layers, each {FULL!r} or {SLIDING!r}"
        )
    if SLIDING not in kinds:
        return {}
    if window is None or window < 1:
        raise ConfigError(f"sliding_window is {window!r} and layer_types has {SLIDING!r}; give the window's width")
    # transformers counts the query itself, Megatron the positions to its left
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": _skip_freq([kind == SLIDING for kind in kinds])}


def _skip_freq(windowed: list[bool]) -> tuple[int, ...]:
    """ModelConfig's shortest form of it."""
    if all(windowed):
        return ()
    first_full = windowed.index(False) + 1
    if first_full > 1 and windowed == [layer % first_full != 0 for layer in range(1, len(windowed) + 1)]:
        return (first_full,)
    return tuple(map(int, windowed))


def window_config(model: ModelConfig) -> dict[str, Any]:
    """``sliding_window`` and ``layer_types`` of a model."""
    windowed = [model.has_window(layer) for layer in range(1, model.num_layers + 1)]
    return {
        "sliding_window": model.window_size[0] + 1 if model.window_size else None,
        "layer_types": [SLIDING if with_window else FULL for with_window in windowed],
    }


def one_window_fields(config: HfConfig) -> dict[str, Any]:
    """The same of a family whose layers all have the window of ``sliding_window``, or none."""
    kind = FULL if config["sliding_window"] is None else SLIDING
    return window_fields({**config, "layer_types": [kind] * config["num_hidden_layers"]})


def one_window_config(model: ModelConfig) -> dict[str, Any]:
    """``sliding_window`` of such a model."""
    return {"sliding_window": window_config(model)["sliding_window"]}
