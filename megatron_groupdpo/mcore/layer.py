"""A transformer layer with norms after attention and MLP, before their outputs are added to the residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_groupdpo.mcore.norm import LayerNorm, RMSNorm, norm_class


class PostNormLayer(TransformerLayer):
    """Megatron's layer; the norms before are those of the spec, identities where there are none."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        norm = norm_class(config.normalization)
        self.post_self_attn_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.post_mlp_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attn_bda = _norm_and_add(self.post_self_attn_layernorm)
        self.mlp_bda = _norm_and_add(self.post_mlp_layernorm)


def _norm_and_add(norm: RMSNorm | LayerNorm) -> Callable[..., Any]:
    """In the form of Megatron's bias-dropout-add; dropout is 0."""

    def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, _dropout: float) -> Tensor:
        output, bias = output_and_bias
        return residual + norm(output if bias is None else output + bias)

    return lambda _training, _fused: add
