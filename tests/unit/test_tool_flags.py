"""A tool's flags for layout and precision are the configuration's: same help, same rules, same messages."""

from __future__ import annotations

import argparse
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from light_start import answers

from megatron_groupdpo.config import (
    CommandParser,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
    TrainingConfig,
    add_fields,
    given_fields,
    load_config,
    validate,
    validate_machine,
)
from megatron_groupdpo.config.flags import flags_of
from megatron_groupdpo.config.options import Option, options
from megatron_groupdpo.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    option.name: option for option in options(TrainConfig) if option.section in ("model", "parallel", "precision")
}
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


@cache
def module_of(tool: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{tool.removesuffix('.py')}", ROOT / "tools" / tool)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsers(tool: str) -> dict[str, argparse.ArgumentParser]:
    """By sub-command; of a tool without, under the empty name."""
    parser = module_of(tool).build_parser()
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(inner[0].choices) if inner else {"": parser}


def fields_of(parser: argparse.ArgumentParser) -> list[tuple[argparse.Action, Option]]:
    """The flags that are named after a field of the model, the layout or the precision."""
    return [(action, MACHINE[action.dest]) for action in parser._actions if action.dest in MACHINE]


@cache
def help_in_training() -> dict[str, str]:
    from megatron_groupdpo.config.flags import _parser

    return {action.dest: action.help or "" for action in _parser(TrainConfig)._actions}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_flag_named_after_a_field_of_the_machine_is_that_field(tool: str):
    for parser in parsers(tool).values():
        for action, option in fields_of(parser):
            assert list(action.option_strings) == flags_of(option), tool
            assert (action.type, action.choices, action.const) == (None, None, None), f"{tool} {option.flag}"
            ours, theirs = (
                text.rpartition(" (default: ")[0] for text in (action.help, help_in_training()[option.name])
            )
            assert ours == theirs, f"{tool} {option.flag}"
            is_default = action.default is argparse.SUPPRESS
            assert is_default == (action.help == help_in_training()[option.name]), f"{tool} {option.flag}"


def wrong_values(option: Option) -> list[str]:
    return ["0", "two"] if "Bounds" in str(option.hint) and option.default == 1 else ["wrong"]


def refusal_of_training(flag: str, value: str) -> str | None:
    try:
        load_config([flag, value])
    except ConfigError as error:
        return None if str(error).startswith("required and not given") else str(error)
    raise AssertionError("nothing is given, and it is accepted")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_wrong_value_is_refused_with_the_message_of_training(tool: str):
    cases, expected = [], []
    for name, parser in parsers(tool).items():
        needed = [
            word for a in parser._actions if a.required and a.option_strings for word in (a.option_strings[0], "x")
        ]
        for _, option in fields_of(parser):
            for value in wrong_values(option):
                message = refusal_of_training(option.flag, value)
                if message is not None:
                    cases.append([*([name] if name else []), *needed, option.flag, value])
                    expected.append(f"error: {message}\n")
    if cases:
        _, *found = answers(f"tools/{tool}", *cases)
        assert [(answer.status, answer.output) for answer in found] == [(1, message) for message in expected]
    assert bool(cases) == (tool in ("convert_checkpoint.py", "sample_groups.py", "score_reference.py"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tensor-model-parallel-size", "2"], "world size (1) must be a multiple of tensor (2)"),
        (["--sequence-parallel"], "sequence_parallel splits over the tensor-parallel ranks"),
        (["--fp8-format", "e4m3"], "fp8_format is set and fp8_recipe is not"),
        (["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"], "fp8_format needs bf16"),
        (["--fp8-recipe", "blockwise"], "fp8_recipe (blockwise) is set and fp8_format is not"),
        (["--first-last-layers-bf16"], "first_last_layers_bf16 (True) would act on nothing: fp8_format is not set"),
        (["--num-layers-at-end-in-bf16", "3"], "num_layers_at_end_in_bf16 (3) would act on nothing"),
        (["--micro-batch-size", "0"], "--micro-batch-size must be >= 1; it is 0."),
        (["--micro-batch-size", "1", "--max-tokens-per-microbatch", "64"], "exclude each other"),
        (["--groups-per-batch", "0"], "--groups-per-batch must be >= 1; it is 0."),
    ],
)
def test_flags_of_the_scoring_that_contradict_each_other_are_refused_as_in_training(words: list[str], message: str):
    needed = ["--load", "x", "--data-path", "x", "--output", "x"]
    _, found = answers("tools/score_reference.py", [*needed, *words])
    assert found.status == 1
    assert message in found.output
    assert "Traceback" not in found.output


RUN = "--data-path s --seq-length 64 --global-batch-size 2 --micro-batch-size 1 --train-iters 9 --lr 1"
RUN += " --num-layers 2 --hidden-size 8 --num-attention-heads 2 --reference-logprobs r"


def test_the_rules_of_a_command_are_those_of_a_run():
    """Whatever a command refuses of layout and precision, a run refuses in the same words."""
    cases = {
        "--tensor-model-parallel-size 2": 3,
        "--expert-model-parallel-size 2 --num-moe-experts 4 --no-add-bias-linear": 1,
        "--sequence-parallel": 1,
        "--fp8-format e4m3": 1,
        "--bf16 --fp8-format e4m3 --fp8-recipe tensorwise --device cpu": 1,
        "--first-last-layers-bf16": 1,
    }
    for words, world_size in cases.items():
        config = load_config([*RUN.split(), *words.split()])
        with pytest.raises(ConfigError) as ours:
            validate_machine(config.parallel, config.precision, world_size)
        with pytest.raises(ConfigError) as theirs:
            validate(config, world_size)
        assert str(ours.value) in str(theirs.value)
    validate_machine(
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), PrecisionConfig(bf16=True), 4
    )


def test_a_commands_own_default_is_what_it_reads_and_says(capsys: pytest.CaptureFixture[str]):
    parser = CommandParser(prog="tool")
    add_fields(parser, ParallelConfig, ("device", "sequence_parallel"), defaults={"device": "cpu"})
    assert given_fields(parser.parse_args([]), ParallelConfig) == {"device": "cpu"}
    words = ["--device", "cuda", "--no-sequence-parallel"]
    assert given_fields(parser.parse_args(words), ParallelConfig) == {"device": "cuda", "sequence_parallel": False}
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "(default: cpu)" in " ".join(capsys.readouterr().out.split())


def test_a_required_field_may_be_left_out_of_a_command():
    parser = CommandParser(prog="tool")
    add_fields(parser, TrainingConfig, ("global_batch_size",))
    add_fields(parser, ModelConfig, ("num_layers",))
    args = parser.parse_args(["--num-layers", "3"])
    assert given_fields(args, ModelConfig) == {"num_layers": 3}
    assert given_fields(args, TrainingConfig) == {}
