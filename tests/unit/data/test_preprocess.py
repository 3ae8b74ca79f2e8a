"""Files to store: what is kept, what is counted, what stops the run, and that order and contents never vary."""

from __future__ import annotations

import gzip
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.counts import Counts, summary_table
from megatron_groupdpo.data.preprocess.partition import Partition
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.text.tokenize import TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import ConfigError, DataError, UserError


def labelled(prompt: str, *labels: int) -> dict:
    return {
        "prompt": prompt,
        "responses": [{"text": f"{prompt} {k}", "label": label} for k, label in enumerate(labels)],
    }


def scored(prompt: str, *scores: float) -> dict:
    return {"prompt": prompt, "responses": [f"{prompt} {k}" for k in range(len(scores))], "rewards": list(scores)}


def responses_balance(counts: Counts) -> bool:
    """Every response read was kept or dropped for one reason; so were the groups."""
    for unit in ("groups", "responses"):
        read = sum(n for r, n in counts.items() if r.unit == unit and r.outcome == "read")
        bad = counts[why.BAD_RECORD] if unit == "groups" else 0
        dropped = sum(n for r, n in counts.items() if r.unit == unit and r.outcome == "dropped")
        kept = counts[why.GROUPS_KEPT if unit == "groups" else why.RESPONSES_KEPT]
        if read != kept + dropped or bad > dropped:
            return False
    return True


def test_a_store_holds_the_partitioned_groups_in_order(write_lines, build, tmp_path):
    path = write_lines([scored("A", 3, 1, 2, 2), scored("B", 1, 1, 1, 1), scored("C", 0, 5, 4, 9)])
    report = build(path, partition=Partition(rule="topk", positives=1, negatives=1))
    store = TokenStore.open(tmp_path / "store")
    tokenizer = store.load_tokenizer()
    texts = [[tokenizer.decode(tokens[:-1]) for tokens in sample.response_tokens] for sample in store]
    assert texts == [["A 0", "A 1"], ["C 0", "C 3"]]
    assert [sample.labels_K.tolist() for sample in store] == [[1, -1], [-1, 1]]
    assert [sample.values_K.tolist() for sample in store] == [[3, 1], [0, 9]]
    assert [store.where(i) for i in range(2)] == [f"{path}:1", f"{path}:3"]
    assert report.schemas == ((str(path), "on_policy"),)
    assert report.counts[why.TIED] == 4
    assert report.counts[why.MIDDLE] == 4
    assert report.counts[why.TIED_OUT] == 1
    assert responses_balance(report.counts)
    assert report.digest == store.digest


def test_contents_do_not_depend_on_the_number_of_workers(write_lines, build, tmp_path):
    # enough for more chunks than may wait at once
    path = write_lines([labelled(f"Anna has {i} apples", 1, -1, -1) for i in range(800)])
    first = build(path)
    second = build(path, workers=2, output=tmp_path / "other")
    assert first.digest == second.digest
    assert first.counts == second.counts


def test_an_error_in_a_worker_names_the_first_bad_line(build, tmp_path):
    records = [labelled(f"{i}", 1, -1) for i in range(200)]
    records[70]["responses"] = []
    records[150]["responses"] = 3
    path = tmp_path / "groups.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())
    path.write_bytes(whole[:-9])  # reading fails while line 71 is on its way to a worker
    with pytest.raises(DataError, match=rf"^{path}:71: "):
        build(path, workers=2)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_each_source_has_its_own_schema(write_lines, build, tmp_path):
    write_lines([labelled("A", 1, -1)], "a.jsonl")
    write_lines([{"prompt": "B", "chosen": "x", "rejected": "y"}], "b.jsonl")
    report = build(str(tmp_path / "*.jsonl"))
    assert [name for _, name in report.schemas] == ["canonical", "pairs"]
    store = TokenStore.open(tmp_path / "store")
    assert [store.where(i).rsplit("/", 1)[1] for i in range(2)] == ["a.jsonl:1", "b.jsonl:1"]


@pytest.mark.acts("Partition.one_sided", "PreprocessOptions.partition")
def test_one_sided_groups_follow_the_policy(write_lines, build, tmp_path):
    path = write_lines([labelled("A", 1, -1), labelled("B", 1, 1), labelled("C", -1, -1)])
    dropped = build(path)
    assert (dropped.counts[why.GROUPS_KEPT], dropped.counts[why.ONE_SIDED]) == (1, 2)
    kept = build(path, partition=Partition(one_sided="keep"), output=tmp_path / "kept")
    assert (kept.counts[why.GROUPS_KEPT], kept.counts[why.KEPT_ONE_SIDED]) == (2, 1)
    assert kept.counts[why.ONE_SIDED] == 1, "without positives there is no NLL to keep it for"
    with pytest.raises(DataError, match=rf"^{path}:2: a group needs positives and negatives, got 2 and 0"):
        build(path, partition=Partition(one_sided="error"), output=tmp_path / "error")
    assert responses_balance(dropped.counts)
    assert responses_balance(kept.counts)


