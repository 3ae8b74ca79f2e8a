"""What the inspection says is what is there: numbers against a plain recount, each warning by its fault, digests."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from data_makers import STYLES, make_folder
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.inspect.inspection import Inspection, Records, inspect_records, inspect_store
from megatron_groupdpo.data.inspect.stats import Distribution, GroupBlock, Statistics
from megatron_groupdpo.data.inspect.verify import store_bytes, verify_store
from megatron_groupdpo.data.inspect.warnings import RULES
from megatron_groupdpo.data.preprocess.partition import Partition
from megatron_groupdpo.data.preprocess.pipeline import preprocess
from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
from megatron_groupdpo.data.store import format as fmt
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.text.tokenize import TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import DataError

# Statistics

LENGTHS = st.integers(0, 4000)
GROUPS = st.lists(
    st.tuples(
        LENGTHS,
        st.lists(
            st.tuples(LENGTHS, st.sampled_from([1, -1, 1, -1, 0]), st.sampled_from([0.0, 0.1, 0.7, -3.25, math.nan])),
            min_size=1,
            max_size=5,
        ),
    ),
    min_size=1,
    max_size=8,
)


def block_of(groups, start: int = 0) -> GroupBlock:
    responses = [response for _, group in groups for response in group]
    return GroupBlock(
        names=range(start, start + len(groups)),
        sizes_G=np.array([len(group) for _, group in groups]),
        prompt_lengths_G=np.array([prompt for prompt, _ in groups]),
        lengths_R=np.array([length for length, _, _ in responses]),
        labels_R=np.array([label for _, label, _ in responses], dtype=np.int8),
        values_R=np.array([value for _, _, value in responses]),
    )


def recount(groups) -> dict:
    """The same numbers, group by group."""
    found: dict = {"one-sided": [], "equal-values": [], "contradicting-labels": [], "gaps": [], "r": [], "ratios": []}
    for index, (_, group) in enumerate(groups):
        lengths, labels, values = zip(*group)
        valued, labelled = not any(map(math.isnan, values)), 0 not in labels
        sides = [[value for label, value in zip(labels, values) if label == side] for side in (1, -1)]
        if labelled and not all(sides):
            found["one-sided"].append(index)
        if valued and len(values) > 1:
            found["gaps"].append(max(values) - min(values))
            if max(values) == min(values):
                found["equal-values"].append(index)
        if valued and labelled and all(sides) and max(sides[1]) > min(sides[0]):
            found["contradicting-labels"].append(index)
        ranks = values if valued else labels if labelled else [0]
        if len(set(lengths)) > 1 and len(set(ranks)) > 1:
            found["r"].append(float(np.corrcoef(lengths, ranks)[0, 1]))
        if all(sides):
            means = [np.mean([n for n, label in zip(lengths, labels) if label == side]) for side in (1, -1)]
            found["ratios"].append(max(means[0], 1) / max(means[1], 1))
    return found


@settings(max_examples=200, deadline=None)
@given(groups=GROUPS, cut=st.integers(0, 8))
@example(groups=[(1, [(1, 1, 0.1), (2, -1, 0.1), (4, 1, 0.1)])], cut=0)  # their rounded mean is not 0.1
def test_statistics_are_those_of_a_plain_recount(groups, cut):
    stats = Statistics()
    stats.add(block_of(groups[:cut]))
    stats.add(block_of(groups[cut:], cut))
    expected = recount(groups)
    labels = [label for _, group in groups for _, label, _ in group]
    assert stats.num["groups"] == len(groups)
    assert stats.num["responses"] == len(labels)
    assert [stats.num[n] for n in ("positives", "negatives", "unlabelled")] == [labels.count(x) for x in (1, -1, 0)]
    for code in ("one-sided", "equal-values", "contradicting-labels"):
        assert stats.num[code] == len(expected[code])
        assert stats.examples.get(code, []) == [str(i) for i in expected[code][:5]]
    gaps, r = stats.distributions["value_gap"], stats.distributions["length_correlation"]
    assert (gaps.num, r.num) == (len(expected["gaps"]), len(expected["r"]))
    assert not r.num or r.mean == pytest.approx(np.mean(expected["r"]), abs=1e-9)
    assert not gaps.num or gaps.max == max(expected["gaps"])
    assert stats.num_compared == len(expected["ratios"])
    if expected["ratios"]:
        assert stats.length_ratio == pytest.approx(math.exp(np.mean(np.log(expected["ratios"]))))
    rows = [prompt + length for prompt, group in groups for length, _, _ in group]
    assert stats.distributions["row_length"].max == max(rows)
    assert stats.distributions["row_length"].mean == pytest.approx(np.mean(rows))
    json.dumps(stats.as_json(), allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.one_of(st.integers(0, 10**7), st.floats(-1e6, 1e6)), min_size=1, max_size=60),
    share=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_quantiles_are_right_to_three_digits(values, share):
    data = Distribution()
    data.add(np.array(values[:20], dtype=np.float64))
    data.add(np.array(values[20:], dtype=np.float64))
    exact = sorted(values)[math.ceil(round(share * len(values), 9)) - 1]
    assert data.quantile(share) == pytest.approx(exact, rel=0.0051, abs=1e-300)
    if all(isinstance(value, int) and value < 1000 for value in values):
        assert data.quantile(share) == exact
    assert data.points()[1].sum() == data.num == len(values)
    assert data.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-6)


# Warnings

ANSWERS = ["Anna has 4 apples.", "She has 12 = 3 * 4", "Good morning! Yes.", "What a day it is"]


def good(number: int) -> dict:
    """A record without fault: sides of about equal length, in any order of values."""
    texts = [f"{answer} {number}" for answer in ANSWERS]
    labels = [1, -1, 1, -1] if number % 2 else [-1, 1, -1, 1]
    entries = [{"text": text, "score": float(label), "label": label} for text, label in zip(texts, labels)]
    return {"prompt": f"Question {number}: how many apples?\n", "responses": entries}


def changed(number: int, **first: object) -> dict:
    """The same with the first response changed."""
    record = good(number)
    record["responses"][0] |= first
    return record


def all_changed(number: int, **change: object) -> dict:
    record = good(number)
    return record | {"responses": [response | change for response in record["responses"]]}


def as_chat(record: dict, **first: str) -> dict:
    turns = [[{"role": "assistant", "content": response["text"]}] for response in record["responses"]]
    if first:
        turns[0][0]["content"] = first["content"]
    responses = [response | {"text": turn} for response, turn in zip(record["responses"], turns)]
    return {"prompt": [{"role": "user", "content": record["prompt"]}], "responses": responses}


FAULTS_OF_RECORDS = {
    "duplicate-prompts": [good(1), good(2) | {"prompt": good(1)["prompt"]}],
    "duplicate-responses": [changed(1, text=good(1)["responses"][2]["text"]), good(2)],
    "one-sided": [changed(1, label=1) | {"responses": [good(1)["responses"][i] for i in (0, 2)]}, good(2)],
    "equal-values": [all_changed(1, score=0.25), good(2)],
    "contradicting-labels": [changed(1, score=-7.0), good(2)],
    "empty-responses": [changed(1, text=" \n"), good(2)],
    "bad-records": [{"prompt": "x", "responses": []}, good(1), good(2)],
    "role-markers": [changed(1, text="Four.\nUser: and now?"), good(2)],
    "control-names": [changed(1, text="Anna has four.</s>"), good(2)],
    "control-names-in-prompt": [as_chat(good(1) | {"prompt": "How many?<|endoftext|>"}), as_chat(good(2))],
    "template-in-prompt": [good(1) | {"prompt": "<|im_start|>user\nHow many?<|im_end|>\n"}, good(2)],
    "no-separator": [good(1) | {"prompt": "How many?"}, good(2) | {"prompt": "How many are there?"}],
    "length-bias": [all_changed(i) | {"responses": [
        response | {"text": response["text"] + " and so on" * (response["label"] == 1)}
        for response in good(i)["responses"]]} for i in (1, 2)],
}  # fmt: skip


def codes(inspection: Inspection) -> set[str]:
    return {finding.code for finding in inspection.findings}


def look_at_records(path: Path | str, **options) -> Inspection:
    return inspect_records(Records(inputs=[str(path)]), **options)


def test_records_without_fault_give_no_warning(write_lines):
    assert codes(look_at_records(write_lines([good(i) for i in range(20)]))) == set()
    assert codes(look_at_records(write_lines([as_chat(good(i)) for i in range(20)], "chat.jsonl"))) == set()


@pytest.mark.parametrize("code", FAULTS_OF_RECORDS)
def test_each_fault_of_records_gives_its_warning(write_lines, code):
    path = write_lines(FAULTS_OF_RECORDS[code])
    inspection = look_at_records(path)
    expected = {code}
    if code == "one-sided":  # a side alone has one value
        expected |= {"equal-values"}
    # so few responses: a change of one text is a change of its side's length
    assert codes(inspection) - {"length-bias"} == expected - {"length-bias"}
    assert code in codes(inspection)
    (finding,) = (finding for finding in inspection.findings if finding.code == code)
    assert finding.advice
    if code != "length-bias":
        rule = RULES[code]
        assert finding.share is not None
        assert finding.share > rule.above
        assert f"{finding.number:,} of " in finding.text
        assert finding.examples[0].startswith(f"{path}:")


@pytest.fixture
def chat_build(build, tmp_path):
    """``chat_build(records, style)``: a store made with a byte-level tokenizer and the style's chat template."""

    def run(path: Path, style: str = "qwen", **tokenize) -> TokenStore:
        folder = tmp_path / "tokenizer"
        if not folder.exists():
            make_folder(folder, *STYLES[style])
        options = PreprocessOptions(
            tokenizer=TokenizerOptions(kind="HuggingFaceTokenizer", model=str(folder)),
            tokenize=TokenizeOptions(**({"seq_length": 4096} | tokenize)),
            partition=Partition(one_sided="keep"),
        )
        preprocess([str(path)], tmp_path / "store", options, overwrite=True)
        return TokenStore.open(tmp_path / "store")

    return run


