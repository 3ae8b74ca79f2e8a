"""Norms for the local layer spec that work under sequence parallelism.

Megatron-Core's torch norm refuses sequence parallelism. Under it every rank normalises its own positions, so the
gradient of the weight is a partial sum; marking the weight ``sequence_parallel`` makes Megatron all-reduce it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, [..., hidden_size] to the same shape and dtype."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = _start(config, hidden_size)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``."""
        if self.zero_centered:
            weight = 1.0 + self.weight.float()
            return torch.nn.functional.rms_norm(x.float(), weight.shape, weight, self.eps).type_as(x)
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class AcrossHeadsRMSNorm(torch.nn.Module):
    """Root-mean-square norm over all heads, of which each tensor-parallel rank holds a part; [S, B, N, D] to the same.

    Every rank holds the whole weight and uses its heads' part. As its name holds ``q_layernorm`` or ``k_layernorm``,
    Megatron sums the ranks' gradients (``finalize_model_grads``), also where several ranks share a key head.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, num_heads: int, **_: object
    ) -> None:
        super().__init__()
        assert config.qk_layernorm, "else the gradients of the weight are not summed"
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.num_heads = num_heads
        self.weight = _start(config, num_heads * hidden_size)

    def forward(self, x_SBND: Tensor) -> Tensor:
        """Normalise this rank's N heads of ``num_heads``."""
        group: Any = parallel_state.get_tensor_model_parallel_group()
        num_local, head = x_SBND.shape[-2:]
        copies = group.size() * num_local // self.num_heads  # of a key head, where there are fewer than ranks
        x = x_SBND.float()
        squares = x.square().sum((-2, -1), keepdim=True)
        if group.size() > 1:
            # Summed forward; and backward, since every rank's heads depend on the sum.
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares)) / copies
        first = group.rank() // copies * num_local
        weight_ND = self.weight.view(self.num_heads, head)[first : first + num_local]
        scale = torch.rsqrt(squares / (self.num_heads * head) + self.eps)
        return (x * scale * (weight_ND.float() + float(self.zero_centered))).type_as(x_SBND)


class LayerNorm(torch.nn.Module):
    """Layer norm with bias over the last dimension, [..., hidden_size] to the same shape and dtype."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = _start(config, hidden_size)
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``."""
        if self.zero_centered:
            weight, bias = 1.0 + self.weight.float(), self.bias.float()
            return torch.nn.functional.layer_norm(x.float(), weight.shape, weight, bias, self.eps).type_as(x)
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def _start(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    """Weights of a norm that changes no scale; Megatron's ``layernorm_zero_centered_gamma`` stores them less 1."""
    start = 0.0 if config.layernorm_zero_centered_gamma else 1.0
    return torch.nn.Parameter(torch.full((size,), start, dtype=config.params_dtype))


def norm_class(normalization: str) -> type[RMSNorm] | type[LayerNorm]:
    """The class for Megatron's ``normalization`` name."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[normalization]


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
