"""Every family computes what ``transformers`` computes, on every kind of layout; gradients too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_examples import CONFIGS, VOCAB_SIZE, random_model, save_random_model
from parity import relative_gap
from rank_pool import RankPool

TOLERANCE = 1e-5
LENGTHS = (40, 23, 9)
ONE_RANK_IS_ENOUGH = {"llama-untied", "llama-tied", "llama-biases", "llama-linear", "gpt2-untied-relu"}
FAMILIES = tuple(name for name in CONFIGS if name not in ONE_RANK_IS_ENOUGH)

LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "packed": (1, {}, True),
    "tp2": (2, {"tensor_model_parallel_size": 2}, False),
    "tp2-sp-packed": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, True),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, False),
    "cp2": (2, {"context_parallel_size": 2}, False),
    "cp2-packed": (2, {"context_parallel_size": 2}, True),
}
"""Ranks, parallel section, packed."""


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB_SIZE, size=length) for length in LENGTHS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_random_model(name, root / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def expected(folders: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    from megatron_groupdpo.convert.verify import transformers_logprobs

    return {name: torch.cat(transformers_logprobs(folder, sequences())) for name, folder in folders.items()}


def microbatch_of(multiple: int, *, packed: bool) -> Any:
    """All sequences, padded or packed, every token a response of its own: scores are then log-probs of tokens."""
    from megatron_groupdpo.types import Microbatch

    padded = [-(-length // multiple) * multiple for length in LENGTHS]
    starts = np.concatenate([[0], np.cumsum(padded)])
    rows, columns = (1, int(starts[-1])) if packed else (len(LENGTHS), max(padded))
    tokens_BS, positions_BS = np.zeros((rows, columns), np.int64), np.zeros((rows, columns), np.int64)
    hidden, targets = [], []
    for i, tokens in enumerate(sequences()):
        row, start = (0, int(starts[i])) if packed else (i, 0)
        tokens_BS[row, start : start + len(tokens)] = tokens
        positions_BS[row, start : start + len(tokens)] = np.arange(len(tokens))
        hidden.append((start + np.arange(len(tokens) - 1)) * rows + row)
        targets.append(tokens[1:])
    num_targets = sum(LENGTHS) - len(LENGTHS)
    return Microbatch(
        tokens_BS=torch.from_numpy(tokens_BS),
        position_ids_BS=torch.from_numpy(positions_BS),
        hidden_positions_T=torch.from_numpy(np.concatenate(hidden)),
        targets_T=torch.from_numpy(np.concatenate(targets)),
        owners_T=torch.arange(num_targets),
        responses_r=torch.arange(num_targets),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)) if packed else None,
    )


def logprobs_on_rank(folders: Mapping[str, Path], layout: Mapping[str, Any], packed: bool) -> dict[str, Any]:
    """Log-probabilities under each family's model, one layout for all; None except on the last stage."""
    from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
    from megatron_groupdpo.convert.hf_model import open_hf_model
    from megatron_groupdpo.convert.weights import load_hf_weights
    from megatron_groupdpo.data.microbatches import context_shard
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down

    parallel = ParallelConfig(device="cpu", **layout)
    try:
        ranks = initialize(parallel, seed=0)
        microbatch = microbatch_of(4, packed=packed)
        num_targets = len(microbatch.targets_T)
        if ranks.cp_group.size() > 1:
            microbatch = context_shard(microbatch, ranks.cp_group.rank(), ranks.cp_group.size())
        found: dict[str, Any] = {}
        for name, folder in folders.items():
            model = open_hf_model(folder).model
            policy = build_policy(model, parallel, PrecisionConfig(), ranks, seed=0, training=False)
            load_hf_weights(folder, policy)
            scores = policy.engine.score([microbatch], num_targets)
            found[name] = None if scores is None else scores.cpu()
        return found
    finally:
        shut_down()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_those_of_transformers_on_every_layout(
    pool: RankPool, folders: Mapping[str, Path], expected: Mapping[str, torch.Tensor], layout: str
):
    num_ranks, parallel, packed = LAYOUTS[layout]
    answers = pool.run(num_ranks, logprobs_on_rank, folders, parallel, packed)
    gaps = {}
    for name, theirs in expected.items():
        assert float(theirs.max() - theirs.min()) > 1, "a model that says nothing would agree with anything"
        (ours, *others) = [answer[name] for answer in answers if answer[name] is not None]
        assert all(torch.equal(ours, other) for other in others)
        gaps[name] = float((ours - theirs).abs().max())
    assert max(gaps.values()) < TOLERANCE, gaps


