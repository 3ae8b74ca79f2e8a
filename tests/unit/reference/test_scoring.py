"""Scoring a store on one rank: what is run, what is told, what is refused; and a reference by swapped weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from by_hand import logps_by_hand
from made_stores import made_groups, num_responses, write_store
from one_rank_run import made_config

from megatron_groupdpo.errors import DataError, UserError

if TYPE_CHECKING:
    from megatron_groupdpo.mcore.setup import Ranks

GROUPS = made_groups(5)
COUNTS = [len(item.labels) for item in GROUPS]


@pytest.fixture
def policy(one_rank: Ranks, tmp_path: Path) -> Any:
    from megatron_groupdpo.mcore.policy import build_policy

    config = made_config(tmp_path / "run.yaml", [tmp_path])
    return build_policy(config.model, config.parallel, config.precision, one_rank, seed=3, training=True)


def plan_of() -> Any:
    from megatron_groupdpo.data.batches.planner import PlanOptions

    return PlanOptions(micro_batch_size=3, data_parallel_size=1)


def score(policy: Any, store: Any, root: Path, **changes: Any) -> tuple[Any, SimpleNamespace]:
    """What ``score_store`` answers, and what it told meanwhile."""
    from megatron_groupdpo.reference.score import score_store

    told = SimpleNamespace(groups=[], start=[], hashed=[], run=[])
    passes = policy.engine.score

    def counting(microbatches: Any, count: int) -> Any:
        told.run.append(count)
        return passes(microbatches, count)

    policy.engine.score = counting
    try:
        done = score_store(
            policy,
            store,
            root,
            plan=plan_of(),
            groups_per_batch=2,
            on_groups=told.groups.append,
            on_start=lambda *given: told.start.append(given),
            on_hashed=told.hashed.append,
            **changes,
        )
    finally:
        policy.engine.score = passes
    return done, told


def stored(root: Path) -> np.ndarray:
    (logps,) = root.glob("*/logps.npy")
    return np.load(logps)


def by_hand(policy: Any) -> list[float]:
    from megatron_groupdpo.mcore.weights import unwrapped

    with torch.no_grad():
        return [float(x) for item in GROUPS for x in logps_by_hand(unwrapped(policy.chunks[0]), item)]


def test_a_store_is_scored_in_batches_of_groups_and_each_is_told(policy: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("megatron_groupdpo.reference.score._GROUPS_TO_HASH", 3)
    store = write_store(tmp_path / "s", GROUPS)
    done, told = score(policy, store, tmp_path / "ref")
    assert (done.num_scored, done.num_taken_over) == (num_responses(GROUPS), 0)
    assert told.start == [(0, 5)]
    assert told.hashed == [3, 2]
    assert told.groups == [2, 2, 1]
    assert told.run == [COUNTS[0] + COUNTS[1], COUNTS[2] + COUNTS[3], COUNTS[4]]
    np.testing.assert_allclose(stored(tmp_path / "ref"), by_hand(policy), rtol=1e-5)


def test_only_what_has_no_number_is_run(policy: Any, tmp_path: Path):
    """A response of the second group and all of the last."""
    store = write_store(tmp_path / "s", GROUPS)
    score(policy, store, tmp_path / "ref")
    (path,) = (tmp_path / "ref").glob("*/logps.npy")
    logps = np.load(path)
    first = np.cumsum([0, *COUNTS])
    lost = [int(first[1]) + 2, *range(int(first[4]), int(first[5]))]
    kept = np.setdiff1d(np.arange(len(logps)), lost)
    logps[kept] = -77.0  # no number that is there is made again
    logps[lost] = np.nan
    np.save(path, logps)
    done, told = score(policy, store, tmp_path / "ref")
    assert (done.num_scored, done.num_taken_over) == (len(lost), 0)
    assert (told.start, told.groups, told.run, told.hashed) == ([(3, 5)], [2], [len(lost)], [])
    again = stored(tmp_path / "ref")
    assert (again[kept] == -77.0).all()
    np.testing.assert_allclose(again[lost], np.array(by_hand(policy))[lost], rtol=1e-5)
    done, told = score(policy, store, tmp_path / "ref")
    assert (done.num_scored, told.start, told.groups, told.run) == (0, [(5, 5)], [], [])


def test_what_other_stores_have_is_taken_over_and_the_rest_is_run(policy: Any, tmp_path: Path):
    score(policy, write_store(tmp_path / "s", GROUPS[1:3]), tmp_path / "ref")
    whole = write_store(tmp_path / "whole", GROUPS)
    done, told = score(policy, whole, tmp_path / "ref")
    assert (done.num_scored, done.num_taken_over) == (COUNTS[0] + COUNTS[3] + COUNTS[4], COUNTS[1] + COUNTS[2])
    assert told.start == [(2, 5)]
    assert told.run == [COUNTS[0] + COUNTS[3], COUNTS[4]]
    np.testing.assert_allclose(np.load(tmp_path / "ref" / whole.digest[:16] / "logps.npy"), by_hand(policy), rtol=1e-5)


def test_a_log_probability_that_is_not_finite_is_not_written(policy: Any, tmp_path: Path):
    store = write_store(tmp_path / "s", GROUPS)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(UserError) as caught:
        score(policy, store, tmp_path / "ref")
    assert str(caught.value) == (
        f"{COUNTS[0] + COUNTS[1]} log-probabilities of groups 0 to 1 of {store.path} are not finite; the checkpoint is "
        "broken, or its precision is too low for it"
    )
    assert np.isnan(stored(tmp_path / "ref")).all()


def test_a_folder_of_other_weights_is_refused(policy: Any, tmp_path: Path):
    store = write_store(tmp_path / "s", GROUPS)
    score(policy, store, tmp_path / "ref")
    with torch.no_grad():
        next(iter(policy.chunks[0].parameters())).add_(1.0)
    with pytest.raises(DataError, match="scored with weights_digest"):
        score(policy, store, tmp_path / "ref")


def test_a_store_that_does_not_fit_the_model_is_refused_with_both_numbers(policy: Any, tmp_path: Path):
    import dataclasses

    store = write_store(tmp_path / "s", GROUPS)
    longest = int(store.meta["max_row_tokens"])
    changed = [
        {"max_position_embeddings": longest},
        {"max_position_embeddings": longest - 1},
        {"vocab_size": 61},
        {"vocab_size": 60},
    ]
    models = [dataclasses.replace(policy, model=dataclasses.replace(policy.model, **fields)) for fields in changed]
    score(models[0], store, tmp_path / "ref0")
    score(models[2], store, tmp_path / "ref2")
    with pytest.raises(DataError) as caught:
        score(models[1], store, tmp_path / "ref1")
    assert str(caught.value) == (
        f"{store.path}: the longest prompt and response have {longest} tokens, the model {longest - 1} positions; run "
        f"tools/preprocess_data.py with --seq-length {longest - 1}"
    )
    with pytest.raises(DataError) as caught:
        score(models[3], store, tmp_path / "ref3")
    assert str(caught.value) == (
        f"{store.path}: its tokenizer has 61 tokens, the model's vocabulary 60; use the model's own"
    )


def test_swapped_weights_score_as_the_reference_and_are_put_back(policy: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("megatron_groupdpo.reference.swapped._ELEMENTS_AT_ONCE", 7)
    from megatron_groupdpo.reference.score import score_groups
    from megatron_groupdpo.reference.swapped import swapped_reference

    samples = list(write_store(tmp_path / "s", GROUPS))
    _, reference_R = score_groups(policy, samples, plan_of())
    digest = policy.weights_digest()
    swapped = swapped_reference(policy)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.mul_(1.25)
    own = policy.weights_digest()
    places = [parameter.data_ptr() for parameter in policy.chunks[0].parameters()]
    _, policy_R = score_groups(policy, samples, plan_of())
    stand_in = SimpleNamespace(ranks=policy.ranks, engine=swapped.engine)
    _, found_R = score_groups(stand_in, samples, plan_of())  # type: ignore[arg-type]
    assert torch.equal(found_R, reference_R)
    assert not torch.allclose(policy_R, reference_R)
    assert swapped.weights_digest() == digest != own
    assert policy.weights_digest() == own
    assert [parameter.data_ptr() for parameter in policy.chunks[0].parameters()] == places
    monkeypatch.setattr(policy.engine, "score", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_groups(stand_in, samples, plan_of())  # type: ignore[arg-type]
    assert policy.weights_digest() == own
