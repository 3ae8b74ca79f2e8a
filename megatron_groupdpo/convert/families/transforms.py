"""How Hugging Face tensors become one Megatron tensor, and back; every transform only moves numbers.

Shapes: N query heads, M query groups (key-value heads), D head size, H hidden size; ``...`` is [H] of a weight and
nothing of a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_groupdpo.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """A pair of inverse functions."""

    merge: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    """The Hugging Face tensors of a rule, in its order, to the Megatron tensor."""
    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
    """The inverse. It works on meta tensors too: this is how the expected Hugging Face shapes are found."""


def _merge_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """q [N*D, ...], k and v [M*D, ...] to [(N + 2M)*D, ...]: per query group its queries, its key, its value."""
    return torch.cat([_by_group(part, model) for part in parts], dim=1).flatten(0, 1)


def _split_qkv(whole: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    head, (queries, groups) = _head_size(model), _heads(model)
    sizes = [queries // groups * head, head, head]
    return tuple(part.flatten(0, 1) for part in _by_group(whole, model).split(sizes, dim=1))


def _by_group(rows: Tensor, model: ModelConfig) -> Tensor:
    """[M * n, ...] to [M, n, ...]."""
    groups = _heads(model)[1]
    return rows.reshape(groups, rows.shape[0] // groups, *rows.shape[1:])


def _heads(model: ModelConfig) -> tuple[int, int]:
    assert model.num_query_groups is not None
    return model.num_attention_heads, model.num_query_groups


def _head_size(model: ModelConfig) -> int:
    assert model.kv_channels is not None
    return model.kv_channels


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t() if tensor.dim() == 2 else tensor


COPY = Transform(merge=lambda parts, _: parts[0], split=lambda whole, _: (whole,))
"""The same tensor."""

CONV1D = Transform(merge=lambda parts, _: _transposed(parts[0]), split=lambda whole, _: (_transposed(whole),))
"""A weight of GPT-2's Conv1D, stored [in, out]; a bias as it is."""

QKV = Transform(merge=_merge_qkv, split=_split_qkv)
"""Query, key and value projections, weights or biases, interleaved per query group."""

CONV1D_QKV = Transform(
    merge=lambda parts, model: _merge_qkv(_transposed(parts[0]).chunk(3), model),
    split=lambda whole, model: (_transposed(torch.cat(_split_qkv(whole, model))),),
)
"""GPT-2's one projection: all queries, all keys, all values; as many key-value heads as query heads."""

GATE_UP = Transform(merge=lambda parts, _: torch.cat(list(parts)), split=lambda whole, _: whole.chunk(2))
"""The two halves of a gated MLP: the one behind the activation first."""
