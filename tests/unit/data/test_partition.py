"""The laws of splitting a group into positives and negatives."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_groupdpo.data.preprocess.partition import (
    Partition,
    Sides,
    cap_sides,
    distinct_responses,
    is_one_sided,
    partition_group,
    topk_sizes,
)
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


@pytest.mark.acts("Partition.rule", "Partition.positives", "Partition.negatives")
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


@pytest.mark.acts("Partition.threshold")
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


texts = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3)), min_size=2, max_size=12)


def responses_of(pairs, *, labels: bool = False) -> list[ResponseRecord]:
    """(text, number) pairs as responses; the number is the value, or its parity the label."""
    return [
        ResponseRecord(text=t, label=1 if n % 2 else -1) if labels else ResponseRecord(text=t, value=float(n))
        for t, n in pairs
    ]


def chosen(responses, sides: Sides) -> dict[str, int]:
    return {responses[i].text: label for i, label in zip(sides.kept, sides.labels)}


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_best_worst_is_one_best_against_one_worst_in_any_order(values, random):
    responses = [ResponseRecord(text=f"t{i}", value=float(v)) for i, v in enumerate(values)]
    sides = partition_group(record(responses), Partition(rule="best-worst"))
    assert len(sides.kept) + sides.num_ties + sides.num_middle == len(values)
    if min(values) == max(values):
        assert sides == Sides(kept=(), labels=(), num_ties=len(values))
        return
    best, worst = sides_of(values, sides)
    assert (best, worst) == ([max(values)], [min(values)])
    assert sides.num_ties == sum(v in (min(values), max(values)) for v in values) - 2
    shuffled = random.sample(responses, len(responses))
    again = partition_group(record(shuffled), Partition(rule="best-worst"))
    assert chosen(shuffled, again) == chosen(responses, sides)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.integers(0, 99), st.randoms(use_true_random=False))
def test_a_random_pair_is_better_against_worse_in_any_order(values, seed, random):
    responses = [ResponseRecord(text=f"t{i}", value=float(v)) for i, v in enumerate(values)]
    options = Partition(rule="random-pair", seed=seed)
    sides = partition_group(record(responses), options)
    if min(values) == max(values):
        assert sides == Sides(kept=(), labels=(), num_ties=len(values))
        return
    (best,), (worst,) = sides_of(values, sides)
    assert best > worst
    assert sides.num_not_drawn == len(values) - 2
    shuffled = random.sample(responses, len(responses))
    assert chosen(shuffled, partition_group(record(shuffled), options)) == chosen(responses, sides)


@pytest.mark.acts("Partition.seed")
def test_a_random_pair_is_drawn_evenly_from_the_pairs_that_differ():
    responses = [ResponseRecord(text=f"t{i}", value=v) for i, v in enumerate([0.0, 0.0, 1.0, 2.0])]
    draws = Counter(
        tuple(partition_group(record(responses), Partition(rule="random-pair", seed=seed)).kept) for seed in range(2000)
    )
    assert set(draws) == {(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)}
    assert all(330 < count < 470 for count in draws.values())  # 400 expected, 3.9 standard deviations
    prompts = [GroupRecord(prompt=f"p{i}", responses=tuple(responses), where="f:1") for i in range(50)]
    assert len({partition_group(group, Partition(rule="random-pair")).kept for group in prompts}) == 5


def test_a_random_pair_goes_by_labels_where_there_are_no_values():
    responses = [ResponseRecord(text=f"t{i}", label=label) for i, label in enumerate([1, -1, 1, -1, -1])]
    drawn = {partition_group(record(responses), Partition(rule="random-pair", seed=s)).kept for s in range(200)}
    assert drawn == {(0, 1), (0, 3), (0, 4), (1, 2), (2, 3), (2, 4)}
    one_sided = partition_group(record(responses[:1] * 2), Partition(rule="random-pair"))
    assert is_one_sided(one_sided.labels)
    with pytest.raises(DataError, match="random-pair needs a value or a label"):
        partition_group(record([ResponseRecord(text="t")] * 2), Partition(rule="random-pair"))


@given(texts)
def test_of_equal_responses_the_first_stays_with_the_mean_of_their_values(pairs):
    distinct = distinct_responses(responses_of(pairs), Partition(rule="mean"))
    expected = {}
    for text, value in pairs:
        expected.setdefault(text, []).append(value)
    assert [r.text for r in distinct.responses] == list(expected)
    assert [r.value for r in distinct.responses] == [sum(v) / len(v) for v in expected.values()]
    assert distinct.num_copies == len(pairs) - len(expected)
    assert distinct.num_contradictory == 0


@given(texts)
def test_equal_responses_with_both_labels_leave_none(pairs):
    distinct = distinct_responses(responses_of(pairs, labels=True), Partition())
    expected = {}
    for text, value in pairs:
        expected.setdefault(text, []).append(value % 2)
    assert [r.text for r in distinct.responses] == [t for t, labels in expected.items() if len(set(labels)) == 1]
    assert distinct.num_contradictory == sum(len(labels) for labels in expected.values() if len(set(labels)) == 2)
    assert len(distinct.responses) + distinct.num_copies + distinct.num_contradictory == len(pairs)


most = st.none() | st.integers(1, 5)


@pytest.mark.acts("Partition.max_positives", "Partition.max_negatives", "Partition.max_responses")
@given(few_values, st.booleans(), most, most, st.none() | st.integers(2, 7))
def test_caps_keep_the_best_positives_and_the_worst_negatives(values, has_values, positives, negatives, in_all):
    options = Partition(rule="mean", max_positives=positives, max_negatives=negatives, max_responses=in_all)
    responses = [ResponseRecord(text=str(i), value=v if has_values else None) for i, v in enumerate(values)]
    before = split(values, rule="mean")
    after, num_dropped = cap_sides(responses, before, options)
    assert len(before.kept) == len(after.kept) + num_dropped
    full = dict(zip(before.kept, before.labels))
    assert dict(zip(after.kept, after.labels)).items() <= full.items()
    sizes = [after.labels.count(side) for side in (1, -1)]
    uncapped = [min(before.labels.count(s), most or 99) for s, most in ((1, positives), (-1, negatives))]
    assert sum(sizes) == min(sum(uncapped), in_all or 99)
    assert all(size > 0 for size, whole in zip(sizes, uncapped) if whole)
    if sizes != uncapped:  # only max_responses makes them smaller: the larger side by far gives more
        assert abs(sizes[0] - sizes[1]) <= 1 or sizes[sizes.index(min(sizes))] == uncapped[sizes.index(min(sizes))]
    for sign in (1, -1):
        kept = [i for i in after.kept if full[i] == sign]
        dropped = [i for i in full if full[i] == sign and i not in after.kept]
        for i in kept:
            for j in dropped:
                better = sign * (values[i] - values[j]) if has_values else 0
                assert better > 0 or (better == 0 and i < j)


@pytest.mark.parametrize(
    "options",
    [
        {"max_positives": 0},
        {"max_negatives": -1},
        {"max_responses": 1},
        {"duplicates": "merge"},
        {"rule": "mean", "seed": 3},
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