def test_a_group_that_loses_a_side_to_its_length_is_counted(write_lines, build):
    record = labelled("A", 1, -1)
    record["responses"][1]["text"] = "word " * 500
    report = build(write_lines([record, labelled("B", 1, -1)]), tokenize=TokenizeOptions(seq_length=64))
    assert report.counts[why.BECAME_ONE_SIDED] == 1
    assert report.counts[why.TOO_LONG] == 1
    assert report.counts[why.GROUP_DROPPED] == 1
    assert responses_balance(report.counts)


def test_single_answers_become_groups_of_one_positive(write_lines, build, tmp_path):
    report = build(write_lines([{"question": "Q", "answer": "A"}]), schema="sft")
    (sample,) = TokenStore.open(tmp_path / "store")
    assert sample.labels_K.tolist() == [1]
    assert math.isnan(sample.values_K[0])
    assert report.counts[why.KEPT_ONE_SIDED] == 1


@pytest.mark.acts("PreprocessOptions.tokenize")
def test_reference_log_probabilities_of_truncated_texts_are_forgotten(write_lines, build, tmp_path):
    record = labelled("A", 1, -1)
    record["responses"][0] |= {"ref_logp": -3.5}
    record["responses"][1] |= {"ref_logp": -900.0, "text": "word " * 500}
    options = TokenizeOptions(seq_length=64, length_policy="truncate-response")
    build(write_lines([record]), tokenize=options)
    ref_logps = TokenStore.open(tmp_path / "store").ref_logps_R
    assert ref_logps[0] == -3.5
    assert math.isnan(ref_logps[1])


@pytest.mark.acts("PreprocessOptions.schema", "PreprocessOptions.on_bad_record")
def test_bad_records_stop_or_are_counted(write_lines, build, tmp_path):
    path = write_lines([labelled("A", 1, -1), {"prompt": "B"}, labelled("C", 1)])
    for schema in ("auto", "canonical"):
        with pytest.raises(DataError, match=rf"^{path}:2: the field 'responses' is required"):
            build(path, schema=schema)
    assert build(path, on_bad_record="drop").counts[why.BAD_RECORD] == 2
    report = build(path, schema="canonical", on_bad_record="drop", overwrite=True)
    assert report.counts[why.BAD_RECORD] == 2
    assert report.counts[why.GROUPS_KEPT] == 1


def test_nothing_kept_writes_nothing_and_says_why(write_lines, build, tmp_path):
    path = write_lines([labelled("A", 1, 1)])
    with pytest.raises(DataError, match=r"(?s)no group was kept.*one-sided"):
        build(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.acts("PreprocessOptions.tokenizer", "TokenizerOptions.model")
def test_another_tokenizer_is_refused_when_the_store_is_used(write_lines, build, train_sentencepiece, tmp_path):
    build(write_lines([labelled("A", 1, -1)]))
    store = TokenStore.open(tmp_path / "store")
    other = TokenizerOptions(kind="SentencePieceTokenizer", model=str(train_sentencepiece(vocab_size=400)))
    with pytest.raises(DataError, match="the store was made with the tokenizer"):
        store.load_tokenizer(other)


def test_options_that_make_no_sense_are_refused(write_lines, build):
    path = write_lines([labelled("A", 1, -1)])
    with pytest.raises(ConfigError, match="--workers"):
        build(path, workers=0)
    with pytest.raises(ConfigError, match="--on-bad-record"):
        build(path, on_bad_record="maybe")
    with pytest.raises(DataError, match="did you mean 'canonical'"):
        build(path, schema="cannonical")


junk = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "label", "score"]), inner),
    max_leaves=6,
)
response = st.fixed_dictionaries({"text": st.text(max_size=8) | junk, "label": st.sampled_from([1, -1]) | junk})
record = st.fixed_dictionaries(
    {"prompt": st.text(max_size=8) | junk, "responses": st.lists(response, max_size=4) | junk}
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(record, min_size=1, max_size=5))
def test_any_junk_is_an_error_or_a_counted_drop(write_lines, build, tmp_path, records):
    good = labelled("A", 1, -1)
    path = write_lines([good, *records])
    report = build(path, schema="canonical", on_bad_record="drop", overwrite=True)
    store = TokenStore.open(tmp_path / "store")
    assert len(store) == report.counts[why.GROUPS_KEPT]
    assert report.counts[why.GROUPS_READ] == len(records) + 1
    assert responses_balance(report.counts)
    for sample in store:
        source = [good, *records][int(store.where(sample.group_id).rsplit(":", 1)[1]) - 1]
        kept = [r for r in source["responses"] if r["text"].strip()]
        assert sample.labels_K.tolist() == [r["label"] for r in kept]


