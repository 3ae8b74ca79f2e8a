"""Where a run begins and what it leaves, by the options of its checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank, Trained

from megatron_groupdpo.errors import CheckpointError, ConfigError, DataError
from megatron_groupdpo.mcore.weights import optimizer_parts
from megatron_groupdpo.reference.swapped import SwappedReference
from megatron_groupdpo.run.parts import Run


@pytest.fixture(scope="module")
def saved(one: OneRank, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three iterations of two groups."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    return one.train(folder, train_iters=3, lr_decay_iters=6, save=str(folder), save_interval=2, run_dir=None)


def folder_of(saved: Trained) -> str:
    folder = saved.run.config.checkpoint.save
    assert folder is not None
    return folder


def moments(run: Run) -> float:
    """The largest number of Adam's state."""
    state = optimizer_parts(run.updater.optimizer)[0].optimizer.state
    tensors = [value for part in state.values() for value in part.values() if isinstance(value, torch.Tensor)]
    return max((float(tensor.abs().max()) for tensor in tensors), default=0.0)


@pytest.mark.acts("CheckpointConfig.save", "CheckpointConfig.save_interval")
def test_checkpoints_are_written_every_so_many_iterations_and_at_the_end(saved: Trained):
    folder = Path(folder_of(saved))
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "3"


@pytest.mark.acts("CheckpointConfig.ckpt_format", refused=True)
def test_the_format_is_torch_dist(saved: Trained, one: OneRank):
    metadata = json.loads((Path(folder_of(saved)) / "iter_0000003" / "metadata.json").read_text())
    assert metadata["sharded_backend"] == one.config().checkpoint.ckpt_format == "torch_dist"
    with pytest.raises(ConfigError, match="'ckpt_format' in 'checkpoint' must be one of torch_dist"):
        one.config(ckpt_format="zarr")


@pytest.mark.acts("CheckpointConfig.load", "CheckpointConfig.no_load_optim", "CheckpointConfig.finetune")
@pytest.mark.parametrize(
    ("changes", "iteration", "has_moments"),
    [({}, 3, True), ({"no_load_optim": True}, 3, False), ({"finetune": True}, 0, False)],
    ids=["load", "no_load_optim", "finetune"],
)
def test_a_run_goes_on_with_what_it_is_told_to_load(
    saved: Trained, one: OneRank, changes: dict[str, Any], iteration: int, has_moments: bool
):
    run = one.build(load=folder_of(saved), train_iters=6, **changes)
    assert run.policy.weights_digest() == saved.run.policy.weights_digest() != one.build().policy.weights_digest()
    assert (run.progress.iteration, run.progress.consumed_groups) == (iteration, 2 * iteration)
    assert run.updater.lr == pytest.approx(1e-2 * (1 - iteration / 6), rel=1e-12)
    assert (moments(run) > 0) == has_moments
    if has_moments:
        assert moments(run) == moments(saved.run)


@pytest.mark.acts("CheckpointConfig.pretrained_checkpoint")
def test_a_run_starts_from_pretrained_weights_where_there_is_nothing_to_load(
    saved: Trained, one: OneRank, folder: Path
):
    run = one.build(pretrained_checkpoint=folder_of(saved), load=str(folder))
    assert run.policy.weights_digest() == saved.run.policy.weights_digest()
    assert run.progress.iteration == 0


@pytest.mark.acts("CheckpointConfig.exit_on_missing_checkpoint")
def test_a_run_without_a_checkpoint_starts_anew_unless_it_must_not(one: OneRank, folder: Path):
    assert one.build(load=str(folder)).progress.iteration == 0
    with pytest.raises(CheckpointError, match="exit_on_missing_checkpoint is set"):
        one.build(load=str(folder), exit_on_missing_checkpoint=True)


@pytest.mark.acts("ObjectiveConfig.reference", "ObjectiveConfig.reference_offload")
@pytest.mark.parametrize("offload", [False, True])
def test_a_resident_reference_is_the_pretrained_model(saved: Trained, one: OneRank, folder: Path, offload: bool):
    """The first scores are then 0, and a pair costs log 2; the second iteration's are not."""
    done = one.train(
        folder, pretrained_checkpoint=folder_of(saved), reference="resident", reference_logprobs=None,
        reference_offload=offload, train_iters=2,
    )  # fmt: skip
    first, second = done.of("preference_loss")
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert abs(second - math.log(2)) > 1e-4
    assert isinstance(done.run.reference_policy, SwappedReference) == offload


@pytest.mark.acts("DataConfig.tokenizer_type", "DataConfig.tokenizer_model")
def test_a_tokenizer_that_is_named_must_be_the_stores(one: OneRank, folder: Path):
    one.build()
    with pytest.raises(DataError, match=f"{folder}: no such file"):
        one.build(tokenizer_model=str(folder))
    with pytest.raises(DataError, match=r"HuggingFaceTokenizer|folder|hub"):
        one.build(tokenizer_model=str(folder), tokenizer_type="HuggingFaceTokenizer")
