"""A run over made stores as the command line would start it, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from made_stores import VOCAB_SIZE

from megatron_groupdpo.config import TrainConfig, load_config

MODEL: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "ffn_hidden_size": 24,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 32,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "make_vocab_size_divisible_by": 8,
    "init_method_std": 0.2,
}


def made_config(path: Path, stores: Sequence[Path], **sections: Mapping[str, Any]) -> TrainConfig:
    """One rank, float32, the stores in their order; ``sections`` add to it or change it."""
    config: dict[str, dict[str, Any]] = {
        "model": dict(MODEL),
        "parallel": {"device": "cpu"},
        "data": {"data_path": [str(store) for store in stores], "seq_length": 24, "num_workers": 0, "shuffle": False},
        "objective": {"objective": "softmax", "beta": 0.3},
        "optimizer": {"lr": 1e-2},
        "training": {"global_batch_size": 4, "micro_batch_size": 3, "train_iters": 1, "seed": 7},
    }
    for name, values in sections.items():
        config.setdefault(name, {}).update(values)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load_config(["--config", str(path)])


def hand_model(config: TrainConfig, ranks: Any) -> Any:
    """Megatron's module with the weights that a run of ``config`` starts from."""
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.weights import unwrapped

    policy = build_policy(
        config.model, config.parallel, config.precision, ranks, seed=config.training.seed, training=False
    )
    return unwrapped(policy.chunks[0])
