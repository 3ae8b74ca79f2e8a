"""A training run as the command line makes it, small enough for a few steps a second; one part runs on the ranks."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import yaml

ROOT = Path(__file__).resolve().parents[2]
NUM_GROUPS = 10
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 128,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "make_vocab_size_divisible_by": 8,
    "init_method_std": 0.1,
}


@dataclass(frozen=True)
class TinyData:
    """A token store and made-up reference log-probabilities of it."""

    folder: Path
    store: Path
    reference: Path
    tokenizer: Path


def write_groups(path: Path, num_groups: int = NUM_GROUPS) -> None:
    """Sums with right and wrong answers, sides of 1 to 3 responses."""
    with path.open("w", encoding="utf-8") as stream:
        for i in range(num_groups):
            right = [{"text": f"{i} + {2 * i} = {3 * i}" + "." * k, "label": 1} for k in range(1 + i % 2)]
            wrong = [{"text": f"maybe {3 * i + k + 1}", "label": -1} for k in range(1 + i % 3)]
            stream.write(json.dumps({"prompt": f"What is {i} plus {2 * i}?", "responses": right + wrong}) + "\n")


def train_tokenizer(path: Path) -> None:
    """A sentencepiece model of a few hundred pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"What is {i} plus {j}? {i} + {j} = {i + j}. maybe" for i in range(30) for j in range(10)),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    path.write_bytes(model.getvalue())


def preprocess(groups: Path, tokenizer: Path, store: Path) -> None:
    """Through the command that users run."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(groups)]
    command += ["--output", str(store), "--seq-length", "64", "--tokenizer-type", "SentencePieceTokenizer"]
    subprocess.run([*command, "--tokenizer-model", str(tokenizer)], check=True, capture_output=True, timeout=300)


def write_reference(store: Path, folder: Path, *, precision: str = "fp32", shift: float = 0.0) -> None:
    """Made-up log-probabilities of the size an untrained model gives; of no weights in particular."""
    from megatron_groupdpo.data.store.reader import TokenStore
    from megatron_groupdpo.reference.store import ReferenceKey, ReferenceWriter

    opened = TokenStore.open(store)
    key = ReferenceKey(store_digest=opened.digest, weights_digest="of no model", precision=precision)
    writer = ReferenceWriter(folder, opened, key)
    noise = np.random.default_rng(1).normal(size=opened.num_responses)
    writer.put(np.arange(opened.num_responses), -5.6 * opened.response_lengths_R + noise + shift)


def write_config(path: Path, store: Path, reference: Path, **sections: Mapping[str, Any]) -> Path:
    """A YAML configuration; ``sections`` add to it or change it."""
    config: dict[str, dict[str, Any]] = {
        "model": dict(MODEL),
        "parallel": {"device": "cpu"},
        "data": {"data_path": [str(store)], "seq_length": 64, "num_workers": 0},
        "objective": {"objective": "softmax", "beta": 0.3, "reference_logprobs": str(reference)},
        "optimizer": {"lr": 5e-3, "lr_decay_style": "cosine", "lr_warmup_iters": 2, "adam_eps": 1e-3},
        "training": {"global_batch_size": 4, "micro_batch_size": 2, "train_iters": 6, "seed": 7},
    }
    for name, values in sections.items():
        config.setdefault(name, {}).update(values)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def train_on_rank(argv: Sequence[str], fault: str | None = None) -> str:
    """Everything that ``megatron_groupdpo.train`` does on one rank; the digest of the final weights.

    ``fault`` is one of :data:`faults.FAULTS`, injected when the run has been built.
    """
    from faults import injected

    from megatron_groupdpo.config import load_config, validate
    from megatron_groupdpo.convert.hf.model_section import complete_model_section
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.run.build import build_run
    from megatron_groupdpo.run.loop import train

    config = load_config(argv, complete=complete_model_section)
    ranks = initialize(config.parallel, seed=config.training.seed)
    try:
        validate(config, ranks.tp_group.size() * ranks.pp_group.size() * ranks.dp_cp_group.size())
        run = build_run(config, ranks)
        with injected(fault, run):
            train(run)
        return run.policy.weights_digest()
    finally:
        shut_down()


def refusal_on_rank(argv: Sequence[str], fault: str | None = None) -> tuple[str, str]:
    """The kind and the message of the user error that :func:`train_on_rank` must raise."""
    from megatron_groupdpo.errors import UserError

    try:
        train_on_rank(argv, fault)
    except UserError as error:
        return type(error).__name__, str(error)
    raise AssertionError("the run went through")


def output_on_rank(argv: Sequence[str], fault: str | None = None) -> str:
    """What :func:`train_on_rank` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train_on_rank(argv, fault)
    return output.getvalue()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def score_own_weights_on_rank(
    argv: Sequence[str], store: str, folder: str, shift: float = 0.0, side_per_token: float = 0.0
) -> None:
    """Write as reference what the very weights give that the run of ``argv`` starts from.

    Plus ``shift``, and plus ``side_per_token`` for each token of a positive, minus it for each of a negative.
    """
    from megatron_groupdpo.config import load_config
    from megatron_groupdpo.data.store.reader import TokenStore
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.reference.store import ReferenceKey, ReferenceWriter
    from megatron_groupdpo.run.build import build_run

    config = load_config(argv)
    ranks = initialize(config.parallel, seed=config.training.seed)
    try:
        run, opened = build_run(config, ranks), TokenStore.open(store)
        precision = "bf16" if config.precision.bf16 else "fp32"
        key = ReferenceKey(store_digest=opened.digest, weights_digest=run.policy.weights_digest(), precision=precision)
        writer = ReferenceWriter(Path(folder), opened, key)
        for planned in run.train.once(4):
            logps_R = run.policy.engine.score(planned.microbatches, planned.batch.num_responses)
            assert logps_R is not None
            index_GK = planned.batch.flat_index_GK
            labels_R = logps_R.new_zeros(planned.batch.num_responses)
            labels_R[index_GK[index_GK >= 0]] = planned.batch.labels_GK[index_GK >= 0].double()
            changed_R = logps_R + shift + side_per_token * labels_R * planned.batch.num_tokens_R
            writer.put(planned.batch.response_ids_R.numpy(), changed_R.numpy())
    finally:
        shut_down()
