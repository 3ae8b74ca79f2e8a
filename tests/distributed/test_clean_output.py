"""What a run and the tools print is theirs: no warning of a library that the user can do nothing about."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clean_output import warnings_in
from tiny_run import ROOT, TinyData, write_config


@pytest.mark.costly
def test_a_run_and_every_tool_warn_of_nothing(tiny_data: TinyData, tmp_path: Path):
    from megatron_groupdpo.online.problems import generate, write_problems

    def at(name: str) -> str:
        return str(tmp_path / name)

    write_problems(tmp_path / "problems.jsonl", generate(2, seed=1, split="train"))
    config = write_config(tmp_path / "run.yaml", tiny_data.store, tiny_data.reference)
    store = str(tiny_data.store)
    run = ["-m megatron_groupdpo.train", "--config", str(config), "--train-iters", "3", "--save", at("run")]
    again = ["--load", at("run"), "--finetune", "--save", at("second"), "--train-iters", "3"]
    few = ["--num-samples-per-prompt", "2", "--max-new-tokens", "4"]
    groups = ["--input", str(tiny_data.folder / "groups.jsonl"), "--seq-length", "64"]
    tokenized = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tiny_data.tokenizer)]
    commands = [
        ["tools/preprocess_data.py", *groups, *tokenized, "--output", at("store")],
        [*run, "--save-interval", "2", "--tensorboard-dir", at("boards"), "--export-hf", at("exported")],
        [*run[:3], *again, "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
        ["tools/score_reference.py", "--load", at("run"), "--data-path", store, "--output", at("reference")],
        ["tools/sample_groups.py", "--load", at("run"), "--prompts", at("problems.jsonl"), "--output", at("s"), *few],
        ["tools/convert_checkpoint.py", "export", "--load", at("run"), "--hf", at("hf")],
        ["tools/convert_checkpoint.py", "import", "--hf", at("hf"), "--save", at("imported")],
        ["tools/convert_checkpoint.py", "verify", "--hf", at("hf"), "--load", at("run"), "--num-sequences", "2"],
        ["tools/inspect_data.py", store, "--plot", at("store.png")],
        ["tools/plot_run.py", at("run")],
    ]
    started = {command[0].removeprefix("tools/") for command in commands}
    assert {path.name for path in (ROOT / "tools").glob("*.py")} <= started, "a tool that no command here starts"
    script = [sys.executable, str(ROOT / "tests" / "harness" / "clean_output.py"), json.dumps(commands)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert warnings_in(done.stderr) == []


@pytest.mark.costly
def test_two_ranks_under_torchrun_warn_of_nothing(tiny_data: TinyData, tmp_path: Path):
    config = write_config(tmp_path / "run.yaml", tiny_data.store, tiny_data.reference)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = [*launch, "-m", "megatron_groupdpo.train", "--config", str(config), "--train-iters", "3"]
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--num-workers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, *layout], capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert warnings_in(done.stdout + done.stderr) == []


@pytest.mark.parametrize(
    "line",
    [
        "/site-packages/x.py:25: UserWarning: Transformer Engine and Apex are not installed.",
        "W1130 18:06:40.040000 8640 torch/utils/cpp_extension.py:140] No CUDA runtime is found",
        "MCore's async save is deprecated and will be removed in the future releases.",
        "WARNING:megatron.core:something",
    ],
)
def test_a_warning_is_seen(line: str):
    assert warnings_in(f"iteration 1\n{line}\n") == [line]


def launches(text: str) -> list[str]:
    """The lines of a text that start ranks with torchrun."""
    return [line for line in text.splitlines() if re.search(r"\btorchrun +(-|\\$|tools/)", line)]


def test_documented_launches_say_how_many_threads_a_rank_has():
    """Without OMP_NUM_THREADS torchrun sets it, and prints a notice of five lines before all else."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tools").glob("*.py")]
    files += [*(ROOT / "megatron_groupdpo").rglob("*.py"), *(ROOT / "examples").rglob("*.*"), ROOT / "Makefile"]
    found = {file: launches(file.read_text(encoding="utf-8")) for file in files if file.suffix in (".md", ".py", "")}
    assert sum(map(len, found.values())) >= 8, "the documented commands are no longer found"
    bare = [line for lines in found.values() for line in lines if not re.search(r"OMP_NUM_THREADS=\d+ torchrun", line)]
    assert bare == []
    for script in (ROOT / "slurm").glob("*.sh"):
        assert re.search(r"^export OMP_NUM_THREADS=", script.read_text(), re.MULTILINE), script
    assert "OMP_NUM_THREADS" in (ROOT / "examples" / "demo" / "run.py").read_text()
