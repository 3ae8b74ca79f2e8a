"""torchrun, the way users start a run: what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from clean_output import warnings_in
from rank_pool import free_port
from tiny_run import read_metrics

ConfigFile = Callable[..., Path]
KEYS = (
    "iteration loss preference_loss nll_loss rewards/accuracies rewards/margins logps/chosen logps/rejected "
    "grad_norm lr score_drift tokens_per_second peak_memory_bytes"
)
PP2 = ["--pipeline-model-parallel-size", "2"]


@dataclass(frozen=True)
class Launch:
    """What a torchrun launch left behind."""

    returncode: int
    outputs: list[str]
    """Of each rank, standard output and error together."""
    seconds: float


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Launch]:
    """``launch(*flags)``: two ranks of ``megatron_groupdpo.train``."""

    def run(*flags: str, num_ranks: int = 2) -> Launch:
        logs = tmp_path / "torchrun"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
        command += [f"--master-port={free_port()}", "--redirects=3", f"--log-dir={logs}"]
        started = time.monotonic()
        done = subprocess.run(
            [*command, "-m", "megatron_groupdpo.train", *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        seconds = time.monotonic() - started
        outputs = [
            "".join(path.read_text() for path in sorted(logs.glob(f"*/attempt_0/{rank}/std*.log")))
            for rank in range(num_ranks)
        ]
        assert any(outputs), done.stderr
        return Launch(done.returncode, outputs, seconds)

    return run


@pytest.mark.costly
def test_a_run_writes_its_logs_and_checkpoints(launch: Callable[..., Launch], config_file: ConfigFile, tmp_path: Path):
    save, boards = tmp_path / "run", tmp_path / "boards"
    config = config_file(optimizer={"lr_warmup_iters": 0})
    flags = ["--train-iters", "3", "--save-interval", "2", "--save", str(save), "--tensorboard-dir", str(boards)]
    done = launch("--config", str(config), *PP2, *flags)
    assert done.returncode == 0, done.outputs
    keys = set(KEYS.split())
    lines = read_metrics(save)
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert keys <= set(line)
        assert all(np.isfinite(line[key]) for key in keys)
        assert line["score_drift"] <= 1e-4
    output = "".join(done.outputs)
    assert len(re.findall(r" iteration +\d+/ +3 \| consumed samples: +\d+ \| .*loss: ", output)) == 3
    assert "TP 1 x PP 2 x CP 1 x DP 1" in output
    assert output.count("device: CPU") == 1
    assert warnings_in(output) == []
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert (save / "config.yaml").is_file()
    assert list(boards.iterdir())


def broken_store(tiny_data, tmp_path: Path) -> Path:
    """A copy of the store whose token file was cut short."""
    import shutil

    store = tmp_path / "broken"
    shutil.copytree(tiny_data.store, store)
    (store / "tokens.bin").write_bytes((store / "tokens.bin").read_bytes()[:-10])
    return store


REFUSALS = {
    "a layout that does not divide the world": (["--tensor-model-parallel-size", "4"], "world size (2)"),
    "layers that do not divide": ([*PP2, "--num-layers", "3"], "num_layers (3) must be a multiple"),
    "heads that do not divide": (["--tensor-model-parallel-size", "2", "--num-attention-heads", "3"], "multiple of"),
    "a mistyped flag": (["--objetive", "mpo"], "did you mean"),
    "data longer than the sequence": ([*PP2, "--seq-length", "8"], "seq_length is 8"),
    "data cut short": ([*PP2, "--data-path", "BROKEN"], "tokens.bin"),
    "no such store": ([*PP2, "--data-path", "/nowhere/store"], "/nowhere/store"),
    "reference of another precision": ([*PP2, "--bf16"], "precision"),
}
DEFAULT = ("data cut short",)  # the messages themselves are the units', which start no process


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what in DEFAULT else [pytest.mark.slow]) for what in REFUSALS]
)
@pytest.mark.costly
def test_what_cannot_run_is_refused_with_one_message_and_nothing_is_overwritten(
    launch: Callable[..., Launch], config_file: ConfigFile, tiny_data, tmp_path: Path, what: str
):
    flags, fragment = REFUSALS[what]
    flags = [str(broken_store(tiny_data, tmp_path)) if flag == "BROKEN" else flag for flag in flags]
    save = tmp_path / "run"
    save.mkdir()
    (save / "metrics.jsonl").write_text(json.dumps({"iteration": 1}) + "\n")
    done = launch("--config", str(config_file()), "--save", str(save), *flags)
    assert done.returncode != 0
    assert done.seconds < 180  # on a busy machine; it does not wait for a time-out of the ranks
    output = "".join(done.outputs)
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    assert fragment in output
    assert [path.name for path in save.iterdir()] == ["metrics.jsonl"]
    assert (save / "metrics.jsonl").read_text() == json.dumps({"iteration": 1}) + "\n"
