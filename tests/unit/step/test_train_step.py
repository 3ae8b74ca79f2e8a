"""The order of the two passes, on an engine that is a table of log-probabilities instead of a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from step_batches import make_batch, options, random_logps
from torch import Tensor

from megatron_groupdpo.engine import MicrobatchLoss
from megatron_groupdpo.step import coefficients, train_step
from megatron_groupdpo.step.coefficients import group_loss, plan_loss
from megatron_groupdpo.step.timers import StepTimers
from megatron_groupdpo.step.train_step import accumulate_gradient
from megatron_groupdpo.types import Microbatch

MICROBATCHES: list[Microbatch] = []
"""What every pass must be given: this list, not one like it."""


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
        assert microbatches is MICROBATCHES
        assert num_responses == len(self.logps_R)
        return self.logps_R.clone() if self.has_output_layer else None

    def backward(
        self, microbatches: Sequence[Microbatch], num_responses: int, loss: MicrobatchLoss | None
    ) -> Tensor | None:
        self.calls.append("backward")
        assert microbatches is MICROBATCHES
        assert num_responses == len(self.logps_R)
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
    outcome = accumulate_gradient(engine, MICROBATCHES, batch, ref_logps_R, loss)
    wanted = group_loss(logps_R, ref_logps_R, batch, loss)
    assert outcome is not None
    torch.testing.assert_close(engine.gradient_R, wanted.weights_R, rtol=1e-12, atol=1e-15)
    assert float(outcome.result.loss) == float(wanted.loss)
    assert torch.equal(outcome.logps_R, logps_R)
    assert torch.equal(outcome.ref_logps_R, ref_logps_R)


@pytest.mark.parametrize(
    ("objective", "calls"), [("all_pairs", ["score", "backward"]), ("nca", ["backward"]), ("sft", ["backward"])]
)
def test_only_coupled_objectives_have_a_scoring_pass(objective: str, calls: list[str]):
    loss = options(objective)
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    engine = TableEngine(logps_R)
    outcome = accumulate_gradient(engine, MICROBATCHES, batch, ref_logps_R, loss)
    assert engine.calls == calls
    assert outcome is not None
    assert (outcome.score_drift is None) == ("score" not in calls)
    elsewhere = TableEngine(logps_R, has_output_layer=False)
    assert accumulate_gradient(elsewhere, MICROBATCHES, batch, ref_logps_R, loss) is None
    assert elsewhere.calls == calls, "all stages must make the same schedule calls"


@pytest.mark.parametrize("score_average", [False, True])
def test_drift_is_the_largest_change_of_a_score_between_the_passes(score_average: bool):
    loss = options(score_average=score_average)
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    outcome = accumulate_gradient(TableEngine(logps_R, second_pass_adds=0.25), MICROBATCHES, batch, ref_logps_R, loss)
    assert outcome is not None
    shortest = float(batch.num_tokens_R.min()) if score_average else 1.0
    assert outcome.score_drift == pytest.approx(0.4 * 0.25 / shortest)


def test_drift_to_nan_is_infinite_not_zero():
    loss = options()
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    engine = TableEngine(logps_R, second_pass_adds=float("nan"))
    outcome = accumulate_gradient(engine, MICROBATCHES, batch, ref_logps_R, loss)
    assert outcome is not None
    assert outcome.score_drift == float("inf")


@pytest.mark.parametrize(("objective", "drift"), [("all_pairs", 0.0), ("nca", None)])
def test_a_batch_without_a_response_is_a_step_all_the_same(objective: str, drift: float | None):
    loss = options(objective)
    batch = make_batch(loss, ((2, 0), (0, 1))) if objective == "all_pairs" else make_batch(loss, ((1, 0), (0, 1)))
    assert batch.num_responses == 0
    empty_R = torch.zeros(0, dtype=torch.float64)
    engine = TableEngine(empty_R)
    outcome = accumulate_gradient(engine, MICROBATCHES, batch, empty_R, loss)
    assert outcome is not None
    assert float(outcome.result.loss) == 0.0
    assert outcome.score_drift == drift
    assert "backward" in engine.calls, "the other ranks may have responses"


def test_one_response_may_drift_too():
    loss = options("sft")
    batch = make_batch(loss, ((1, 0),))
    logps_R, _ = random_logps(batch)
    assert len(logps_R) == 1
    assert float(train_step._drift(logps_R, logps_R + 0.25, batch, loss)) == pytest.approx(0.4 * 0.25)


@pytest.mark.parametrize("objective", ["all_pairs", "nca"])
def test_the_plan_of_a_loss_is_made_once_a_step(monkeypatch: pytest.MonkeyPatch, objective: str):
    """It asks the host, which a pass of many microbatches must not wait for."""
    loss = options(objective)
    batch = make_batch(loss)
    logps_R, ref_logps_R = random_logps(batch)
    made = []

    def counted(*args: object) -> object:
        made.append(args)
        return plan_loss(*args)  # type: ignore[arg-type]

    for module in (train_step, coefficients):
        monkeypatch.setattr(module, "plan_loss", counted)
    accumulate_gradient(TableEngine(logps_R), MICROBATCHES, batch, ref_logps_R, loss)
    assert len(made) == 1


def test_each_part_of_a_step_is_timed_by_its_name(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(TableEngine):
        def score(self, *args: Any) -> Tensor | None:
            now[0] += 1
            return super().score(*args)

        def backward(self, *args: Any) -> Tensor | None:
            now[0] += 2
            return super().backward(*args)

    def slow_loss(*args: Any, **options: Any) -> object:
        now[0] += 4
        return group_loss(*args, **options)

    monkeypatch.setattr(train_step, "group_loss", slow_loss)
    for objective, has_output_layer, wanted in (
        ("all_pairs", True, {"scoring": 1, "coefficients": 4, "backward": 2}),
        ("all_pairs", False, {"scoring": 1, "backward": 2}),
        ("nca", False, {"backward": 2}),
    ):
        loss = options(objective)
        batch = make_batch(loss)
        logps_R, ref_logps_R = random_logps(batch)
        timers = StepTimers(torch.device("cpu"))
        engine = Slow(logps_R, has_output_layer=has_output_layer)
        accumulate_gradient(engine, MICROBATCHES, batch, ref_logps_R, loss, timers=timers)
        assert timers.read() == {f"time/{part}_ms": 1000 * seconds for part, seconds in wanted.items()}
