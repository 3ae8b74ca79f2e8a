"""Whatever a file or a store holds: a clear error or a counted drop, never a wrong sample, never another exception."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
import time
from pathlib import Path

import pytest
from data_makers import train_byte_level
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.files import json_array
from megatron_groupdpo.data.files.reader import read_records
from megatron_groupdpo.data.preprocess.partition import Partition
from megatron_groupdpo.data.preprocess.pipeline import preprocess
from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
from megatron_groupdpo.data.schemas import SchemaOptions
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.text.tokenize import TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import DataError, UserError

fuzz = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

RECORDS = [{"prompt": f"é {i}", "responses": [f"a {i}", f"b {i}"], "rewards": [0.5, float(i)]} for i in range(30)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARCHIVE = gzip.compress(LINES, mtime=0)


@fuzz
@given(st.integers(0, len(ARCHIVE) - 1))
def test_an_archive_cut_at_any_byte_is_refused(tmp_path, cut):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(ARCHIVE[:cut])
    with pytest.raises(
        DataError, match=r"a\.jsonl\.gz: (the archive is cut short|the file holds no record|no gzip file)"
    ):
        list(read_records(str(path)))


@settings(fuzz, max_examples=150)
@given(st.integers(0, len(ARCHIVE) - 1), st.integers(0, 7))
def test_an_archive_with_a_flipped_bit_is_refused_or_harmless(tmp_path, byte, bit):
    damaged = bytearray(ARCHIVE)
    damaged[byte] ^= 1 << bit
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damaged)
    try:
        read = [record for record, _ in read_records(str(path))]
    except DataError:
        return
    assert read == RECORDS  # the bit was in the header's time or name


@fuzz
@given(st.data())
def test_a_cut_archive_never_leaves_a_store(build, tmp_path, data):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(ARCHIVE[: data.draw(st.integers(20, len(ARCHIVE) - 1))])
    with pytest.raises(DataError):
        build(path, partition=Partition(rule="rank"))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


leaves = st.none() | st.booleans() | st.integers() | st.floats()
json_values = st.recursive(
    leaves | st.text(max_size=30) | st.sampled_from(["[", "]", '",', "\\"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(fuzz, max_examples=150)
@given(
    st.lists(json_values, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40), st.data()
)  # fmt: skip
def test_a_streamed_array_is_what_json_reads(monkeypatch, values, indent, ascii_only, block, data):
    monkeypatch.setattr(json_array, "_BLOCK_BYTES", block)
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    change = data.draw(st.sampled_from(["none", "cut", "replace", "add"]))
    at = data.draw(st.integers(1, len(text) - 1))
    if change == "cut":
        text = text[:at]
    elif change == "replace":
        text = text[:at] + data.draw(st.sampled_from([b",", b"]", b"}", b'"', b" ", b"\xff"])) + text[at + 1 :]
    elif change == "add":
        text += data.draw(st.sampled_from([b"\n ", b"]", b"[]", b"x"]))
    try:
        expected = repr(json.loads(text.decode()))
    except ValueError:
        expected = None
    stream = io.BytesIO(text)
    try:
        read = [value for value, _ in json_array.records(stream.read(block), stream, "a.json")]
    except DataError:
        assert expected is None
    else:
        assert repr(read) == expected


def test_an_early_mistake_in_a_large_array_is_found_early(tmp_path):
    item = json.dumps({"prompt": "p" * 1000}) + ", "
    stream = io.BytesIO(("[" + item * 10 + "{'no'}, " + item * 20_000).encode())
    with pytest.raises(DataError, match=r"a\.json: broken JSON: .* at item 11 of the array"):
        list(json_array.records(stream.read(100), stream, "a.json"))
    assert stream.tell() < 4 << 20


# Records -----------------------------------------------------------------------------------------------------

nasty_text = st.sampled_from(["", " ", "\u00a0", "a", "b", "\ud800", "a\udfff", "\x00", "\ufeff", "é" * 50, "1" * 300])
nasty_number = st.sampled_from(
    [math.nan, math.inf, -math.inf, 1e39, -0.0, 0.0, 1.0, 2.0, 10**400, True, None, "3", [1]]
)
on_policy = st.fixed_dictionaries(
    {
        "id": st.just(1),  # the same everywhere: a record is known by its place alone
        "prompt": nasty_text,
        "responses": st.lists(nasty_text, min_size=1, max_size=4),
        "rewards": st.lists(nasty_number, min_size=1, max_size=4),
    }
)
partitions = st.sampled_from(
    [
        Partition(rule="rank"),
        Partition(rule="mean", one_sided="keep"),
        Partition(rule="topk", positives=1, negatives=1, duplicates="keep"),
        Partition(rule="threshold", threshold=1.0, max_positives=1, max_negatives=1),
        Partition(rule="best-worst"),
        Partition(rule="random-pair", max_responses=2),
    ]
)


def values_of(record: dict, text: str) -> list[float]:
    return [value for other, value in zip(record["responses"], record["rewards"]) if other == text]


@settings(fuzz, max_examples=60)
@given(st.lists(on_policy, min_size=1, max_size=4), partitions)
def test_nasty_texts_and_scores_are_dropped_and_counted(write_lines, build, tmp_path, records, partition):
    good = {"id": 1, "prompt": "good", "responses": ["x", "y"], "rewards": [2.0, 0.0]}
    records = [good, *records, good]
    path = write_lines(records)
    report = build(path, partition=partition, on_bad_record="drop", overwrite=True)
    store = TokenStore.open(tmp_path / "store")
    tokenizer = store.load_tokenizer()
    counts = report.counts
    dropped = sum(n for r, n in counts.items() if (r.unit, r.outcome) == ("groups", "dropped"))
    assert counts[why.GROUPS_READ] == len(records) == len(store) + dropped
    dropped = sum(n for r, n in counts.items() if (r.unit, r.outcome) == ("responses", "dropped"))
    assert counts[why.RESPONSES_READ] == counts[why.RESPONSES_KEPT] + dropped
    assert counts[why.RESPONSES_KEPT] == store.num_responses
    rows = [int(store.where(i).rpartition(":")[2]) for i in range(len(store))]
    assert rows == sorted(set(rows))
    assert {1, len(records)} <= set(rows)
    for sample, row in zip(store, rows):
        record = records[row - 1]
        assert tokenizer.decode(sample.prompt_tokens[1:]) == record["prompt"]
        kept = [tokenizer.decode(tokens[:-1]) for tokens in sample.response_tokens]
        assert all(math.isfinite(value) for value in sample.values_K)
        for text, value in zip(kept, sample.values_K):
            copies = values_of(record, text)
            assert copies, "a text that the record does not hold"
            assert math.isclose(value, sum(copies) / len(copies)) or value in copies
        best = [v for v, label in zip(sample.values_K, sample.labels_K) if label == 1]
        worst = [v for v, label in zip(sample.values_K, sample.labels_K) if label == -1]
        assert not best or not worst or min(best) > max(worst)


FORMS = {
    "canonical": {"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 0}]},
    "on_policy": {"prompt": "p", "responses": ["a", "b"], "rewards": [1, 0]},
    "ultrafeedback": {
        "instruction": "p",
        "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 0}],
    },
    "distilabel": {"instruction": "p", "generations": ["a", "b"], "ratings": [1, 0]},
}


@fuzz
@given(st.lists(st.sampled_from(sorted(FORMS)), min_size=1, max_size=24), st.sampled_from(["error", "drop"]))
def test_mixed_forms_stop_or_are_counted(write_lines, build, tmp_path, names, on_bad_record):
    path = write_lines([FORMS[name] for name in names])
    try:
        report = build(path, partition=Partition(rule="rank"), on_bad_record=on_bad_record, overwrite=True)
    except DataError:
        assert len(set(names)) > 1
        return
    assert report.counts[why.GROUPS_KEPT] == names.count(names[0])
    assert report.counts[why.BAD_RECORD] == len(names) - names.count(names[0])
    assert len(set(names[:16])) == 1
    assert on_bad_record == "drop" or len(set(names)) == 1


GOOD = {"prompt": "p", "responses": [{"text": "a", "label": 1}, {"text": "b", "label": -1}]}
CANNOT_BE_USED = {
    "no object": "null",
    "no label": {"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 0}]},
    "empty": {"prompt": "p", "responses": []},
}


@pytest.mark.parametrize("bad", CANNOT_BE_USED)
def test_a_record_that_cannot_be_used_is_dropped_and_counted_where_asked(write_lines, build, bad):
    path = write_lines([GOOD] * 17 + [CANNOT_BE_USED[bad]] + [GOOD])
    with pytest.raises(DataError, match=":18: "):
        build(path)
    report = build(path, on_bad_record="drop")
    assert (report.counts[why.GROUPS_KEPT], report.counts[why.BAD_RECORD]) == (18, 1)


def test_what_the_user_asked_to_stop_at_stops_also_where_bad_records_are_dropped(write_lines, build):
    one_sided = {"prompt": "p", "responses": [{"text": "a", "label": 1}, {"text": "b", "label": 1}]}
    path = write_lines([GOOD] * 17 + [one_sided])
    with pytest.raises(DataError, match=":18: a group needs positives and negatives"):
        build(path, partition=Partition(one_sided="error"), on_bad_record="drop")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_an_integer_of_thousands_of_digits_is_refused(tmp_path, name):
    text = '{"prompt": ' + "9" * 5000 + "}"
    (tmp_path / name).write_text(text if name == "a.jsonl" else f"[{text}]")
    with pytest.raises(DataError, match=r"a\.jsonl?:?.* integer string conversion"):
        list(read_records(str(tmp_path / name)))


@pytest.mark.acts("PreprocessOptions.schema_options")
def test_a_weighted_sum_beyond_32_bits_is_refused(write_lines, build):
    scores = [{"text": "a", "scores": {"x": 1e38}}, {"text": "b", "scores": {"x": 0}}]
    path = write_lines([{"instruction": "p", "input": "", "candidates": scores}])
    options = SchemaOptions(score_weights={"x": 10.0})
    with pytest.raises(DataError, match=r"the weighted sum of .* must be a finite number that fits 32 bits"):
        build(path, partition=Partition(rule="rank"), schema_options=options)


# Very long texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
@pytest.mark.parametrize(
    "text", ["a b " * 250_000, "a" * 1_000_000, "é" * 500_000], ids=["words", "one word", "accents"]
)
def test_a_million_characters_neither_stall_nor_pass(write_lines, tmp_path, sentencepiece_model, kind, text):
    model = str(sentencepiece_model)
    if kind == "HuggingFaceTokenizer":
        model = str(train_byte_level(tmp_path / "hf", special=["</s>"], chat_template=None, eos_token="</s>"))
    responses = [{"text": "yes", "label": 1}, {"text": text, "label": -1}, {"text": "no", "label": -1}]
    path = write_lines([{"prompt": "p", "responses": responses}])
    options = PreprocessOptions(
        tokenizer=TokenizerOptions(kind=kind, model=model), tokenize=TokenizeOptions(seq_length=4096)
    )
    started = time.process_time()
    report = preprocess([str(path)], tmp_path / "out", options)
    assert time.process_time() - started < 20
    assert report.counts[why.TOO_LONG] == 1
    assert report.counts[why.RESPONSES_KEPT] == 2


# Stores ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory, sentencepiece_model) -> Path:
    folder = tmp_path_factory.mktemp("store")
    (folder / "in.jsonl").write_bytes(LINES)
    tokenizer = TokenizerOptions(kind="SentencePieceTokenizer", model=str(sentencepiece_model))
    options = PreprocessOptions(
        tokenizer=tokenizer, tokenize=TokenizeOptions(seq_length=64), partition=Partition(rule="rank")
    )
    preprocess([str(folder / "in.jsonl")], folder / "store", options)
    return folder / "store"


@settings(fuzz, max_examples=150)
@given(st.data())
def test_a_store_cut_or_changed_at_any_byte_is_never_read(whole_store, tmp_path, data):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole_store, copy)
    path = data.draw(st.sampled_from(sorted(copy.iterdir())))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        store = TokenStore.open(copy)
    except UserError:
        return
    assert path.name == "meta.json"  # its white space
    assert store.meta == TokenStore.open(whole_store).meta
