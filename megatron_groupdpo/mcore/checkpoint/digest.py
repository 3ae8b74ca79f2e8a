"""Hashes of weights: a digest that does not depend on the layout, and the comparison of replicas."""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch import Tensor

from megatron_groupdpo.mcore.fp8.weights import full_weights, raw_parts
from megatron_groupdpo.mcore.model.init import sharded_tensors
from megatron_groupdpo.mcore.setup import Ranks
from megatron_groupdpo.mcore.weights import finish_param_gather, unwrapped

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_ELEMENTS_AT_A_TIME = 1 << 22
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(
    r"mlp\.experts\.(local_experts\.(?P<one>\d+)\.(?P<rest>.+)|(?P<linear>linear_fc[12])\.weight(?P<grouped>\d+))"
)
"""Of a layer: experts as modules, and as weights of a grouped product, which are then named like the former."""


def weights_digest(chunks: Sequence[Any], *, vocab_size: int, device: torch.device, function: str) -> str:
    """Hash over every weight's name, dtype, shape and bits, and ``function``; 16 hex digits, equal on all ranks.

    Each element contributes a hash of its place in the whole tensor times its bits, and contributions add up modulo
    2^64, so shards may be cut and summed in any way. Rows that pad the vocabulary are left out: how many there are
    depends on the tensor-parallel size.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    with full_weights(chunks):
        for shard in _own_shards(chunks):
            total += _shard_hash(shard, vocab_size)
    dist.all_reduce(total)
    own = int.from_bytes(hashlib.sha256(function.encode()).digest()[:8], "big")
    return f"{(int(total) + own) & (2**64 - 1):016x}"


def count_parameters(chunks: Sequence[Any], *, device: torch.device) -> int:
    """Parameters of the whole model, each counted once; equal on all ranks."""
    with full_weights(chunks, read=False):
        own = sum(math.prod(shard.local_shape) for shard in _own_shards(chunks))
    total = torch.tensor(own, device=device)
    dist.all_reduce(total)
    return int(total)


def differing_replicas(chunks: Sequence[Any], ranks: Ranks) -> str | None:
    """Compare every parameter's bits over the ranks that must hold the same: data- and context-parallel ones, and of
    experts those with the same experts.

    A collective call with one answer on all ranks: ``None``, or the first parameter that differs, the ranks and their
    hashes. One pass over the local weights on the device they are on, and 8 bytes a parameter tensor on the wire.
    """
    finish_param_gather(chunks)
    named = [(name, p) for chunk in chunks for name, p in parameter_names(chunk).items()]
    found_in = []
    for group in (ranks.dp_cp_group, ranks.expert_dp_group):
        own = [(name, p) for name, p in named if ranks.replicas_of(p) is group]
        if group.size() > 1 and own:
            found_in.append(_differing(own, group))
    finding = next((text for text in found_in if text is not None), None)
    found = torch.tensor(finding is not None, dtype=torch.int32, device=ranks.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if not int(found):
        return None
    findings: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    return next(text for text in findings if text is not None)


def _differing(named: Sequence[tuple[str, Tensor]], group: dist.ProcessGroup) -> str | None:
    """The first parameter that differs between the ranks of a group, with the ranks and their hashes."""
    zero = torch.zeros((), dtype=torch.int64, device=named[0][1].device)
    own_P = torch.stack([sum(map(_bits_hash, raw_parts(parameter)), start=zero) for _, parameter in named])
    all_P = [torch.empty_like(own_P) for _ in range(group.size())]
    dist.all_gather(all_P, own_P, group=group)
    hashes_DP = torch.stack(all_P)
    differs_P = (hashes_DP != hashes_DP[0]).any(0)
    if not bool(differs_P.any()):
        return None
    first = int(differs_P.int().argmax())
    held: dict[str, list[int]] = {}
    for rank, value in zip(dist.get_process_group_ranks(group), hashes_DP[:, first].tolist()):
        held.setdefault(f"{value & (2**64 - 1):016x}", []).append(rank)
    return f"{named[first][0]}: " + "; ".join(
        f"{value} on rank{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}" for value, own in held.items()
    )


def parameter_names(chunk: Any) -> dict[str, Tensor]:
    """Parameters of a chunk by name, layers and experts numbered as in the whole model."""
    chunk = unwrapped(chunk)
    layers = chunk.decoder.layers

    def whole_name(name: str) -> str:
        found = _LAYER.match(name)
        if found is None:
            return name
        layer, rest = layers[int(found[1])], name[found.end() :]
        # Megatron counts the layers of the whole model from 1.
        start = f"decoder.layers.{layer.layer_number - 1}."
        expert = _EXPERT.fullmatch(rest)
        if expert is None:
            return start + rest
        number = layer.mlp.local_expert_indices[int(expert["one"] or expert["grouped"])]
        return f"{start}mlp.experts.local_experts.{number}.{expert['rest'] or expert['linear'] + '.weight'}"

    return {whole_name(name): parameter for name, parameter in chunk.named_parameters()}


def _bits_hash(parameter: Tensor) -> Tensor:
    """[] int64 hash of the bits in their order, eight bytes at a time; any one changed word changes it."""
    own_bytes = parameter.detach().contiguous().view(-1).view(torch.uint8)
    if own_bytes.numel() % 8 or own_bytes.storage_offset() % 8:
        own_bytes = torch.cat([own_bytes, own_bytes.new_zeros(-own_bytes.numel() % 8)])
    words = own_bytes.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _ELEMENTS_AT_A_TIME):
        part = words[start : start + _ELEMENTS_AT_A_TIME]
        places = torch.arange(start, start + part.numel(), device=words.device)
        total += _mix(part + (0x9E3779B97F4A7C15 - 2**64) * places).sum()
    return total


def _own_shards(chunks: Sequence[Any]) -> Iterator[ShardedTensor]:
    """Shards that this rank answers for: over all ranks, every element of every weight once."""
    for chunk in chunks:
        yield from (shard for shard in sharded_tensors(unwrapped(chunk)) if is_own_shard(shard))


def is_own_shard(shard: ShardedTensor) -> bool:
    """Whether this rank answers for the shard: over all ranks, one does for each element."""
    return is_main_replica(shard.replica_id)


def _shard_hash(shard: ShardedTensor, vocab_size: int) -> Tensor:
    assert shard.data is not None
    local = shard.data.detach().reshape(shard.local_shape)
    shape = list(shard.global_shape[shard.prepend_axis_num :])
    offsets = list(shard.global_offset[shard.prepend_axis_num :])
    if shard.allow_shape_mismatch:  # set on vocabulary weights alone
        local = local[: max(0, min(local.shape[0], vocab_size - offsets[0]))]
        shape[0] = vocab_size
    layer = tuple(shard.global_offset[: shard.prepend_axis_num])
    seed = zlib.crc32(f"{shard.key}|{layer}|{tuple(shape)}|{local.dtype}".encode())
    total = torch.zeros((), dtype=torch.int64, device=local.device)
    places = _places(local.shape, shape, offsets, local.device)
    bits = local.contiguous().view(_BITS[local.dtype]).flatten()
    for start in range(0, bits.numel(), _ELEMENTS_AT_A_TIME):
        part = slice(start, start + _ELEMENTS_AT_A_TIME)
        total += (_mix(places[part] + (seed << 20)) * (2 * bits[part].to(torch.int64) + 1)).sum()
    return total


def _places(local_shape: Sequence[int], shape: Sequence[int], offsets: Sequence[int], device: torch.device) -> Tensor:
    """Flat index in the whole tensor of each local element: [numel] int64."""
    place = torch.zeros(tuple(local_shape), dtype=torch.int64, device=device)
    stride = 1
    for axis in reversed(range(len(local_shape))):
        index = torch.arange(local_shape[axis], device=device, dtype=torch.int64) + offsets[axis]
        place += (index * stride).reshape([-1 if a == axis else 1 for a in range(len(local_shape))])
        stride *= shape[axis]
    return place.flatten()


def _mix(x: Tensor) -> Tensor:
    """Scramble int64, wrapping on overflow (constants of SplitMix64)."""
    x = (x ^ (x >> 31)) * (0xBF58476D1CE4E5B9 - 2**64)
    return (x ^ (x >> 29)) * (0x94D049BB133111EB - 2**64)
