"""Stored reference log-probabilities: the same on every layout, and the same as a second model in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rank_pool import RankPool
from tiny_run import TinyData, read_metrics, train_on_rank

ConfigFile = Callable[..., Path]
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}


def score_on_rank(checkpoint: str, store: str, folder: str, layout: dict[str, int]) -> int:
    """``score_store`` as the tool calls it; how many groups were scored before."""
    from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
    from megatron_groupdpo.data.planner import plan_options
    from megatron_groupdpo.data.store import TokenStore
    from megatron_groupdpo.mcore.policy import load_policy
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.reference.score import score_store

    parallel = ParallelConfig(device="cpu", **layout)
    ranks = initialize(parallel, seed=0)
    done_before = [-1]

    try:
        policy = load_policy(Path(checkpoint), parallel, PrecisionConfig(), ranks)
        plan = plan_options(parallel, data_parallel_size=ranks.dp_group.size(), micro_batch_size=3)
        opened = TokenStore.open(store)
        score_store(
            policy,
            opened,
            Path(folder),
            plan=plan,
            groups_per_batch=3,
            on_start=lambda done, _total: done_before.__setitem__(0, done),
        )
        return done_before[0]
    finally:
        shut_down()


@pytest.fixture(scope="module")
def start(pool: RankPool, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from, trained for two steps so that its weights are no initial ones."""
    from tiny_run import write_config

    folder = tmp_path_factory.mktemp("start")
    config = write_config(
        folder / "config.yaml",
        tiny_data.store,
        tiny_data.reference,
        training={"train_iters": 3},
        checkpoint={"save": str(folder / "run")},
    )
    pool.run(1, train_on_rank, ["--config", str(config)])
    return folder / "run"


def stored(folder: Path) -> np.ndarray:
    (logps,) = folder.glob("*/logps.npy")
    return np.load(logps)


def test_reference_log_probabilities_do_not_depend_on_the_layout(
    pool: RankPool, tiny_data: TinyData, start: Path, tmp_path: Path
):
    found = {}
    for name, layout in LAYOUTS.items():
        pool.run(2, score_on_rank, str(start), str(tiny_data.store), str(tmp_path / name), layout)
        found[name] = stored(tmp_path / name)
        assert np.isfinite(found[name]).all()
    np.testing.assert_allclose(found["tp2"], found["pp2"], rtol=1e-5)
    np.testing.assert_allclose(found["dp2"], found["pp2"], rtol=1e-5)


def test_scoring_goes_on_where_it_stopped_and_leaves_the_rest_alone(
    pool: RankPool, tiny_data: TinyData, start: Path, tmp_path: Path
):
    folder = tmp_path / "reference"
    arguments = (str(start), str(tiny_data.store), str(folder), {"pipeline_model_parallel_size": 2})
    pool.run(2, score_on_rank, *arguments)
    whole = stored(folder)
    (path,) = folder.glob("*/logps.npy")
    half = np.load(path, mmap_mode="r+")
    half[len(half) // 2 :] = np.nan
    half[0] += 1.0  # what is there is not computed again
    half.flush()
    done_before = pool.run(2, score_on_rank, *arguments)[-1]
    assert 0 < done_before < 10
    again = stored(folder)
    assert again[0] == whole[0] + 1.0
    np.testing.assert_array_equal(again[1:], whole[1:])


def test_a_resident_reference_gives_the_losses_of_the_cached_one(
    pool: RankPool, tiny_data: TinyData, start: Path, config_file: ConfigFile, tmp_path: Path
):
    reference = tmp_path / "reference"
    pp2 = {"pipeline_model_parallel_size": 2}
    pool.run(2, score_on_rank, str(start), str(tiny_data.store), str(reference), pp2)
    losses = {}
    for kind, logprobs in (("cached", str(reference)), ("resident", None)):
        config = config_file(
            parallel=pp2,
            objective={"reference": kind, "reference_logprobs": logprobs},
            checkpoint={"pretrained_checkpoint": str(start), "save": str(tmp_path / kind)},
        )
        shutil.copy(config, tmp_path / f"{kind}.yaml")
        pool.run(2, train_on_rank, ["--config", str(tmp_path / f"{kind}.yaml")])
        losses[kind] = [line["loss"] for line in read_metrics(tmp_path / kind)]
    assert len(losses["cached"]) == 6
    np.testing.assert_allclose(losses["resident"], losses["cached"], rtol=1e-6)
    # and the reference matters: the first loss is the closed form, the later ones are not
    assert abs(losses["cached"][-1] - losses["cached"][0]) > 1e-3
