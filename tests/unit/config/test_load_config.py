"""YAML and flags become a configuration, or one message that says what is wrong and where."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from config_examples import EXAMPLE_YAML, example
from hypothesis import example as example_case
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupdpo.config import TrainConfig, load_config, objective_hyperparameters, to_yaml, validate
from megatron_groupdpo.config.flags import flags_of
from megatron_groupdpo.config.options import options
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.objectives import OBJECTIVES, hyperparameter_names


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str) -> list[str]:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return ["--config", str(tmp_path / "run.yaml")]

    return write_file


def refused(*fragments: str):
    return pytest.raises(ConfigError, match="(?s)" + ".*".join(re.escape(f) for f in fragments))


def test_yaml_sections_become_the_dataclasses(write):
    config = load_config(write(EXAMPLE_YAML))
    assert config.model.num_query_groups == 2
    assert config.model.swiglu is True
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.data.data_path == ("stores/train", "stores/more")
    assert config.data.shuffle is False
    assert config.objective.beta == 2.0
    assert type(config.objective.beta) is float
    assert config.objective.label_smoothing == 0.1
    assert config.optimizer.lr == 1e-6, "YAML 1.1 reads 1e-6 as text"
    assert config.optimizer.min_lr == 1.5e-7
    assert config.training.train_samples == 800
    assert config.logging.log_interval == 1, "an empty section keeps its defaults"
    validate(config, world_size=2)


def test_flags_override_the_file_and_alone_suffice(write):
    flags = ["--lr", "3e-5", "--data-path", "a", "b", "c", "--no-swiglu", "--train-iters=7", "--train-samples", "none"]
    config = load_config([*write(EXAMPLE_YAML), *flags])
    assert config.optimizer.lr == 3e-5
    assert config.data.data_path == ("a", "b", "c")
    assert config.model.swiglu is False
    assert (config.training.train_iters, config.training.train_samples) == (7, None)
    required = "--num-layers 1 --hidden-size 8 --num-attention-heads 2 --data-path x --seq-length 9 --lr 1"
    config = load_config([*required.split(), "--global-batch-size", "3"])
    assert config.training.global_batch_size == 3
    assert config.objective == TrainConfig.__dataclass_fields__["objective"].default_factory()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bf16"], True),
        (["--bf16", "true"], True),
        (["--bf16=false"], False),
        (["--no-bf16"], False),
        (["--bf16", "--no-bf16"], False),
        (["--no-bf16", "--bf16"], True),
        ([], False),
    ],
)
def test_booleans_are_switches_or_take_a_value(write, words, expected):
    assert load_config([*write(EXAMPLE_YAML), *words]).precision.bf16 is expected


def test_every_field_has_one_flag_of_its_own():
    flags = [flag for option in options(TrainConfig) for flag in flags_of(option)]
    assert len(set(flags)) == len(flags)
    assert not {"--config", "--help"} & set(flags)
    assert "--tensor-model-parallel-size" in flags
    assert not [flag for flag in flags if flag.startswith("--no-no-")]


def test_every_field_is_documented_in_the_help_under_its_section(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as exited:
        load_config(["--help"])
    assert exited.value.code == 0
    shown = capsys.readouterr().out
    for option in options(TrainConfig):
        assert len(option.doc) > 10, option.name
        section = shown.split(f"\n{option.section}:\n")[1].split("\n\n")[1]
        (entry,) = (text for text in re.split(r"\n  (?=--)", section) if re.match(rf"\s*{option.flag}[\s,]", text))
        assert f"{option.doc} ({'required' if option.required else 'default: '}" in " ".join(entry.split())
    assert "--swiglu, --no-swiglu\n" in shown
    assert "--global-batch-size counts prompts (groups)" in shown


def test_hyperparameters_of_every_objective_are_fields_with_their_defaults_in_the_help():
    fields = {option.name: option for option in options(TrainConfig) if option.section == "objective"}
    for name, objective in OBJECTIVES.items():
        for field in dataclasses.fields(objective.hyperparameters):
            assert field.name in fields
            if field.name != "beta":
                assert fields[field.name].default is None
                assert name in fields[field.name].unset
                assert str(field.default) in fields[field.name].unset


def test_beta_reaches_the_objective_that_reads_it():
    assert objective_hyperparameters(example(objective="ipo_pairs", beta=0.3).objective) == {"beta": 0.3}
    given = objective_hyperparameters(example(objective="dpo", beta=0.3, label_smoothing=0.0).objective)
    assert given == {"label_smoothing": 0.0}
    assert hyperparameter_names("dpo") == ("label_smoothing", "pair_selection")


def test_yaml_of_a_config_loads_to_an_equal_one(write):
    for config in (example(), load_config(write(EXAMPLE_YAML))):
        assert load_config(write(to_yaml(config))) == config


@settings(deadline=None, max_examples=50)  # a busy machine is no failure
@example_case(lr=1e-6, path="\x85", paths=["\x85 "])
@given(
    lr=st.floats(min_value=1e-12, max_value=1e3),
    path=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20).filter(
        lambda s: s.lower() not in ("none", "null")
    ),
    paths=st.lists(st.sampled_from(["1e-6", "true", "null", "a: b", "#", "0123", "ü"]), min_size=1, max_size=3),
)
def test_yaml_keeps_any_number_and_any_text(tmp_path_factory, lr, path, paths):
    config = example(lr=lr, save=path, data_path=tuple(paths))
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (
            "objective:\n  objetive: mpo",
            ("run.yaml:2: unknown key 'objetive' in 'objective'", "did you mean 'objective'?"),
        ),
        ("model:\n  lr: 1", ("run.yaml:2: unknown key 'lr' in 'model'; it belongs in section 'optimizer'",)),
        ("model:\n  micro-batch-siz: 1", ("did you mean 'micro_batch_size' in section 'training'?",)),
        ("logging:\n  qqq: 1", ("unknown key 'qqq' in 'logging'; its keys are: run_dir, ",)),
        ("objetive:\n  beta: 1", ("run.yaml:1: unknown section 'objetive'; did you mean 'objective'?",)),
        ("qqq:\n  beta: 1", ("the sections are: model, parallel, ",)),
        ("lr: 1", ("run.yaml:1: 'lr' is not a section but a field of section 'optimizer'",)),
        ("model: 3", ("run.yaml:1: section 'model' must be a mapping",)),
        ("- a\n- b", ("run.yaml:1: the file must be a mapping",)),
        ("optimizer:\n  lr: 1\n  clip_grad: 2\n  lr: 2", ("run.yaml:4: 'lr' is given twice", "first in line 2")),
        ("model: {}\nmodel: {}", ("run.yaml:2: 'model' is given twice",)),
        ("optimizer:\n  lr: [1", ("run.yaml:", "not valid YAML")),
        ("optimizer:\n  lr: fast", ("run.yaml:2: 'lr' in 'optimizer' must be a finite number; it is 'fast'",)),
        ("optimizer:\n  lr: .nan", ("must be a finite number; it is nan",)),
        ("optimizer:\n  lr: yes", ("must be a finite number; it is True",)),
        ("optimizer:\n  lr:", ("must be a finite number; it is empty",)),
        ("optimizer:\n  lr: 0", ("'lr' in 'optimizer' must be > 0; it is 0",)),
        ("model:\n  num_layers: 2.5", ("'num_layers' in 'model' must be an integer; it is 2.5",)),
        ("model:\n  num_layers: true", ("'num_layers' in 'model' must be an integer; it is True",)),
        ("model:\n  num_layers: 0", ("must be >= 1; it is 0",)),
        ("model:\n  swiglu: 1", ("'swiglu' in 'model' must be true or false; it is 1",)),
        ("model:\n  normalization: rmsnorm", ("one of LayerNorm, RMSNorm; it is 'rmsnorm'; did you mean 'RMSNorm'?",)),
        (
            "objective:\n  objective: mppo",
            ("'objective' in 'objective' must be one of all_pairs", "did you mean 'mpo'?"),
        ),
        ("checkpoint:\n  save: 2024", ("'save' in 'checkpoint' must be text; it is 2024. Quote it",)),
        ("data:\n  data_path: [1]", ("'data_path' in 'data' must be text",)),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(write, text, fragments):
    with refused(*fragments):
        load_config(write(text))


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--micro-batchsize", "3"], ("unknown flag '--micro-batchsize'; did you mean '--micro-batch-size'?",)),
        (["--qqq=3"], ("unknown flag '--qqq'; see --help",)),
        (["--micro-batch", "3"], ("unknown flag '--micro-batch'",)),
        (["stray"], ("unexpected argument 'stray'",)),
        (["--lr"], ("--lr", "expected one argument")),
        (["--lr", "x"], ("--lr must be a finite number; it is 'x'",)),
        (["--bf16=perhaps"], ("--bf16 must be true or false; it is 'perhaps'",)),
        (["--no-bf16", "true"], ("--no-bf16 takes no value",)),
        (["--recompute-granularity", "ful"], ("one of full, selective; it is 'ful'; did you mean 'full'?",)),
        (["--config", "no/such.yaml"], ("no/such.yaml: cannot be read",)),
        ([], ("required and not given: num_layers (model), hidden_size (model)", "lr (optimizer)", "or as flags")),
    ],
)
def test_a_wrong_flag_is_refused(words, fragments):
    with refused(*fragments):
        load_config(words)


def test_unlimited_numbers_are_refused():
    for word in ("inf", "nan", "-inf"):
        with refused("--clip-grad must be a finite number"):
            load_config([f"--clip-grad={word}"])
