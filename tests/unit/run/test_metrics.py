"""Metrics against values worked out by hand and response by response; what a cut into batches must not change."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics_oracle import Scored, all_pairs_phi, dpo_phi, expected_held_out, expected_metrics

from megatron_groupdpo import objectives
from megatron_groupdpo.data.batches.batch import build_batch
from megatron_groupdpo.run.logs.metrics import METRICS, HeldOutMetrics, batch_metrics
from megatron_groupdpo.step.coefficients import LossOptions, group_loss
from megatron_groupdpo.types import GroupBatch, GroupSample

Group = Sequence[Scored]
PHI = {"all_pairs": all_pairs_phi, "dpo": dpo_phi}


def options(objective: str = "all_pairs", **changes: object) -> LossOptions:
    defaults: dict[str, object] = {
        "beta": 0.5,
        "score_average": False,
        "nll_coeff": 2.0,
        "nll_average": "response",
        "one_sided_nll": False,
    }
    return LossOptions(objective=objective, **(defaults | changes))  # type: ignore[arg-type]


def batch_of(groups: Sequence[Group], loss: LossOptions, *, every_response: bool = False) -> GroupBatch:
    """The batch a run would make: passes for what the loss reads, or for all."""
    samples, first = [], 0
    for group_id, group in enumerate(groups):
        samples.append(
            GroupSample(
                group_id=group_id,
                first_response_id=first,
                prompt_tokens=np.zeros(1, dtype=np.int32),
                response_tokens=tuple(np.full(one.tokens, first + k, dtype=np.int32) for k, one in enumerate(group)),
                response_masks=(None,) * len(group),
                labels_K=np.array([one.label for one in group], dtype=np.int8),
                values_K=np.array([one.value for one in group], dtype=np.float32),
            )
        )
        first += len(group)

    def needs_pass(given: dict[str, torch.Tensor]) -> torch.Tensor:
        every_GK = given["labels_GK"] != 0
        return every_GK if every_response else objectives.used_responses(loss.objective, **given)

    return build_batch(samples, group_keys_G=torch.arange(len(samples)), needs_pass=needs_pass)


def logps_of(groups: Sequence[Group], batch: GroupBatch) -> tuple[torch.Tensor, torch.Tensor]:
    responses = [one for group in groups for one in group]
    chosen = [responses[i] for i in batch.response_ids_R.tolist()]
    return tuple(torch.tensor(v, dtype=torch.float64) for v in zip(*((o.logp, o.ref_logp) for o in chosen)))  # type: ignore[return-value]


def training(groups: Sequence[Group], loss: LossOptions) -> dict[str, float]:
    batch = batch_of(groups, loss)
    logps_R, ref_R = logps_of(groups, batch)
    return batch_metrics(batch, group_loss(logps_R, ref_R, batch, loss), logps_R, ref_R, loss)


def held_out(groups: Sequence[Group], loss: LossOptions, sizes: Sequence[int]) -> dict[str, float]:
    """As a validation adds them up, in batches of these sizes."""
    metrics, start = HeldOutMetrics(loss), 0
    for size in sizes:
        own = groups[start : start + size]
        batch = batch_of(own, loss, every_response=True)
        logps_R, ref_R = logps_of(own, batch)
        arrays = {name: getattr(batch, name) for name in ("labels_GK", "values_GK", "tie_keys_GK", "group_keys_G")}
        trained_GK = objectives.used_responses(loss.objective, **arrays)
        metrics.add(batch, group_loss(logps_R, ref_R, batch, loss), logps_R, ref_R, trained_GK)
        start += size
    assert start == len(groups)
    return metrics.values()


# Two groups with both sides, one without a negative. Scores are beta x (logp - ref): 1, 0, 3; 0, -1, 0.
BY_HAND: list[list[Scored]] = [
    [Scored(1, 2.0, -4.0, -6.0, 4), Scored(-1, 1.0, -6.0, -6.0, 4), Scored(-1, 0.0, -2.0, -8.0, 4)],
    [Scored(1, 3.0, -5.0, -5.0, 2), Scored(1, 2.0, -9.0, -7.0, 2), Scored(-1, 1.0, -8.0, -8.0, 8)],
    [Scored(1, 2.0, -1.0, -1.0, 1, trained=False), Scored(1, 1.0, -1.0, -3.0, 1, trained=False)],
]


def test_metrics_of_a_batch_worked_out_by_hand():
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
        # Group 0: the best is a negative. Group 1: a positive and a negative tie for the best.
        "group/top1_accuracy": (0.0 + 0.5) / 2,
        "group/groups": 3.0,
        "group/active": 2.0,
        "group/one_sided_rate": 1 / 3,
        "group/responses": 6.0,
        "group/mean_response_tokens": 4.0,
        "group/logp_minus_ref": (2.0 + 0.0 + 6.0 + 0.0 - 2.0 + 0.0) / 6,
    }
    found = training(BY_HAND, options())
    assert found == pytest.approx(wanted, rel=1e-12)
    assert expected_metrics(BY_HAND, phi=all_pairs_phi, beta=0.5, nll_coeff=2.0) == pytest.approx(wanted, rel=1e-12)


def test_a_metric_without_a_term_is_left_out():
    only_positives = [[Scored(1, 1.0, -4.0, 0.0, 4)], [Scored(1, 1.0, -6.0, 0.0, 2)]]
    metrics = training(only_positives, options("sft"))
    assert metrics["rewards/chosen"] == -2.5
    for name in ("rewards/rejected", "logps/rejected", "rewards/accuracies", "rewards/margins", "group/top1_accuracy"):
        assert name not in metrics
    assert "group/logp_minus_ref" not in metrics, "without a reference there is nothing to be minus"
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("sides", [(1, 1), (2, 3)])
def test_equal_scores_say_nothing_whatever_their_columns(sides: tuple[int, int]):
    """Step 0: policy and reference are one model, log-probabilities differ by fp32 rounding. Chosen come first."""
    num_good, num_bad = sides
    noise = np.random.default_rng(0).uniform(-1, 1, size=num_good + num_bad) * 5e-7 * 400
    group = [
        Scored(1 if k < num_good else -1, float(-k), -400.0 - k + float(noise[k]), -400.0 - k, 100)
        for k in range(num_good + num_bad)
    ]
    for own in (group, group[::-1]):
        metrics = training([own], options(beta=0.1))
        assert metrics["rewards/accuracies"] == 0.5
        assert metrics["group/top1_accuracy"] == pytest.approx(num_good / (num_good + num_bad), rel=1e-12)


def test_scores_a_thousandth_apart_are_no_tie():
    """The band is rounding's size: a small preference, or a small beta, is an order all the same."""
    right = [Scored(1, 1.0, -5.0, -5.002, 4), Scored(-1, 0.0, -5.0, -5.0, 4)]
    assert training([right], options(nll_coeff=0.0))["rewards/accuracies"] == 1.0
    assert training([right], options(nll_coeff=0.0))["group/top1_accuracy"] == 1.0
    wrong = [replace(right[0], ref_logp=-4.998), right[1]]
    assert training([wrong], options(nll_coeff=0.0))["rewards/accuracies"] == 0.0
    assert training([wrong], options(nll_coeff=0.0))["group/top1_accuracy"] == 0.0


