"""Every command answers ``--help``, and what is mistyped, before anything heavy is imported."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from light_start import answers

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 2.0
TRAIN = "-m megatron_groupdpo.train"
# All that must be given but the learning rate, and the sizes of the model where a Hugging Face model has them.
MOST = "--data-path s --seq-length 64 --global-batch-size 2 --micro-batch-size 1 --train-iters 9"
MODEL = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --reference-logprobs r"


def commands() -> list[str]:
    """What a user can start: the tools, the examples, and the modules behind the installed names."""
    files = [*(ROOT / "tools").glob("*.py"), *(ROOT / "examples").rglob("*.py")]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
    modules = {script.split(":")[0] for script in scripts}
    started = {module.rpartition(".")[0] if has_main(module.rpartition(".")[0]) else module for module in modules}
    return sorted(str(file.relative_to(ROOT)) for file in files) + sorted(f"-m {module}" for module in started)


def has_main(folder: str) -> bool:
    return (ROOT / folder.replace(".", "/") / "__main__.py").is_file()


@cache
def sub_commands(command: str) -> list[str]:
    """``{a,b} ...`` of the usage."""
    if command.startswith("-m ") or "add_subparsers" not in (ROOT / command).read_text():
        return []
    usage = answers(command)[0].output.split("\n\n")[0]
    found = re.search(r"\s\{([a-z_,]+)\}\s+\.\.\.", usage)
    return found[1].split(",") if found else []


@pytest.mark.parametrize("command", commands())
def test_help_and_a_mistyped_flag_are_answered_at_once_by_every_command(command: str):
    parts = [[], *([name] for name in sub_commands(command))]
    helps, typos = [[*part, "--help"] for part in parts], [[*part, "--hepl"] for part in parts]
    first, *rest = answers(command, *helps, *typos)
    assert first.seconds < SECONDS
    for answer in [first, *rest[: len(helps)]]:
        assert (answer.status, "usage: " in answer.output) == (0, True), answer.output
    for answer in rest[len(helps) :]:
        assert answer.status in (1, 2), answer.output
        assert "error: " in answer.output
        assert "Traceback" not in answer.output, answer.output
    if "tools/" in command or command == TRAIN:
        for part, answer in zip(parts, rest[len(helps) :], strict=True):
            if part or len(parts) == 1:
                assert answer.output == "error: unknown flag '--hepl'; did you mean '--help'?\n"


def test_the_commands_are_found():
    found = commands()
    assert {TRAIN, "-m megatron_groupdpo.doctor", "examples/demo/run.py", "tools/preprocess_data.py"} <= set(found)
    assert sub_commands("tools/convert_checkpoint.py") == ["import", "export", "verify"]


def test_training_answers_what_is_wrong_with_its_configuration_at_once(tmp_path: Path):
    (tmp_path / "typo.yaml").write_text("optimizer:\n  lrr: 1e-3\n")
    (tmp_path / "broken.yaml").write_text("optimizer: [\n")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    most, model = MOST.split(), MODEL.split()
    cases = {
        ("--objetive", "mpo"): "unknown flag '--objetive'; did you mean '--objective'?",
        ("--lr", "fast"): "--lr must be a finite number; it is 'fast'.",
        ("--config", str(tmp_path / "none.yaml")): "none.yaml: cannot be read",
        ("--config", str(tmp_path / "typo.yaml")): "typo.yaml:2: unknown key 'lrr' in 'optimizer'; did you mean 'lr'?",
        ("--config", str(tmp_path / "broken.yaml")): "broken.yaml:2: not valid YAML",
        (*most, *model, "--load", str(tmp_path / "runs")): "required and not given: lr (optimizer).",
        (*most, "--load", str(tmp_path / "hf")): "required and not given: lr (optimizer).",
        (*most, *model, "--lr", "1", "--tensor-model-parallel-size", "2"): "world size (1) must be a multiple of",
    }
    _, *rest = answers(TRAIN, *cases)
    for answer, message in zip(rest, cases.values(), strict=True):
        assert answer.status == 1
        assert answer.output.startswith("error: ")
        assert message in answer.output
        assert answer.output.count("\n") == 1, answer.output
