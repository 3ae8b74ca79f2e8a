"""The whole tensors of a model one after the other: from a distributed checkpoint, or from the ranks that share it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_groupdpo.convert.tensors.megatron_names import num_leading_axes, tensor_key
from megatron_groupdpo.convert.tensors.plan import Key, Pair
from megatron_groupdpo.convert.weights.loading import key_of, policy_shards, window_of
from megatron_groupdpo.errors import CheckpointError
from megatron_groupdpo.mcore.checkpoint.digest import is_own_shard
from megatron_groupdpo.mcore.checkpoint.tensors import CheckpointTensors
from megatron_groupdpo.mcore.fp8.weights import full_weights
from megatron_groupdpo.mcore.policy import Policy

_OPTIMIZER = "optimizer."
"""What the names of the optimizer's tensors start with in a checkpoint."""


Place = tuple[str, tuple[int, ...]]
"""A tensor's name in a checkpoint, and its indices in the axes before its own: layer, expert."""


def places_in(stored: CheckpointTensors, plan: Mapping[Key, Pair]) -> dict[Key, Place]:
    """Where the checkpoint has each tensor of the plan; Transformer Engine's layers have other names.

    Raises:
        CheckpointError: a tensor is missing, misshapen, or not of the model.
    """
    places: dict[Key, Place] = {}
    for name, shape in stored.shapes.items():
        if not name.startswith(_OPTIMIZER):
            axes = (range(size) for size in shape[: num_leading_axes(name)])
            places |= {tensor_key(name, indices): (name, indices) for indices in itertools.product(*axes)}
    for key, pair in plan.items():
        if key not in places:
            raise CheckpointError(f"{stored.folder} lacks the tensor {_show(key)} that its model has; it is damaged")
        name, indices = places[key]
        found = stored.shapes[name][len(indices) :]
        padded = key[1] is None and found[1:] == pair.shape[1:] and found[0] >= pair.shape[0]  # the vocabulary
        if found != pair.shape and not padded:
            raise CheckpointError(
                f"{stored.folder}: tensor {_show(key)} has shape {list(found)}, its model asks for {list(pair.shape)}"
            )
    for key in places.keys() - plan.keys():
        raise CheckpointError(
            f"{stored.folder}: unexpected tensor {_show(key)}, which its model does not have; converting without it "
            "would change the model"
        )
    return places


def _show(key: Key) -> str:
    name, layer = key
    return repr(name) if layer is None else f"{name!r} of layer {layer}"


def checkpoint_tensors(folder: Path, plan: Mapping[Key, Pair]) -> Iterator[tuple[Key, Tensor]]:
    """Every tensor of the plan, in its order, without the rows that pad the vocabulary; one at a time is held."""
    stored = CheckpointTensors(folder)
    places = places_in(stored, plan)
    for key, pair in plan.items():
        name, indices = places[key]
        yield key, stored.read(name, indices, rows=pair.shape[0])


def gathered_tensors(policy: Policy, plan: Mapping[Key, Pair]) -> Iterator[tuple[Key, Tensor | None]]:
    """The same of a policy on any layout: the tensor in host memory on rank 0, None on the others.

    A collective call: every rank must take every item. The tensor may alias the weight; rank 0 holds one beside its
    own part of the model.
    """
    with full_weights(policy.chunks):
        yield from _gathered(policy, plan)


def _gathered(policy: Policy, plan: Mapping[Key, Pair]) -> Iterator[tuple[Key, Tensor | None]]:
    rank = dist.get_rank()
    own: dict[Key, list[Any]] = {}
    for shard in policy_shards(policy):
        if is_own_shard(shard):
            own.setdefault(key_of(shard), []).append(shard)
    own_places = {
        key: [(tuple((part.start, part.stop) for part in window_of(shard)), shard.data.dtype) for shard in shards]
        for key, shards in own.items()
    }
    table: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(table, own_places)
    for key, pair in plan.items():
        parts = [(owner, index) for owner, part in enumerate(table) for index in range(len(part.get(key, ())))]
        assert parts, f"no rank holds {key}"
        dtype = table[parts[0][0]][key][0][1]
        whole = torch.empty(pair.shape, dtype=dtype, device="cpu") if rank == 0 and len(parts) > 1 else None
        for owner, index in parts:
            if rank not in (0, owner):
                continue
            bounds, part_dtype = table[owner][key][index]
            if owner == rank:
                piece = own[key][index].data.detach()
                if rank != 0:
                    dist.send(piece.contiguous(), dst=0)
                    continue
            else:
                shape = [stop - start for start, stop in bounds]
                piece = torch.empty(shape, dtype=part_dtype, device=policy.ranks.device)
                dist.recv(piece, src=owner)
            inside = tuple(slice(start, min(stop, size)) for (start, stop), size in zip(bounds, pair.shape))
            piece = piece[tuple(slice(max(0, part.stop - part.start)) for part in inside)]
            if whole is None:
                whole = piece.cpu()
            elif piece.numel():
                whole[inside].copy_(piece)
        yield key, whole