def look_at(store: TokenStore, **options) -> Inspection:
    return inspect_store(store, store.load_tokenizer(), **options)


@pytest.mark.parametrize("style", STYLES)
def test_a_chat_store_without_fault_gives_no_warning(write_lines, chat_build, style):
    inspection = look_at(chat_build(write_lines([as_chat(good(i)) for i in range(20)]), style))
    assert codes(inspection) == set(), [finding.text for finding in inspection.findings]
    assert sum(inspection.end_tokens.values()) == 80


def test_a_plain_store_without_fault_gives_no_warning(write_lines, build, tmp_path):
    build(write_lines([good(i) for i in range(20)]))
    inspection = look_at(TokenStore.open(tmp_path / "store"))
    assert codes(inspection) == set(), [finding.text for finding in inspection.findings]


SPOKEN = "Four.<|im_end|>\n<|im_start|>user\nAnd pears?"
RENDERED = {
    "prompt": "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n",
    "responses": [{"text": SPOKEN, "label": 1}, {"text": "Five.", "label": -1}],
    "rendered": True,
}
FAULTS_OF_STORES = {
    "template-not-applied": ([good(1), good(2)], {}),
    "control-tokens-inside": ([RENDERED, RENDERED | {"prompt": RENDERED["prompt"].replace("many", "few")}], {}),
    "escaped": ([as_chat(good(1), content=SPOKEN), as_chat(good(2))], {}),
    "role-markers": ([as_chat(good(1), content="Four.\n### Instruction: go on"), as_chat(good(2))], {}),
    "empty-responses": ([as_chat(changed(1, text=" ")), as_chat(good(2))], {}),
    "duplicate-prompts": ([as_chat(good(1)), as_chat(good(2) | {"prompt": good(1)["prompt"]})], {}),
    "one-sided": ([as_chat(good(1) | {"responses": good(1)["responses"][::2]}), as_chat(good(2))], {}),
    "responses-cut": (
        [as_chat(changed(1, text="word " * 3000))], {"seq_length": 99, "length_policy": "truncate-response"}
    ),
    "responses-too-long": ([as_chat(changed(1, text="word " * 3000)), as_chat(good(2))], {}),
    "prompts-cut": ([as_chat(good(1))], {"seq_length": 50, "length_policy": "truncate-prompt"}),
    "prompts-too-long": ([as_chat(good(1) | {"prompt": "word " * 3000}), as_chat(good(2))], {}),
}  # fmt: skip