def random_groups(seed: int, count: int, *, below: float) -> list[list[Scored]]:
    """Groups of 1 to 6 responses, some one-sided; all scores are below ``below``, so 0 in a padding cell is largest."""
    draw = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        size = int(draw.integers(1, 7))
        group = []
        for k in range(size):
            tokens, logp = int(draw.integers(1, 30)), -float(draw.uniform(1.0, 90.0))
            ref = logp - below + float(draw.uniform(0.1, 8.0))
            group.append(Scored(int(draw.choice((1, -1))), float(k) + float(draw.uniform(0, 0.5)), logp, ref, tokens))
        groups.append(group)
    return groups


def marked(groups: Sequence[Group], objective: str) -> list[list[Scored]]:
    """Which responses the loss reads, found apart from the package."""
    found = []
    for group in groups:
        good, bad = [o for o in group if o.label > 0], [o for o in group if o.label < 0]
        read = set(group) if good and bad else set()
        if read and objective == "dpo":
            read = {max(good, key=lambda o: o.value), min(bad, key=lambda o: o.value)}
        found.append([replace(one, trained=one in read) for one in group])
    return found


CASES = [
    ("all_pairs", {}),
    ("all_pairs", {"score_average": True, "nll_average": "batch-tokens"}),
    ("dpo", {"nll_average": "sum"}),
    ("dpo", {"nll_average": "batch-tokens", "beta": 0.05}),
]


