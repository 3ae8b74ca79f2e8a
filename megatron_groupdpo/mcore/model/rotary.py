"""Rotary frequencies with the scalings of published models, and with another base in layers with a window; and how
packed responses take them.

Megatron-Core's ``RotaryEmbedding`` has one base and Llama 3's scaling with fixed constants. The frequencies here
replace its; how angles are laid out, cut over context-parallel ranks and applied stays Megatron's, but that packed
responses are rotated token by token, not sequence by sequence.

Sources: linear, arXiv 2306.15595; yarn, arXiv 2309.00071 sections 3.2 to 3.4; llama3, Meta's llama-models
(``apply_scaling``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import attention
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.mcore.model.attention import layer_window
from megatron_groupdpo.mcore.weights import unwrapped


def frequencies(model: ModelConfig, *, windowed: bool) -> Tensor:
    """[D/2] float32: radians per position of each pair of rotated channels, in layers with or without the window."""
    assert model.kv_channels is not None
    dim = int(model.kv_channels * model.rotary_percent)
    local = windowed and model.rotary_base_local is not None
    base = model.rotary_base_local if local else model.rotary_base
    assert base is not None
    plain = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if local or model.rope_scaling_type is None:
        return plain
    scaled = plain / model.rope_scaling_factor
    if model.rope_scaling_type == "linear":
        return scaled
    weight = _llama3_weight(model, plain) if model.rope_scaling_type == "llama3" else _yarn_weight(model, dim)
    return scaled * (1 - weight) + plain * weight


def _llama3_weight(model: ModelConfig, plain: Tensor) -> Tensor:
    """[D/2]: 1 where a channel turns often enough over the original length to be left alone, 0 where it is scaled."""
    low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
    turns = model.rope_scaling_original_length * plain / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_weight(model: ModelConfig, dim: int) -> Tensor:
    """[D/2]: as for Llama 3, but linear in the channel's number, between the channels of two numbers of turns."""

    def channel(turns: float) -> float:
        length = model.rope_scaling_original_length
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(model.rotary_base))

    first = max(math.floor(channel(model.rope_scaling_beta_fast)), 0)
    last = min(math.ceil(channel(model.rope_scaling_beta_slow)), dim - 1)
    span = last - first if last != first else 0.001
    return 1 - ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / span).clamp(0, 1)


def score_factor(model: ModelConfig, *, windowed: bool) -> float:
    """What yarn's attention factor, on queries and on keys, comes to in the attention scores of a layer."""
    if model.rope_scaling_type != "yarn" or (windowed and model.rotary_base_local is not None):
        return 1.0
    return model.rope_scaling_attention_factor**2


class ScaledRotaryEmbedding(RotaryEmbedding):
    """Megatron's with our frequencies, of one kind, or of two (without and with the window) where they differ."""

    def __init__(self, model: ModelConfig, *, cp_group: Any) -> None:
        assert model.kv_channels is not None
        super().__init__(model.kv_channels, model.rotary_percent, cp_group=cp_group)
        kinds = (False,) if model.rotary_base_local is None else (False, True)
        each = [frequencies(model, windowed=windowed) for windowed in kinds]
        self.inv_freq = torch.stack(each).to(self.inv_freq.device)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """[S, 1, kinds, D] angles; with two kinds, each layer takes its own (:class:`TwoRopeSelfAttention`)."""
        self.inv_freq = self.inv_freq.to(torch.cuda.current_device())
        positions_S = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=torch.float32) + offset
        angles = positions_S[:, None, None] * self.inv_freq
        return torch.cat((angles, angles), dim=-1)[:, None]


class TwoRopeSelfAttention(SelfAttention):
    """Self-attention that takes the angles of its layer's kind."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        """Megatron's, with [S, 1, 1, D] of the angles."""
        if rotary_pos_emb is not None:
            kind = int(layer_window(self.config, self.layer_number) is not None)
            rotary_pos_emb = rotary_pos_emb[:, :, kind : kind + 1].contiguous()  # as fused kernels read it
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)


_rotate = attention.apply_rotary_pos_emb
"""Megatron's; its attention calls what stands under this name in ``attention``."""


def _rotate_by_token(
    t: Tensor, freqs: Tensor, config: TransformerConfig, cu_seqlens: Tensor | None = None, **others: Any
) -> Tensor:
    if cu_seqlens is None or config.apply_rope_fusion or len(freqs) != len(t):
        return _rotate(t, freqs, config, cu_seqlens=cu_seqlens, **others)
    return _rotate(t[:, None], freqs, config, **others)[:, 0]


def take_angles_by_token(chunk: Any) -> None:
    """Let packed responses be rotated in one product, each token by the angles of its position.

    Megatron rotates sequence by sequence, and reads their bounds on the host, in every layer. Which positions the
    tokens have, :func:`positions` says around each forward.
    """
    attention.apply_rotary_pos_emb = _rotate_by_token
    chunk.rotary_pos_emb.positions_T = None
    chunk.rotary_pos_emb.register_forward_hook(_select_angles)


@contextmanager
def positions(chunk: Any, positions_T: Tensor | None) -> Iterator[None]:
    """For the forwards in here: [T] of this rank's tokens, as they lie in the packed row; none: it is not packed."""
    rotary = getattr(unwrapped(chunk), "rotary_pos_emb", None)
    if rotary is None or positions_T is None:
        yield
        return
    rotary.positions_T = positions_T
    try:
        yield
    finally:
        rotary.positions_T = None


def _select_angles(rotary: Any, _inputs: Any, table: Tensor) -> Tensor:
    """[S, 1, kinds, D] by position to [T, 1, kinds, D] by token."""
    return table if rotary.positions_T is None else table.index_select(0, rotary.positions_T)