@pytest.mark.parametrize("code", FAULTS_OF_STORES)
def test_each_fault_of_a_store_gives_its_warning(write_lines, chat_build, code):
    records, options = FAULTS_OF_STORES[code]
    inspection = look_at(chat_build(write_lines(records), **options))
    allowed = {"one-sided": {"equal-values"}, "responses-cut": {"missing-end"}, "escaped": {"role-markers"}}
    # so few responses: a change of one text is a change of its side's length
    assert {code} <= codes(inspection) <= {code, "length-bias"} | allowed.get(code, set())


def test_responses_that_a_template_makes_equal_are_found(write_lines, chat_build):
    # this template trims: texts that differ in white space have the same tokens
    record = as_chat(good(1), content=good(1)["responses"][2]["text"] + " ")
    inspection = look_at(chat_build(write_lines([record, as_chat(good(2))]), "llama3"))
    assert codes(inspection) - {"length-bias"} == {"same-tokens"}


def test_beginning_tokens_too_many_and_too_few(write_lines, chat_build, build, tmp_path):
    template, *names = STYLES["llama3"]
    make_folder(tmp_path / "tokenizer", "{{ bos_token }}" + template, *names)
    store = chat_build(write_lines([as_chat(good(1)), as_chat(good(2))], "chats.jsonl"))
    assert codes(look_at(store)) == {"double-bos"}
    build(write_lines([good(1), good(2)]), tokenize=TokenizeOptions(seq_length=99, add_bos="no"), overwrite=True)
    assert codes(look_at(TokenStore.open(tmp_path / "store"))) == {"missing-bos"}


