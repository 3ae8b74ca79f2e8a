"""Weights between a Hugging Face model and the tensors of a policy.

Each shard of a policy says which window of which whole tensor it is, so loading needs no knowledge of the layout: make
the whole tensor, keep the window. Rows beyond the whole tensor pad the vocabulary and are 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.hf.files import byte_bar
from megatron_groupdpo.convert.hf.model import HfModel, open_hf_model
from megatron_groupdpo.convert.tensors.megatron_names import tensor_key
from megatron_groupdpo.convert.tensors.plan import Key
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.fp8.weights import full_weights
from megatron_groupdpo.mcore.model.init import sharded_tensors
from megatron_groupdpo.mcore.policy import Policy, model_identity
from megatron_groupdpo.mcore.weights import unwrapped
from megatron_groupdpo.processes import errors_reach_all_ranks

NOT_THE_WEIGHTS = frozenset({"make_vocab_size_divisible_by", "moe_router_dtype"})
"""Fields that no config.json has: rows that pad the vocabulary and the router's precision are the run's own choice."""


def load_hf_weights(folder: Path, policy: Policy) -> HfModel:
    """Fill a policy from a Hugging Face folder, on any layout; every rank reads what it needs, one tensor at a time.

    Weights take the policy's dtype. An optimizer with float32 master weights must copy them afterwards
    (``reload_model_params``).

    Raises:
        ConfigError: the folder's model is not the policy's, or cannot be converted.
        CheckpointError: see :func:`open_hf_model`.
    """
    with errors_reach_all_ranks():
        source = open_hf_model(folder)
        check_same_model(source, policy.model)
    fill_on_all_ranks(policy, source)
    return source


def check_same_model(source: HfModel, model: ModelConfig) -> None:
    """Refuse a folder of another model, naming the fields that differ."""
    theirs, ours = model_identity(source.model), model_identity(model)
    differ = [
        f"{name}: {value!r} there, {ours[name]!r} in the model section"
        for name, value in theirs.items()
        if name not in NOT_THE_WEIGHTS and ours[name] != value
    ]
    if differ:
        raise ConfigError(f"{source.folder} is another model ({'; '.join(differ)}); make the model section agree")


def fill(policy: Policy, source: HfModel, *, on_bytes: Callable[[int], None] = lambda count: None) -> None:
    """Copy the source's weights into the policy's shards on this rank.

    Beside the shards, at most the part of one tensor that goes into a shard is held (of a few kinds of tensor, the
    whole tensor). ``on_bytes`` is told of each shard's size.
    """
    last: tuple[Key, Tensor] | None = None  # the halves of a gated MLP are two shards of one tensor
    for shard in policy_shards(policy):
        key, window = key_of(shard), window_of(shard)
        pair = source.plan[key]
        assert shard.allow_shape_mismatch or shard.global_shape[shard.prepend_axis_num :] == pair.shape, key
        with torch.no_grad():
            shard.data.zero_()
            inside = tuple(slice(len(range(size)[part])) for size, part in zip(pair.shape, window, strict=True))
            if pair.moves_rows:
                source.read_into(shard.data[inside], key, window)
            else:
                if last is None or last[0] != key:
                    last = None  # not two at a time
                    last = (key, source.read(key))
                shard.data[inside].copy_(last[1][window])
        on_bytes(shard.data.numel() * shard.data.element_size())


def fill_on_all_ranks(policy: Policy, source: HfModel) -> None:
    """:func:`fill` on every rank, with a bar of rank 0's part; what fails on one stops all."""
    is_first = dist.get_rank() == 0
    size = sum(s.data.numel() * s.data.element_size() for s in policy_shards(policy)) if is_first else 0
    with (
        full_weights(policy.chunks, read=False, changed=True),
        errors_reach_all_ranks(),
        byte_bar(f"read {source.folder}", size, quiet=not is_first) as bar,
    ):
        fill(policy, source, on_bytes=bar.update)


def policy_shards(policy: Policy) -> Iterator[Any]:
    """Every parameter shard of this rank, as :func:`sharded_tensors` describes it."""
    for chunk in policy.chunks:
        yield from sharded_tensors(unwrapped(chunk))


def key_of(shard: Any) -> Key:
    """Name and layer of the tensor that a shard is a part of."""
    return tensor_key(shard.key, shard.global_offset[: shard.prepend_axis_num])


def window_of(shard: Any) -> tuple[slice, ...]:
    """Where the shard stands in its whole tensor."""
    offsets = shard.global_offset[shard.prepend_axis_num :]
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, shard.local_shape))


def with_vocabulary_padding(model: ModelConfig, divisible_by: int | None) -> ModelConfig:
    """The model with another multiple for its vocabulary rows; None leaves it."""
    if divisible_by is None:
        return model
    if divisible_by < 1:
        raise ConfigError(f"--make-vocab-size-divisible-by must be at least 1, got {divisible_by}")
    return dataclasses.replace(model, make_vocab_size_divisible_by=divisible_by)