def test_a_million_characters_are_dropped_not_swallowed(write_lines, build):
    record = labelled("A", 1, -1, -1)
    record["responses"][2]["text"] = "a b" * 350_000
    report = build(write_lines([record]))
    assert report.counts[why.TOO_LONG] == 1
    assert report.counts[why.RESPONSES_KEPT] == 2


def test_the_summary_shows_what_happened_and_hides_zeros():
    table = summary_table(Counts({why.GROUPS_READ: 1200, why.GROUPS_KEPT: 3, why.TIED: 0}))
    assert table.splitlines() == ["groups     read       1,200", "groups     kept           3"]


# Real data ---------------------------------------------------------------------------------------------------


def test_the_verified_solutions_go_through_unchanged(real_data, build, tmp_path):
    path = real_data("gsm8k_model_solutions.jsonl")
    report = build(path)
    assert report.schemas[0][1] == "verified"
    assert report.counts[why.GROUPS_READ] == 1319
    assert report.counts[why.ONE_SIDED] == 588
    assert report.counts[why.GROUPS_KEPT] == 731
    assert responses_balance(report.counts)
    store = TokenStore.open(tmp_path / "store")
    tokenizer = store.load_tokenizer()
    lines = path.read_text(encoding="utf-8").splitlines()
    for sample in list(store)[::50]:
        record = json.loads(lines[int(store.where(sample.group_id).rsplit(":", 1)[1]) - 1])
        assert tokenizer.decode(sample.prompt_tokens) == record["question"]
        solutions = [entry for entry in record.values() if isinstance(entry, dict)]
        assert [tokenizer.decode(tokens) for tokens in sample.response_tokens] == [s["solution"] for s in solutions]
        assert [label == 1 for label in sample.labels_K] == [s["is_correct"] for s in solutions]


@pytest.mark.acts("Partition.duplicates")
def test_the_judged_answers_go_through_with_topk(real_data, build, tmp_path):
    path = real_data("alpaca_eval_groups.jsonl")
    eight = {"rule": "topk", "positives": 8, "negatives": 8}
    report = build(path, partition=Partition(**eight, duplicates="keep"))
    assert report.schemas[0][1] == "on_policy"
    assert report.counts[why.GROUPS_READ] == 400
    assert report.counts[why.RESPONSES_READ] == 6400
    assert report.counts[why.TIED] == 340
    assert responses_balance(report.counts)
    without = build(path, partition=Partition(**eight), output=tmp_path / "without")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    num_distinct = sum(len(set(record["all_generated_responses"])) for record in records)
    assert without.counts[why.DUPLICATE] == 6400 - num_distinct > 0
    assert responses_balance(without.counts)


def test_the_worked_answers_go_through_as_sft(real_data, build):
    report = build(real_data("gsm8k_test.jsonl"), schema="sft")
    assert report.counts[why.GROUPS_KEPT] == 1319


# The command -------------------------------------------------------------------------------------------------


def test_the_command_builds_a_store_and_sums_up(tool, write_lines, sentencepiece_model, tmp_path):
    path = write_lines([scored("A", 3, 1, 2), scored("B", 1, 1, 1)])
    arguments = ["--input", path, "--output", tmp_path / "out", "--seq-length", 64, "--partition", "mean"]
    arguments += ["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", sentencepiece_model]
    result = tool("preprocess_data", *arguments)
    assert result.returncode == 0, result.stderr
    assert f"{path}: schema on_policy" in result.stderr
    assert "tied at the boundary" in result.stdout
    assert len(TokenStore.open(tmp_path / "out")) == 1
    again = tool("preprocess_data", *arguments)
    assert again.returncode == 1
    assert "error: " in again.stderr
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr


def test_the_command_leaves_nothing_after_an_error(tool, write_lines, sentencepiece_model, tmp_path):
    path = write_lines([*[labelled(f"{i}", 1, -1) for i in range(100)], '{"prompt": '])
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sentencepiece_model]
    result = tool("preprocess_data", "--input", path, "--output", tmp_path / "out", "--seq-length", 64, *tokenizer)
    assert result.returncode == 1
    assert f"error: {path}:101: broken JSON" in result.stderr
    assert "Traceback" not in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_every_policy_error_is_a_user_error():
    assert issubclass(DataError, UserError)
    assert issubclass(ConfigError, UserError)
