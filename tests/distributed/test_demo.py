"""The demo's ten steps run through, with less of everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from clean_output import warnings_in
from tiny_run import ROOT


@pytest.mark.slow
@pytest.mark.costly
def test_every_step_of_the_demo_runs_and_reports(tmp_path: Path):
    folder = tmp_path / "demo"
    command = [sys.executable, str(ROOT / "examples/demo/run.py"), "--quick", "--dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert warnings_in(done.stdout + done.stderr) == []
    assert "held-out prompts" in done.stdout
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert {"before", "after"} == set(result["reward margin"])
    assert (folder / "groupdpo_hf" / "model.safetensors").exists()
    assert (folder / "groupdpo" / "training.png").stat().st_size > 10_000
    assert list((folder / "groupdpo" / "tensorboard").iterdir())
