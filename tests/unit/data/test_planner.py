"""Placement: every response once, equal work shapes on every rank, the same plan everywhere."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupdpo.data.planner import PlanOptions, build_microbatches, plan_batch
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
            assert microbatch.position_ids_BS.tolist() == [list(range(length))] * num_rows
            # Hidden states lie as [S, B, H]; take the next token of each as its "prediction".
            next_SB = microbatch.tokens_BS.T.roll(-1, dims=0)
            found_T = next_SB.flatten()[microbatch.hidden_positions_T]
            assert torch.equal(found_T, microbatch.targets_T)
            for local, r in enumerate(microbatch.responses_r.tolist()):
                row = batch.rows[r]
                own_T = microbatch.targets_T[microbatch.owners_T == local]
                assert own_T.tolist() == row.tokens_S[row.target_positions_T].tolist()
                assert microbatch.tokens_BS[local, len(row.tokens_S) :].eq(options.pad_token).all()
            assert microbatch.owners_T.numel() == sum(int(batch.num_tokens_R[r]) for r in microbatch.responses_r)


def test_long_responses_share_microbatches_with_long_ones():
    plan = plan_batch(batch_of([2, 30, 3, 31]), PlanOptions(micro_batch_size=2, data_parallel_size=1))
    assert plan.lengths == ((31, 3),)


def test_no_rank_always_takes_the_longer_of_two_neighbours():
    plan = plan_batch(batch_of([40, 30, 20, 10]), PlanOptions(micro_batch_size=1, data_parallel_size=2))
    assert plan.lengths == ((40, 10), (30, 20))
