"""The laws of splitting a group into positives and negatives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_groupdpo.data.partition import Partition, Sides, is_one_sided, partition_group, topk_sizes
from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import GroupRecord, ResponseRecord

few_values = st.lists(st.integers(0, 6).map(float), min_size=2, max_size=20)
sizes = st.integers(1, 9)


def record(responses) -> GroupRecord:
    return GroupRecord(prompt="p", responses=tuple(responses), where="f:1")


def split(values, **options) -> Sides:
    return partition_group(record([ResponseRecord(text="t", value=v) for v in values]), Partition(**options))


def sides_of(values, sides: Sides) -> tuple[list[float], list[float]]:
    chosen = dict(zip(sides.kept, sides.labels))
    return [values[i] for i in chosen if chosen[i] == 1], [values[i] for i in chosen if chosen[i] == -1]


@given(few_values, sizes, sizes)
def test_topk_is_best_against_worst_and_every_response_is_accounted_for(values, positives, negatives):
    sides = split(values, rule="topk", positives=positives, negatives=negatives)
    best, worst = sides_of(values, sides)
    most_positives, most_negatives = topk_sizes(len(values), positives, negatives)
    assert len(best) <= most_positives
    assert len(worst) <= most_negatives
    assert len(sides.kept) + sides.num_ties + sides.num_middle == len(values)
    dropped = [values[i] for i in range(len(values)) if i not in sides.kept]
    assert all(value > other for value in best for other in [*dropped, *worst])
    assert all(value < other for value in worst for other in [*dropped, *best])
    if len(set(values)) == len(values):
        assert (len(best), len(worst), sides.num_ties) == (most_positives, most_negatives, 0)


@given(few_values, sizes, sizes, st.randoms(use_true_random=False))
def test_topk_does_not_depend_on_the_order_of_the_file(values, positives, negatives, random):
    shuffled = random.sample(values, len(values))
    options = {"rule": "topk", "positives": positives, "negatives": negatives}
    first, second = sides_of(values, split(values, **options)), sides_of(shuffled, split(shuffled, **options))
    assert [sorted(side) for side in first] == [sorted(side) for side in second]


def test_topk_drops_and_counts_what_ties_at_a_boundary():
    sides = split([5, 4, 4, 3, 1, 1, 0], rule="topk", positives=2, negatives=2)
    assert sides == Sides(kept=(0, 6), labels=(1, -1), num_ties=4, num_middle=1)


@pytest.mark.parametrize(
    ("num_responses", "expected"), [(16, (8, 8)), (20, (8, 8)), (4, (2, 2)), (3, (1, 1)), (2, (1, 1))]
)
def test_topk_divides_a_small_group_in_the_same_ratio(num_responses, expected):
    assert topk_sizes(num_responses, 8, 8) == expected


@given(few_values, st.integers(0, 6).map(float))
def test_threshold_keeps_all_and_counts_the_threshold_as_positive(values, threshold):
    sides = split(values, rule="threshold", threshold=threshold)
    assert sides.kept == tuple(range(len(values)))
    assert [label == 1 for label in sides.labels] == [value >= threshold for value in values]


@given(few_values)
def test_mean_drops_what_equals_it(values):
    sides = split(values, rule="mean")
    best, worst = sides_of(values, sides)
    mean = sum(values) / len(values)
    assert all(value > mean for value in best)
    assert all(value < mean for value in worst)
    assert sides.num_ties == sum(value == mean for value in values)


def test_mean_of_equal_values_is_no_boundary():
    assert split([0.1] * 3, rule="mean") == Sides(kept=(), labels=(), num_ties=3)


@given(few_values)
def test_rank_is_every_best_response_against_the_rest(values):
    best, worst = sides_of(values, split(values, rule="rank"))
    assert set(best) == {max(values)}
    assert len(best) + len(worst) == len(values)
    assert is_one_sided([1] * len(best) + [-1] * len(worst)) == (len(set(values)) == 1)


def test_label_follows_the_data():
    responses = [ResponseRecord(text="t", label=label) for label in (1, -1, 1)]
    assert partition_group(record(responses), Partition()) == Sides(kept=(0, 1, 2), labels=(1, -1, 1))


def test_a_rule_without_what_it_needs_names_the_record():
    with pytest.raises(DataError, match=r"^f:1: --partition label needs a label"):
        split([1.0, 2.0])
    unscored = [ResponseRecord(text="t", label=1), ResponseRecord(text="u", label=-1)]
    with pytest.raises(DataError, match=r"^f:1: --partition rank needs a value"):
        partition_group(record(unscored), Partition(rule="rank"))


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "top"},
        {"rule": "topk", "positives": 8},
        {"rule": "topk", "positives": 0, "negatives": 1},
        {"rule": "rank", "positives": 8},
        {"rule": "threshold"},
        {"rule": "threshold", "threshold": float("nan")},
        {"rule": "label", "threshold": 0.5},
        {"one_sided": "maybe"},
    ],
)
def test_contradicting_options_are_refused(options):
    with pytest.raises(ConfigError, match="--"):
        Partition(**options)
