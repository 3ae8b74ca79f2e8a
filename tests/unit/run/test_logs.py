"""The run's log files: one line an iteration, and a resumed run writes the later lines again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_groupdpo.run.logs.writer import METRICS_FILE, RunLogger


def logger(folder: Path | None, *, start: int = 0, tensorboard: Path | None = None) -> RunLogger:
    return RunLogger(run_dir=folder, tensorboard_dir=tensorboard, start_iteration=start, train_iters=10)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def write(folder: Path, *iterations: int, start: int = 0, run: str = "first") -> None:
    log = logger(folder, start=start)
    for iteration in iterations:
        log.write(iteration, {"loss": iteration / 10, "run": run})
    log.close()


def test_every_iteration_is_one_json_object(tmp_path: Path):
    write(tmp_path, 1, 2, 3)
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3]
    assert lines(tmp_path)[1] == {"iteration": 2, "loss": 0.2, "run": "first"}


def test_a_line_is_on_disk_when_it_is_written(tmp_path: Path):
    log = logger(tmp_path)
    log.write(1, {"loss": 0.5})
    assert len(lines(tmp_path)) == 1
    log.close()


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path):
    write(tmp_path, 1, 2, 3, 4)
    write(tmp_path, 3, 4, 5, start=2, run="second")
    assert [(line["iteration"], line["run"]) for line in lines(tmp_path)] == [
        (1, "first"),
        (2, "first"),
        (3, "second"),
        (4, "second"),
        (5, "second"),
    ]


def test_a_run_from_the_start_drops_every_line(tmp_path: Path):
    write(tmp_path, 1, 2)
    write(tmp_path, 1, run="second")
    assert [(line["iteration"], line["run"]) for line in lines(tmp_path)] == [(1, "second")]


@pytest.mark.parametrize("torn", ['{"iteration": 3, "lo', "", "[]", '{"loss": 1}'])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path, torn: str):
    write(tmp_path, 1, 2)
    with (tmp_path / METRICS_FILE).open("a") as stream:
        stream.write(torn)
    write(tmp_path, 3, start=2)
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3]


def test_tensorboard_gets_the_numbers_by_name(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = logger(None, tensorboard=tmp_path)
    log.write(4, {"rewards/margins": 1.5, "score_drift": None})
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["rewards/margins"]
    (point,) = events.Scalars("rewards/margins")
    assert (point.step, point.value) == (4, 1.5)


def test_the_console_line_is_megatrons(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    metrics = {"loss": 0.5, "lr": 1e-4, "grad_norm": 2.0, "iteration_ms": 1500.0, "score_drift": None}
    log = logger(None)
    log.write(3, metrics | {"iteration_ms": 500.0})
    log.write(4, metrics)
    log.line(4, metrics, consumed_groups=32, global_batch_size=8)
    line = capsys.readouterr().out
    for part in (
        "iteration        4/      10",
        "consumed samples:           32",
        "elapsed time per iteration (ms): 1000.0",
        "learning rate: 1.000000E-04",
        "global batch size:     8",
        "loss: 5.000000E-01",
        "grad norm: 2.000",
        "ETA: 0:00:06",
    ):
        assert f" {part} |" in line.replace("] ", "] | "), part
    assert "score drift" not in line
