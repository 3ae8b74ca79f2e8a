"""The losses that a run logs are those written out, group by group, with the options it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from objective_oracle import ORACLES, smoothed
from one_rank import OneRank, made_up_reference

from megatron_groupdpo.run.batches import PlannedBatch
from megatron_groupdpo.run.parts import Run

ALL = 9
"""The groups of the store are one batch."""
FREE = {"reference": "none", "reference_logprobs": None}
ALONE = {"nll_coeff": 0.0}
# changes, and the oracle's keywords
PREFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all_pairs": ({"beta": 0.7}, {}),
    "all_pairs, averaged": ({"score_average": True, "beta": 2.0}, {}),
    "all_pairs, smoothed": ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "softmax": ({"objective": "softmax"}, {}),
    "dpo, smoothed": ({"objective": "dpo", "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "margin, smoothed": ({"objective": "margin", "label_smoothing": 0.3}, {"label_smoothing": 0.3}),
    "weighted_mpo": ({"objective": "weighted_mpo", "weight_exponent": 2.5}, {"weight_exponent": 2.5}),
    "lipo_lambda, scaled": ({"objective": "lipo_lambda"}, {}),
    "lipo_lambda, as given": ({"objective": "lipo_lambda", "psi_scaling": "given"}, {"psi_scaling": "given"}),
    "info_nca": ({"objective": "info_nca", "value_temperature": 0.2}, {"value_temperature": 0.2}),
    "nca": ({"objective": "nca", "value_temperature": 3.0}, {"value_temperature": 3.0}),
    "ipo_pairs": ({"objective": "ipo_pairs", "beta": 0.3}, {"beta": 0.3}),
    "simpo_pairs": (
        {"objective": "simpo_pairs", "simpo_gamma": 1.5, "score_average": True, **FREE},
        {"simpo_gamma": 1.5},
    ),
    "simpo_pairs, smoothed": (
        {"objective": "simpo_pairs", "label_smoothing": 0.25, "score_average": True, **FREE},
        {"label_smoothing": 0.25},
    ),
}


@pytest.mark.acts(
    "ObjectiveConfig.objective",
    "ObjectiveConfig.beta",
    "ObjectiveConfig.score_average",
    "ObjectiveConfig.reference",
    "ObjectiveConfig.reference_logprobs",
    "ObjectiveConfig.label_smoothing",
    "ObjectiveConfig.weight_exponent",
    "ObjectiveConfig.psi_scaling",
    "ObjectiveConfig.value_temperature",
    "ObjectiveConfig.simpo_gamma",
    "LossOptions.objective",
    "LossOptions.beta",
    "LossOptions.score_average",
    "LossOptions.hyperparameters",
    "PairwiseHyperparameters.label_smoothing",
    "WeightedMpoHyperparameters.weight_exponent",
    "LipoLambdaHyperparameters.psi_scaling",
    "ValueSoftmaxHyperparameters.value_temperature",
    "IpoPairsHyperparameters.beta",
    "SimpoPairsHyperparameters.simpo_gamma",
)
@pytest.mark.parametrize(("changes", "keywords"), PREFERENCES.values(), ids=PREFERENCES)
def test_the_preference_loss_of_a_run_is_the_one_written_out(
    one: OneRank, folder: Path, changes: dict[str, Any], keywords: dict[str, Any]
):
    given = changes | ALONE
    done = one.train(folder, train_iters=1, global_batch_size=ALL, **given)
    oracle, terms = ORACLES[given.get("objective", "all_pairs")], []
    for group in groups_of(*start(one, given), beta=given.get("beta", 0.5), average=given.get("score_average", False)):
        has_term = len(set(group.values)) > 1 if "nca" in oracle.__name__ or "lipo" in oracle.__name__ else True
        if has_term and (-1 in group.labels or "nca" in oracle.__name__ or "lipo" in oracle.__name__):
            terms.append(oracle(group.scores, group.labels, group.values, [0] * len(group.labels), **keywords))
    assert done.of("preference_loss") == pytest.approx([sum(terms) / len(terms)], rel=1e-5)
    assert done.of("loss") == done.of("preference_loss")


@pytest.mark.acts("ObjectiveConfig.pair_selection", "DpoHyperparameters.pair_selection")
def test_a_random_pair_is_not_always_the_best_and_the_worst(one: OneRank, folder: Path):
    """Its loss is that of the two responses of each group that get a pass."""
    taken = {}
    for selection in ("best_worst", "random"):
        given = {"objective": "dpo", "pair_selection": selection, **ALONE}
        done = one.train(folder / selection, train_iters=1, global_batch_size=ALL, **given)
        run, planned, logps = start(one, given)
        taken[selection] = set(logps)
        terms = []
        for group in groups_of(run, planned, logps, beta=0.5, average=False):
            pair = [(label, score) for label, score in zip(group.labels, group.scores) if score is not None]
            if pair:
                (better,), (worse,) = ([s for y, s in pair if y == side] for side in (1, -1))
                terms.append(smoothed(better - worse, 0.0))
        assert len(terms) == 7, "two of the groups have positives alone"
        assert done.of("preference_loss") == pytest.approx([sum(terms) / len(terms)], rel=1e-5)
    assert taken["best_worst"] != taken["random"]


@pytest.mark.acts(
    "ObjectiveConfig.nll_coeff",
    "ObjectiveConfig.nll_average",
    "ObjectiveConfig.one_sided_nll",
    "LossOptions.nll_coeff",
    "LossOptions.nll_average",
    "LossOptions.one_sided_nll",
)
@pytest.mark.parametrize("average", ["sum", "response", "batch-tokens"])
@pytest.mark.parametrize("one_sided", [False, True])
def test_the_nll_of_a_run_is_the_one_written_out(one: OneRank, folder: Path, average: str, one_sided: bool):
    given = {"nll_coeff": 0.3, "nll_average": average, "one_sided_nll": one_sided}
    done = one.train(folder, train_iters=1, global_batch_size=ALL, **given)
    found, tokens = [], 0
    for group in groups_of(*start(one, given), beta=0.5, average=False):
        if -1 in group.labels or one_sided:
            good = [k for k, label in enumerate(group.labels) if label == 1]
            own = [-group.logps[k] / (group.lengths[k] if average == "response" else 1) for k in good]
            found.append(sum(own) if average == "batch-tokens" else sum(own) / len(own))
            tokens += sum(group.lengths[k] for k in good)
    nll = sum(found) / (tokens if average == "batch-tokens" else len(found))
    (line,) = done.lines
    assert line["nll_loss"] == pytest.approx(nll, rel=1e-5)
    assert line["loss"] == pytest.approx(line["preference_loss"] + 0.3 * nll, rel=1e-5)


class _Group:
    """One group's numbers, None where a response has no pass."""

    def __init__(self, labels: list[int], values: list[float], logps: list[Any], lengths: list[int]) -> None:
        self.labels, self.values, self.logps, self.lengths = labels, values, logps, lengths
        self.scores: list[Any] = []