def gradients_on_rank(
    folders: Mapping[str, Path], layout: Mapping[str, Any], packed: bool
) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """Of a weighted sum of the log-probabilities: this rank's shards of every gradient, and the norm of all."""
    from layout_run import collect, gradients_in_place_of_weights

    from megatron_groupdpo.config import OptimizerConfig, ParallelConfig, PrecisionConfig
    from megatron_groupdpo.convert.hf_model import open_hf_model
    from megatron_groupdpo.convert.weights import load_hf_weights
    from megatron_groupdpo.mcore.optimizer import build_optimizer
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down

    parallel = ParallelConfig(device="cpu", **layout)
    try:
        ranks = initialize(parallel, seed=0)
        microbatch = microbatch_of(4, packed=packed)
        num_targets = len(microbatch.targets_T)
        weights_T = token_weights(num_targets)

        def weighted_sum(responses_r: torch.Tensor, logps_r: torch.Tensor) -> torch.Tensor:
            return (weights_T[responses_r] * logps_r).sum()

        shards, norms = {}, {}
        for name, folder in folders.items():
            model = open_hf_model(folder).model
            policy = build_policy(model, parallel, PrecisionConfig(), ranks, seed=0, training=True)
            load_hf_weights(folder, policy)
            optimizer: Any = build_optimizer(policy.chunks, OptimizerConfig(lr=1e-3), parallel, PrecisionConfig())
            policy.engine.backward([microbatch], num_targets, weighted_sum if ranks.is_last_stage else None)
            with gradients_in_place_of_weights(policy):
                shards[name] = collect(policy)
            norms[name] = float(optimizer.step()[1])
        return shards, norms
    finally:
        shut_down()


def token_weights(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64, device="cpu")


def gradients_of_transformers(name: str) -> dict[str, torch.Tensor]:
    model = random_model(name).double()
    weights = iter(token_weights(sum(LENGTHS) - len(LENGTHS)).split([length - 1 for length in LENGTHS]))
    for tokens in sequences():
        logits_SV = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0]
        logps = logits_SV[:-1].double().log_softmax(-1).gather(1, torch.from_numpy(tokens)[1:, None])[:, 0]
        (next(weights) * logps).sum().backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


GRADIENT_FAMILIES = ("qwen3", "olmo2", "gemma3")


@pytest.mark.parametrize("layout", ["packed", "tp2", "tp2-sp-packed", "pp2"])
def test_gradients_are_those_of_transformers(pool: RankPool, folders: Mapping[str, Path], layout: str):
    from layout_run import whole_tensors

    from megatron_groupdpo.convert.hf_model import open_hf_model

    num_ranks, parallel, packed = LAYOUTS[layout]
    chosen = {name: folders[name] for name in GRADIENT_FAMILIES}
    answers = pool.run(num_ranks, gradients_on_rank, chosen, parallel, packed)
    for name in GRADIENT_FAMILIES:
        theirs = gradients_of_transformers(name)
        wanted = {
            key if layer is None else f"{key}#{layer}": pair.merge([theirs[part] for part in pair.hf])
            for (key, layer), pair in open_hf_model(folders[name]).plan.items()
        }
        parts = [shards[name] for shards, _ in answers]
        found = whole_tensors(parts, replicas_agree_to=1e-5, vocab_size=VOCAB_SIZE)
        assert relative_gap(found, wanted) < TOLERANCE, name
        assert max(relative_gap({key: found[key]}, {key: wanted[key]}) for key in wanted) < 10 * TOLERANCE, name
        norm = sum(float(gradient.square().sum()) for gradient in wanted.values()) ** 0.5
        assert all(norms[name] == pytest.approx(norm, rel=TOLERANCE) for _, norms in answers), name
