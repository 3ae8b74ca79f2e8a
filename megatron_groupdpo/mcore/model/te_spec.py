"""The layer spec of Transformer Engine's modules, for every supported family.

Its linear layers hold the norm before them (``layer_norm_weight``). Norms over all heads and after attention or MLP are
ours, as in the local spec. Tensors are named as in the local spec, so that a checkpoint serves either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.mcore.model.attention import SdpaAttention, layer_window
from megatron_groupdpo.mcore.model.moe import grouped_mixture_mlp
from megatron_groupdpo.mcore.model.norm import AcrossHeadsRMSNorm, PostNormLayer
from megatron_groupdpo.mcore.model.rotary import TwoRopeSelfAttention, score_factor
from megatron_groupdpo.mcore.model.te_grouped import scales_by_expert

_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """The modules a layer is made of; each is called as Megatron's own of its kind."""

    norm_and_column: Any
    """Norm, then a column-parallel linear layer."""
    column: Any
    row: Any
    core_attention: Any
    norm: Any
    grouped_column: Any = None
    """Of all experts on a rank, a column-parallel linear layer each; only mixtures ask for it."""
    grouped_row: Any = None


def transformer_engine_parts() -> LayerParts:
    """Megatron's wrappers of Transformer Engine's modules."""
    from megatron.core.extensions import transformer_engine as te

    return LayerParts(
        norm_and_column=te.TELayerNormColumnParallelLinear,
        column=te.TEColumnParallelLinear,
        row=te.TERowParallelLinear,
        core_attention=te.TEDotProductAttention,
        norm=te.TENorm,
        grouped_column=scales_by_expert(te.TEColumnParallelGroupedLinear),
        grouped_row=scales_by_expert(te.TERowParallelGroupedLinear),
    )


def fused_layer_spec(
    model: ModelConfig,
    config: TransformerConfig,
    vp_stage: int | None,
    parts: LayerParts,
    *,
    local_attention: bool,
) -> TransformerBlockSubmodules:
    """Layers of ``parts``; ``local_attention`` puts PyTorch's attention between them."""
    full_factor = score_factor(model, windowed=False) / score_factor(model, windowed=True)
    attention: Any
    if local_attention:
        attention = partial(SdpaAttention, full_attention_factor=full_factor)
    elif full_factor != 1.0:
        attention = partial(_scaled_attention, parts.core_attention, full_factor)
    else:
        attention = parts.core_attention
    before = parts.column if model.norm_position == "post" else parts.norm_and_column
    add: Any = get_bias_dropout_add
    submodules = TransformerLayerSubmodules(
        input_layernorm=IdentityOp,
        self_attention=ModuleSpec(
            module=SelfAttention if model.rotary_base_local is None else TwoRopeSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=before,
                core_attention=attention,
                linear_proj=parts.row,
                q_layernorm=_head_norm(model, parts, model.num_attention_heads),
                k_layernorm=_head_norm(model, parts, model.num_query_groups),
            ),
        ),
        self_attn_bda=add,
        pre_mlp_layernorm=IdentityOp,
        mlp=partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=before, linear_fc2=parts.row)),  # type: ignore[arg-type]
        mlp_bda=add,
        sharded_state_dict_keys_map={} if model.norm_position == "post" else dict(_NAMES),
    )
    layer_class = TransformerLayer if model.norm_position == "pre" else PostNormLayer
    dense = mixture = ModuleSpec(module=layer_class, submodules=submodules)
    if model.num_moe_experts is not None:
        with_experts = dataclasses.replace(
            submodules,
            mlp=grouped_mixture_mlp(parts.grouped_column, parts.grouped_row),
            # The router reads what the experts read, so their norm is a module of its own.
            pre_mlp_layernorm=IdentityOp if model.norm_position == "post" else parts.norm,
        )
        mixture = ModuleSpec(module=layer_class, submodules=with_experts)
    first = get_transformer_layer_offset(config, vp_stage) + 1
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage))
    layers = [mixture if model.has_experts(number) else dense for number in numbers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=parts.norm)


def _head_norm(model: ModelConfig, parts: LayerParts, num_heads: Any) -> Any:
    if not model.qk_layernorm:
        return IdentityOp
    return partial(AcrossHeadsRMSNorm, num_heads=num_heads) if model.qk_layernorm_across_heads else parts.norm


def _scaled_attention(
    build: Callable[..., Any],
    full_attention_factor: float,
    *,
    config: TransformerConfig,
    layer_number: int,
    softmax_scale: float | None = None,
    **kwargs: Any,
) -> Any:
    """As ``SdpaAttention``: the factor multiplies the scores of layers without a window."""
    if layer_window(config, layer_number) is None:
        assert config.kv_channels is not None
        softmax_scale = full_attention_factor * (softmax_scale or 1.0 / math.sqrt(config.kv_channels))
    return build(config=config, layer_number=layer_number, softmax_scale=softmax_scale, **kwargs)
