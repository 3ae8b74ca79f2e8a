"""The loss as one graph: the value and the gradient that the two passes take apart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from step_batches import make_batch, options, random_logps
from torch import Tensor

from megatron_groupdpo.engine import MicrobatchLoss
from megatron_groupdpo.step import coupled
from megatron_groupdpo.step.coefficients import coupled_loss, group_loss, plan_loss
from megatron_groupdpo.step.coupled import accumulate_coupled_gradient
from megatron_groupdpo.types import Microbatch

MICROBATCHES: list[Microbatch] = []


class GroupEngine:
    """Each call of the loss has one group's responses, whose log-probabilities are parameters of their own."""

    def __init__(self, logps_R: Tensor, groups: Sequence[Tensor]) -> None:
        self.logps_R, self.groups = logps_R, groups
        self.gradient_R = torch.zeros_like(logps_R)
        self.losses: list[float] = []

    def backward(
        self, microbatches: Sequence[Microbatch], num_responses: int, loss: MicrobatchLoss | None
    ) -> Tensor | None:
        assert microbatches is MICROBATCHES
        assert num_responses == len(self.logps_R)
        assert loss is not None
        for own_r in self.groups:
            leaf_r = self.logps_R[own_r].clone().requires_grad_()
            value = loss(own_r, leaf_r)
            value.backward()
            self.losses.append(float(value.detach()))
            assert leaf_r.grad is not None
            self.gradient_R[own_r] = leaf_r.grad
        return self.logps_R


@pytest.mark.parametrize("score_average", [False, True])
@pytest.mark.parametrize("objective", ["all_pairs", "mpo", "nca"])
def test_one_graph_has_the_loss_and_the_gradient_of_the_two_passes(objective: str, score_average: bool):
    loss = options(objective, score_average=score_average)
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    wanted = group_loss(logps_R, ref_logps_R, batch, loss)
    leaf_R = logps_R.clone().requires_grad_()
    for plan in (None, plan_loss(batch, loss, torch.device("cpu"))):
        leaf_R.grad = None
        value = coupled_loss(leaf_R, ref_logps_R, batch, loss, plan=plan)
        value.backward()
        torch.testing.assert_close(value.detach(), wanted.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(leaf_R.grad, wanted.weights_R, rtol=1e-12, atol=1e-15)


def test_the_plan_that_is_given_is_the_one_that_counts():
    loss = options()
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    other = options(beta=1.3, nll_coeff=0.7)
    found = coupled_loss(logps_R, ref_logps_R, batch, loss, plan=plan_loss(batch, other, torch.device("cpu")))
    torch.testing.assert_close(found, coupled_loss(logps_R, ref_logps_R, batch, other), rtol=1e-12, atol=0)
    assert abs(float(found - coupled_loss(logps_R, ref_logps_R, batch, loss))) > 1e-3


def test_group_by_group_the_gradient_is_the_same(monkeypatch: pytest.MonkeyPatch):
    """In each call the other groups stand at the reference, where their scores are 0 and their gradient none."""
    loss = options()
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    made = []

    def counted(*args: object) -> object:
        made.append(args)
        return plan_loss(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(coupled, "plan_loss", counted)
    groups = [own_r for g in range(batch.num_groups) if len(own_r := batch.responses_of([g]))]
    engine = GroupEngine(logps_R, groups)
    found_R = accumulate_coupled_gradient(engine, MICROBATCHES, batch, ref_logps_R, loss)  # type: ignore[arg-type]
    assert found_R is logps_R
    wanted = group_loss(logps_R, ref_logps_R, batch, loss)
    torch.testing.assert_close(engine.gradient_R, wanted.weights_R, rtol=1e-12, atol=1e-15)
    for own_r, value in zip(groups, engine.losses, strict=True):
        there_R = ref_logps_R.clone()
        there_R[own_r] = logps_R[own_r]
        assert value == pytest.approx(float(group_loss(there_R, ref_logps_R, batch, loss).loss), rel=1e-12)
    assert len(made) == 1, "one plan for all calls"
