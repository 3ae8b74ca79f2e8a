"""Groups as text: what is trained on is marked, what is asked for is shown, what cannot act is refused."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_makers import STYLES, make_folder
from hypothesis import given
from hypothesis import strategies as st

from megatron_groupdpo.data.inspect import show
from megatron_groupdpo.data.preprocess.partition import Partition
from megatron_groupdpo.data.preprocess.pipeline import preprocess
from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.text.tokenize import TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import GroupRecord, GroupSample, Message, ResponseRecord

Command = Callable[..., str]


@pytest.fixture
def command(repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``command(...)``: what the tool prints for these words."""
    monkeypatch.setenv("COLUMNS", "80")
    spec = importlib.util.spec_from_file_location("inspect_data", repository / "tools" / "inspect_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: object) -> str:
        capsys.readouterr()
        module.main([str(word) for word in words])
        return capsys.readouterr().out

    return run


def labelled(prompt: str, *labels: int, scores: tuple[float, ...] = ()) -> dict:
    responses = [{"text": f"{prompt} {k}", "label": label} for k, label in enumerate(labels)]
    for response, score in zip(responses, scores):
        response["score"] = score
    return {"prompt": prompt, "responses": responses}


def conversation(response: str, follow_up: str, answer: str) -> dict:
    turns = [("assistant", response), ("user", follow_up), ("assistant", answer)]
    several = [{"role": role, "content": content} for role, content in turns]
    return {
        "prompt": [{"role": "user", "content": "Go on"}],
        "responses": [{"text": several, "label": 1}, {"text": several[:1], "label": -1}],
    }


@pytest.fixture
def chat_store(write_lines, tmp_path) -> Path:
    options = PreprocessOptions(
        tokenizer=TokenizerOptions(
            kind="HuggingFaceTokenizer", model=str(make_folder(tmp_path / "tokenizer", *STYLES["qwen"]))
        ),
        tokenize=TokenizeOptions(seq_length=512),
    )
    preprocess([str(write_lines([conversation("First one.", "And then?", "Last 12.")]))], tmp_path / "chat", options)
    return tmp_path / "chat"


def test_trained_and_context_tokens_have_their_marks(chat_store, command):
    shown = command("show", chat_store)
    lines = shown.splitlines()
    assert lines[0].startswith("group 0 (")
    assert lines[0].endswith("groups.jsonl:1), 2 responses: 1 positive, 1 negative")
    assert "· Go on<|im_end|>" in lines
    head = next(line for line in lines if line.startswith("response 0"))
    sample = TokenStore.open(chat_store)[0]
    assert sample.response_masks[0] is not None
    size, trained = len(sample.response_tokens[0]), int(sample.response_masks[0].sum())
    assert head == f"response 0  POSITIVE  no value  {size} tokens, {trained} trained on"
    first = lines.index(head)
    assert lines[first + 1] == "┃ First one.<|im_end|>"
    assert "· And then?<|im_end|>" in lines[first + 2 :]
    assert lines[lines.index("", first) - 1] == "┃ Last 12.<|im_end|>"
    assert "\x1b" not in shown, "no colour where it is not a terminal"


def test_every_token_can_be_listed(chat_store, command):
    store = TokenStore.open(chat_store)
    shown = command("show", chat_store, "--tokens")
    trained = re.findall(r"(?:^┃ |  )(\d+):", "\n".join(re.findall(r"^┃ .*$", shown, re.MULTILINE)), re.MULTILINE)
    sample = store[0]
    expected = [sample.response_tokens[0][sample.response_masks[0]], sample.response_tokens[1]]
    assert [int(i) for i in trained] == np.concatenate(expected).tolist()


def test_control_tokens_that_decode_to_nothing_are_named(write_lines, build, tmp_path, command):
    build(write_lines([labelled("How many", 1, -1)]))
    shown = command("show", tmp_path / "store")
    assert "· [begin]How many\n" in shown
    assert "┃ How many 0[end]\n" in shown


def test_lines_keep_the_width_and_the_text(write_lines, command):
    text = "word " * 60 + "\n\n  indented\x1b[2J" + "x" * 200
    record = {"prompt": "P", "responses": [{"text": text, "label": 1}, {"text": "b", "label": -1}]}
    shown = command("show", write_lines([record]), "--width", 40)
    start = shown.index("response 0")
    body = shown[start : shown.index("\nresponse 1")].splitlines()[1:]
    assert max(map(len, body)) <= 40
    assert "\x1b" not in shown, "a text may not drive the terminal"
    assert "\\x1b[2J" in shown.replace("\n  ", "")
    kept = "".join("".join(body).split())
    assert kept == "".join(text.replace("\x1b", "\\x1b").split())
    assert any(line.startswith("    indented") for line in body)


def test_colour_adds_escapes_alone():
    record = GroupRecord(
        prompt=(Message(role="user", content="Q"),),
        responses=(ResponseRecord(text="A", label=1, value=2.5), ResponseRecord(text="B")),
        where="f:1",
    )
    plain = show.show_record(record, show.Screen())
    coloured = show.show_record(record, show.Screen(colour=True))
    assert coloured != plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert "POSITIVE  value 2.5  1 characters" in plain
    assert "no label  no value" in plain
    assert "· [user]\n· Q" in plain


RECORDS = [
    labelled("A", 1, -1, scores=(1.0, 0.0)),
    labelled("B", 1, 1, scores=(1.0, 0.5)),
    labelled("C", 1, -1, scores=(0.0, 1.0)),
    labelled("D", 1, -1, scores=(3.0, 3.0)),
]


@pytest.mark.parametrize("kind", ["records", "store"])
def test_groups_are_chosen_by_number_place_kind_and_seed(write_lines, build, tmp_path, command, kind):
    path = source = write_lines(RECORDS)
    if kind == "store":
        build(path, partition=Partition(one_sided="keep"))
        source = tmp_path / "store"

    def chosen(*words: object) -> list[str]:
        found = re.findall(rf"\({re.escape(str(path))}:(\d)\)", command("show", source, *words))
        return ["ABCD"[int(line) - 1] for line in found]

    assert chosen() == ["A"]
    assert chosen("--count", 3) == ["A", "B", "C"]
    assert chosen("--index", 2, 0) == ["C", "A"]
    assert chosen("--where", f"{path}:2") == ["B"]
    assert chosen("--only", "one-sided") == ["B"]
    assert chosen("--only", "contradicting", "--count", 9) == ["C"]
    assert chosen("--only", "equal-values", "--count", 9) == ["D"]
    draws = {frozenset(chosen("--random", seed, "--count", 2)) for seed in range(40)}
    assert all(len(draw) == 2 for draw in draws)
    assert set().union(*draws) == set("ABCD")
    assert chosen("--random", 5) == chosen("--random", 5)
    with pytest.raises(DataError, match="--index"):
        command("show", source, "--index", 4)
    with pytest.raises(DataError, match="--where"):
        command("show", source, "--where", f"{path}:9")
    other = write_lines(RECORDS[:1], "other.jsonl")
    with pytest.raises(DataError, match="no group is one-sided"):
        command("show", other, "--only", "one-sided")


def test_masked_groups_and_cut_ones_are_found(chat_store, write_lines, build, tmp_path, command):
    assert command("show", chat_store, "--only", "masked").startswith("group 0")
    with pytest.raises(DataError, match="no group is no-end"):
        command("show", chat_store, "--only", "no-end")
    long = labelled("A", 1, -1)
    long["responses"][1]["text"] = "word " * 99
    options = TokenizeOptions(seq_length=64, length_policy="truncate-response")
    build(write_lines([labelled("B", 1, -1), long]), tokenize=options)
    assert command("show", tmp_path / "store", "--only", "no-end").startswith("group 1 ")


@given(num=st.integers(1, 400), seed=st.integers(0, 10**6))
def test_the_shuffled_walk_visits_every_row_once(num, seed):
    assert sorted(show._shuffled(num, seed)) == list(range(num))


def test_a_draw_from_a_stream_takes_each_alike():
    records = [GroupRecord(prompt=str(i), responses=(), where=f"f:{i}") for i in range(5)]
    taken = [record.prompt for seed in range(3000) for record in show._reservoir(iter(records), 2, seed)]
    assert [taken.count(str(i)) / 3000 for i in range(5)] == pytest.approx([0.4] * 5, abs=0.04)


def test_a_filter_asks_for_what_it_names():
    def sample(*masks: list[bool] | None) -> GroupSample:
        return GroupSample(
            group_id=0, first_response_id=0, prompt_tokens=np.array([1]),
            response_tokens=tuple(np.array([5, 2]) for _ in masks),
            response_masks=tuple(None if mask is None else np.array(mask) for mask in masks),
            labels_K=np.ones(len(masks)), values_K=np.ones(len(masks)),
        )  # fmt: skip

    assert show.keeps("one-sided", [1, 1], [math.nan] * 2, None, frozenset())
    assert not show.keeps("one-sided", [1, 0], [math.nan] * 2, None, frozenset()), "unknown is not one-sided"
    assert not show.keeps("equal-values", [1, -1], [math.nan] * 2, None, frozenset())
    assert show.keeps("masked", [1, -1], [0, 0], sample(None, [False, True]), frozenset())
    assert not show.keeps("masked", [1, -1], [0, 0], sample(None, None), frozenset())
    assert show.keeps("no-end", [1], [0], sample(None), frozenset({3}))
    assert not show.keeps("no-end", [1], [0], sample(None), frozenset({2, 3}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{records}", "--tokenizer-model", "x"], "--tokenizer-model and --tokenizer-type go together for records"),
        (["{records}", "--verify"], "--verify is for a token store"),
        (["{records}", "--seed", "1"], "--seed is for a token store"),
        (["show", "{records}", "--tokens"], "--tokens is for a token store"),
        (["show", "{records}", "--only", "masked"], "--only masked asks about tokens"),
        (["{store}", "--schema", "pairs"], "--schema is for records"),
        (["{store}", "--score-weights", "a=1"], "--score-weights is for records"),
        (["{store}", "{records}"], "one token store at a time"),
        (["{store}", "--verify", "--json"], "leave --json out"),
        (["{store}", "--plot", "a.pdf"], r"--plot must end in \.png or \.html"),
        (["{records}", "--limit", "-1"], "--limit must be at least 0"),
        (["show", "{store}", "--count", "0"], "--count must be at least 1"),
        (["show", "{store}", "--index", "1", "--count", "2"], "--count goes with"),
    ],
)
def test_an_option_that_cannot_act_is_refused(write_lines, build, tmp_path, command, words, message):
    records = write_lines(RECORDS[:1])
    build(records)
    with pytest.raises(ConfigError, match=message):
        command(*(word.format(records=records, store=tmp_path / "store") for word in words))
