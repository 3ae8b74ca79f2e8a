"""Weights between a Hugging Face model and the tensors of a policy.

Each shard of a policy says which window of which whole tensor it is, so loading needs no knowledge of the layout: make
the whole tensor, keep the window. Rows beyond the whole tensor pad the vocabulary and are 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.hf_model import HfModel, open_hf_model
from megatron_groupdpo.convert.megatron_names import megatron_tensors, tensor_key
from megatron_groupdpo.convert.plan import Key
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.init import sharded_tensors
from megatron_groupdpo.mcore.policy import Policy, model_identity

_NOT_THE_WEIGHTS = "make_vocab_size_divisible_by"
"""How many rows pad the vocabulary is the run's own choice."""


def load_hf_weights(folder: Path, policy: Policy) -> HfModel:
    """Fill a policy from a Hugging Face folder, on any layout; every rank reads what it needs, one tensor at a time.

    Weights take the policy's dtype. An optimizer with float32 master weights must copy them afterwards
    (``reload_model_params``).

    Raises:
        ConfigError: the folder's model is not the policy's, or cannot be converted.
        CheckpointError: see :func:`open_hf_model`.
    """
    source = open_hf_model(folder)
    check_same_model(source, policy.model)
    fill(policy, source)
    return source


def check_same_model(source: HfModel, model: ModelConfig) -> None:
    """Refuse a folder of another model, naming the fields that differ."""
    theirs, ours = model_identity(source.model), model_identity(model)
    differ = [
        f"{name}: {value!r} there, {ours[name]!r} in the model section"
        for name, value in theirs.items()
        if name != _NOT_THE_WEIGHTS and ours[name] != value
    ]
    if differ:
        raise ConfigError(f"{source.folder} is another model ({'; '.join(differ)}); make the model section agree")


def fill(policy: Policy, source: HfModel) -> None:
    """Copy the source's weights into the policy's shards on this rank."""
    last: tuple[Key, Tensor] | None = None  # the halves of a gated MLP are two shards of one tensor
    for shard in policy_shards(policy):
        key = key_of(shard)
        if last is None or last[0] != key:
            last = (key, source.read(key))
        whole = last[1]
        window = window_of(shard)
        assert shard.allow_shape_mismatch or shard.global_shape[shard.prepend_axis_num :] == tuple(whole.shape), key
        with torch.no_grad():
            part = whole[window]
            shard.data.zero_()
            shard.data[tuple(slice(size) for size in part.shape)].copy_(part)


def policy_shards(policy: Policy) -> Iterator[Any]:
    """Every parameter shard of this rank, as :func:`sharded_tensors` describes it."""
    for chunk in policy.chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        yield from sharded_tensors(chunk)


def key_of(shard: Any) -> Key:
    """Name and layer of the tensor that a shard is a part of."""
    return tensor_key(shard.key, shard.global_offset[: shard.prepend_axis_num])


def window_of(shard: Any) -> tuple[slice, ...]:
    """Where the shard stands in its whole tensor."""
    offsets = shard.global_offset[shard.prepend_axis_num :]
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, shard.local_shape))


def whole_tensors(policy: Policy) -> dict[Key, list[Any]]:
    """The shards of each tensor of a policy that one process holds entirely."""
    for group in (policy.ranks.tp_group, policy.ranks.pp_group):
        assert group.size() == 1, "export gathers nothing: one process holds all"
    shards: dict[Key, list[Any]] = {}
    for shard in policy_shards(policy):
        shards.setdefault(key_of(shard), []).append(shard)
    expected = megatron_tensors(policy.model)
    assert {name for name, _ in shards} == set(expected)
    return shards


def assemble(shards: list[Any], shape: tuple[int, ...]) -> Tensor:
    """The whole tensor from all its shards, without the rows that pad the vocabulary; may alias the weight."""
    if len(shards) == 1:
        return shards[0].data[: shape[0]]
    whole = shards[0].data.new_empty(shape)
    for shard in shards:
        whole[window_of(shard)] = shard.data
    return whole


def with_vocabulary_padding(model: ModelConfig, divisible_by: int | None) -> ModelConfig:
    """The model with another multiple for its vocabulary rows; None leaves it."""
    if divisible_by is None:
        return model
    if divisible_by < 1:
        raise ConfigError(f"--make-vocab-size-divisible-by must be at least 1, got {divisible_by}")
    return dataclasses.replace(model, make_vocab_size_divisible_by=divisible_by)
