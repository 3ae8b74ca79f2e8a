"""Placement: every response once, equal work shapes on every rank, the same plan everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupdpo.data.batches.microbatches import build_microbatches
from megatron_groupdpo.data.batches.planner import PlanOptions, plan_batch, plan_whole_groups
from megatron_groupdpo.types import GroupBatch, ResponseRow


def batch_of(lengths: list[int], num_targets: int = 1) -> GroupBatch:
    """One group; response r is ``lengths[r]`` tokens whose ids tell the response and the position."""
    rows = tuple(
        ResponseRow(
            index=r,
            tokens_S=np.arange(length, dtype=np.int32) + 100 * (r + 1),
            target_positions_T=np.arange(max(1, length - num_targets), length),
        )
        for r, length in enumerate(lengths)
    )
    shape = (1, len(lengths))
    return GroupBatch(
        rows=rows,
        flat_index_GK=torch.arange(len(lengths)).reshape(shape),
        labels_GK=torch.ones(shape, dtype=torch.int8),
        values_GK=torch.zeros(shape, dtype=torch.float64),
        tie_keys_GK=torch.zeros(shape, dtype=torch.int64),
        group_keys_G=torch.zeros(1, dtype=torch.int64),
        response_ids_R=torch.arange(len(lengths)),
        num_tokens_R=torch.tensor([len(row.target_positions_T) for row in rows], dtype=torch.int64),
    )


lengths_of_responses = st.lists(st.integers(2, 40), max_size=40)
plan_options = st.builds(
    PlanOptions,
    micro_batch_size=st.integers(1, 7),
    data_parallel_size=st.integers(1, 5),
    microbatch_multiple=st.integers(1, 4),
    length_multiple=st.integers(1, 8),
    same_length=st.booleans(),
    pad_token=st.just(9),
)


@settings(deadline=None)
@given(lengths_of_responses, plan_options)
def test_every_response_is_placed_exactly_once(lengths: list[int], options: PlanOptions):
    plan = plan_batch(batch_of(lengths), options)
    placed = [row.index for own in plan.rows for rows in own for row in rows]
    assert sorted(placed) == list(range(len(lengths)))


@pytest.mark.acts("PlanOptions.data_parallel_size", "PlanOptions.microbatch_multiple")
@settings(deadline=None)
@given(lengths_of_responses, plan_options)
def test_all_ranks_have_the_same_number_of_microbatches_in_the_asked_multiple(lengths: list[int], options: PlanOptions):
    plan = plan_batch(batch_of(lengths), options)
    assert len(plan.rows) == len(plan.lengths) == options.data_parallel_size
    counts = {len(own) for own in (*plan.rows, *plan.lengths)}
    assert counts == {plan.num_microbatches}
    assert plan.num_microbatches >= 1
    assert plan.num_microbatches % options.microbatch_multiple == 0
    microbatches = -(-len(lengths) // options.micro_batch_size)
    needed = max(1, -(-microbatches // options.data_parallel_size))
    assert plan.num_microbatches < needed + options.microbatch_multiple, "no more filling than the multiple asks"


@pytest.mark.acts("PlanOptions.length_multiple", "PlanOptions.same_length")
@settings(deadline=None)
@given(lengths_of_responses, plan_options)
def test_lengths_hold_their_rows_and_keep_their_multiple(lengths: list[int], options: PlanOptions):
    plan = plan_batch(batch_of(lengths), options)
    for own, own_lengths in zip(plan.rows, plan.lengths):
        for rows, length in zip(own, own_lengths):
            assert length % options.length_multiple == 0
            assert len(rows) <= options.micro_batch_size
            longest = max((len(row.tokens_S) for row in rows), default=1)
            assert longest <= length
            if rows and not options.same_length:
                assert length < longest + options.length_multiple, "no more padding than the multiple asks"
    if options.same_length:
        assert len({length for own in plan.lengths for length in own}) == 1


@settings(deadline=None)
@given(lengths_of_responses, plan_options)
def test_the_plan_is_the_same_on_every_rank_and_call(lengths: list[int], options: PlanOptions):
    assert plan_batch(batch_of(lengths), options).lengths == plan_batch(batch_of(lengths), options).lengths
    one, other = (plan_batch(batch_of(lengths), options) for _ in range(2))
    assert [[row.index for row in rows] for own in one.rows for rows in own] == [
        [row.index for row in rows] for own in other.rows for rows in own
    ]


@pytest.mark.acts("PlanOptions.pad_token")
@settings(deadline=None)
@given(lengths_of_responses, plan_options, st.integers(1, 5))
def test_microbatches_point_at_the_states_that_predict_the_targets(
    lengths: list[int], options: PlanOptions, num_targets: int
):
    batch = batch_of(lengths, num_targets)
    plan = plan_batch(batch, options)
    for rank in range(options.data_parallel_size):
        for microbatch, length in zip(build_microbatches(plan, options, rank=rank), plan.lengths[rank]):
            num_rows, fullest = len(microbatch.tokens_BS), min(options.micro_batch_size, max(1, len(lengths)))
            assert num_rows == (fullest if options.same_length else max(1, microbatch.responses_r.numel()))
            assert microbatch.tokens_BS.shape == (num_rows, length)
            # Hidden states lie as [S, B, H]; take the next token of each as its "prediction".
            next_SB = microbatch.tokens_BS.T.roll(-1, dims=0)
            found_T = next_SB.flatten()[microbatch.hidden_positions_T]
            assert torch.equal(found_T, microbatch.targets_T)
            for local, r in enumerate(microbatch.responses_r.tolist()):
                row = batch.rows[r]
                own_T = microbatch.targets_T[microbatch.owners_T == local]
                assert own_T.tolist() == row.tokens_S[row.target_positions_T].tolist()
                assert microbatch.tokens_BS[local, len(row.tokens_S) :].eq(options.pad_token).all()
                assert microbatch.position_ids_BS[local, : len(row.tokens_S)].tolist() == list(range(len(row.tokens_S)))
                assert not microbatch.position_ids_BS[local, len(row.tokens_S) :].any()
            assert microbatch.owners_T.numel() == sum(int(batch.num_tokens_R[r]) for r in microbatch.responses_r)


@st.composite
def repeating_options(draw: st.DrawFn) -> PlanOptions:
    """What CUDA graphs ask for; no response is longer than 40."""
    multiple = draw(st.sampled_from([1, 2, 4]))
    return PlanOptions(
        micro_batch_size=draw(st.integers(1, 7)),
        data_parallel_size=draw(st.integers(1, 5)),
        length_multiple=multiple,
        length_step=draw(st.integers(1, 50)),
        longest_length=draw(st.sampled_from([40, 44])),
        same_rows=True,
        pad_token=9,
    )


@pytest.mark.acts("PlanOptions.same_rows")
@settings(deadline=None)
@given(st.lists(lengths_of_responses, min_size=1, max_size=4), repeating_options())
def test_shapes_repeat_over_batches_and_hold_every_response_once(batches: list[list[int]], options: PlanOptions):
    longest, shapes = options.longest_length, set()
    assert longest is not None
    for lengths in batches:
        batch = batch_of(lengths)
        plan = plan_batch(batch, options)
        for rank in range(options.data_parallel_size):
            for microbatch, rows in zip(build_microbatches(plan, options, rank=rank), plan.rows[rank]):
                shapes.add(tuple(microbatch.tokens_BS.shape))
                assert microbatch.responses_r.tolist() == [row.index for row in rows]
        placed = [row.index for own in plan.rows for rows in own for row in rows]
        assert sorted(placed) == list(range(len(lengths)))
    assert {num_rows for num_rows, _ in shapes} == {options.micro_batch_size}
    # As many lengths as steps up to the longest, and no padding beyond it.
    assert len(shapes) <= -(-longest // options.length_step)
    assert max(length for _, length in shapes) <= longest
    assert all(length % options.length_multiple == 0 for _, length in shapes)


@settings(deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), repeating_options())
def test_a_microbatch_that_only_fills_the_schedule_has_no_shape_of_its_own(lengths: list[int], options: PlanOptions):
    plan = plan_batch(batch_of(lengths), options)
    filled = {length for own, rows in zip(plan.lengths, plan.rows) for length, r in zip(own, rows) if r}
    assert {length for own in plan.lengths for length in own} == filled


@pytest.mark.acts("PlanOptions.length_step", "PlanOptions.longest_length")
def test_lengths_are_rounded_up_to_the_step_and_work_is_dealt_by_what_is_computed():
    options = PlanOptions(micro_batch_size=1, data_parallel_size=2, length_step=16, longest_length=40, same_rows=True)
    plan = plan_batch(batch_of([40, 33, 31, 17, 5, 2]), options)
    assert plan.lengths == ((40, 32, 16), (40, 32, 16))


def test_whole_groups_keep_their_lengths():
    options = PlanOptions(micro_batch_size=2, data_parallel_size=1, length_step=16, longest_length=40, same_rows=True)
    plan = plan_whole_groups(batch_of([21, 5, 3]), options)
    assert plan.lengths == ((21,),)
    (microbatch,) = build_microbatches(plan, options, rank=0)
    assert microbatch.tokens_BS.shape == (3, 21)


def test_long_responses_share_microbatches_with_long_ones():
    plan = plan_batch(batch_of([2, 30, 3, 31]), PlanOptions(micro_batch_size=2, data_parallel_size=1))
    assert plan.lengths == ((31, 3),)


def test_no_rank_always_takes_the_longer_of_two_neighbours():
    plan = plan_batch(batch_of([40, 30, 20, 10]), PlanOptions(micro_batch_size=1, data_parallel_size=2))
    assert plan.lengths == ((40, 10), (30, 20))


@st.composite
def packed_options(draw: st.DrawFn) -> PlanOptions:
    context = draw(st.sampled_from([1, 2, 3]))
    step = (2 * context if context > 1 else 1) * draw(st.sampled_from([1, 2, 4]))
    return PlanOptions(
        max_tokens_per_microbatch=draw(st.integers(-(-40 // step) * step, 200)),
        data_parallel_size=draw(st.integers(1, 5)),
        context_parallel_size=context,
        microbatch_multiple=draw(st.integers(1, 4)),
        length_multiple=step,
        same_length=draw(st.booleans()),
        pad_token=9,
        attention_cost=draw(st.sampled_from([0.0, 0.01, 1.0])),
    )


@settings(deadline=None)
@given(lengths_of_responses, packed_options())
def test_packing_places_every_response_once_within_the_budget(lengths: list[int], options: PlanOptions):
    plan = plan_batch(batch_of(lengths), options)
    assert sorted(row.index for own in plan.rows for rows in own for row in rows) == list(range(len(lengths)))
    assert {len(own) for own in (*plan.rows, *plan.lengths)} == {plan.num_microbatches}
    assert plan.num_microbatches % options.microbatch_multiple == 0
    assert options.max_tokens_per_microbatch is not None
    for own, own_lengths in zip(plan.rows, plan.lengths):
        for rows, length in zip(own, own_lengths):
            used = sum(options.row_length(row) for row in rows)
            assert used <= length <= options.max_tokens_per_microbatch
            assert length % options.length_multiple == 0
            if rows and not options.same_length:
                assert length < used + options.length_multiple, "no more padding than the multiple asks"
    if options.same_length:
        assert len({length for own in plan.lengths for length in own}) == 1
    budget = options.max_tokens_per_microbatch // options.length_multiple * options.length_multiple
    tokens = sum(-(-length // options.row_multiple) * options.row_multiple for length in lengths)
    # Bins are over half full but for one, whatever the lengths.
    bins = max(1, 2 * -(-tokens // budget))
    assert plan.num_microbatches * options.data_parallel_size <= bins + options.data_parallel_size * (
        options.microbatch_multiple
    )


@pytest.mark.acts("PlanOptions.context_parallel_size")
@settings(deadline=None)
@given(lengths_of_responses, packed_options(), st.integers(1, 5))
def test_context_parallel_ranks_together_hold_every_token_and_target_once(
    lengths: list[int], options: PlanOptions, num_targets: int
):
    batch = batch_of(lengths, num_targets)
    plan = plan_batch(batch, options)
    size = options.context_parallel_size
    for rank in range(options.data_parallel_size):
        parts = [build_microbatches(plan, options, rank=rank, context_rank=r) for r in range(size)]
        for index, length in enumerate(plan.lengths[rank]):
            own = [part[index] for part in parts]
            assert all(microbatch.tokens_BS.shape == (1, length // size) for microbatch in own)
            tokens = sorted(token for microbatch in own for token in microbatch.tokens_BS.flatten().tolist())
            held = [t for r in own[0].responses_r.tolist() for t in batch.rows[r].tokens_S.tolist()]
            assert tokens == sorted(held + [options.pad_token] * (length - len(held)))
            for r_local, r in enumerate(own[0].responses_r.tolist()):
                row = batch.rows[r]
                pairs = []
                for microbatch in own:
                    mine_T = microbatch.owners_T == r_local
                    states_T = microbatch.hidden_positions_T[mine_T]
                    # The state's own token and position are those before the target.
                    pairs += list(
                        zip(
                            microbatch.position_ids_BS[0, states_T].tolist(),
                            microbatch.tokens_BS[0, states_T].tolist(),
                            microbatch.targets_T[mine_T].tolist(),
                        )
                    )
                wanted = [(t - 1, int(row.tokens_S[t - 1]), int(row.tokens_S[t])) for t in row.target_positions_T]
                assert sorted(pairs) == sorted(wanted)


@settings(deadline=None)
@given(lengths_of_responses, packed_options())
def test_whole_groups_are_one_microbatch_each(lengths: list[int], options: PlanOptions):
    plan = plan_whole_groups(batch_of(lengths), options)
    filled = [rows for own in plan.rows for rows in own if rows]
    assert [sorted(row.index for row in rows) for rows in filled] == ([list(range(len(lengths)))] if lengths else [])


@pytest.mark.acts("PlanOptions.attention_cost")
def test_packing_shares_the_work_among_ranks_by_cost_not_by_count():
    """One response of 40 weighs as much as many short ones where attention counts."""
    options = PlanOptions(max_tokens_per_microbatch=48, data_parallel_size=2, attention_cost=1.0)
    plan = plan_batch(batch_of([40, 8, 8, 8, 8, 8]), options)
    assert [sorted(len(row.tokens_S) for rows in own for row in rows) for own in plan.rows] == [[40], [8] * 5]
