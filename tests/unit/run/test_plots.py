"""A run's picture shows what the log holds, leaves out what it lacks, and refuses a log that is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_groupdpo.errors import DataError
from megatron_groupdpo.run.logs.plots import PANELS, plot_run, read_metrics, running_mean


def write_log(path: Path, *, iterations: int = 60, names: tuple[str, ...] | None = None) -> Path:
    metrics = [metric for panel in PANELS for metric, _, _ in panel.series] + ["lr"]
    lines = [
        {"iteration": at, **{name: 1.0 + at / iterations for name in metrics if names is None or name in names}}
        for at in range(1, iterations + 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def colours(path: Path) -> np.ndarray:
    """[height, width, 3] bytes."""
    return (imread(path)[..., :3] * 255).round().astype(int)


def share_of(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(picture - np.array(colour)).max(-1) < 12).mean())


BLUE, ORANGE, GREEN = (0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x9E, 0x73)


def test_a_full_log_gives_every_panel_and_all_curves(tmp_path: Path):
    log = write_log(tmp_path / "metrics.jsonl")
    drawn = plot_run(log, tmp_path / "plots" / "run.png")
    assert drawn == [panel.title for panel in PANELS]
    assert 4 <= len(drawn) <= 6
    picture = colours(tmp_path / "plots" / "run.png")
    assert min(picture.shape[:2]) > 500
    assert all(share_of(picture, colour) > 2e-4 for colour in (BLUE, ORANGE, GREEN))
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["run.png"]


def test_missing_metrics_leave_their_panel_out(tmp_path: Path):
    log = write_log(tmp_path / "metrics.jsonl", names=("loss", "nll_loss"))
    assert plot_run(log, tmp_path / "run.png") == ["loss"]
    picture = colours(tmp_path / "run.png")
    assert share_of(picture, GREEN) > 0
    assert share_of(picture, ORANGE) == 0


def test_the_curve_follows_the_values(tmp_path: Path):
    log = write_log(tmp_path / "metrics.jsonl", names=("grad_norm",), iterations=30)
    plot_run(log, tmp_path / "run.png")
    rows, columns = np.nonzero(np.abs(colours(tmp_path / "run.png") - np.array(BLUE)).max(-1) < 12)
    # A rising straight line: rows fall as columns rise.
    assert np.corrcoef(rows, columns)[0, 1] < -0.99


def test_held_out_curves_are_drawn_even_alone(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"iteration": at, "eval/rewards/margins": at}) + "\n" for at in (0, 50, 100)))
    assert plot_run(log, tmp_path / "run.png") == ["reward margin"]
    assert share_of(colours(tmp_path / "run.png"), BLUE) > 1e-4


def test_one_iteration_is_drawn(tmp_path: Path):
    log = write_log(tmp_path / "metrics.jsonl", names=("loss",), iterations=1)
    plot_run(log, tmp_path / "run.png")
    assert share_of(colours(tmp_path / "run.png"), BLUE) > 0


def test_a_drift_of_zero_is_shown_though_its_axis_is_logarithmic(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"iteration": at, "score_drift": 0.0}) + "\n" for at in range(50)))
    plot_run(log, tmp_path / "run.png")
    assert share_of(colours(tmp_path / "run.png"), BLUE) > 1e-3


def test_the_last_word_on_an_iteration_counts_and_nan_is_a_gap(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"iteration": 2, "loss": 5.0}\n{"iteration": 1, "loss": 4.0}\n{"iteration": 2, "loss": 3.0}\n'
        '{"iteration": 3, "loss": NaN, "note": "text", "flag": true, "nothing": null}\n'
    )
    curves = read_metrics(log)
    assert set(curves) == {"loss"}
    assert (curves["loss"][0].tolist(), curves["loss"][1].tolist()) == ([1.0, 2.0], [4.0, 3.0])


def test_a_last_line_cut_short_is_skipped_and_an_earlier_one_refused(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"iteration": 1, "loss": 4.0}\n{"iteration": 2, "lo')
    assert read_metrics(log)["loss"][0].tolist() == [1.0]
    log.write_text('{"iteration": 1, "lo\n{"iteration": 2, "loss": 4.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: "):
        read_metrics(log)


@pytest.mark.parametrize("text", ["", '{"iteration": 1}\n', '{"iteration": 1, "memory": 4}\n'])
def test_a_log_with_nothing_to_draw_is_refused(tmp_path: Path, text: str):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        plot_run(tmp_path, tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_an_output_that_is_no_png_is_refused(tmp_path: Path):
    log = write_log(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match=r"\.png"):
        plot_run(log, tmp_path / "run.pdf")


def test_the_running_mean_is_the_mean_of_the_window():
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(0, at - 3) : at + 4].mean() for at in range(50)]
    np.testing.assert_allclose(running_mean(values, 7), expected, atol=1e-12)


def test_the_command_draws_a_run_folder_and_refuses_an_absent_one(tmp_path: Path, tool):
    write_log(tmp_path / "metrics.jsonl")
    assert tool("plot_run", tmp_path).returncode == 0
    assert colours(tmp_path / "training.png").std() > 10
    refused = tool("plot_run", tmp_path / "absent")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr
