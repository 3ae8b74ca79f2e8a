"""The weight of each response is the derivative of the total loss by its log-probability."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from step_batches import make_batch, options, random_logps
from torch import Tensor

from megatron_groupdpo import objectives
from megatron_groupdpo.step.coefficients import LossOptions, group_loss
from megatron_groupdpo.types import GroupBatch


def loss_by_hand(logps_R: Tensor, ref_logps_R: Tensor, batch: GroupBatch, loss: LossOptions) -> Tensor:
    """all_pairs with its NLL, group by group, in the graph of ``logps_R``."""
    terms, nlls, nll_tokens = [], [], 0
    for g in range(batch.num_groups):
        sides: dict[int, list[int]] = {1: [], -1: []}
        for k in range(batch.labels_GK.shape[1]):
            if (index := int(batch.flat_index_GK[g, k])) >= 0:
                sides[int(batch.labels_GK[g, k])].append(index)
        lengths = {i: float(batch.num_tokens_R[i]) for side in sides.values() for i in side}
        score = {
            i: loss.beta * (logps_R[i] - ref_logps_R[i]) / (lengths[i] if loss.score_average else 1.0) for i in lengths
        }
        if sides[1] and sides[-1]:
            pairs = [-(score[p] - score[n]).sigmoid().log() for p in sides[1] for n in sides[-1]]
            terms.append(sum(pairs) / len(pairs))
        if sides[1] and (sides[-1] or loss.one_sided_nll):
            divided = loss.nll_average == "response"
            own = [-logps_R[p] / (lengths[p] if divided else 1.0) for p in sides[1]]
            nlls.append(sum(own) if loss.nll_average == "batch-tokens" else sum(own) / len(own))
            nll_tokens += sum(lengths[p] for p in sides[1])
    denominator = nll_tokens if loss.nll_average == "batch-tokens" else len(nlls)
    return torch.as_tensor(sum(terms) / len(terms) + loss.nll_coeff * sum(nlls) / denominator)


@pytest.mark.parametrize("score_average", [False, True])
@pytest.mark.parametrize("nll_average", ["sum", "response", "batch-tokens"])
@pytest.mark.parametrize("one_sided_nll", [False, True])
def test_weights_are_the_gradient_of_the_loss_written_by_hand(
    score_average: bool, nll_average: Any, one_sided_nll: bool
):
    loss = options(score_average=score_average, nll_average=nll_average, one_sided_nll=one_sided_nll)
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    logps_R.requires_grad_()
    by_hand = loss_by_hand(logps_R, ref_logps_R, batch, loss)
    by_hand.backward()
    found = group_loss(logps_R.detach(), ref_logps_R, batch, loss)
    assert logps_R.grad is not None
    torch.testing.assert_close(found.loss, by_hand.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.weights_R, logps_R.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("objective", sorted(set(objectives.OBJECTIVES) - {"sft"}))
@pytest.mark.parametrize("score_average", [False, True])
def test_weights_are_the_finite_difference_of_the_loss_for_every_objective(objective: str, score_average: bool):
    description = objectives.get_objective(objective)
    loss = options(objective, score_average=score_average or description.needs_score_average)
    if "beta" in objectives.hyperparameter_names(objective):
        loss = dataclasses.replace(loss, hyperparameters={"beta": loss.beta})
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    found = group_loss(logps_R, ref_logps_R, batch, loss)
    step = 1e-5
    for r in range(batch.num_responses):
        moved = []
        for sign in (1, -1):
            there_R = logps_R.clone()
            there_R[r] += sign * step
            moved.append(float(group_loss(there_R, ref_logps_R, batch, loss).loss))
        assert float(found.weights_R[r]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-6, abs=1e-9)


def test_groups_without_a_preference_term_are_not_counted_in_the_mean():
    loss = options(nll_coeff=0.0)
    with_empty = make_batch(loss, ((1, 1), (2, 0), (0, 3)))
    alone = make_batch(loss, ((1, 1),))
    logps_R, ref_logps_R = random_logps(alone)
    one, other = (group_loss(logps_R, ref_logps_R, batch, loss) for batch in (with_empty, alone))
    assert one.active_G.tolist() == [True, False, False]
    assert float(one.loss) == float(other.loss)
    assert torch.equal(one.weights_R, other.weights_R)


def test_a_batch_without_any_active_group_has_loss_zero_and_no_nan():
    loss = options()
    batch = make_batch(loss, ((2, 0), (0, 1)))
    assert batch.num_responses == 0
    empty_R = torch.zeros(0, dtype=torch.float64)
    result = group_loss(empty_R, empty_R, batch, loss)
    assert (float(result.loss), float(result.preference_loss), float(result.nll_loss)) == (0.0, 0.0, 0.0)


def test_equal_policy_and_reference_give_the_closed_form():
    """-log sigma(0) = log 2 for all_pairs, whatever the groups."""
    loss = options(nll_coeff=0.0)
    batch = make_batch(loss)
    logps_R, _ = random_logps(batch)
    result = group_loss(logps_R, logps_R, batch, loss)
    assert float(result.loss) == pytest.approx(0.6931471805599453, abs=1e-15)
    assert float(result.scores_R.abs().max()) == 0.0