def start(one: OneRank, given: dict[str, Any]) -> tuple[Run, PlannedBatch, dict[int, float]]:
    """The run as it starts, its first batch, and the policy's log-probabilities by response."""
    run = one.build(global_batch_size=ALL, **given)
    planned = run.train.batch(0, ALL)
    logps_R = run.policy.engine.score(planned.microbatches, planned.batch.num_responses)
    assert logps_R is not None
    return run, planned, dict(zip(planned.batch.response_ids_R.tolist(), logps_R.tolist()))


def groups_of(run: Run, planned: PlannedBatch, logps: dict[int, float], *, beta: float, average: bool) -> list[_Group]:
    store = run.train.dataset.stores[0]
    free = run.config.objective.reference == "none"
    reference = made_up_reference(store, 0) * (not free)
    found = []
    for group_id in planned.group_ids:
        sample = store[group_id]
        ids = range(sample.first_response_id, sample.first_response_id + len(sample.labels_K))
        lengths = [len(tokens) for tokens in sample.response_tokens]
        group = _Group(sample.labels_K.tolist(), sample.values_K.tolist(), [logps.get(i) for i in ids], lengths)
        for i, logp, length in zip(ids, group.logps, lengths):
            group.scores.append(None if logp is None else beta * (logp - reference[i]) / (length if average else 1))
        found.append(group)
    return found
