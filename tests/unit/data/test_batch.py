"""From groups to the global batch: which responses get a pass, and in which flat order."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupdpo.data.batches.batch import build_batch
from megatron_groupdpo.types import GroupBatch, GroupSample

groups_of_responses = st.lists(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, -1]), st.booleans()), min_size=1, max_size=5),
    min_size=1,
    max_size=6,
)
"""Per group and response: number of tokens, label, whether it gets a pass."""


def make(groups: list[list[tuple[int, int, bool]]]) -> tuple[list[GroupSample], GroupBatch]:
    samples, first = [], 0
    for group_id, group in enumerate(groups):
        samples.append(
            GroupSample(
                group_id=group_id,
                first_response_id=first,
                prompt_tokens=np.array([group_id, 7], dtype=np.int32),
                response_tokens=tuple(
                    np.full(length, 10 * group_id + k, dtype=np.int32) for k, (length, _, _) in enumerate(group)
                ),
                response_masks=(None,) * len(group),
                labels_K=np.array([label for _, label, _ in group], dtype=np.int8),
                values_K=np.arange(len(group), dtype=np.float32),
            )
        )
        first += len(group)
    width = max(len(group) for group in groups)
    wanted_GK = torch.tensor(
        # True in the padding cells: they must get no pass even when the objective asks for all.
        [[*(wants for _, _, wants in group), *[True] * (width - len(group))] for group in groups]
    )
    return samples, build_batch(samples, group_keys_G=torch.arange(len(groups)), needs_pass=lambda _: wanted_GK)


@settings(deadline=None)
@given(groups_of_responses)
def test_a_response_gets_a_row_exactly_when_it_needs_a_pass(groups: list[list[tuple[int, int, bool]]]):
    samples, batch = make(groups)
    wanted = [(g, k) for g, group in enumerate(groups) for k, (_, _, wants) in enumerate(group) if wants]
    assert batch.num_responses == len(wanted)
    for r, (g, k) in enumerate(wanted):
        row = batch.rows[r]
        assert row.index == r
        assert int(batch.flat_index_GK[g, k]) == r
        assert row.tokens_S.tolist() == [g, 7, *samples[g].response_tokens[k].tolist()]
        assert row.target_positions_T.tolist() == list(range(2, 2 + groups[g][k][0]))
        assert int(batch.response_ids_R[r]) == samples[g].first_response_id + k
        assert int(batch.num_tokens_R[r]) == groups[g][k][0]


@settings(deadline=None)
@given(groups_of_responses)
def test_every_cell_of_the_padded_arrangement_holds_its_own_response(groups: list[list[tuple[int, int, bool]]]):
    _, batch = make(groups)
    flat_R = torch.arange(batch.num_responses, dtype=torch.float64) + 1
    padded_GK = batch.to_groups(flat_R, fill=-1.0)
    held_GK = batch.flat_index_GK >= 0
    assert torch.equal(padded_GK[held_GK], flat_R[batch.flat_index_GK[held_GK]])
    assert sorted(padded_GK[held_GK].tolist()) == flat_R.tolist()
    assert bool((padded_GK[batch.flat_index_GK < 0] == -1.0).all())


@settings(deadline=None)
@given(groups_of_responses)
def test_labels_and_values_keep_every_response_and_mark_the_padding(groups: list[list[tuple[int, int, bool]]]):
    _, batch = make(groups)
    for g, group in enumerate(groups):
        size = len(group)
        assert batch.labels_GK[g, :size].tolist() == [label for _, label, _ in group]
        assert bool((batch.labels_GK[g, size:] == 0).all())
        assert batch.values_GK[g, :size].tolist() == list(range(size))
        assert bool(batch.values_GK[g, size:].isnan().all())
        assert bool((batch.flat_index_GK[g, size:] == -1).all())


@settings(max_examples=50, deadline=None)
@given(groups_of_responses, st.data())
def test_selected_groups_keep_their_responses_and_number_them_anew(
    groups: list[list[tuple[int, int, bool]]], data: st.DataObject
):
    _, batch = make(groups)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(groups) - 1), min_size=1)))
    part, own_R = batch.select(chosen), batch.responses_of(chosen)
    assert [row.index for row in part.rows] == list(range(len(own_R)))
    for row, old in zip(part.rows, own_R.tolist(), strict=True):
        assert np.array_equal(row.tokens_S, batch.rows[old].tokens_S)
        assert np.array_equal(row.target_positions_T, batch.rows[old].target_positions_T)
    values_R = torch.randn(batch.num_responses)
    assert torch.equal(part.to_groups(values_R[own_R]), batch.to_groups(values_R)[chosen])
    assert torch.equal(part.response_ids_R, batch.response_ids_R[own_R])
    assert torch.equal(part.num_tokens_R, batch.num_tokens_R[own_R])
    for name in ("labels_GK", "tie_keys_GK", "group_keys_G", "values_GK"):
        np.testing.assert_array_equal(getattr(part, name), getattr(batch, name)[chosen])


def test_masked_tokens_are_context_and_do_not_count():
    sample = GroupSample(
        group_id=0,
        first_response_id=0,
        prompt_tokens=np.array([1, 2, 3], dtype=np.int32),
        response_tokens=(np.array([4, 5, 6, 7], dtype=np.int32),),
        response_masks=(np.array([True, False, False, True]),),
        labels_K=np.array([1], dtype=np.int8),
        values_K=np.array([np.nan], dtype=np.float32),
    )
    batch = build_batch(
        [sample], group_keys_G=torch.zeros(1, dtype=torch.int64), needs_pass=lambda given: given["labels_GK"] != 0
    )
    assert batch.rows[0].tokens_S.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.rows[0].target_positions_T.tolist() == [3, 6]
    assert batch.num_tokens_R.tolist() == [2]


def test_tie_keys_depend_on_the_tokens_alone():
    _, one = make([[(2, 1, True), (3, -1, True)]])
    _, other = make([[(2, -1, False), (3, 1, True), (4, 1, True)]])
    assert one.tie_keys_GK[0].tolist() == other.tie_keys_GK[0, :2].tolist()
    assert one.tie_keys_GK[0, 0] != one.tie_keys_GK[0, 1]
