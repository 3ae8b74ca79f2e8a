"""Core attention of the local layer spec, on PyTorch's scaled dot-product attention.

Replaces Megatron's ``DotProductAttention``, which materialises [B, heads, S, S] and refuses packed sequences.
Transformer Engine's layer spec brings its own and does not use this.

Shapes in this file: N heads of this rank, M key-value heads of this rank, D head size.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SdpaAttention(torch.nn.Module):
    """Causal attention over padded [S, B] or packed [total] layouts."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: object,
    ) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "context parallelism needs an attention that exchanges keys"
        assert not config.attention_dropout, "both passes must see one function: dropout is refused before"
        self.attn_mask_type = attn_mask_type
        assert config.kv_channels is not None
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[S, B, N, D] x [S, B, M, D] to [S, B, N*D]; packed: [total, N, D] to [total, N*D].

        Padding needs no mask: it stands right of the response, where causality hides it.
        """
        assert attention_bias is None, "no attention bias in this spec"
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        mask_type = attn_mask_type or self.attn_mask_type
        # One query against a cache is decoding: it may see everything that is there.
        is_causal = mask_type != AttnMaskType.no_mask and query.shape[0] > 1
        context_BNSD = self._attend(
            query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), is_causal=is_causal
        )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """Block-diagonal causal attention, one sequence at a time: exact, and no [total, total] mask."""
        assert packed.cu_seqlens_q is not None
        bounds = packed.cu_seqlens_q.tolist()
        contexts = []
        for start, end in pairwise(bounds):
            q, k, v = (t[start:end].transpose(0, 1).unsqueeze(0) for t in (query, key, value))
            contexts.append(self._attend(q, k, v, is_causal=True)[0].transpose(0, 1).flatten(1))
        return torch.cat(contexts)

    def _attend(self, q_BNSD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, *, is_causal: bool) -> Tensor:
        repeats = q_BNSD.shape[1] // k_BMSD.shape[1]
        # The CPU kernels take equal head counts only; the CUDA ones read grouped heads in place.
        grouped = repeats > 1 and q_BNSD.is_cuda
        if repeats > 1 and not grouped:
            k_BMSD = k_BMSD.repeat_interleave(repeats, dim=1)
            v_BMSD = v_BMSD.repeat_interleave(repeats, dim=1)
        return scaled_dot_product_attention(
            q_BNSD, k_BMSD, v_BMSD, is_causal=is_causal, scale=self.scale, enable_gqa=grouped
        )