def test_prompts_that_are_no_prefix_are_warned_of(write_lines, tmp_path, chat_build):
    # the last answer has a mark that earlier ones lack
    template = "{% for m in messages %}{{ '!' if loop.last and m.role == 'assistant' }}{{ m.content }}</s>{% endfor %}"
    make_folder(tmp_path / "tokenizer", template, ["</s>"], None, "</s>")
    first = as_chat(good(1))
    last = first["responses"][0]["text"]
    last += [{"role": "user", "content": "And pears?"}, *as_chat(good(3))["responses"][0]["text"]]
    inspection = look_at(chat_build(write_lines([first, as_chat(good(2))])))
    assert "not-a-prefix" in codes(inspection)
    (finding,) = (finding for finding in inspection.findings if finding.code == "not-a-prefix")
    assert finding.number == inspection.preprocessing[why.NO_PREFIX] == 1


def test_a_share_at_the_threshold_is_no_warning(write_lines):
    records = [good(i) for i in range(99)]
    assert codes(look_at_records(write_lines([*records, records[0]]))) == set(), "1 % of the groups"
    assert codes(look_at_records(write_lines([*records[:98], records[0]]))) == {"duplicate-prompts"}


# Sampling


def test_a_limit_bounds_what_is_looked_at_and_says_so(write_lines, build, tmp_path):
    path = write_lines([good(i) for i in range(200)])
    build(path)
    store = TokenStore.open(tmp_path / "store")
    done: list[int] = []
    inspection = look_at(store, limit=30, on_progress=done.append)
    assert sum(done) == 30
    assert sum(inspection.end_tokens.values()) == 120
    assert inspection.stats.num["groups"] == 200, "the arrays are read whole"
    assert "30 of 200 groups were looked at" in inspection.notes[0]
    for limit in (0, None, 200):
        assert look_at(store, limit=limit).notes == []
    done.clear()
    inspection = look_at_records(path, limit=30, on_progress=done.append)
    assert sum(done) == inspection.stats.num["groups"] == 30
    assert "the first 30 records" in inspection.notes[-1]
    for limit in (0, None, 200):
        assert look_at_records(path, limit=limit).stats.num["groups"] == 200


def test_a_store_whose_tokenizer_is_gone_still_gives_its_numbers(write_lines, build, tmp_path):
    build(write_lines([good(1), good(2)]))
    inspection = inspect_store(TokenStore.open(tmp_path / "store"), None)
    assert inspection.stats.num["responses"] == 8
    assert not inspection.end_tokens


# Digests


