"""Metrics of a batch worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_groupdpo.run.logs.metrics import batch_metrics
from megatron_groupdpo.step.coefficients import GroupLoss, LossOptions, group_loss
from megatron_groupdpo.types import GroupBatch, ResponseRow

# Two groups with both sides, one without a negative. Scores are beta x (logp - ref) with beta 0.5.
LABELS_GK = torch.tensor([[1, -1, -1], [1, 1, -1], [1, 1, 0]], dtype=torch.int8)
FLAT_GK = torch.tensor([[0, 1, 2], [3, 4, 5], [-1, -1, -1]])
LOGPS_R = torch.tensor([-4.0, -6.0, -2.0, -5.0, -9.0, -8.0], dtype=torch.float64)
REF_R = torch.tensor([-6.0, -6.0, -8.0, -5.0, -7.0, -8.0], dtype=torch.float64)
SCORES_R = [1.0, 0.0, 3.0, 0.0, -1.0, 0.0]


@pytest.fixture
def batch() -> GroupBatch:
    import numpy as np

    lengths = [4, 4, 4, 2, 2, 8]
    rows = tuple(
        ResponseRow(index=r, tokens_S=np.zeros(n + 1, dtype=np.int32), target_positions_T=np.arange(1, n + 1))
        for r, n in enumerate(lengths)
    )
    return GroupBatch(
        rows=rows,
        flat_index_GK=FLAT_GK,
        labels_GK=LABELS_GK,
        values_GK=torch.full(LABELS_GK.shape, math.nan, dtype=torch.float64),
        tie_keys_GK=torch.zeros(LABELS_GK.shape, dtype=torch.int64),
        group_keys_G=torch.zeros(3, dtype=torch.int64),
        response_ids_R=torch.arange(6),
        num_tokens_R=torch.tensor(lengths),
    )


def loss_of(batch: GroupBatch) -> GroupLoss:
    options = LossOptions(
        objective="all_pairs",
        beta=0.5,
        score_average=False,
        nll_coeff=2.0,
        nll_average="response",
        one_sided_nll=False,
    )
    return group_loss(LOGPS_R, REF_R, batch, options)


def test_metrics_of_a_batch_worked_out_by_hand(batch: GroupBatch):
    result = loss_of(batch)
    assert result.scores_R.tolist() == SCORES_R
    metrics = batch_metrics(batch, result, LOGPS_R, REF_R)

    def pair(gap: float) -> float:
        return math.log1p(math.exp(-gap))

    preference = ((pair(1.0) + pair(-2.0)) / 2 + (pair(0.0) + pair(-1.0)) / 2) / 2
    nll = (4.0 / 4 + (5.0 / 2 + 9.0 / 2) / 2) / 2
    wanted = {
        "loss": preference + 2.0 * nll,
        "preference_loss": preference,
        "nll_loss": nll,
        "rewards/chosen": (1.0 + 0.0 - 1.0) / 3,
        "rewards/rejected": (0.0 + 3.0 + 0.0) / 3,
        "logps/chosen": (-4.0 - 5.0 - 9.0) / 3,
        "logps/rejected": (-6.0 - 2.0 - 8.0) / 3,
        # Group 0: one of two pairs right. Group 1: a tie counts half, the other pair is wrong.
        "rewards/accuracies": (0.5 + 0.25) / 2,
        "rewards/margins": ((1.0 - 1.5) + (-0.5 - 0.0)) / 2,
        # Group 0: the best is a negative. Group 1: a positive ties for the best and comes first.
        "group/top1_accuracy": 0.5,
        "group/active": 2.0,
        "group/one_sided_rate": 1 / 3,
        "group/responses": 6.0,
        "group/mean_response_tokens": 4.0,
        "group/logp_minus_ref": float((LOGPS_R - REF_R).mean()),
    }
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, rel=1e-12), name
    assert set(metrics) == set(wanted)


def test_a_metric_without_a_term_is_left_out(batch: GroupBatch):
    import dataclasses

    only_positives = dataclasses.replace(
        batch, labels_GK=LABELS_GK.abs(), flat_index_GK=FLAT_GK.masked_fill(LABELS_GK < 0, -1), rows=batch.rows
    )
    metrics = batch_metrics(only_positives, loss_of(only_positives), LOGPS_R, torch.zeros_like(REF_R))
    assert "rewards/chosen" in metrics
    for name in ("rewards/rejected", "logps/rejected", "rewards/accuracies", "rewards/margins", "group/top1_accuracy"):
        assert name not in metrics
    assert "group/logp_minus_ref" not in metrics, "without a reference there is nothing to be minus"
    assert all(math.isfinite(value) for value in metrics.values())
