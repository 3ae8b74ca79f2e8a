"""GPT-2: learned positions, layer norms and biases throughout, weights of the linear layers stored [in, out]."""

from __future__ import annotations

from typing import Any, cast

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families.base import Family, HfConfig, one_of, require, require_model, rule
from megatron_groupdpo.convert.families.transforms import CONV1D, CONV1D_QKV
from megatron_groupdpo.errors import ConfigError

_LAYER = "transformer.h.{layer}."

_ACTIVATIONS = {
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""The first name of each is the one written on export."""

_SUMMARY = (
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
)  # fmt: skip

_RULES = {
    "embedding.word_embeddings.weight": rule("transformer.wte.weight"),
    "embedding.position_embeddings.weight": rule("transformer.wpe.weight"),
    "output_layer.weight": rule("lm_head.weight"),
    **{
        f"{name}.{kind}": rule(f"{hf}.{kind}", **transform)
        for kind in ("weight", "bias")
        for name, hf, transform in (
            ("decoder.layers.input_layernorm", _LAYER + "ln_1", {}),
            ("decoder.layers.self_attention.linear_qkv", _LAYER + "attn.c_attn", {"transform": CONV1D_QKV}),
            ("decoder.layers.self_attention.linear_proj", _LAYER + "attn.c_proj", {"transform": CONV1D}),
            ("decoder.layers.pre_mlp_layernorm", _LAYER + "ln_2", {}),
            ("decoder.layers.mlp.linear_fc1", _LAYER + "mlp.c_fc", {"transform": CONV1D}),
            ("decoder.layers.mlp.linear_fc2", _LAYER + "mlp.c_proj", {"transform": CONV1D}),
            ("decoder.final_layernorm", "transformer.ln_f", {}),
        )
    },
}


def _to_model(config: HfConfig) -> ModelConfig:
    require(config, "scale_attn_weights", True)
    require(config, "scale_attn_by_inverse_layer_idx", False)
    require(config, "add_cross_attention", False)
    return ModelConfig(
        num_layers=config["n_layer"],
        hidden_size=config["n_embd"],
        ffn_hidden_size=config["n_inner"] or 4 * config["n_embd"],
        num_attention_heads=config["n_head"],
        num_query_groups=config["n_head"],
        kv_channels=config["n_embd"] // config["n_head"],
        max_position_embeddings=config["n_positions"],
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        norm_epsilon=config["layer_norm_epsilon"],
        activation=cast(Any, one_of(config, "activation_function", _ACTIVATIONS)),
        add_bias_linear=True,
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
        vocab_size=config["vocab_size"],
        init_method_std=config["initializer_range"],
    )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    require_model(
        model,
        "gpt2",
        expressed=("activation", "untie_embeddings_and_output_weights", "add_qkv_bias"),
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        add_bias_linear=True,
        num_query_groups=model.num_attention_heads,
    )
    assert model.kv_channels is not None
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        raise ConfigError(
            f"gpt2 has heads of hidden_size / num_attention_heads channels, the model kv_channels {model.kv_channels}"
        )
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": names[model.activation],
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_method_std,
    }


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    rules=_RULES,
    to_model=_to_model,
    to_hf=_to_hf,
    reads=(
        *("n_layer", "n_embd", "n_inner", "n_head", "n_positions", "layer_norm_epsilon", "activation_function"),
        *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"),
        # what transformers reads as the first names
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"),
    ),
    harmless={
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), "training runs without dropout"),
        **dict.fromkeys(_SUMMARY, "of a classifier on the model"),
        "reorder_and_upcast_attn": "the same product, rounded otherwise in half precision",
        "n_ctx": "an older name of n_positions beside it",
    },
    prefix="transformer.",
    ignorable=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    tied_copies={"lm_head.weight": "transformer.wte.weight"},
)
