"""Initial weights that do not depend on the layout.

Megatron seeds each tensor- and pipeline-parallel rank on its own, so a model started from scratch differs between
layouts. Here every weight is drawn whole, from a generator seeded by the run's seed and the weight's name in the
distributed checkpoint, and each rank keeps its shard. Costs one full tensor of host memory at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_groupdpo.config import ModelConfig


def initialize_weights(chunks: list[torch.nn.Module], model: ModelConfig, *, seed: int) -> None:
    """Fill the parameters in place: normal weights, residual outputs scaled by 1/sqrt(2 layers), norms 1, biases 0."""
    for chunk in chunks:
        for shard in sharded_tensors(chunk):
            assert shard.data is not None
            full = _draw(shard, model, seed=seed)
            window = tuple(
                slice(offset, offset + size)
                for offset, size in zip(shard.global_offset[shard.prepend_axis_num :], shard.local_shape)
            )
            with torch.no_grad():
                shard.data.copy_(full[window])


def sharded_tensors(chunk: torch.nn.Module) -> Iterator[ShardedTensor]:
    """Every parameter of a chunk as the distributed checkpoint names and places it; ``data`` aliases the weight."""
    for entry in chunk.sharded_state_dict().values():  # type: ignore[operator]
        yield from _leaves(entry)


def _leaves(entry: object) -> Iterator[ShardedTensor]:
    if isinstance(entry, ShardedTensorFactory):
        built = entry.build()
        for part in built.values() if isinstance(built, dict) else built if isinstance(built, list) else [built]:
            yield from _leaves(part)
    elif isinstance(entry, ShardedTensor):
        yield entry
    else:
        assert isinstance(entry, ShardedBase), type(entry)  # extra state of Transformer Engine: nothing to fill


def _draw(shard: ShardedTensor, model: ModelConfig, *, seed: int) -> Tensor:
    shape = tuple(shard.global_shape[shard.prepend_axis_num :])
    name = shard.key
    if name.endswith("bias"):
        return torch.zeros(shape, device="cpu")
    if "norm" in name or "layer_norm_weight" in name:
        return torch.zeros(shape, device="cpu") if model.apply_layernorm_1p else torch.ones(shape, device="cpu")
    layer = shard.global_offset[: shard.prepend_axis_num]
    digest = hashlib.sha256(f"{seed}|{name}|{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    std = model.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2.0 * model.num_layers)
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        # Drawn for the real vocabulary only: how many rows pad it depends on the tensor-parallel size.
        assert model.vocab_size is not None
        real = torch.empty((model.vocab_size, *shape[1:]), device="cpu").normal_(std=std, generator=generator)
        return torch.cat([real, torch.zeros((shape[0] - model.vocab_size, *shape[1:]), device="cpu")])
    return torch.empty(shape, device="cpu").normal_(std=std, generator=generator)
