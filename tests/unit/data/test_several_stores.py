"""Several stores of different sizes are the one store that holds all their groups, in everything that is read."""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from made_stores import counted, made_groups, made_logps, num_responses, write_reference, write_store

from megatron_groupdpo import objectives
from megatron_groupdpo.data.batches.planner import PlanOptions
from megatron_groupdpo.data.batches.sampler import BlendedSampler, GroupSampler, build_sampler, group_sizes
from megatron_groupdpo.data.store.reader import GroupDataset, split_by_prompt
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.reference.store import ReferenceLogProbs
from megatron_groupdpo.run.batches import BatchSource
from megatron_groupdpo.run.checks import check_groups
from megatron_groupdpo.step.coefficients import LossOptions

GROUPS = made_groups(12)
CUTS = (0, 3, 4, 12)
"""Stores of three groups, of one and of eight."""
LOGPS = made_logps(GROUPS)
FIRST_RESPONSE = np.cumsum([0, *(len(item.labels) for item in GROUPS)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for number, (start, stop) in enumerate(itertools.pairwise(CUTS)):
        store = write_store(folder / f"s{number}", GROUPS[start:stop])
        write_reference(folder / "reference", store, LOGPS[FIRST_RESPONSE[start] : FIRST_RESPONSE[stop]])
    return folder


@pytest.fixture
def dataset(folder: Path) -> GroupDataset:
    return GroupDataset.open([str(folder / f"s{number}") for number in range(3)])


def test_groups_and_responses_are_numbered_on_from_store_to_store(dataset: GroupDataset):
    assert len(dataset) == 12
    assert dataset.num_responses == num_responses(GROUPS)
    assert dataset.longest_row == max(
        len(item.prompt_tokens) + len(tokens) for item in GROUPS for tokens in item.response_tokens
    )
    for group_id, item in enumerate(GROUPS):
        sample = dataset[group_id]
        assert sample.group_id == group_id
        assert sample.first_response_id == FIRST_RESPONSE[group_id]
        assert sample.prompt_tokens.tolist() == item.prompt_tokens.tolist()
        assert [tokens.tolist() for tokens in sample.response_tokens] == [t.tolist() for t in item.response_tokens]
        assert sample.labels_K.tolist() == list(item.labels)
        np.testing.assert_array_equal(sample.values_K, np.array(item.values, dtype=np.float32))
        for mask, wanted in zip(sample.response_masks, item.response_masks, strict=True):
            np.testing.assert_array_equal(mask, wanted)  # type: ignore[arg-type]


def test_messages_name_the_line_of_the_right_file(dataset: GroupDataset):
    wanted = [f"s{0 if g < 3 else 1 if g < 4 else 2}.jsonl:{item.source_row}" for g, item in enumerate(GROUPS)]
    assert [dataset.where(group_id) for group_id in range(12)] == wanted


def test_the_split_reads_each_stores_own_prompts(dataset: GroupDataset):
    keys = [zlib.crc32(item.prompt_tokens.astype("<i4").tobytes()) for item in GROUPS]
    for cut in sorted(keys)[1:]:  # so that the smallest sides have one group
        train, held_out = split_by_prompt(dataset, cut / 2**32)
        assert held_out.tolist() == [g for g, key in enumerate(keys) if key < cut]
        assert train.tolist() == [g for g, key in enumerate(keys) if key >= cut]


def test_stores_of_two_tokenizers_are_refused_with_both_digests(folder: Path, tmp_path: Path, monkeypatch):
    import made_stores

    monkeypatch.setattr(made_stores, "TOKENIZER", made_stores.TOKENIZER | {"digest": "e" * 16})
    write_store(tmp_path / "other", GROUPS[:1])
    with pytest.raises(DataError) as caught:
        GroupDataset.open([str(folder / "s0"), str(folder / "s1"), str(tmp_path / "other")])
    assert f"digest {'d' * 16} there, {'e' * 16} here" in str(caught.value)
    assert str(tmp_path / "other") in str(caught.value)


def test_each_response_has_the_reference_of_its_own_store(folder: Path, dataset: GroupDataset):
    reference = ReferenceLogProbs.open(folder / "reference", dataset.stores, precision="fp32")
    ids_R = np.random.default_rng(0).permutation(len(LOGPS))
    assert reference[ids_R].tolist() == [LOGPS[i] for i in ids_R]
    for i, logp in enumerate(LOGPS):
        assert reference[np.array([i])].tolist() == [logp]
    assert reference[np.empty(0, dtype=np.int64)].tolist() == []


def test_a_curriculum_counts_the_responses_of_every_store(dataset: GroupDataset):
    sizes = [len(item.labels) for item in GROUPS]
    ids = np.array([1, 2, 3, 5, 8, 11])
    assert group_sizes(dataset, ids).tolist() == [sizes[g] for g in ids]
    sampler = build_sampler(dataset, ids, seed=5, shuffle=False, curriculum="group-size")
    wanted = sorted(range(6), key=lambda i: sizes[ids[i]])  # sorted is stable, as the order of equals must be
    assert sampler.take(0, 6) == [(i, 0) for i in wanted]
    assert sampler.take(6, 6) == [(i, 1) for i in range(6)], "the curriculum is over after the first epoch"


def test_weights_go_to_the_stores_in_their_order(dataset: GroupDataset):
    """Of the ids left to train on, 0 and 2 lie in the first store, 3 in the second, the others in the third."""
    ids = np.array([0, 2, 3, 5, 6, 7, 9])
    sampler = build_sampler(dataset, ids, seed=5, shuffle=False, weights=(1.0, 2.0, 5.0))
    assert isinstance(sampler, BlendedSampler)
    assert [source.num_groups for source in sampler.sources] == [2, 1, 4]
    taken = [group for group, _ in sampler.take(0, 8000)]
    counts = [sum(group in own for group in taken) for own in ((0, 1), (2,), (3, 4, 5, 6))]
    assert counts == [1000, 2000, 5000]
    by_store = [[g for g in taken if g in own] for own in ((0, 1), (2,), (3, 4, 5, 6))]
    assert by_store[0][:4] == [0, 1, 0, 1]
    assert by_store[2][:6] == [3, 4, 5, 6, 3, 4]


def test_a_share_may_be_a_ten_thousandth(dataset: GroupDataset):
    sampler = build_sampler(dataset, np.arange(12), seed=5, shuffle=False, weights=(1, 2, 9_997))
    owners = [0 if group < 3 else 1 if group < 4 else 2 for group, _ in sampler.take(0, 20_000)]
    assert [owners.count(store) for store in range(3)] == [2, 4, 19_994]


def test_each_weighted_store_has_a_seed_and_a_curriculum_of_its_own(dataset: GroupDataset):
    ids = np.arange(12)
    sizes_G = np.array([len(item.labels) for item in GROUPS])
    sampler = build_sampler(dataset, ids, seed=5, shuffle=True, weights=(1, 1, 1), curriculum="group-size")
    assert isinstance(sampler, BlendedSampler)
    for number, (start, stop) in enumerate(itertools.pairwise(CUTS)):
        alone = GroupSampler(stop - start, seed=(5, number), shuffle=True, sizes_G=sizes_G[start:stop])
        found = [sampler.sources[number].at(place) for place in range(3 * (stop - start))]
        assert found == alone.take(0, 3 * (stop - start))


def test_a_weighted_store_that_the_split_leaves_empty_is_named(folder: Path, dataset: GroupDataset):
    with pytest.raises(DataError, match=f"{folder / 's1'}: has a weight and no group to train on"):
        build_sampler(dataset, np.array([0, 1, 2, 4]), seed=0, shuffle=False, weights=(1, 1, 1))


def test_data_are_refused_only_where_no_store_has_a_group_to_train_on(tmp_path: Path):
    one_sided = made_groups(2, sides=((2, 0), (0, 3)))
    write_store(tmp_path / "none", one_sided)
    write_store(tmp_path / "last", [*one_sided, *GROUPS[:1]])
    check_groups(GroupDataset.open([str(tmp_path / "none"), str(tmp_path / "last")]), "all_pairs")
    twice = GroupDataset.open([str(tmp_path / "none")] * 2)
    with pytest.raises(DataError, match=f"{tmp_path / 'none'}, {tmp_path / 'none'}: objective 'all_pairs' needs"):
        check_groups(twice, "all_pairs")


def source(folder: Path, dataset: GroupDataset, objective: str = "all_pairs", **hyperparameters: object) -> BatchSource:
    """Over the groups 2 to 11 in their order."""
    loss = LossOptions(
        objective=objective,
        beta=0.3,
        score_average=False,
        nll_coeff=1.0,
        nll_average="response",
        one_sided_nll=False,
        hyperparameters=hyperparameters,
    )
    ids = np.arange(2, 12)
    return BatchSource(
        dataset,
        ids,
        sampler=build_sampler(dataset, ids, seed=5, shuffle=False),
        loss=loss,
        plan=PlanOptions(micro_batch_size=4, data_parallel_size=1),
        data_parallel_rank=0,
        seed=7,
        reference=ReferenceLogProbs.open(folder / "reference", dataset.stores, precision="fp32"),
    )


def test_a_batch_over_stores_has_every_groups_own_content(folder: Path, dataset: GroupDataset):
    planned = source(folder, dataset).batch(8, 4)  # the last two of an epoch, and the first two of the next
    wanted = [10, 11, 2, 3]
    assert planned.group_ids == wanted
    batch, row = planned.batch, 0
    for g, group_id in enumerate(wanted):
        item = GROUPS[group_id]
        for k, tokens in enumerate(item.response_tokens):
            r = int(batch.flat_index_GK[g, k])
            assert batch.rows[r].tokens_S.tolist() == [*item.prompt_tokens.tolist(), *tokens.tolist()]
            counts = np.flatnonzero(counted(item, k)) + len(item.prompt_tokens)
            assert batch.rows[r].target_positions_T.tolist() == counts.tolist()
            assert int(batch.num_tokens_R[r]) == len(counts)
            assert int(batch.response_ids_R[r]) == FIRST_RESPONSE[group_id] + k
            assert float(planned.ref_logps_R[r]) == LOGPS[FIRST_RESPONSE[group_id] + k]
            assert int(batch.labels_GK[g, k]) == item.labels[k]
            assert float(batch.values_GK[g, k]) == float(np.float32(item.values[k]))
            row += 1
        assert (batch.flat_index_GK[g, len(item.labels) :] == -1).all()
    assert batch.num_responses == row
    assert planned.num_tokens == sum(
        len(GROUPS[g].prompt_tokens) + len(tokens) for g in wanted for tokens in GROUPS[g].response_tokens
    )


def test_random_pairs_are_drawn_anew_in_every_epoch_by_the_number_of_the_group(folder: Path, dataset: GroupDataset):
    batches = source(folder, dataset, "dpo", pair_selection="random")
    pairs = []
    for epoch in range(6):
        planned = batches.batch(10 * epoch, 10)
        keys_G = objectives.group_keys(torch.arange(2, 12), seed=7, epoch=epoch)
        assert torch.equal(planned.batch.group_keys_G, keys_G)
        pairs.append([tuple(row) for row in (planned.batch.flat_index_GK >= 0).tolist()])
    assert all(sum(row) == 2 for epoch in pairs for row in epoch)
    assert all(len({epoch[g] for epoch in pairs}) > 1 for g, item in enumerate(GROUPS[2:]) if len(item.labels) > 2)


def test_validation_goes_once_through_the_groups_and_stops_at_its_limit(folder: Path, dataset: GroupDataset):
    batches = source(folder, dataset)
    assert [planned.group_ids for planned in batches.once(4)] == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]
    assert [planned.group_ids for planned in batches.once(4, limit=2)] == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert [planned.group_ids for planned in batches.once(5, limit=9)] == [[2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]
