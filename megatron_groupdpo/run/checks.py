"""What is refused before a model is built: outputs of another run, data or a checkpoint that do not fit the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_groupdpo import objectives
from megatron_groupdpo.config import TrainConfig
from megatron_groupdpo.data.batches.sampler import BLENDS
from megatron_groupdpo.data.store.reader import GroupDataset
from megatron_groupdpo.errors import CheckpointError, ConfigError, DataError
from megatron_groupdpo.mcore.checkpoint.folders import latest_iteration, read_common
from megatron_groupdpo.run.logs.writer import METRICS_FILE


def check_groups(dataset: GroupDataset, objective: str) -> None:
    """Refuse data of which no group has a preference term: the run would train on nothing.

    Raises:
        DataError: so it is; the message says what the objective needs.
    """
    description = objectives.get_objective(objective)
    active = 0
    for store in dataset.stores:
        first_G = np.asarray(store.first_response_G1[:-1])
        positive_G = np.maximum.reduceat(store.labels_R, first_G) > 0
        negative_G = np.minimum.reduceat(store.labels_R, first_G) < 0
        sides_G = positive_G if objective == "sft" else positive_G & negative_G
        if description.needs_values:
            high_G, low_G = np.fmax.reduceat(store.values_R, first_G), np.fmin.reduceat(store.values_R, first_G)
            sides_G = sides_G & ~np.isnan(high_G) if objective == "weighted_mpo" else high_G > low_G
        active += int(sides_G.sum())
    if active == 0:
        needs = {
            "sft": "a positive",
            "weighted_mpo": "a positive, a negative and values",
        }.get(objective, "two distinct values" if description.needs_values else "a positive and a negative")
        has_values = any(not np.isnan(store.values_R).all() for store in dataset.stores)
        way_out = (
            "preprocess with another --partition"
            if has_values or not description.needs_values
            # No partition makes values: the records must bring them, which pairs of texts do not.
            else "preprocess records that give each response a score (of pairs: canonical records, say with 1 and 0)"
        )
        raise DataError(
            f"{', '.join(str(store.path) for store in dataset.stores)}: objective {objective!r} needs groups with "
            f"{needs}, and none of {len(dataset)} groups is one; choose another objective, or {way_out}"
        )


def check_outputs(config: TrainConfig, resumed: Path | None) -> None:
    """Make the folders a run writes to, and refuse those that hold another run.

    Args:
        config: the run.
        resumed: the ``iter_`` folder the run goes on from, if it does.

    Raises:
        ConfigError: a folder cannot be made.
        CheckpointError: ``save`` or ``run_dir`` holds a run that this one does not go on with.
    """
    save, run_dir = config.checkpoint.save, config.logging.run_dir
    for name, folder in (("save", save), ("run_dir", run_dir), ("tensorboard_dir", config.logging.tensorboard_dir)):
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{name} {folder}: the folder cannot be made ({error}); choose another") from error
    way_out = "go on with it (--load with the same folder), or choose another folder"
    if save is not None:
        goes_on = resumed is not None and resumed.resolve().parent == Path(save).resolve()
        found = latest_iteration(Path(save))
        if found is not None and not goes_on:
            raise CheckpointError(f"--save {save} holds another run, at iteration {found}; {way_out}")
    log = None if run_dir is None else Path(run_dir) / METRICS_FILE
    if log is not None and log.exists() and resumed is None:
        raise CheckpointError(f"--run-dir {run_dir} holds the {METRICS_FILE} of another run; {way_out}")
    # No rank may start to write before the last one has looked.
    dist.barrier()


def check_order(source: Path, order: dict[str, Any]) -> None:
    """A resumed run must be of the same data in the same order."""
    before = read_common(source)["config"].get("order")
    if before is None:
        return
    before = {"blend": BLENDS[0]} | before  # a checkpoint older than the number
    differ = [
        f"{name}: checkpoint {before.get(name)}, run {value}"
        for name, value in order.items()
        if before.get(name) != value
    ]
    if differ:
        raise CheckpointError(
            f"{source} stands in another order of data ({'; '.join(differ)}), which this run would not go on with; "
            "set these as they were, or take the weights alone with --finetune and another --save"
        )
