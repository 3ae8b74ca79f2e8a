"""Stored reference log-probabilities: the same on every layout, and the same as a second model in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_pool import RankPool, RanksFailed
from tiny_run import TinyData, preprocess, read_metrics, refusal_on_rank, train_on_rank, write_groups

ConfigFile = Callable[..., Path]
PP2 = {"pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
PACKED = {"max_tokens_per_microbatch": 64}
PADDED = {"micro_batch_size": 3}
# ranks, layout, microbatches
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, int]]] = {
    "tp2": (2, TP2, PADDED),
    "tp2-sp": (2, TP2 | {"sequence_parallel": True}, PADDED),
    "pp2": (2, PP2, PADDED),
    "dp2": (2, {}, PADDED),
    "cp2": (2, CP2, PADDED),
    "packed": (1, {}, PACKED),
    "packed-cp2": (2, CP2, PACKED),
    "packed-pp2-dp2": (4, PP2, PACKED),
    "packed-tp2-cp2-sp": (4, TP2 | CP2 | {"sequence_parallel": True}, PACKED),
}


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of a scoring."""

    done_before: int
    """Groups that needed no pass; -1 off the logging rank."""
    num_run: int
    """Responses that went through the engine."""
    scored: int
    taken_over: int


def score_on_rank(
    checkpoint: str,
    store: str,
    folder: str,
    layout: dict[str, Any],
    sizes: dict[str, int] | None = None,
    groups_per_batch: int = 3,
    changes: dict[str, Any] | None = None,
) -> Outcome:
    """``score_store`` as the tool calls it; ``changes`` to the model that has the checkpoint's weights."""
    from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
    from megatron_groupdpo.data.batches.planner import plan_options
    from megatron_groupdpo.data.store.reader import TokenStore
    from megatron_groupdpo.mcore.policy import load_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.reference.score import score_store

    parallel = ParallelConfig(device="cpu", **layout)
    ranks = initialize(parallel, seed=0)
    done_before, num_run = [-1], [0]

    try:
        policy = load_policy(Path(checkpoint), parallel, PrecisionConfig(), ranks)
        policy = dataclasses.replace(policy, model=dataclasses.replace(policy.model, **changes or {}))
        score = policy.engine.score

        def counting(microbatches: Any, num_responses: int) -> Any:
            num_run[0] += num_responses
            return score(microbatches, num_responses)

        policy.engine.score = counting  # type: ignore[method-assign]
        outcome = score_store(
            policy,
            TokenStore.open(store),
            Path(folder),
            plan=plan_options(parallel, data_parallel_size=ranks.dp_group.size(), **(sizes or PADDED)),
            groups_per_batch=groups_per_batch,
            on_start=lambda done, _total: done_before.__setitem__(0, done),
        )
        return Outcome(done_before[0], num_run[0], outcome.num_scored, outcome.num_taken_over)
    finally:
        shut_down()