@pytest.mark.parametrize(("objective", "changes"), CASES, ids=["pairs", "averages", "dpo-sum", "dpo-tokens"])
@pytest.mark.parametrize("seed", range(4))
def test_every_step_equals_the_plain_sums_with_padding_larger_than_any_score(objective: str, changes: dict, seed: int):
    loss = options(objective, **changes)
    groups = marked(random_groups(seed, 9, below=0.0), objective)
    given = {"phi": PHI[objective], "beta": loss.beta, "nll_coeff": loss.nll_coeff, "nll_average": loss.nll_average}
    wanted = expected_metrics(groups, **given, score_average=loss.score_average)
    assert training(groups, loss) == pytest.approx(wanted, rel=1e-10, abs=1e-12)
    assert wanted["rewards/chosen"] < 0, "or padding would not be the largest"
    validation = expected_held_out(groups, **given, score_average=loss.score_average)
    assert held_out(groups, loss, (9,)) == pytest.approx(validation, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("objective", "changes"), CASES, ids=["pairs", "averages", "dpo-sum", "dpo-tokens"])
def test_a_validation_does_not_depend_on_how_its_groups_are_cut(objective: str, changes: dict):
    loss = options(objective, **changes)
    groups = random_groups(11, 11, below=3.0)
    whole = held_out(groups, loss, (11,))
    for sizes in ((1,) * 11, (2, 2, 2, 2, 2, 1), (3, 3, 3, 2), (5, 5, 1), (10, 1), (1, 10)):
        assert held_out(groups, loss, sizes) == pytest.approx(whole, rel=1e-12), sizes


def test_held_out_metrics_of_responses_are_alike_for_every_objective():
    groups = random_groups(5, 8, below=2.0)
    alike = [name for name, metric in METRICS.items() if metric.of_responses]
    whole = [held_out(groups, options(objective), (3, 5)) for objective in ("all_pairs", "dpo", "nca", "mpo")]
    for metrics in whole[1:]:
        assert {n: metrics[f"eval/{n}"] for n in alike} == {n: whole[0][f"eval/{n}"] for n in alike}
    dpo = whole[1]
    assert dpo["eval/trained/group/responses"] == 2 * dpo["eval/group/active"] < dpo["eval/group/responses"]


def test_where_all_responses_are_trained_nothing_is_said_twice():
    groups = [group for group in random_groups(2, 12, below=1.0) if len({one.label for one in group}) == 2]
    assert len(groups) > 3
    metrics = held_out(groups, options("mpo"), (len(groups),))
    assert not [name for name in metrics if "trained" in name]
    wanted = metrics["eval/preference_loss"] + 2.0 * metrics["eval/nll_loss"]
    assert metrics["eval/loss"] == pytest.approx(wanted, rel=1e-12)


def test_the_documented_table_is_the_registry():
    """docs/logs.md names numerator and denominator of every metric, as they are declared."""
    text = (Path(__file__).parents[3] / "docs" / "logs.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z0-9_/]+)` \| (.+) \|$", text, re.MULTILINE))
    for name, metric in METRICS.items():
        assert rows[name] == f"{metric.numerator} | {metric.denominator or 'not divided'}", name