def test_every_changed_or_absent_file_is_found(write_lines, build, tmp_path):
    build(write_lines([good(i) for i in range(5)]))
    store = tmp_path / "store"
    read: list[int] = []
    num_files, num_bytes = verify_store(store, on_bytes=read.append)
    files = [path for path in sorted(store.iterdir()) if path.name != fmt.META]
    assert num_files == len(files)
    assert num_bytes == sum(read) == sum(path.stat().st_size for path in files) == store_bytes(store)
    contents = {path: path.read_bytes() for path in files}
    for path, content in contents.items():
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        written = json.loads((store / fmt.META).read_text())["files"][path.name]["sha256"]
        with pytest.raises(DataError, match=rf"1 of {num_files} files differ(?s:.)*  {path.name}: SHA-256 {written}"):
            verify_store(store)
        path.write_bytes(content)
    first, second, third = files[:3]
    first.unlink()
    second.write_bytes(contents[second][:-1])
    third.write_bytes(contents[third] + b"x")
    with pytest.raises(DataError, match=rf"3 of {num_files} files") as caught:
        verify_store(store)
    assert f"{first.name}: missing" in str(caught.value)
    for path in (second, third):
        size = f"{len(contents[path]):,} bytes were written, {path.stat().st_size:,} are there"
        assert f"{path.name}: {size}" in str(caught.value)


def test_a_change_that_opening_does_not_see_is_found(write_lines, build, tmp_path, monkeypatch):
    # opening reads 64 blocks of a file: small ones here, so that a small file has bytes between them
    monkeypatch.setattr(fmt, "_BLOCK_BYTES", 8)
    build(write_lines([good(i) for i in range(20)]))
    tokens = tmp_path / "store" / f"{fmt.TOKENS}.bin"
    size = tokens.stat().st_size
    assert size > 64 * 8 * 2
    with open(tokens, "r+b") as stream:
        stream.seek(8 + (size - 8) // 63 // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    TokenStore.open(tmp_path / "store")
    with pytest.raises(DataError, match=f"{tokens.name}: SHA-256"):
        verify_store(tmp_path / "store")


# The command


def test_the_command_prints_json_draws_and_verifies(write_lines, build, tool, tmp_path):
    build(write_lines([*(good(i) for i in range(6)), good(3)]))
    store = tmp_path / "store"
    done = tool("inspect_data", store, "--json", "--plot", tmp_path / "plots" / "a.png")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["statistics"]["groups"] == 7
    assert [warning["code"] for warning in found["warnings"]] == ["duplicate-prompts"]
    assert found["warnings"][0]["examples"] == ["6"]
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["a.png"]
    assert (tmp_path / "plots" / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = tool("inspect_data", "--verify", store)
    assert done.returncode == 0, done.stderr
    assert TokenStore.open(store).digest in done.stdout
    with open(store / "labels.npy", "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x05")
    refused = tool("inspect_data", "--verify", store)
    assert refused.returncode == 1
    assert "labels.npy: SHA-256" in refused.stderr


def test_a_page_holds_the_report_and_loads_nothing(write_lines, tool, tmp_path):
    records = [changed(1, text="Four.</s> <script>alert(1)</script>"), good(2)]
    path = write_lines(records, "a & b <i>.jsonl")
    assert tool("inspect_data", path, "--plot", tmp_path / "page.html").returncode == 0
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "control-names" in page
    assert "a &amp; b &lt;i&gt;.jsonl" in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=[\"'](?!#)", page), "only links into the page itself"


def test_real_data_give_the_warnings_they_should(real_data):
    solutions = look_at_records(real_data("gsm8k_model_solutions.jsonl"))
    found = {finding.code: finding for finding in solutions.findings}
    assert set(found) == {"one-sided", "equal-values", "no-separator"}
    assert found["one-sided"].number == found["equal-values"].number == 588
    judged = look_at_records(real_data("alpaca_eval_groups.jsonl"))
    found = {finding.code: finding for finding in judged.findings}
    assert set(found) == {"length-bias", "duplicate-responses", "no-separator"}
    assert found["length-bias"].number == pytest.approx(0.49, abs=0.005)
    assert judged.stats.num["groups"] == 400
    for name, size in (("gsm8k_train.jsonl", 7473), ("gsm8k_test.jsonl", 1319)):
        answers = inspect_records(Records(inputs=[str(real_data(name))], schema="sft"))
        assert answers.stats.num["groups"] == size
        assert codes(answers) == {"no-separator"}


def test_real_data_as_a_store_keep_their_length_bias(real_data, build, tmp_path):
    build(real_data("alpaca_eval_groups.jsonl"), partition=Partition(rule="topk", positives=8, negatives=8))
    inspection = look_at(TokenStore.open(tmp_path / "store"))
    bias = next(finding for finding in inspection.findings if finding.code == "length-bias")
    assert "positives have 1." in bias.text or "positives have 2." in bias.text
    assert inspection.stats.length_ratio > 1.5
