"""Stored numbers are taken over by content alone, and refused under any other key."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_groupdpo.data.preprocess.work_folder import whole_folder
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.store.writer import PreparedGroup, StoreIdentity, StoreWriter
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.reference import content
from megatron_groupdpo.reference.content import content_hashes, group_hashes, take_over
from megatron_groupdpo.reference.store import (
    SCORING_VERSION,
    ReferenceKey,
    ReferenceLogProbs,
    ReferenceWriter,
    store_folder,
)

IDENTITY = {"kind": "SentencePieceTokenizer", "model": "m", "chat_template": None, "digest": "d", "vocab_size": 500}


def group(prompt: list[int], *responses: list[int], masks=None, labels=None) -> PreparedGroup:
    size = len(responses)
    return PreparedGroup(
        prompt_tokens=np.array(prompt, dtype=np.int32),
        response_tokens=tuple(np.array(tokens, dtype=np.int32) for tokens in responses),
        response_masks=tuple(masks or [None] * size),
        labels=tuple(labels or (1 if k == 0 else -1 for k in range(size))),
        values=(float("nan"),) * size,
        ref_logps=(float("nan"),) * size,
        source_row=1,
    )


def make_store(path: Path, groups: list[PreparedGroup]) -> TokenStore:
    identity = StoreIdentity(tokenizer=IDENTITY, options={})
    with whole_folder(path, overwrite=False) as folder, closing(StoreWriter(folder, identity)) as writer:
        for item in groups:
            writer.add(item, 0)
        writer.finish(sources=[{"path": "in.jsonl", "schema": "canonical"}], counts=[])
    return TokenStore.open(path)


TWO = [group([1, 2], [3, 4], [5, 4]), group([9], [8, 7, 4], [3, 4], [6])]
"""Five responses."""


def key_of(store: TokenStore, **changes: object) -> ReferenceKey:
    key = ReferenceKey(store_digest=store.digest, weights_digest="w" * 16, precision="fp32")
    return replace(key, **changes)  # type: ignore[arg-type]


def scored(root: Path, store: TokenStore, logps: list[float], **changes: object) -> ReferenceWriter:
    writer = ReferenceWriter(root, store, key_of(store, **changes))
    writer.write_content([group_hashes(store, 0, len(store))])
    writer.put(np.arange(len(logps)), np.array(logps))
    return writer


def grown(path: Path) -> TokenStore:
    """TWO in another order and with other labels, one response more in a group, and a new group."""
    return make_store(
        path,
        [
            group([9], [6], [3, 4], [4, 4], [8, 7, 4], labels=[1, 1, -1, -1]),
            group([7], [3, 4]),
            group([1, 2], [3, 4], [5, 4]),
        ],
    )


def test_numbers_follow_the_content_into_another_store(tmp_path: Path):
    scored(tmp_path / "ref", make_store(tmp_path / "two", TWO), [-1.0, -2.0, -3.0, -4.0, -5.0])
    more = grown(tmp_path / "more")
    writer = scored(tmp_path / "ref", more, [])
    assert writer.take_over() == 5
    assert writer.missing().tolist() == [2, 4]
    writer.put(np.array([2, 4]), np.array([-6.0, -7.0]))
    numbers = ReferenceLogProbs.open(tmp_path / "ref", [more], precision="fp32")
    assert numbers[np.arange(7)].tolist() == [-5.0, -4.0, -6.0, -3.0, -7.0, -1.0, -2.0]


def test_numbers_that_are_there_are_not_replaced(tmp_path: Path):
    scored(tmp_path / "ref", make_store(tmp_path / "two", TWO), [-1.0, -2.0, -3.0, -4.0, -5.0])
    writer = scored(tmp_path / "ref", grown(tmp_path / "more"), [-50.0])
    assert writer.take_over() == 4
    assert np.load(writer.folder / "logps.npy")[0] == -50.0


@pytest.mark.parametrize("changes", [{"weights_digest": "v" * 16}, {"precision": "bf16"}, {"scoring_version": 0}])
def test_numbers_of_another_key_are_not_taken_over(tmp_path: Path, changes: dict[str, object]):
    scored(tmp_path / "ref", make_store(tmp_path / "two", TWO), [-1.0, -2.0, -3.0, -4.0, -5.0], **changes)
    assert scored(tmp_path / "ref", grown(tmp_path / "more"), []).take_over() == 0


def test_an_unfinished_store_gives_what_it_has_and_a_broken_one_nothing(tmp_path: Path):
    root = tmp_path / "ref"
    scored(root, make_store(tmp_path / "two", TWO), [-1.0, -2.0])
    broken = scored(root, make_store(tmp_path / "one", TWO[1:]), [-3.0, -4.0, -5.0])
    with (broken.folder / "content.bin").open("r+b") as stream:
        stream.truncate(40)
    (root / "notes").mkdir()
    assert scored(root, grown(tmp_path / "more"), []).take_over() == 2


@pytest.mark.parametrize(
    "changed",
    [
        group([1, 2], [3, 5], [5, 4]),
        group([1, 3], [3, 4]),
        group([1], [2, 3, 4]),  # the boundary between prompt and response
        group([1, 2], [3, 4], masks=[np.array([True, False])]),
        group([1, 2], [3, 4], masks=[np.array([False, True])]),
    ],
    ids=["response", "prompt", "boundary", "mask", "other mask"],
)
def test_every_part_of_the_content_is_in_the_hash(tmp_path: Path, changed: PreparedGroup):
    samples = [make_store(tmp_path / name, [item])[0] for name, item in (("a", TWO[0]), ("b", changed))]
    first, other = (content_hashes(sample)[0].tolist() for sample in samples)
    assert first != other


def test_a_mask_of_all_true_is_no_mask(tmp_path: Path):
    masked = group([1, 2], [3, 4], masks=[np.array([True, True])])
    samples = [make_store(tmp_path / name, [item])[0] for name, item in (("a", TWO[0]), ("b", masked))]
    np.testing.assert_array_equal(*(content_hashes(sample)[0] for sample in samples))


@pytest.mark.parametrize("at_once", [3, 50, 1 << 20])
def test_matching_in_parts_finds_what_a_dictionary_finds(monkeypatch: pytest.MonkeyPatch, at_once: int):
    monkeypatch.setattr("megatron_groupdpo.reference.content._READ_AT_ONCE", 16)
    draw = np.random.default_rng(0)
    # First words repeat on purpose, so that the second has to tell contents apart.
    pool = np.stack([draw.integers(0, 2**64, size=60, dtype=np.uint64), np.arange(60, dtype=np.uint64)], axis=1)
    pool[30:40, 0] = pool[20:30, 0]
    theirs, ours = pool[draw.permutation(60)[:45]], pool[draw.integers(0, 60, size=200)]
    their_logps = np.where(draw.random(45) < 0.2, np.nan, draw.normal(size=45))
    logps = np.where(draw.random(200) < 0.2, 1.0, np.nan)
    known = {tuple(h): x for h, x in zip(theirs.tolist(), their_logps) if not np.isnan(x)}
    firsts = [h[0] for h in known]
    wanted = [known.get(tuple(h), np.nan) if np.isnan(x) else x for h, x in zip(ours.tolist(), logps)]
    found = logps.copy()
    filled = take_over(found, ours, their_logps, theirs, at_once=at_once)
    assert filled == (np.isnan(logps) & ~np.isnan(found)).sum() > 50
    unique = np.array([firsts.count(h[0]) < 2 for h in ours.tolist()])  # a shared first word may be left to score
    np.testing.assert_array_equal(found[unique], np.array(wanted)[unique])
    taken = ~np.isnan(found)
    np.testing.assert_array_equal(found[taken], np.array(wanted)[taken])


def test_a_kill_while_hashing_leaves_no_hashes(tmp_path: Path):
    store = make_store(tmp_path / "two", TWO)
    writer = ReferenceWriter(tmp_path / "ref", store, key_of(store))

    def dies():
        yield group_hashes(store, 0, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_content(dies())
    assert not writer.knows_content


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("weights_digest", "v" * 16, "w" * 16),
        ("precision", "bf16", "fp32"),
        ("scoring_version", 0, SCORING_VERSION),
        ("store_digest", "0" * 64, None),
    ],
)
def test_scoring_into_a_folder_of_another_key_is_refused_with_both_values(
    tmp_path: Path, name: str, value: object, wanted: object
):
    store = make_store(tmp_path / "two", TWO)
    ReferenceWriter(tmp_path / "ref", store, key_of(store, **{name: value}))
    with pytest.raises(DataError) as caught:
        ReferenceWriter(tmp_path / "ref", store, key_of(store))
    assert f"scored with {name} {value!r}, this run needs {wanted or store.digest!r}" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("precision", "bf16"), ("scoring_version", 0), ("store_digest", "0" * 64)])
def test_training_refuses_numbers_of_another_key(tmp_path: Path, name: str, value: object):
    store = make_store(tmp_path / "two", TWO)
    writer = scored(tmp_path / "ref", store, [-1.0] * 5)
    meta = writer.folder / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {name: value}))
    with pytest.raises(DataError, match=f"scored with {name}"):
        ReferenceLogProbs.open(tmp_path / "ref", [store], precision="fp32")


@pytest.mark.parametrize(
    "changed",
    [
        [group([1, 2], [3, 4], [5, 5]), TWO[1]],
        [group([1, 2], [3, 4], [5, 4], masks=[None, np.array([False, True])]), TWO[1]],
    ],
    ids=["tokens", "mask"],
)
def test_training_refuses_numbers_of_other_tokens_or_masks(tmp_path: Path, changed: list[PreparedGroup]):
    store, other = make_store(tmp_path / "two", TWO), make_store(tmp_path / "other", changed)
    writer = scored(tmp_path / "ref", store, [-1.0] * 5)
    with pytest.raises(DataError, match="has no reference log-probabilities of the store"):
        ReferenceLogProbs.open(tmp_path / "ref", [other], precision="fp32")
    writer.folder.rename(store_folder(tmp_path / "ref", other))
    with pytest.raises(DataError, match="scored with store_digest"):
        ReferenceLogProbs.open(tmp_path / "ref", [other], precision="fp32")


def test_training_refuses_stores_scored_by_different_weights(tmp_path: Path):
    stores = [make_store(tmp_path / "two", TWO), make_store(tmp_path / "one", TWO[1:])]
    scored(tmp_path / "ref", stores[0], [-1.0] * 5)
    scored(tmp_path / "ref", stores[1], [-1.0] * 3, weights_digest="v" * 16)
    with pytest.raises(DataError, match=r"different weights \(v{16}, w{16}\)"):
        ReferenceLogProbs.open(tmp_path / "ref", stores, precision="fp32")


def test_training_refuses_a_store_scored_in_part(tmp_path: Path):
    store = make_store(tmp_path / "two", TWO)
    scored(tmp_path / "ref", store, [-1.0] * 4)
    with pytest.raises(DataError, match="1 of 5 responses have no number"):
        ReferenceLogProbs.open(tmp_path / "ref", [store], precision="fp32")


def test_a_store_scored_in_part_says_how_to_go_on(tmp_path: Path):
    store = make_store(tmp_path / "two", TWO)
    writer = scored(tmp_path / "ref", store, [-1.0] * 4)
    with pytest.raises(DataError) as caught:
        ReferenceLogProbs.open(tmp_path / "ref", [store], precision="fp32")
    assert str(caught.value) == (
        f"{writer.folder}: 1 of 5 responses have no number; run tools/score_reference.py again, it goes on where it "
        "stopped"
    )


def test_numbers_of_another_count_are_refused(tmp_path: Path):
    store = make_store(tmp_path / "two", TWO)
    writer = scored(tmp_path / "ref", store, [-1.0] * 5)
    np.save(writer.folder / "logps.npy", np.zeros(4))
    with pytest.raises(DataError) as caught:
        ReferenceLogProbs.open(tmp_path / "ref", [store], precision="fp32")
    assert str(caught.value) == (
        f"{writer.folder / 'logps.npy'}: has (4,) numbers, the store {store.path} has 5 responses; delete the folder "
        "and score again"
    )


def test_the_numbers_name_the_weights_that_made_them(tmp_path: Path):
    store = make_store(tmp_path / "two", TWO)
    scored(tmp_path / "ref", store, [-1.0] * 5)
    opened = ReferenceLogProbs.open(tmp_path / "ref", [store], precision="fp32")
    assert opened.weights_digest == "w" * 16
    assert opened.keys == (key_of(store),)
    assert opened[np.arange(5)].dtype == np.float64


def taken_over(ours: list[tuple[int, int]], theirs: list[tuple[int, int]], logps: list[float], at_once: int) -> list:
    found = np.full(len(ours), np.nan)
    words = (np.array(hashes, dtype=np.uint64) for hashes in (ours, theirs))
    our_words, their_words = words
    filled = take_over(found, our_words, np.array(logps), their_words, at_once=at_once)
    assert filled == (~np.isnan(found)).sum()
    return [None if np.isnan(x) else x for x in found.tolist()]


def test_contents_that_differ_in_one_bit_are_two():
    top = 2**63
    assert taken_over([(top, 1), (top + 1, 1), (top, 2)], [(top + 1, 1)], [-1.0], 8) == [None, -1.0, None]


def test_a_part_of_the_content_without_a_number_does_not_end_the_search():
    """In two parts by the first word: no even one has a number."""
    assert taken_over([(3, 0), (2, 0), (5, 0)], [(5, 0), (3, 0)], [-5.0, -3.0], 1) == [-3.0, None, -5.0]


def test_of_equal_contents_the_first_number_is_taken():
    theirs = [(i % 3, 0) for i in range(3000)]
    assert taken_over([(2, 0), (0, 0), (1, 0)], theirs, [-float(i) for i in range(3000)], 4000) == [-2.0, 0.0, -1.0]


def test_rows_are_read_once_and_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_groupdpo.reference.content._READ_AT_ONCE", 16)
    assert list(content._ranges(40)) == [slice(0, 16), slice(16, 32), slice(32, 40)]
    assert list(content._ranges(16)) == [slice(0, 16)]
