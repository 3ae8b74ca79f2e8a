"""Where a run reports: Megatron's console line, ``metrics.jsonl``, TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
_ON_THE_LINE = (
    ("loss", "loss", ".6E"),
    ("preference loss", "preference_loss", ".6E"),
    ("nll loss", "nll_loss", ".6E"),
    ("accuracy", "rewards/accuracies", ".3f"),
    ("margin", "rewards/margins", ".4f"),
    ("grad norm", "grad_norm", ".3f"),
    ("score drift", "score_drift", ".1E"),
    ("tokens per second", "tokens_per_second", ".0f"),
    ("data (ms)", "time/data_ms", ".1f"),
    ("scoring (ms)", "time/scoring_ms", ".1f"),
    ("backward (ms)", "time/backward_ms", ".1f"),
    ("optimizer (ms)", "time/optimizer_ms", ".1f"),
    ("throughput per GPU (TFLOP/s)", "tflops_per_gpu", ".2f"),
)


class RunLogger:
    """Writes on one rank. ``start_iteration`` is the iteration resumed from; later lines of an old log are dropped."""

    def __init__(
        self, *, run_dir: Path | None, tensorboard_dir: Path | None, start_iteration: int, train_iters: int
    ) -> None:
        self.train_iters = train_iters
        self._interval_ms: list[float] = []
        self._file = None
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            path = run_dir / METRICS_FILE
            _keep_until(path, start_iteration)
            self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard_dir is not None:
            self._writer = SummaryWriter(str(tensorboard_dir), purge_step=start_iteration + 1)

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """One object in ``metrics.jsonl``, one point per number in TensorBoard."""
        if "iteration_ms" in metrics:
            self._interval_ms.append(metrics["iteration_ms"])
        if self._file is not None:
            self._file.write(json.dumps({"iteration": iteration, **_finite(metrics)}, allow_nan=False) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, iteration)

    def line(self, iteration: int, metrics: Mapping[str, Any], *, consumed_groups: int, global_batch_size: int) -> None:
        """Megatron's console line, with the mean time since the last one, and the time to the end at that pace."""
        mean_ms = sum(self._interval_ms) / len(self._interval_ms)
        self._interval_ms.clear()
        parts = [
            f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {iteration:8d}/{self.train_iters:8d}",
            f"consumed samples: {consumed_groups:12d}",
            f"elapsed time per iteration (ms): {mean_ms:.1f}",
            f"learning rate: {metrics['lr']:.6E}",
            f"global batch size: {global_batch_size:5d}",
            *(f"{title}: {metrics[key]:{form}}" for title, key, form in _ON_THE_LINE if metrics.get(key) is not None),
            f"ETA: {timedelta(seconds=round((self.train_iters - iteration) * mean_ms / 1000))}",
        ]
        print(" | ".join(parts) + " |", flush=True)

    def validation_line(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Megatron's validation line."""
        values = " | ".join(f"{name.removeprefix('eval/')}: {value:.6E}" for name, value in metrics.items())
        print(f" validation loss at iteration {iteration} | {values} |", flush=True)

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no NaN: such numbers become null."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in metrics.items()}


def _keep_until(path: Path, iteration: int) -> None:
    """Drop lines after ``iteration``: the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a kill
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
