"""Whole runs on one rank in this process, of a model and stores so small that a step takes milliseconds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupdpo.config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
    validate,
)
from megatron_groupdpo.data.preprocess.work_folder import whole_folder
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.store.writer import PreparedGroup, StoreIdentity, StoreWriter
from megatron_groupdpo.mcore.setup import Ranks
from megatron_groupdpo.reference.store import ReferenceKey, ReferenceWriter
from megatron_groupdpo.run.build import build_run
from megatron_groupdpo.run.loop import train
from megatron_groupdpo.run.parts import Run

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("config", "objectives")]
from config_examples import changed  # noqa: E402

VOCAB_SIZE, SEQ_LENGTH = 23, 12
TOKENIZER = {
    "kind": "SentencePieceTokenizer", "model": "m", "chat_template": None, "digest": "d" * 16,
    "vocab_size": VOCAB_SIZE, "bos_id": 0, "eos_id": 1, "pad_id": 2,
}  # fmt: skip


def write_store(folder: Path, num_groups: int, seed: int) -> Path:
    """Groups of 2 to 5 ragged responses with values in [0, 1]: one good one, in every fourth group only good ones."""
    draw = np.random.default_rng(seed)
    identity = StoreIdentity(tokenizer=TOKENIZER, options={"seq_length": SEQ_LENGTH})
    with whole_folder(folder, overwrite=False) as path, contextlib.closing(StoreWriter(path, identity)) as writer:
        for row in range(num_groups):
            size = 2 + (row * 3) % 4
            writer.add(
                PreparedGroup(
                    prompt_tokens=draw.integers(3, VOCAB_SIZE, size=draw.integers(1, 5), dtype=np.int32),
                    response_tokens=tuple(
                        draw.integers(3, VOCAB_SIZE, size=draw.integers(1, 8), dtype=np.int32) for _ in range(size)
                    ),
                    response_masks=(None,) * size,
                    labels=(1,) * size if row % 4 == 3 else (1,) + (-1,) * (size - 1),
                    values=(0.9, *(float(value) for value in draw.uniform(0.1, 0.8, size=size - 1))),
                    ref_logps=(math.nan,) * size,
                    source_row=row + 1,
                ),
                0,
            )
        writer.finish(sources=[{"path": "in.jsonl", "schema": "canonical"}], counts=[])
    return folder


def write_reference(stores: Sequence[Path], folder: Path) -> None:
    """Made-up log-probabilities of the size an untrained model gives; of no weights in particular."""
    for seed, path in enumerate(stores):
        store = TokenStore.open(path)
        key = ReferenceKey(store_digest=store.digest, weights_digest="of no model", precision="fp32")
        ReferenceWriter(folder, store, key).put(np.arange(store.num_responses), made_up_reference(store, seed))


def made_up_reference(store: TokenStore, seed: int) -> np.ndarray:
    """[R] float64."""
    return -3.1 * store.response_lengths_R + np.random.default_rng(seed).normal(size=store.num_responses)


@dataclass(frozen=True)
class Trained:
    """A run at its end."""

    run: Run
    lines: list[dict[str, Any]]
    """Of metrics.jsonl."""
    printed: str

    def of(self, name: str) -> list[Any]:
        """A metric by iteration, where it was written."""
        return [line[name] for line in self.lines if name in line]


@dataclass(frozen=True)
class OneRank:
    """Builds runs from a small configuration whose fields are changed by name."""

    ranks: Ranks
    large: Path
    """9 groups."""
    small: Path
    """5 groups."""
    reference: Path

    def config(self, **changes: Any) -> TrainConfig:
        config = TrainConfig(
            model=ModelConfig(
                num_layers=1, hidden_size=8, num_attention_heads=2, max_position_embeddings=16, init_method_std=0.3,
                make_vocab_size_divisible_by=1,
            ),
            parallel=ParallelConfig(device="cpu"),
            data=DataConfig(data_path=(str(self.large),), seq_length=SEQ_LENGTH, num_workers=0),
            objective=ObjectiveConfig(reference_logprobs=str(self.reference), beta=0.5),
            optimizer=OptimizerConfig(lr=1e-2),
            training=TrainingConfig(global_batch_size=2, micro_batch_size=2, train_iters=4),
            logging=LoggingConfig(),
        )  # fmt: skip
        config = changed(config, **changes)
        validate(config, 1)
        return config

    def build(self, **changes: Any) -> Run:
        return build_run(self.config(**changes), self.ranks)

    def train(self, folder: Path, **changes: Any) -> Trained:
        run = self.build(**{"run_dir": str(folder)} | changes)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            progress = train(run)
        run = dataclasses.replace(run, progress=progress)
        return Trained(run, read_lines(folder), printed.getvalue())


def read_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
