"""Every family computes what ``transformers`` computes, on every kind of layout; gradients too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_examples import CONFIGS, VOCAB_SIZE, named_as_in_files, random_model, save_random_model
from parity import relative_gap
from rank_pool import RankPool

TOLERANCE = 1e-5
LENGTHS = (40, 23, 9)
NUM_TARGETS = sum(LENGTHS) - len(LENGTHS)
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
EP2: dict[str, Any] = {"expert_model_parallel_size": 2}
MIXTURE_LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "ep2": (2, EP2, False),
    "ep2-packed": (2, EP2, True),
    "ep2-allgather": (2, {**EP2, "moe_token_dispatcher_type": "allgather"}, False),
    "ep2-tp2-sp-packed": (4, {**EP2, "tensor_model_parallel_size": 2, "sequence_parallel": True}, True),
    "ep2-pp2": (4, {**EP2, "pipeline_model_parallel_size": 2}, False),
    "ep2-cp2": (2, {**EP2, "context_parallel_size": 2}, False),
}
MIXTURES = ("mixtral", "qwen3-moe", "olmoe")


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


def microbatch_of(multiple: int, *, packed: bool, dp_rank: int = 0, dp_size: int = 1) -> Any:
    """A rank's sequences, padded or packed, every token a response of its own: scores are then log-probs of tokens."""
    from megatron_groupdpo.types import Microbatch

    own = list(range(len(LENGTHS)))[dp_rank::dp_size]
    padded = [-(-LENGTHS[i] // multiple) * multiple for i in own]
    starts = np.concatenate([[0], np.cumsum(padded)])
    # Padded microbatches have one shape on all ranks, as the planner's have where the layout asks for it.
    longest = -(-max(LENGTHS) // multiple) * multiple
    rows, columns = (1, int(starts[-1])) if packed else (-(-len(LENGTHS) // dp_size), longest)
    tokens_BS, positions_BS = np.zeros((rows, columns), np.int64), np.zeros((rows, columns), np.int64)
    hidden, targets, responses = [], [], []
    first_target = np.concatenate([[0], np.cumsum(np.array(LENGTHS) - 1)])
    for i, tokens in enumerate(sequences()[s] for s in own):
        row, start = (0, int(starts[i])) if packed else (i, 0)
        tokens_BS[row, start : start + len(tokens)] = tokens
        positions_BS[row, start : start + len(tokens)] = np.arange(len(tokens))
        hidden.append((start + np.arange(len(tokens) - 1)) * rows + row)
        targets.append(tokens[1:])
        responses.append(np.arange(first_target[own[i]], first_target[own[i] + 1]))
    return Microbatch(
        tokens_BS=torch.from_numpy(tokens_BS),
        position_ids_BS=torch.from_numpy(positions_BS),
        hidden_positions_T=torch.from_numpy(np.concatenate(hidden)),
        targets_T=torch.from_numpy(np.concatenate(targets)),
        owners_T=torch.arange(sum(map(len, targets))),
        responses_r=torch.from_numpy(np.concatenate(responses)),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)) if packed else None,
    )


def own_microbatch(ranks: Any, *, packed: bool) -> Any:
    from megatron_groupdpo.data.batches.microbatches import context_shard

    dp, cp = ranks.dp_group, ranks.cp_group
    microbatch = microbatch_of(4, packed=packed, dp_rank=dp.rank(), dp_size=dp.size())
    return context_shard(microbatch, cp.rank(), cp.size()) if cp.size() > 1 else microbatch


def logprobs_on_rank(folders: Mapping[str, Path], layout: Mapping[str, Any], packed: bool) -> dict[str, Any]:
    """Log-probabilities under each family's model, one layout for all; None except on the last stage."""
    from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
    from megatron_groupdpo.convert.hf.model import open_hf_model
    from megatron_groupdpo.convert.weights.loading import load_hf_weights
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down

    parallel = ParallelConfig(device="cpu", **layout)
    try:
        ranks = initialize(parallel, seed=0)
        microbatch = own_microbatch(ranks, packed=packed)
        found: dict[str, Any] = {}
        for name, folder in folders.items():
            model = open_hf_model(folder).model
            policy = build_policy(model, parallel, PrecisionConfig(), ranks, seed=0, training=False)
            load_hf_weights(folder, policy)
            scores = policy.engine.score([microbatch], NUM_TARGETS)
            found[name] = None if scores is None else scores.cpu()
        return found
    finally:
        shut_down()


@pytest.mark.parametrize("layout", [*LAYOUTS, *MIXTURE_LAYOUTS])
def test_log_probs_are_those_of_transformers_on_every_layout(
    pool: RankPool, folders: Mapping[str, Path], expected: Mapping[str, torch.Tensor], layout: str
):
    num_ranks, parallel, packed = (LAYOUTS | MIXTURE_LAYOUTS)[layout]
    chosen = {name: folders[name] for name in (FAMILIES if layout in LAYOUTS else MIXTURES)}
    answers = pool.run(num_ranks, logprobs_on_rank, chosen, parallel, packed)
    gaps = {}
    for name in chosen:
        theirs = expected[name]
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
    from megatron_groupdpo.convert.hf.model import open_hf_model
    from megatron_groupdpo.convert.weights.loading import load_hf_weights
    from megatron_groupdpo.mcore.passes.optimizer import build_optimizer
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down

    parallel = ParallelConfig(device="cpu", **layout)
    try:
        ranks = initialize(parallel, seed=0)
        microbatch = own_microbatch(ranks, packed=packed)
        weights_T = token_weights(NUM_TARGETS)

        def weighted_sum(responses_r: torch.Tensor, logps_r: torch.Tensor) -> torch.Tensor:
            return (weights_T[responses_r] * logps_r).sum()

        shards, norms = {}, {}
        for name, folder in folders.items():
            model = open_hf_model(folder).model
            policy = build_policy(model, parallel, PrecisionConfig(), ranks, seed=0, training=True)
            load_hf_weights(folder, policy)
            optimizer: Any = build_optimizer(policy.chunks, OptimizerConfig(lr=1e-3), parallel, PrecisionConfig())
            policy.engine.backward([microbatch], NUM_TARGETS, weighted_sum if ranks.is_last_stage else None)
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
    weights = iter(token_weights(NUM_TARGETS).split([length - 1 for length in LENGTHS]))
    for tokens in sequences():
        logits_SV = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0]
        logps = logits_SV[:-1].double().log_softmax(-1).gather(1, torch.from_numpy(tokens)[1:, None])[:, 0]
        (next(weights) * logps).sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    return named_as_in_files(gradients, model.config.model_type)


DENSE = ("qwen3", "olmo2", "gemma3")
MIXED = ("qwen3-moe", "olmoe")


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        *((layout, (*DENSE, *MIXED)) for layout in ("packed", "tp2-sp-packed", "pp2")),
        ("tp2", DENSE),
        *((layout, MIXED) for layout in ("ep2", "ep2-tp2-sp-packed", "ep2-pp2", "ep2-cp2")),
    ],
)
def test_gradients_are_those_of_transformers(
    pool: RankPool, folders: Mapping[str, Path], layout: str, names: tuple[str, ...]
):
    from layout_run import whole_tensors

    from megatron_groupdpo.convert.hf.model import open_hf_model

    num_ranks, parallel, packed = (LAYOUTS | MIXTURE_LAYOUTS)[layout]
    chosen = {name: folders[name] for name in names}
    answers = pool.run(num_ranks, gradients_on_rank, chosen, parallel, packed)
    for name in names:
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
