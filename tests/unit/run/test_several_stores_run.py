"""A run over stores of different sizes has the loss and the gradient of one store with the same groups, and by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from by_hand import HandLoss, gradient_by_hand, logps_by_hand, loss_by_hand
from made_stores import made_groups, made_logps, num_responses, write_reference, write_store
from one_rank_run import hand_model, made_config

if TYPE_CHECKING:
    from megatron_groupdpo.mcore.setup import Ranks

SIDES = ((1, 1), (2, 3), (1, 2), (2, 0), (1, 4), (3, 2))
"""The fourth group has no preference term."""
TRAIN, VALID = made_groups(8, sides=SIDES), made_groups(7, seed=3, sides=SIDES)
TRAIN_CUTS, VALID_CUTS = (0, 3, 8), (0, 5, 7)


def refs_of(groups: list[Any], seed: int) -> list[list[float]]:
    flat = iter(made_logps(groups, seed=seed))
    return [list(itertools.islice(flat, len(item.labels))) for item in groups]


TRAIN_REFS, VALID_REFS = refs_of(TRAIN, 1), refs_of(VALID, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train``, ``train0`` and ``train1``: all groups, the first ones, the rest; the same of ``valid``."""
    folder = tmp_path_factory.mktemp("stores")
    for name, groups, refs, cuts in (
        ("train", TRAIN, TRAIN_REFS, TRAIN_CUTS),
        ("valid", VALID, VALID_REFS, VALID_CUTS),
    ):
        for part, (start, stop) in {"": (0, cuts[-1]), "0": cuts[:2], "1": cuts[1:]}.items():
            store = write_store(folder / f"{name}{part}", groups[start:stop])
            write_reference(folder / "reference", store, [x for own in refs[start:stop] for x in own])
    return folder


def build(folder: Path, tmp_path: Path, ranks: Ranks, parts: tuple[str, ...]) -> Any:
    """The run over these parts of the training and of the validation data."""
    from megatron_groupdpo.run.build import build_run

    config = made_config(
        tmp_path / "run.yaml",
        [folder / f"train{part}" for part in parts],
        data={"valid_data_path": [str(folder / f"valid{part}") for part in parts]},
        objective={"reference_logprobs": str(folder / "reference")},
        training={"global_batch_size": 8},
    )
    return build_run(config, ranks)


def step_of(run: Any) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient of the first batch."""
    from megatron_groupdpo.mcore.weights import unwrapped
    from megatron_groupdpo.run.proofs.step import reference_logps
    from megatron_groupdpo.step.train_step import accumulate_gradient

    planned = run.train.batch(0, 8)
    refs = reference_logps(run, planned)
    outcome = accumulate_gradient(run.policy.engine, planned.microbatches, planned.batch, refs, run.loss)
    assert outcome is not None
    return float(outcome.result.loss), [p.main_grad.clone() for p in unwrapped(run.policy.chunks[0]).parameters()]


def test_loss_and_gradient_over_two_stores_are_those_of_one_and_those_by_hand(
    one_rank: Ranks, folder: Path, tmp_path: Path
):
    run = build(folder, tmp_path, one_rank, ("0", "1"))
    assert run.order["stores"] == [store.digest for store in run.train.dataset.stores]
    assert len(set(run.order["stores"])) == 2
    loss, gradient = step_of(run)
    loss_of_one, gradient_of_one = step_of(build(folder, tmp_path, one_rank, ("",)))
    assert loss == loss_of_one
    assert all(torch.equal(a, b) for a, b in zip(gradient, gradient_of_one, strict=True))
    model = hand_model(run.config, one_rank)
    by_hand = loss_by_hand(model, TRAIN, TRAIN_REFS, beta=0.3, nll_coeff=1.0)
    assert loss == pytest.approx(float(by_hand.loss), rel=1e-6)
    for ours, theirs in zip(gradient, gradient_by_hand(model, by_hand.loss), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_validation_over_two_stores_is_that_of_one_and_reads_its_reference(
    one_rank: Ranks, folder: Path, tmp_path: Path
):
    from megatron_groupdpo.run.loop import evaluate

    run = build(folder, tmp_path, one_rank, ("0", "1"))
    found = evaluate(run)
    assert found == evaluate(build(folder, tmp_path, one_rank, ("",)))
    by_hand: HandLoss = loss_by_hand(hand_model(run.config, one_rank), VALID, VALID_REFS, beta=0.3, nll_coeff=1.0)
    assert found["eval/loss"] == pytest.approx(float(by_hand.loss), rel=1e-6)
    assert found["eval/preference_loss"] == pytest.approx(by_hand.preference, rel=1e-6)
    assert found["eval/trained/nll_loss"] == pytest.approx(by_hand.nll, rel=1e-6)


def test_stores_scored_one_by_one_have_the_numbers_of_one_store_and_those_by_hand(
    one_rank: Ranks, folder: Path, tmp_path: Path
):
    from megatron_groupdpo.reference.score import score_store
    from megatron_groupdpo.reference.store import ReferenceLogProbs

    run = build(folder, tmp_path, one_rank, ("0", "1"))
    (whole,) = build(folder, tmp_path, one_rank, ("",)).train.dataset.stores
    tables = []
    for name, stores in (("two", run.train.dataset.stores), ("one", [whole])):
        for store in stores:
            done = score_store(run.policy, store, tmp_path / name, plan=run.train.plan, groups_per_batch=2)
            assert (done.num_scored, done.num_taken_over) == (store.num_responses, 0)
        table = ReferenceLogProbs.open(tmp_path / name, stores, precision="fp32")
        tables.append(table[np.arange(num_responses(TRAIN))])
    model = hand_model(run.config, one_rank)
    with torch.no_grad():
        wanted = [float(logp) for item in TRAIN for logp in logps_by_hand(model, item)]
    np.testing.assert_allclose(tables[0], wanted, rtol=1e-5)
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-6)  # other responses share a microbatch
    # What one store was scored by is taken over for another that holds the same content, each to its own place.
    again = score_store(run.policy, whole, tmp_path / "two", plan=run.train.plan, groups_per_batch=2)
    assert (again.num_scored, again.num_taken_over) == (0, num_responses(TRAIN))
    np.testing.assert_array_equal(
        ReferenceLogProbs.open(tmp_path / "two", [whole], precision="fp32")[np.arange(num_responses(TRAIN))], tables[0]
    )
