"""A run stops on all ranks, with one message, before an update that cannot be trusted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_pool import RankPool
from tiny_run import (
    read_metrics,
    refusal_on_rank,
    score_own_weights_on_rank,
    train_on_rank,
)

ConfigFile = Callable[..., Path]
PP2 = {"pipeline_model_parallel_size": 2}


def test_a_score_that_is_not_finite_stops_all_stages_and_names_the_record(
    pool: RankPool, config_file: ConfigFile, tmp_path: Path
):
    save = tmp_path / "run"
    config = config_file(parallel=PP2, checkpoint={"save": str(save)})
    answers = pool.run(2, refusal_on_rank, ["--config", str(config)], "poisoned weight")
    assert len(set(answers)) == 1, "every stage must stop with the same message"
    kind, message = answers[0]
    assert kind == "UserError"
    assert re.match(r"iteration 1: \d+ of 14 log-probabilities are not finite", message)
    assert re.search(r"groups\.jsonl:\d+;", message)
    assert "Nothing was updated" in message
    assert read_metrics(save) == []
    assert not list(save.glob("iter_*"))


def test_a_gradient_that_is_not_finite_stops_all_stages_before_it_is_saved(
    pool: RankPool, config_file: ConfigFile, tmp_path: Path
):
    """Adam's first update makes all weights +-1e30: RMSNorm still gives finite scores, the gradient overflows."""
    save = tmp_path / "run"
    config = config_file(
        optimizer={"lr": 1e30, "lr_warmup_iters": 0}, parallel=PP2, checkpoint={"save": str(save), "save_interval": 2}
    )
    answers = pool.run(2, refusal_on_rank, ["--config", str(config)])
    assert len(set(answers)) == 1
    kind, message = answers[0]
    assert kind == "UserError"
    assert message.startswith("iteration 2: the gradient norm is")
    assert [line["iteration"] for line in read_metrics(save)] == [1]
    assert not list(save.glob("iter_*"))


@pytest.mark.acts("TrainingConfig.score_drift_threshold")
def test_drift_between_the_passes_beyond_the_threshold_stops_the_run(
    pool: RankPool, config_file: ConfigFile, tmp_path: Path
):
    save = tmp_path / "run"
    config = config_file(parallel=PP2, training={"score_drift_threshold": 1e-3}, checkpoint={"save": str(save)})
    answers = pool.run(2, refusal_on_rank, ["--config", str(config)], "noisy scores")
    assert len(set(answers)) == 1
    kind, message = answers[0]
    assert kind == "UserError"
    assert "differ by 3.000e-02, more than score_drift_threshold 1.000e-03" in message  # beta 0.3
    assert not list(save.glob("iter_*"))


@pytest.mark.costly
def test_a_policy_with_the_references_weights_scores_zero_on_any_layout(
    pool: RankPool, config_file: ConfigFile, tiny_data, tmp_path: Path
):
    config, reference = config_file(), tmp_path / "own"
    argv = ["--config", str(config)]
    pool.run(1, score_own_weights_on_rank, argv, str(tiny_data.store), str(reference))
    for num_ranks, parallel in ((1, {}), (2, PP2), (2, {"tensor_model_parallel_size": 2}), (2, {})):
        save = tmp_path / f"run{num_ranks}{parallel}"
        training = {"train_iters": 1, "global_batch_size": 10}
        config = config_file(
            parallel=parallel,
            training=training,
            optimizer={"lr_warmup_iters": 0},
            objective={"reference_logprobs": str(reference)},
            checkpoint={"save": str(save)},
        )
        pool.run(num_ranks, train_on_rank, ["--config", str(config)])
        (line,) = read_metrics(save)
        # Scores are 0: each of P positives against N negatives costs log(1 + N), and N is 1, 2, 3 in turn.
        closed_form = (4 * math.log(2) + 3 * math.log(3) + 3 * math.log(4)) / 10
        assert line["preference_loss"] == pytest.approx(closed_form, rel=1e-5)
        assert line["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)
        assert line["rewards/rejected"] == pytest.approx(0.0, abs=1e-4)


def test_reference_numbers_that_are_not_the_policys_are_refused_at_step_0(
    pool: RankPool, config_file: ConfigFile, tiny_data, tmp_path: Path
):
    reference = tmp_path / "shifted"
    argv = ["--config", str(config_file())]
    pool.run(1, score_own_weights_on_rank, argv, str(tiny_data.store), str(reference), 0.5)
    config = config_file(parallel=PP2, objective={"reference_logprobs": str(reference)})
    answers = pool.run(2, refusal_on_rank, ["--config", str(config)])
    assert len(set(answers)) == 1
    kind, message = answers[0]
    assert kind == "UserError"
    assert "starts with the reference's weights" in message
    assert "tools/score_reference.py" in message
