"""The tensors of a Megatron model by global name: the side of the mapping that all families share.

A name that starts with ``decoder.layers.`` stands for one tensor per layer, as in a distributed checkpoint; the experts
of a layer are numbered in it (``decoder.layers.mlp.experts.experts.3.linear_fc1.weight``). Shapes are those of one
whole layer on no particular layout, without the rows that pad the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_groupdpo.config import ModelConfig

LAYERS = "decoder.layers."
EXPERTS = LAYERS + "mlp.experts.experts."  # Megatron's module, and its prefix in checkpoints
_NUMBERED = re.compile(re.escape(LAYERS) + r"(\d+)\.")
Shape = tuple[int, ...]

# Fused Transformer Engine layers keep a norm in the linear layer behind it, and their checkpoints name it so.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def canonical_name(name: str) -> str:
    """The name of a tensor in the local layer spec, for either layer spec's name."""
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def num_leading_axes(name: str) -> int:
    """How many axes a distributed checkpoint puts before those of a tensor: one for the layer, one for the expert."""
    unnumbered = _NUMBERED.sub(LAYERS, name)
    return int(name.startswith(LAYERS) and unnumbered == name) + int(unnumbered.startswith(EXPERTS))


def tensor_key(name: str, indices: Sequence[int]) -> tuple[str, int | None]:
    """Name and layer of a tensor of a distributed checkpoint.

    Args:
        name: there. A model whose layers differ in kind has the layer's number in it.
        indices: place in the axes that the checkpoint puts before the tensor's own: of the layer, of the expert.
    """
    name, places = canonical_name(name), list(indices)
    numbered = _NUMBERED.match(name)
    if numbered:
        name, places = LAYERS + name[numbered.end() :], [int(numbered[1]), *places]
    if name.startswith(EXPERTS):
        name = f"{EXPERTS}{places.pop()}.{name.removeprefix(EXPERTS)}"
    assert len(places) <= 1, (name, indices)
    return name, places[0] if places else None


def rule_name(name: str) -> tuple[str, int | None]:
    """The name under which families have a rule for a tensor, and the number of the expert."""
    if not name.startswith(EXPERTS):
        return name, None
    number, rest = name.removeprefix(EXPERTS).split(".", 1)
    return EXPERTS + rest, int(number)


def is_in_layer(name: str, model: ModelConfig, layer: int) -> bool:
    """Whether a layer, counted from 0, has this tensor: experts and their router, or an MLP."""
    if not name.startswith(LAYERS + "mlp."):
        return True
    of_mixture = name.startswith((EXPERTS, LAYERS + "mlp.router."))
    return of_mixture == model.has_experts(layer + 1)


def is_per_layer(name: str) -> bool:
    """Whether the model has one such tensor per layer."""
    return name.startswith(LAYERS)


def megatron_tensors(model: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a model with all its sizes filled in has."""
    assert model.vocab_size is not None
    assert model.kv_channels is not None
    assert model.ffn_hidden_size is not None
    assert model.num_query_groups is not None
    hidden, heads, head = model.hidden_size, model.num_attention_heads, model.kv_channels
    ffn = model.ffn_hidden_size
    qkv = (heads + 2 * model.num_query_groups) * head
    bias = model.add_bias_linear
    tensors: dict[str, Shape] = {"embedding.word_embeddings.weight": (model.vocab_size, hidden)}
    if model.position_embedding_type == "learned_absolute":
        tensors["embedding.position_embeddings.weight"] = (model.max_position_embeddings, hidden)
    tensors |= _linear(LAYERS + "self_attention.linear_qkv", qkv, hidden, bias=bias or model.add_qkv_bias)
    if model.qk_layernorm:
        queries, keys = (heads, model.num_query_groups) if model.qk_layernorm_across_heads else (1, 1)
        tensors |= _norm(LAYERS + "self_attention.q_layernorm", queries * head, model)
        tensors |= _norm(LAYERS + "self_attention.k_layernorm", keys * head, model)
    tensors |= _linear(LAYERS + "self_attention.linear_proj", hidden, heads * head, bias=bias)
    with_experts = {model.has_experts(layer) for layer in range(1, model.num_layers + 1)}
    if False in with_experts:
        tensors |= _mlp(LAYERS + "mlp.", ffn, model)
    if True in with_experts:
        assert model.num_moe_experts is not None
        assert model.moe_ffn_hidden_size is not None
        tensors |= _linear(LAYERS + "mlp.router", model.num_moe_experts, hidden, bias=False)
        for expert in range(model.num_moe_experts):
            tensors |= _mlp(f"{EXPERTS}{expert}.", model.moe_ffn_hidden_size, model)
    before = ("input_layernorm", "pre_mlp_layernorm") if model.norm_position != "post" else ()
    after = ("post_self_attn_layernorm", "post_mlp_layernorm") if model.norm_position != "pre" else ()
    for name in (*before, *after):
        tensors |= _norm(LAYERS + name, hidden, model)
    tensors |= _norm("decoder.final_layernorm", hidden, model)
    if model.untie_embeddings_and_output_weights:
        tensors["output_layer.weight"] = (model.vocab_size, hidden)
    return tensors


def _mlp(name: str, ffn: int, model: ModelConfig) -> dict[str, Shape]:
    hidden, bias = model.hidden_size, model.add_bias_linear
    first = _linear(name + "linear_fc1", 2 * ffn if model.gated else ffn, hidden, bias=bias)
    return first | _linear(name + "linear_fc2", hidden, ffn, bias=bias)


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, size: int, model: ModelConfig) -> dict[str, Shape]:
    return {f"{name}.weight": (size,)} | ({f"{name}.bias": (size,)} if model.normalization == "LayerNorm" else {})
