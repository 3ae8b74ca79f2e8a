"""What every result says of where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine(device: str = "cpu") -> dict[str, str]:
    """Date, commit, processor and versions; with ``cuda``, the GPU."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU used"
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {gpu}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "transformers")},
        **{name: found for name in ("transformer-engine", "trl") if device == "cuda" and (found := _version(name))},
    }


def _commit() -> str:
    """Of the checkout; GROUPDPO_COMMIT where the files were copied without their history."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git
        return os.environ.get("GROUPDPO_COMMIT", "unknown")
    return found.stdout.strip() or os.environ.get("GROUPDPO_COMMIT", "unknown")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
