"""What ties cost and who breaks them; the date of a template; stores of another rendering version."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from chat_makers import DATED, make_chat_folder

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.inspect.inspection import inspect_store
from megatron_groupdpo.data.preprocess import pipeline
from megatron_groupdpo.data.preprocess.partition import Partition, partition_group
from megatron_groupdpo.data.preprocess.pipeline import Listeners, preprocess
from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.text.tokenize import RENDERING, TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import ConfigError, UserError
from megatron_groupdpo.types import GroupRecord, ResponseRecord


def group(values: Sequence[float], texts: Sequence[str] | None = None) -> GroupRecord:
    texts = texts or [f"text {i}" for i in range(len(values))]
    rows = tuple(ResponseRecord(text=text, value=value) for text, value in zip(texts, values))
    return GroupRecord(prompt="q", responses=rows, where="f:1")


def topk(values: Sequence[float], tie_break: str, texts: Sequence[str] | None = None, **options) -> list[int]:
    """The sign of each response."""
    rule = Partition(rule="topk", positives=2, negatives=2, tie_break=tie_break, **options)
    sides = partition_group(group(values, texts), rule)
    signs = dict(zip(sides.kept, sides.labels))
    return [signs.get(i, 0) for i in range(len(values))]


TIED = [5.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0]


def test_ties_are_dropped_unless_told_otherwise():
    assert topk(TIED, "drop") == [1, 0, 0, 0, 0, 0, 0]
    assert topk(TIED, "first") == [1, 1, 0, 0, -1, -1, 0]


def test_the_shortest_of_equals_is_taken_wherever_it_stands():
    texts = ["best", "longest one", "short", "middle", "longest two", "bb", "aaa"]
    assert topk(TIED, "length", texts) == [1, 0, 1, 0, 0, -1, -1]
    assert topk(TIED[::-1], "length", texts[::-1]) == [-1, -1, 0, 0, 1, 0, 1]


@pytest.mark.acts("Partition.tie_break")
def test_random_ties_depend_on_the_seed_and_the_texts_alone():
    draws = {tuple(topk(TIED, "random", seed=seed)) for seed in range(40)}
    assert len(draws) == 9, "any of the three at the top, any two of the three at the bottom"
    assert all(signs[0] == 1 and sum(map(abs, signs)) == 4 for signs in draws)
    texts = [f"text {i}" for i in range(7)]
    taken = {texts[i] for i, sign in enumerate(topk(TIED, "random", texts, seed=3)) if sign}
    mirrored = {texts[::-1][i] for i, sign in enumerate(topk(TIED[::-1], "random", texts[::-1], seed=3)) if sign}
    assert taken == mirrored


@pytest.mark.parametrize("tie_break", ["random", "length", "first"])
@pytest.mark.parametrize("values", [[1.0] * 5, [2.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0]])
def test_no_value_stands_on_both_sides(values, tie_break):
    assert topk(values, tie_break) == topk(values, "drop")


def test_tie_break_is_topks():
    with pytest.raises(ConfigError, match="--tie-break belongs to --partition topk, not to 'mean'"):
        Partition(rule="mean", tie_break="random")
    with pytest.raises(ConfigError, match="--seed belongs to"):
        Partition(rule="topk", positives=1, negatives=1, seed=1)
    Partition(rule="topk", positives=1, negatives=1, seed=1, tie_break="random")


def test_the_summary_and_inspect_say_what_ties_cost(build, write_lines, tmp_path):
    scores = [(2, 1, 1, 1)] * 4 + [(4, 3, 2, 1)]
    rows = [
        {"prompt": f"q{i}", "responses": [{"text": text, "score": score} for text, score in zip("abcd", row)]}
        for i, row in enumerate(scores)
    ]
    rule = {"rule": "topk", "positives": 1, "negatives": 1}
    report = build(write_lines(rows), partition=Partition(**rule))
    assert report.counts[why.TIED] == 12
    assert report.counts[why.TIED_OUT] == 4
    codes = {finding.code for finding in inspect_store(TokenStore.open(tmp_path / "store"), None).findings}
    assert {"ties", "dropped-one-sided"} <= codes
    report = build(write_lines(rows), partition=Partition(**rule, tie_break="first"), overwrite=True)
    assert report.counts[why.TIED] == 8
    assert report.counts[why.TIES_BROKEN] == 4
    assert report.counts[why.GROUPS_KEPT] == 5


# The date


@pytest.fixture
def dated(tmp_path: Path, write_lines) -> Callable[..., TokenStore]:
    """``dated(date, ...)``: a store of two groups, made on a day."""
    folder = make_chat_folder(tmp_path / "tokenizer", DATED)
    turns = [{"role": "user", "content": "q"}]
    source = write_lines([{"prompt": turns, "chosen": "a", "rejected": f"b{i}"} for i in range(4)])

    def make(monkeypatch: pytest.MonkeyPatch, day: str, *, date: str | None = None, stop: bool = False, **more):
        class Clock(datetime.date):
            @classmethod
            def today(cls):
                return datetime.date.fromisoformat(day)

        monkeypatch.setattr(pipeline.datetime, "date", Clock)
        options = PreprocessOptions(
            tokenizer=TokenizerOptions(kind="HuggingFaceTokenizer", model=str(folder)),
            tokenize=TokenizeOptions(seq_length=128, template_date=date),
        )
        monkeypatch.setattr(pipeline, "_CHUNK_RECORDS", 1)

        listeners = Listeners(on_progress=stopping_at(2)) if stop else None
        preprocess([str(source)], tmp_path / "out", options, listeners=listeners, commit_seconds=0, **more)
        return TokenStore.open(tmp_path / "out")

    return make


def stopping_at(call: int) -> Callable[[int], None]:
    """A listener that interrupts at its n-th call; the records of the calls before are on the disk."""
    calls = itertools.count(1)

    def on_progress(num_records: int) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt

    return on_progress


def prompts(store: TokenStore) -> set[str]:
    tokenizer = store.load_tokenizer()
    heads = [tokenizer.decode(sample.prompt_tokens.tolist()).split("<|im_end|>")[0] for sample in store]
    return {head.rpartition(": ")[2] for head in heads}


@pytest.mark.acts("TokenizeOptions.template_date")
def test_a_store_has_the_date_it_was_begun_on_or_was_told(dated, monkeypatch):
    store = dated(monkeypatch, "2031-02-03")
    assert prompts(store) == {"03 Feb 2031"}
    assert store.meta["options"]["tokenize"]["template_date"] == "2031-02-03"
    told = dated(monkeypatch, "2031-02-04", date="2031-02-03", overwrite=True)
    assert told.digest == store.digest
    assert dated(monkeypatch, "2031-02-04", overwrite=True).digest != store.digest


def test_a_store_resumed_on_another_day_keeps_its_date(dated, monkeypatch):
    whole = dated(monkeypatch, "2031-02-03").digest
    for day in ("2031-02-03", "2031-02-04"):
        with pytest.raises(KeyboardInterrupt):
            dated(monkeypatch, day, overwrite=True, stop=True)
    store = dated(monkeypatch, "2031-02-05", overwrite=True)
    assert prompts(store) == {"03 Feb 2031"}
    assert store.digest == whole


def test_a_date_is_for_templates_that_ask(build, write_lines):
    source = write_lines([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ConfigError, match="--template-date is for chat templates that ask"):
        build(source, tokenize=TokenizeOptions(seq_length=64, template_date="2031-02-03"))
    with pytest.raises(ConfigError, match="must be YYYY-MM-DD, got '3 Feb'"):
        TokenizeOptions(seq_length=64, template_date="3 Feb")


# The version


def test_half_a_store_of_another_rendering_is_refused_and_kept(build, write_lines, monkeypatch, tmp_path):
    source = write_lines([{"prompt": "q", "chosen": "a", "rejected": f"b{i}"} for i in range(4)])
    monkeypatch.setattr(pipeline, "_CHUNK_RECORDS", 1)

    with pytest.raises(KeyboardInterrupt):
        build(source, listeners=Listeners(on_progress=stopping_at(2)), commit_seconds=0)
    journal = tmp_path / ".store.partial" / "journal.json"
    left = json.loads(journal.read_text())
    assert left["identity"]["options"]["rendering"] == RENDERING
    for older in ({"rendering": RENDERING - 1}, {}):
        left["identity"]["options"].pop("rendering", None)
        left["identity"]["options"].update(older)
        journal.write_text(json.dumps(left))
        with pytest.raises(UserError, match=r"half a store with rendering version 1, .*--overwrite"):
            build(source)
        assert journal.is_file()
    report = build(source, overwrite=True)
    assert report.records_resumed == 0
    assert TokenStore.open(tmp_path / "store").meta["options"]["rendering"] == RENDERING


def test_a_store_without_a_rendering_version_opens(build, write_lines, tmp_path):
    from megatron_groupdpo.data.store import format as fmt

    build(write_lines([{"prompt": "q", "chosen": "a", "rejected": "b"}]))
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    del meta["options"]["rendering"]
    meta["digest"] = fmt.content_digest(meta)
    meta["meta_sha256"] = fmt.meta_digest(meta)
    (tmp_path / "store" / "meta.json").write_text(json.dumps(meta))
    store = TokenStore.open(tmp_path / "store")
    assert len(store) == 1
    assert store.digest == meta["digest"]
