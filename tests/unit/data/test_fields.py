"""Every field of a record is read, known to be harmless, refused by name, or reported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from chat_makers import CHATML, THINKING, load, make_chat_folder, text_of, tokens_of

from megatron_groupdpo.data.counts import unread_fields
from megatron_groupdpo.data.inspect.inspection import Records, inspect_records
from megatron_groupdpo.data.preprocess.prepare import GroupPreparer, PreprocessOptions
from megatron_groupdpo.data.schemas import SCHEMAS, SchemaOptions, schema_named
from megatron_groupdpo.data.schemas.known import table
from megatron_groupdpo.data.text.tokenize import TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions
from megatron_groupdpo.errors import ConfigError, DataError

USER = {"role": "user", "content": "Q"}
PAIR = {"prompt": [USER], "chosen": "a", "rejected": "b"}


def said(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def read(schema: str, record: dict[str, Any]):
    return schema_named(schema).parse(record, "f.jsonl:7", SchemaOptions())


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> Tokenizer:
    return load(make_chat_folder(tmp_path_factory.mktemp("thinking"), THINKING))


@pytest.fixture(scope="module")
def plain_chat(tmp_path_factory) -> Tokenizer:
    return load(make_chat_folder(tmp_path_factory.mktemp("chatml"), CHATML))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_trained_or_the_template_is_refused(thinking, plain_chat, key):
    record = {"prompt": [USER], "chosen": [said("5", **{key: "2 + 3"})], "rejected": [said("6", **{key: "guess"})]}
    _, trained = text_of(thinking, "pairs", record)
    assert trained == ["<think>\n2 + 3\n</think>\n\n5<|im_end|>", "<think>\nguess\n</think>\n\n6<|im_end|>"]
    with pytest.raises(DataError, match=rf"^f\.jsonl:7: the chat template leaves out some of the {key}"):
        text_of(plain_chat, "pairs", record)


def test_earlier_turns_beside_the_prompt_are_turns(plain_chat):
    record = {
        "instruction": "And of Italy?",
        "input": "",
        "history": [["Of France?", "Paris."]],
        "chosen": "a",
        "rejected": "b",
    }
    prompt, _ = text_of(plain_chat, "pairs", record, apply_chat_template=True)
    turns = [("user", "Of France?"), ("assistant", "Paris."), ("user", "And of Italy?")]
    assert prompt.startswith("".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns))
    with pytest.raises(DataError, match=r"^f\.jsonl:7: history .* --apply-chat-template"):
        tokens_of(plain_chat, "pairs", record)
    with pytest.raises(DataError, match=r"^f\.jsonl:7: history .*stands beside messages"):
        read("pairs", {**record, "instruction": [USER]})


def test_the_input_is_part_of_any_text_prompt():
    for schema, record in {
        "pairs": {"prompt": "Q", "chosen": "a", "rejected": "b"},
        "canonical": {"prompt": "Q", "responses": [{"text": "a"}, {"text": "b"}]},
        "on_policy": {"prompt": "Q", "responses": ["a", "b"], "rewards": [0, 1]},
        "verified": {
            "question": "Q",
            "x": {"solution": "a", "is_correct": True},
            "y": {"solution": "b", "is_correct": False},
        },
        "sft": {"prompt": "Q", "response": "a"},
    }.items():
        assert read(schema, {**record, "input": "I"}).prompt == "Q\nI"
        assert read(schema, {**record, "input": "Q"}).prompt == "Q"


@pytest.mark.acts("TokenizeOptions.template_arguments")
def test_arguments_of_the_template_come_from_the_flag_and_the_record(thinking, plain_chat):
    off, on = '{"enable_thinking": false}', {"chat_template_kwargs": {"enable_thinking": True, "unset": None}}
    assert text_of(thinking, "pairs", PAIR)[0].endswith("assistant\n")
    assert text_of(thinking, "pairs", PAIR, template_arguments=off)[0].endswith("assistant\n<think>\n\n</think>\n\n")
    assert text_of(thinking, "pairs", {**PAIR, **on}, template_arguments=off)[0].endswith("assistant\n")
    own = {**PAIR, "chat_template_kwargs": {"enable_thinking": False}}
    assert text_of(thinking, "pairs", own)[0].endswith("assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(DataError, match=r"reads no argument 'enable_thinkin'; did you mean 'enable_thinking'"):
        text_of(thinking, "pairs", PAIR, template_arguments='{"enable_thinkin": false}')
    with pytest.raises(DataError, match=r"^f\.jsonl:7: chat_template_kwargs: .*'enable_thinking'"):
        text_of(plain_chat, "pairs", own)
    with pytest.raises(DataError, match=r"may not set 'add_generation_prompt'"):
        read("pairs", {**PAIR, "chat_template_kwargs": {"add_generation_prompt": False}})


@pytest.mark.parametrize("key", ["weight", "loss"])
def test_a_turn_without_weight_is_not_trained_on(plain_chat, key):
    def sides(first: int, last: int) -> dict[str, Any]:
        return {
            side: [said("skip", **{key: first}), USER, said(side, **{key: last})] for side in ("chosen", "rejected")
        }

    assert text_of(plain_chat, "pairs", {"prompt": [USER], **sides(0, 1)})[1] == [
        "chosen<|im_end|>",
        "rejected<|im_end|>",
    ]
    both = text_of(plain_chat, "pairs", {"prompt": [USER], **sides(1, 1)})[1]
    assert both == ["skip<|im_end|>chosen<|im_end|>", "skip<|im_end|>rejected<|im_end|>"]
    with pytest.raises(DataError, match="weights leave nothing of response 0"):
        read("pairs", {"prompt": [USER], **sides(0, 0)})
    with pytest.raises(DataError, match=rf"{key} must be 0 or 1, got 0\.5"):
        read("pairs", {"prompt": [USER], **sides(0.5, 1)})
    with pytest.raises(DataError, match="a turn of the prompt has a weight"):
        read("pairs", {"prompt": [USER, said("x", **{key: 1}), USER], "chosen": "a", "rejected": "b"})
    several = [USER, said("x", **{key: 0}), USER, said("y", **{key: 1}), USER, said("z")]
    group = read("sft", {"messages": several})
    assert (len(group.prompt), len(group.responses[0].text)) == (3, 3)


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "note": "say \\"hi\\""}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]


def test_tools_and_their_calls_go_through_the_template(thinking, plain_chat):
    answer = [said(None, tool_calls=[CALL]), {"role": "tool", "content": "5", "name": "add"}, said("It is 5.")]
    record = {"prompt": [USER], "chosen": answer, "rejected": [said("6")], "tools": TOOLS}
    prompt, trained = text_of(thinking, "pairs", record)
    assert '"name": "add"' in prompt
    assert trained[0] == '<call>add {"a": 2, "note": "say \\"hi\\""}</call><|im_end|>It is 5.<|im_end|>'
    with pytest.raises(DataError, match=r"^f\.jsonl:7: the chat template shows no tools"):
        text_of(plain_chat, "pairs", record)
    with pytest.raises(DataError, match=r"leaves out some of the tool_calls"):
        text_of(plain_chat, "pairs", {**record, "tools": "[]"})
    with pytest.raises(DataError, match=r"tools .* --apply-chat-template"):
        tokens_of(thinking, "pairs", {"prompt": "Q", "chosen": "a", "rejected": "b", "tools": TOOLS})


@pytest.mark.parametrize("tools", ["[]", [], None, ""])
def test_no_tools_are_no_tools(tools):
    assert read("pairs", {**PAIR, "tools": tools}).tools == ""


@pytest.mark.parametrize("schema", [schema.name for schema in SCHEMAS])
@pytest.mark.parametrize("key", ["images", "videos", "audio", "documents", "functions"])
def test_what_no_text_can_honour_is_refused_by_its_name(schema, key):
    with pytest.raises(DataError, match=rf"^f\.jsonl:7: {key} \(\['x'\]\) cannot be used: "):
        read(schema, {key: ["x"]})


def test_fields_of_turns_and_of_responses_are_known_too():
    answers = [{"text": "a", "thinking": "hm"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"^f\.jsonl:7: responses\[0\]\.thinking"):
        read("canonical", {"prompt": "Q", "responses": answers})
    with pytest.raises(DataError, match=r"prompt\[0\] has function_call"):
        read("pairs", {**PAIR, "prompt": [{**USER, "function_call": {"name": "f"}}]})
    with pytest.raises(DataError, match=r"content\[0\] has the type 'image_url'"):
        read("pairs", {**PAIR, "prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]})
    part = [{"type": "text", "text": "Q"}]
    assert read("pairs", {**PAIR, "prompt": [{"role": "user", "content": part}]}).prompt[0].content == "Q"


def test_sharegpt_and_single_messages_are_read():
    record = {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    group = read("pairs", record)
    assert [(turn.role, turn.content) for turn in group.prompt] == [("user", "Q")]
    assert [response.text[0].content for response in group.responses] == ["a", "b"]
    with pytest.raises(DataError, match="from 'observation', ShareGPT's form of tools"):
        read("pairs", {**record, "conversations": [{"from": "observation", "value": "5"}]})


def test_messages_as_json_text_are_messages():
    record = {
        "prompt": '[{"role": "user", "content": "hi"}]',
        "chosen": '[{"role": "assistant", "content": "yes"}]',
        "rejected": '{"role": "assistant", "content": "no"}',
    }
    group = read("pairs", record)
    assert group.prompt[0].content == "hi"
    assert [response.text[0].content for response in group.responses] == ["yes", "no"]
    assert read("pairs", {**record, "prompt": "[1, 2]"}).prompt == "[1, 2]"


def test_a_null_is_called_null():
    rows = [{"response": "a", "overall_score": None}, {"response": "b", "overall_score": 1}]
    with pytest.raises(DataError, match="'overall_score' is required, but it is null"):
        read("ultrafeedback", {"instruction": "Q", "completions": rows})


UNREAD = {**PAIR, "hint": "think", "extra_number": 3, "other": {"deep": ["text"]}, "empty": "", "source": "web"}


def test_unknown_text_is_counted_and_shown(plain_chat, write_lines):
    assert read("pairs", UNREAD).unread == ("hint", "other")
    answers = [{"text": "a", "note": "x"}, {"text": "b"}]
    assert read("canonical", {"prompt": "Q", "responses": answers}).unread == ("responses[].note",)
    assert read("pairs", {**PAIR, "prompt": [{**USER, "mood": "glad"}]}).unread == ("message.mood",)
    options = PreprocessOptions(
        tokenizer=TokenizerOptions(kind="HuggingFaceTokenizer", model=""), tokenize=TokenizeOptions(seq_length=64)
    )
    from collections import Counter

    counts: Counter = Counter()
    assert GroupPreparer(options, plain_chat).prepare(UNREAD, "f:1", schema_named("pairs"), counts)
    assert unread_fields(counts) == {"hint": 1, "other": 1}
    inspection = inspect_records(Records(inputs=[str(write_lines([UNREAD]))]))
    (finding,) = [f for f in inspection.findings if f.code == "unread-fields"]
    assert finding.examples == ("hint (1)", "other (1)")


def test_a_harmless_field_is_not_unknown():
    for schema in SCHEMAS:
        names = [
            name for names in schema.known.harmless for name in names.split() if "[]" not in name and "<" not in name
        ]
        for name in names:
            assert schema._field_check.unread({name: "text"}, "f:1") == ()


def test_the_documented_table_is_the_codes():
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    documented = re.search(r"\| of \| formats .*?(?=\n\n)", text, re.DOTALL)
    assert documented is not None
    assert documented[0] == table({schema.name: schema.known for schema in SCHEMAS})


def test_bad_template_arguments_are_refused():
    from megatron_groupdpo.data.text.tokenize import arguments_from

    assert arguments_from(None) == ""
    assert arguments_from('{"b": 1, "a": false}') == '{"a": false, "b": 1}'
    for given in ("{", "[1]", '{"messages": []}'):
        with pytest.raises((ConfigError, DataError), match="--chat-template-kwargs"):
            arguments_from(given)
