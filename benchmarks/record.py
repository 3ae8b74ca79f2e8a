"""What every result says of where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine(device: str = "cpu") -> dict[str, str]:
    """Date, commit, processor and versions; with ``cuda``, the GPU."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU used"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {gpu}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "transformers")},
    }
