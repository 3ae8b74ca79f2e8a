"""The order of the two passes, on an engine that is a table of log-probabilities instead of a model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from step_batches import make_batch, options, random_logps
from torch import Tensor

from megatron_groupdpo.engine import MicrobatchLoss
from megatron_groupdpo.step.coefficients import group_loss
from megatron_groupdpo.step.train_step import accumulate_gradient
from megatron_groupdpo.types import Microbatch


class TableEngine:
    """Log-probabilities are parameters of their own; the second pass may see other ones than the first."""

    def __init__(self, logps_R: Tensor, *, second_pass_adds: float = 0.0, has_output_layer: bool = True) -> None:
        self.logps_R = logps_R
        self.second_pass_adds = second_pass_adds
        self.has_output_layer = has_output_layer
        self.calls: list[str] = []
        self.gradient_R = torch.zeros_like(logps_R)

    def score(self, microbatches: Sequence[Microbatch], num_responses: int) -> Tensor | None:
        self.calls.append("score")
        return self.logps_R.clone() if self.has_output_layer else None

    def backward(
        self, microbatches: Sequence[Microbatch], num_responses: int, loss: MicrobatchLoss | None
    ) -> Tensor | None:
        self.calls.append("backward")
        if not self.has_output_layer:
            return None
        assert loss is not None
        again_R = self.logps_R + self.second_pass_adds
        for response in range(num_responses):  # one response a microbatch: no weight may need the others
            leaf_r = again_R[response : response + 1].clone().requires_grad_()
            loss(torch.tensor([response]), leaf_r).backward()
            assert leaf_r.grad is not None
            self.gradient_R[response] = leaf_r.grad[0]
        return again_R


@pytest.mark.parametrize("objective", ["all_pairs", "dpo", "nca", "group_bce", "sft"])
def test_the_gradient_is_the_weights_of_the_true_loss(objective: str):
    loss = options(objective)
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    engine = TableEngine(logps_R)
    outcome = accumulate_gradient(engine, [], batch, ref_logps_R, loss)
    wanted = group_loss(logps_R, ref_logps_R, batch, loss)
    assert outcome is not None
    torch.testing.assert_close(engine.gradient_R, wanted.weights_R, rtol=1e-12, atol=1e-15)
    assert float(outcome.result.loss) == float(wanted.loss)


@pytest.mark.parametrize(
    ("objective", "calls"), [("all_pairs", ["score", "backward"]), ("nca", ["backward"]), ("sft", ["backward"])]
)
def test_only_coupled_objectives_have_a_scoring_pass(objective: str, calls: list[str]):
    loss = options(objective)
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    engine = TableEngine(logps_R)
    outcome = accumulate_gradient(engine, [], batch, ref_logps_R, loss)
    assert engine.calls == calls
    assert outcome is not None
    assert (outcome.score_drift is None) == ("score" not in calls)
    elsewhere = TableEngine(logps_R, has_output_layer=False)
    assert accumulate_gradient(elsewhere, [], batch, ref_logps_R, loss) is None
    assert elsewhere.calls == calls, "all stages must make the same schedule calls"


@pytest.mark.parametrize("score_average", [False, True])
def test_drift_is_the_largest_change_of_a_score_between_the_passes(score_average: bool):
    loss = options(score_average=score_average)
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    outcome = accumulate_gradient(TableEngine(logps_R, second_pass_adds=0.25), [], batch, ref_logps_R, loss)
    assert outcome is not None
    shortest = float(batch.num_tokens_R.min()) if score_average else 1.0
    assert outcome.score_drift == pytest.approx(0.4 * 0.25 / shortest)


def test_drift_to_nan_is_infinite_not_zero():
    loss = options()
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    outcome = accumulate_gradient(TableEngine(logps_R, second_pass_adds=float("nan")), [], batch, ref_logps_R, loss)
    assert outcome is not None
    assert outcome.score_drift == float("inf")