@pytest.fixture(scope="module")
def start(pool: RankPool, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from, trained for two steps so that its weights are no initial ones."""
    from tiny_run import write_config

    folder = tmp_path_factory.mktemp("start")
    config = write_config(
        folder / "config.yaml",
        tiny_data.store,
        tiny_data.reference,
        training={"train_iters": 3},
        checkpoint={"save": str(folder / "run"), "save_interval": 1},
    )
    pool.run(1, train_on_rank, ["--config", str(config)])
    return folder / "run"


def stored(folder: Path) -> np.ndarray:
    (logps,) = folder.glob("*/logps.npy")
    return np.load(logps)


@pytest.fixture(scope="module")
def one_rank(pool: RankPool, tiny_data: TinyData, start: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The numbers of one rank and padded microbatches."""
    folder = tmp_path_factory.mktemp("one") / "reference"
    pool.run(1, score_on_rank, str(start), str(tiny_data.store), str(folder), {})
    return stored(folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_log_probabilities_do_not_depend_on_the_layout(
    pool: RankPool, tiny_data: TinyData, start: Path, one_rank: np.ndarray, tmp_path: Path, name: str
):
    num_ranks, layout, sizes = LAYOUTS[name]
    pool.run(num_ranks, score_on_rank, str(start), str(tiny_data.store), str(tmp_path / "ref"), layout, sizes)
    np.testing.assert_allclose(stored(tmp_path / "ref"), one_rank, rtol=1e-5)


@pytest.fixture(scope="module")
def grown(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the tiny data's 10 groups and 5 more."""
    folder = tmp_path_factory.mktemp("grown")
    write_groups(folder / "groups.jsonl", 15)
    preprocess(folder / "groups.jsonl", tiny_data.tokenizer, folder / "store")
    return folder / "store"


@pytest.mark.parametrize(
    ("layout", "sizes", "groups_per_batch", "same_microbatches"),
    [(PP2, PADDED, 5, True), (PP2, PADDED, 4, False), (CP2, PACKED, 5, True)],
    ids=["pp2", "pp2-other-microbatches", "cp2-packed"],
)
def test_a_grown_store_runs_only_what_is_new(
    pool: RankPool,
    tiny_data: TinyData,
    start: Path,
    grown: Path,
    tmp_path: Path,
    layout: dict[str, Any],
    sizes: dict[str, int],
    groups_per_batch: int,
    same_microbatches: bool,
):
    from megatron_groupdpo.data.store.reader import TokenStore

    ten, fifteen = TokenStore.open(tiny_data.store), TokenStore.open(grown)
    old, new = ten.num_responses, fifteen.num_responses - ten.num_responses
    assert len(ten) == 10
    assert len(fifteen) == 15
    given = (layout, sizes, groups_per_batch)
    reference = tmp_path / "reference"
    pool.run(2, score_on_rank, str(start), str(tiny_data.store), str(reference), *given)
    first = stored(reference)
    outcomes = pool.run(2, score_on_rank, str(start), str(grown), str(reference), *given)
    assert {(outcome.num_run, outcome.scored, outcome.taken_over) for outcome in outcomes} == {(new, new, old)}
    pool.run(2, score_on_rank, str(start), str(grown), str(tmp_path / "whole"), *given)
    found, whole = np.load(reference / fifteen.digest[:16] / "logps.npy"), stored(tmp_path / "whole")
    np.testing.assert_array_equal(found[:old], first)
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    if same_microbatches:
        np.testing.assert_array_equal(found, whole)


def test_scoring_goes_on_where_it_stopped_and_leaves_the_rest_alone(
    pool: RankPool, tiny_data: TinyData, start: Path, tmp_path: Path
):
    folder = tmp_path / "reference"
    arguments = (str(start), str(tiny_data.store), str(folder), {"pipeline_model_parallel_size": 2})
    pool.run(2, score_on_rank, *arguments)
    whole = stored(folder)
    (path,) = folder.glob("*/logps.npy")
    half = np.load(path, mmap_mode="r+")
    half[len(half) // 2 :] = np.nan
    half[0] += 1.0  # what is there is not computed again
    half.flush()
    outcome = pool.run(2, score_on_rank, *arguments)[-1]
    assert 0 < outcome.done_before < 10
    assert outcome.num_run == outcome.scored == len(whole) - len(half) // 2
    again = stored(folder)
    assert again[0] == whole[0] + 1.0
    np.testing.assert_array_equal(again[1 : len(half) // 2], whole[1 : len(half) // 2])
    np.testing.assert_allclose(again[1:], whole[1:], rtol=1e-5)


@pytest.fixture
def losses_with(
    pool: RankPool, config_file: ConfigFile, start: Path, tmp_path: Path
) -> Callable[..., tuple[str, list[float]]]:
    """``losses_with(name, num_ranks, objective=..., ...)``: a run from ``start``; its weights' digest and losses."""

    def run(name: str, num_ranks: int, **sections: dict[str, Any]) -> tuple[str, list[float]]:
        checkpoint = {"pretrained_checkpoint": str(start), "save": str(tmp_path / name)}
        config = config_file(**sections, checkpoint=checkpoint)
        digests = pool.run(num_ranks, train_on_rank, ["--config", str(config)])
        return digests[0], [line["loss"] for line in read_metrics(tmp_path / name)]

    return run


RESIDENT: dict[str, Any] = {"reference": "resident", "reference_logprobs": None}


def test_equal_weights_in_another_model_are_another_reference(
    pool: RankPool, start: Path, tiny_data: TinyData, tmp_path: Path
):
    """A norm's epsilon is in no tensor, and in every log-probability."""
    arguments = (str(start), str(tiny_data.store), str(tmp_path / "scored"), {}, PADDED, 3)
    pool.run(1, score_on_rank, *arguments)
    before = stored(tmp_path / "scored")
    with pytest.raises(RanksFailed, match=r"scored with weights_digest '.*score into another folder"):
        pool.run(1, score_on_rank, *arguments, {"norm_epsilon": 1e-3})
    assert np.array_equal(stored(tmp_path / "scored"), before)
    (again,) = pool.run(1, score_on_rank, *arguments, {"max_position_embeddings": 4096})
    assert again.num_run == 0, "how many positions there are is no part of the function"


@pytest.mark.parametrize(
    "name", ["pp2", pytest.param("cp2", marks=pytest.mark.slow), "packed", "packed-cp2", "packed-pp2-dp2"]
)
@pytest.mark.costly
def test_a_resident_reference_gives_the_losses_of_the_cached_one(
    pool: RankPool, tiny_data: TinyData, start: Path, losses_with, tmp_path: Path, name: str
):
    num_ranks, layout, sizes = LAYOUTS[name]
    reference = tmp_path / "reference"
    pool.run(num_ranks, score_on_rank, str(start), str(tiny_data.store), str(reference), layout, sizes)
    training = {"micro_batch_size": None} | sizes
    cached = {"reference_logprobs": str(reference)}
    _, wanted = losses_with("cached", num_ranks, parallel=layout, training=training, objective=cached)
    _, losses = losses_with("resident", num_ranks, parallel=layout, training=training, objective=RESIDENT)
    assert len(wanted) == 6
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)
    # and the reference matters: the first loss is the closed form, the later ones are not
    assert abs(wanted[-1] - wanted[0]) > 1e-3


VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("num_ranks", "layout", "precision"),
    [
        (1, {}, {}),
        (2, {"use_distributed_optimizer": True}, {"bf16": True}),
        (2, VPP2, {"bf16": True}),
        pytest.param(2, TP2, {}, marks=pytest.mark.slow),
    ],
    ids=["one", "dp2-sharded-bf16", "vpp2-bf16", "tp2"],
)
def test_swapped_weights_train_as_a_second_model_bit_for_bit(
    losses_with, num_ranks: int, layout: dict[str, Any], precision: dict[str, Any]
):
    given = {"parallel": layout, "precision": precision}
    resident, wanted = losses_with("resident", num_ranks, **given, objective=RESIDENT)
    swapped, losses = losses_with("swapped", num_ranks, **given, objective=RESIDENT | {"reference_offload": True})
    assert losses == wanted
    assert swapped == resident
    assert abs(wanted[-1] - wanted[0]) > 1e-3  # the policy has left the reference


def swap_on_rank(checkpoint: str, other: str) -> dict[str, Any]:
    """Digests of a policy before, while and after its weights are swapped with another checkpoint's."""
    from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
    from megatron_groupdpo.mcore.checkpoint.folders import find_checkpoint
    from megatron_groupdpo.mcore.checkpoint.training import load_weights
    from megatron_groupdpo.mcore.policy import load_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.reference.swapped import swapped_reference

    parallel = ParallelConfig(device="cpu", pipeline_model_parallel_size=2)
    ranks = initialize(parallel, seed=0)
    try:
        policy = load_policy(Path(checkpoint), parallel, PrecisionConfig(), ranks, training=True)
        load_weights(find_checkpoint(Path(other)), policy.chunks, model=policy.identity)
        reference = swapped_reference(policy)
        load_weights(find_checkpoint(Path(checkpoint)), policy.chunks, model=policy.identity)
        found: dict[str, Any] = {"reference": reference.weights_digest(), "before": policy.weights_digest()}
        places = [parameter.data_ptr() for chunk in policy.chunks for parameter in chunk.parameters()]

        def fails(_microbatches: Any, _num_responses: int) -> Any:
            found["while"] = policy.weights_digest()
            raise RuntimeError("a failure while the reference is in place")

        policy.engine.score = fails  # type: ignore[method-assign]
        try:
            reference.engine.score([], 0)
        except RuntimeError as error:
            found["error"] = str(error)
        found["after"] = policy.weights_digest()
        found["moved"] = places != [p.data_ptr() for chunk in policy.chunks for p in chunk.parameters()]
        return found
    finally:
        shut_down()


def test_a_swap_is_undone_bit_for_bit_even_after_a_failure(pool: RankPool, start: Path):
    first, last = str(start / "iter_0000001"), str(start / "iter_0000003")
    for found in pool.run(2, swap_on_rank, last, first):
        assert found["while"] == found["reference"]
        assert found["after"] == found["before"] != found["reference"]
        assert "a failure while" in found["error"]
        assert not found["moved"]


def test_an_offloaded_reference_of_another_model_is_refused(
    pool: RankPool, config_file: ConfigFile, start: Path, tmp_path: Path
):
    config = config_file(
        objective=RESIDENT | {"reference_offload": True},
        model={"norm_epsilon": 1e-3},
        checkpoint={"pretrained_checkpoint": str(start), "save": str(tmp_path / "run")},
    )
    ((kind, message),) = pool.run(1, refusal_on_rank, ["--config", str(config)])
    assert kind == "CheckpointError"
    assert "another model" in message
