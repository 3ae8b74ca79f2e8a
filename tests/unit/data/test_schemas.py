# ruff: noqa: E501 (a record a line)
"""Each record form is recognised, alone among all, and read as its own documentation says."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from megatron_groupdpo.data.schemas import SCHEMAS, SchemaOptions, choose_schema, schema_named
from megatron_groupdpo.data.schemas.fields import weights_from
from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import GroupRecord, Message


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# (schema, record, texts, values, labels); every prompt reads "Q".
CASES: list[tuple[str, dict[str, Any], list[str], list[float | None], list[int | None]]] = [
    ("canonical", {"prompt": "Q", "responses": [{"text": "a", "score": 2, "label": 1}, {"text": "b", "score": 1.5, "label": -1}]},
     ["a", "b"], [2.0, 1.5], [1, -1]),
    ("canonical", {"prompt": "Q", "responses": [{"text": "a", "rank": 2}, {"text": "b", "rank": 1}]},
     ["a", "b"], [-2.0, -1.0], [None, None]),
    ("pairs", {"prompt": "Q", "chosen": "a", "rejected": "b"}, ["a", "b"], [None, None], [1, -1]),
    ("pairs", {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 4.0, "score_rejected": 1},
     ["a", "b"], [4.0, 1.0], [1, -1]),
    ("ultrafeedback", {"instruction": "Q", "completions": [{"response": "a", "overall_score": 7.5, "model": "m"}, {"response": "b", "overall_score": 8, "model": "n"}]},
     ["a", "b"], [7.5, 8.0], [None, None]),
    ("on_policy", {"prompt": "Q", "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [0.1, -3, 0.5]},
     ["a", "b", "c"], [0.1, -3.0, 0.5], [None] * 3),
    ("on_policy", {"prompt": "Q", "all_generated_responses": ["a", "b"], "scores": [0.1, 2], "chosen": "b", "rejected": "a"},
     ["a", "b"], [0.1, 2.0], [None] * 2),
    ("on_policy", {"prompt": "Q", "responses": ["a", "b"], "rewards": [0, 1]}, ["a", "b"], [0.0, 1.0], [None] * 2),
    ("reward", {"prompt": "Q", "A0": "a", "A1": "b", "A10": "d", "A2": "c", "score_A0": 0.5, "score_A1": 1, "score_A2": 2, "score_A10": 3},
     ["a", "b", "c", "d"], [0.5, 1.0, 2.0, 3.0], [None] * 4),
    ("nectar", {"prompt": "Q", "answers": [{"answer": "a", "rank": 3.0}, {"answer": "b", "rank": 1.0}]},
     ["a", "b"], [-3.0, -1.0], [None] * 2),
    ("mix_instruct", {"instruction": "Q", "input": "", "candidates": [{"text": "a", "scores": {"bart": -2.5}}, {"text": "b", "scores": {"bart": -1}}]},
     ["a", "b"], [-2.5, -1.0], [None] * 2),
    ("distilabel", {"instruction": "Q", "generations": ["a", "b"], "ratings": [5, 3]}, ["a", "b"], [5.0, 3.0], [None] * 2),
    ("nemo_rl", {"context": "Q", "completions": [{"rank": 0, "completion": "a"}, {"rank": 1, "completion": "b"}]},
     ["a", "b"], [0.0, -1.0], [None] * 2),
    ("helpsteer3", {"context": "Q", "response1": "a", "response2": "b", "overall_preference": -2},
     ["a", "b"], [2.0, -2.0], [1, -1]),
    ("helpsteer3", {"context": "Q", "response1": "a", "response2": "b", "overall_preference": 1},
     ["a", "b"], [-1.0, 1.0], [-1, 1]),
    ("verified", {"question": "Q", "ground_truth": "4", "small": {"solution": "a", "is_correct": False}, "big": {"is_correct": True, "solution": "b"}},
     ["a", "b"], [0.0, 1.0], [-1, 1]),
]  # fmt: skip

BROKEN_FIELDS = [
    ("canonical", ("responses", 0, "score"), "high"),
    ("canonical", ("responses", 0, "label"), 0),
    ("canonical", ("responses", 1, "text"), 7),
    ("canonical", ("prompt",), None),
    ("pairs", ("chosen",), 3),
    ("ultrafeedback", ("completions", 1, "overall_score"), math.nan),
    ("on_policy", ("all_rm_scores", 2), math.inf),
    ("on_policy", ("all_rm_scores", 2), 1e300),
    ("on_policy", ("all_rm_scores", 2), True),
    ("on_policy", ("all_rm_scores",), [1, 2]),
    ("reward", ("score_A2",), "2"),
    ("nectar", ("answers", 0, "rank"), None),
    ("mix_instruct", ("candidates", 0, "scores"), {}),
    ("distilabel", ("ratings", 0), None),
    ("nemo_rl", ("completions",), {"rank": 0}),
    ("helpsteer3", ("overall_preference",), "2"),
    ("verified", ("small", "is_correct"), "yes"),
    ("verified", ("question",), "half a pair: \ud800"),
]


def read(name: str, record: dict[str, Any], options: SchemaOptions | None = None) -> GroupRecord:
    return schema_named(name).parse(record, "f.jsonl:7", options or SchemaOptions())


@pytest.mark.parametrize(("name", "record", "texts", "values", "labels"), CASES)
def test_a_record_is_recognised_and_read(name, record, texts, values, labels):
    assert choose_schema("auto", [(record, "f.jsonl:1")]).name == name
    group = read(name, record)
    assert group.prompt == "Q"
    assert group.where == "f.jsonl:7"
    assert [response.text for response in group.responses] == texts
    assert [response.value for response in group.responses] == values
    assert [response.label for response in group.responses] == labels


def test_every_schema_has_a_record_that_is_read_and_one_that_is_broken():
    tested_apart = {"ms_swift", "sft"}  # below: messages, and not to be detected
    wanted = {schema.name for schema in SCHEMAS} - tested_apart
    assert {name for name, *_ in CASES} == wanted
    assert {name for name, *_ in BROKEN_FIELDS} == wanted


@pytest.mark.parametrize(("name", "path", "value"), BROKEN_FIELDS)
def test_a_broken_field_is_refused_with_its_place(name, path, value):
    record = copy.deepcopy(next(case[1] for case in CASES if case[0] == name))
    target: Any = record
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(DataError, match=r"^f\.jsonl:7: ") as caught:
        read(name, record)
    named = [str(key) for key in path if isinstance(key, str)]
    assert any(key in str(caught.value) for key in named)


REQUIRED = [
    ("canonical", "prompt responses"), ("pairs", "chosen rejected"), ("ultrafeedback", "instruction completions"),
    ("on_policy", "prompt all_rm_scores"), ("reward", "prompt score_A1"), ("nectar", "prompt answers"),
    ("mix_instruct", "instruction candidates"), ("distilabel", "instruction generations ratings"),
    ("nemo_rl", "context completions"), ("helpsteer3", "context response1 response2 overall_preference"),
    ("verified", "question"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in REQUIRED for key in keys.split()])
def test_a_missing_field_is_named(name, key):
    record = dict(next(case[1] for case in CASES if case[0] == name))
    del record[key]
    with pytest.raises(DataError, match=rf"^f\.jsonl:7: the field '{key}' is required"):
        read(name, record)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("canonical", {"prompt": "Q", "responses": [{"text": "a", "score": 1}]}),
        ("on_policy", {"prompt": "Q", "responses": ["a"], "rewards": [1]}),
        ("reward", {"prompt": "Q", "A0": "a", "score_A0": 1}),
        ("verified", {"question": "Q", "one": {"solution": "a", "is_correct": True}}),
    ],
)
def test_a_group_with_one_response_is_refused(name, record):
    with pytest.raises(DataError, match=r"f\.jsonl:7: a group needs at least 2 responses, got 1"):
        read(name, record)


def test_half_scored_groups_are_refused():
    record = {"prompt": "Q", "responses": [{"text": "a", "score": 1}, {"text": "b"}]}
    with pytest.raises(DataError, match="either every response of a group has a value or none"):
        read("canonical", record)


def test_a_score_and_a_rank_are_no_one_scale():
    record = {"prompt": "Q", "responses": [{"text": "a", "score": 1}, {"text": "b", "rank": 1}]}
    with pytest.raises(DataError, match=r"f\.jsonl:7: of the responses, 1 have a score and 1 only a rank"):
        read("canonical", record)
    record["responses"][1]["score"] = 2
    assert [response.value for response in read("canonical", record).responses] == [1, 2]


def test_a_score_has_one_weight():
    assert weights_from(["a=1", "b=0.5"]) == {"a": 1, "b": 0.5}
    with pytest.raises(ConfigError, match="--score-weights gives 'a' twice"):
        weights_from(["a=1", "a=2"])


def test_messages_are_read_for_prompts_and_responses():
    record = {"prompt": [user("Q")], "responses": [{"text": [assistant("a")]}, {"text": "b"}]}
    group = read("canonical", record)
    assert group.prompt == (Message(role="user", content="Q"),)
    assert group.responses[0].text == (Message(role="assistant", content="a"),)
    record["prompt"] = [{"role": "user"}]
    with pytest.raises(DataError, match="'content' is required"):
        read("canonical", record)


@pytest.mark.parametrize("explicit", [True, False])
def test_the_prompt_of_a_pair_of_conversations_is_their_shared_start(explicit):
    shared = [{"role": "system", "content": "S"}, user("Q")]
    record = {"chosen": [*shared, assistant("a")], "rejected": [*shared, assistant("b")]}
    if explicit:
        record["prompt"] = "Q"
    group = read("pairs", record)
    assert [m.content for m in group.prompt] == ["S", "Q"]
    assert [r.text[0].content for r in group.responses] == ["a", "b"]


def test_the_answers_of_a_pair_are_not_taken_into_its_prompt():
    record = {
        "chosen": [user("Q"), assistant("a"), user("more"), assistant("good")],
        "rejected": [user("Q"), assistant("a"), user("else"), assistant("bad")],
    }
    group = read("pairs", record)
    assert [m.content for m in group.prompt] == ["Q"]
    assert [m.content for m in group.responses[1].text] == ["a", "else", "bad"]


def test_an_explicit_prompt_beside_answers_alone_is_kept():
    group = read("pairs", {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")]})
    assert [m.content for m in group.prompt] == ["Q"]
    assert [r.text[0].content for r in group.responses] == ["a", "b"]


def test_the_prompt_of_a_pair_of_texts_ends_where_the_assistant_begins():
    start = "\n\nHuman: Which is it?\n\nAssistant:"
    group = read("pairs", {"chosen": start + " The first.", "rejected": start + " The second."})
    assert group.prompt == start
    assert [r.text for r in group.responses] == [" The first.", " The second."]
    with pytest.raises(DataError, match="add the field 'prompt'"):
        read("pairs", {"chosen": "a", "rejected": "b"})


def test_ms_swift_takes_the_last_message_as_chosen():
    turns = [user("Q"), assistant("a")]
    several = read("ms_swift", {"messages": turns, "rejected_response": ["b", "c"]})
    assert [(r.text[0].content, r.label) for r in several.responses] == [("a", 1), ("b", -1), ("c", -1)]
    whole = read("ms_swift", {"messages": turns, "rejected_messages": [user("Q"), assistant("b")]})
    assert [m.content for m in whole.prompt] == ["Q"]
    assert [(r.text[0].content, r.label) for r in whole.responses] == [("a", 1), ("b", -1)]
    assert choose_schema("auto", [({"messages": turns, "rejected_response": "b"}, "f:1")]).name == "ms_swift"
    with pytest.raises(DataError, match="followed by the chosen assistant answer"):
        read("ms_swift", {"messages": [user("Q")], "rejected_response": "b"})


@pytest.mark.acts("SchemaOptions.score_weights")
def test_several_scores_are_combined_by_weights():
    record = {
        "instruction": "Q",
        "input": "I",
        "candidates": [{"text": "a", "scores": {"x": 1, "y": 10}}, {"text": "b", "scores": {"x": 2, "y": 1}}],
    }
    group = read("mix_instruct", record, SchemaOptions(score_weights={"x": 2.0, "y": 0.5}))
    assert group.prompt == "Q\nI"
    assert [response.value for response in group.responses] == [7.0, 4.5]
    with pytest.raises(DataError, match="--score-weights x=1"):
        read("mix_instruct", record)
    with pytest.raises(DataError, match="'z' is required"):
        read("mix_instruct", record, SchemaOptions(score_weights={"z": 1.0}))


def test_a_tie_in_helpsteer3_has_no_positive():
    record = {"context": [user("Q")], "response1": "a", "response2": "b", "overall_preference": 0}
    assert [response.label for response in read("helpsteer3", record).responses] == [-1, -1]


@pytest.mark.parametrize(
    "record",
    [
        {"question": "Q", "answer": "a"},
        {"prompt": "Q", "response": "a"},
        {"prompt": "Q", "completion": "a"},
        {"messages": [user("Q"), assistant("a")]},
    ],
)
def test_single_answers_must_be_named(record):
    with pytest.raises(DataError, match="--schema sft"):
        choose_schema("auto", [(record, "f.jsonl:1")])
    assert choose_schema("sft", [(record, "f.jsonl:1")]).name == "sft"
    (response,) = read("sft", record).responses
    assert response.label == 1


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(DataError, match="did you mean 'ultrafeedback'"):
        schema_named("ultrafeedbak")
    assert len({schema.name for schema in SCHEMAS}) == len(SCHEMAS)


def test_first_records_of_two_forms_are_refused_with_the_odd_line():
    records = [(CASES[0][1], "f:1"), (CASES[0][1], "f:2"), (CASES[4][1], "f:3")]
    with pytest.raises(DataError, match=r"^f:3: .*'ultrafeedback' while f:1 has 'canonical'"):
        choose_schema("auto", records)
    with pytest.raises(DataError, match=r"^f:2: no known schema fits .* foo"):
        choose_schema("auto", [(CASES[0][1], "f:1"), ({"foo": 1}, "f:2")])


def test_a_record_without_a_form_is_left_to_the_reader_of_the_others():
    good = (CASES[0][1], "f:1")
    assert choose_schema("auto", [good, ({"foo": 1}, "f:2"), good]).name == "canonical"
    with pytest.raises(DataError, match=r"^f:3: .*'ultrafeedback' while f:2 has 'canonical'"):
        choose_schema("auto", [({"foo": 1}, "f:1"), (CASES[0][1], "f:2"), (CASES[4][1], "f:3")])


def test_score_weights_need_named_scores():
    options = SchemaOptions(score_weights={"overall_score": 1.0})
    schema_named("canonical").check(options, "f.jsonl")
    schema_named("pairs").check(SchemaOptions(), "f.jsonl")
    with pytest.raises(ConfigError, match=r"f\.jsonl has the schema 'ultrafeedback'.*canonical, mix_instruct"):
        schema_named("ultrafeedback").check(options, "f.jsonl")
    record = {"prompt": "Q", "responses": [{"text": "a", "score": 1.0}, {"text": "b", "score": 0.0}]}
    with pytest.raises(DataError, match=r"responses\[0\]\.score is one number"):
        schema_named("canonical").parse(record, "f:1", options)
