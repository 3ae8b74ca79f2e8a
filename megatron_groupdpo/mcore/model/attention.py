"""Core attention of the local layer spec, on PyTorch's scaled dot-product attention.

Replaces Megatron's ``DotProductAttention``, which materialises [B, heads, S, S] and refuses packed sequences and
context parallelism. Transformer Engine's layer spec brings its own and does not use this.

Under context parallelism the keys and values of all ranks are gathered, and each rank attends with its own queries.

A layer with a sliding window sees ``config.window_size[0]`` positions to the left of the query. Its mask, [S, A]
booleans, is materialised where the sequence is longer than the window.

Shapes in this file: N heads of this rank, M key-value heads of this rank, D head size; S the positions of this rank, A
those of all context-parallel ranks.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_groupdpo.tensors import positions_of_rank


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Positions to the left that a layer, counted from 1, sees; None: all."""
    if config.window_size is None:
        return None
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)  # type: ignore[arg-type]
    return config.window_size[0] if windowed else None


class SdpaAttention(torch.nn.Module):
    """Causal attention over padded [S, B] or packed [total] layouts, in some layers within a sliding window."""

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
        full_attention_factor: float = 1.0,
        **_: object,
    ) -> None:
        """``full_attention_factor`` multiplies the scores of layers without a window; the rest is Megatron's."""
        super().__init__()
        assert not config.attention_dropout, "both passes must see one function: dropout is refused before"
        self.attn_mask_type = attn_mask_type
        self.cp_size = config.context_parallel_size
        self.cp_group: Any = parallel_state.get_context_parallel_group() if self.cp_size > 1 else None
        assert config.kv_channels is not None
        self.window = layer_window(config, layer_number)
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        if self.window is None:
            self.scale *= full_attention_factor

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
        if (attn_mask_type or self.attn_mask_type) == AttnMaskType.no_mask or query.shape[0] == 1 < key.shape[0]:
            return self._decode(query, key, value)
        mask_SA = self._mask(query.shape[0] * self.cp_size, query.device)
        if self.cp_size > 1:
            key, value = gather_keys(key, self.cp_group), gather_keys(value, self.cp_group)
        context_BNSD = self._attend(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            mask_SA=mask_SA,
        )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _decode(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One query, the last position, against a cache of all keys up to it."""
        assert query.shape[0] == 1, "decoding takes one position at a time"
        if self.window is not None:
            key, value = key[-self.window - 1 :], value[-self.window - 1 :]
        q_BNSD, k_BMAD, v_BMAD = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        context_BNSD = self._attend(q_BNSD, k_BMAD, v_BMAD, mask_SA=None, is_causal=False)
        return context_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """Block-diagonal causal attention, one sequence at a time: exact, and no [total, total] mask."""
        assert packed.cu_seqlens_q is not None
        bounds = [bound // self.cp_size for bound in packed.cu_seqlens_q.tolist()]
        if self.cp_size > 1:
            # [size, total / size, M, D]: a sequence is the same slice of every rank's part.
            key, value = (gather_keys(t, self.cp_group).unflatten(0, (self.cp_size, -1)) for t in (key, value))
        contexts = []
        for start, end in pairwise(bounds):
            q_SND = query[start:end]
            if self.cp_size > 1:
                k_AMD, v_AMD = (t[:, start:end].flatten(0, 1) for t in (key, value))
            else:
                k_AMD, v_AMD = key[start:end], value[start:end]
            q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q_SND, k_AMD, v_AMD))
            mask_SA = self._mask((end - start) * self.cp_size, query.device)
            context_NSD = self._attend(q, k, v, mask_SA=mask_SA)[0]
            contexts.append(context_NSD.transpose(0, 1).flatten(1))
        return torch.cat(contexts)

    def _mask(self, length: int, device: torch.device) -> Tensor | None:
        """[S, A] bool: which of one sequence's gathered keys each query of this rank may see; None: plain causal."""
        if self.cp_size == 1 and (self.window is None or self.window >= length - 1):
            return None
        rank = self.cp_group.rank() if self.cp_size > 1 else 0
        # Made on the device: nothing is copied from the host, which a CUDA graph could not repeat.
        of_ranks = [positions_of_rank(length, other, self.cp_size, device=device) for other in range(self.cp_size)]
        distance_SA = of_ranks[rank][:, None] - torch.cat(of_ranks)[None, :]
        mask_SA = distance_SA >= 0
        if self.window is not None:
            mask_SA &= distance_SA <= self.window
        return mask_SA

    def _attend(
        self, q_BNSD: Tensor, k_BMAD: Tensor, v_BMAD: Tensor, *, mask_SA: Tensor | None, is_causal: bool | None = None
    ) -> Tensor:
        """With the mask where there is one, else causal unless told otherwise."""
        repeats = q_BNSD.shape[1] // k_BMAD.shape[1]
        # The CPU kernels take equal head counts only; the CUDA ones read grouped heads in place.
        grouped = repeats > 1 and q_BNSD.is_cuda
        if repeats > 1 and not grouped:
            k_BMAD = k_BMAD.repeat_interleave(repeats, dim=1)
            v_BMAD = v_BMAD.repeat_interleave(repeats, dim=1)
        return scaled_dot_product_attention(
            q_BNSD,
            k_BMAD,
            v_BMAD,
            attn_mask=mask_SA,
            is_causal=mask_SA is None if is_causal is None else is_causal,
            scale=self.scale,
            enable_gqa=grouped,
        )


def gather_keys(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S / size, ...] of every context-parallel rank to [S, ...]; the backward sums the ranks' gradients."""
    return gather_from_sequence_parallel_region(shard, tensor_parallel_output_grad=True, group=group)
