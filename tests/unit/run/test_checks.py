"""What is refused before a model is built: data without a preference term, a checkpoint in another order of data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_groupdpo.errors import CheckpointError, DataError
from megatron_groupdpo.objectives import OBJECTIVES, active_groups
from megatron_groupdpo.run.checks import check_groups, check_order

NAN = float("nan")
DATA: dict[str, tuple[list[list[int]], list[list[float]]]] = {
    "labels": ([[1, -1], [1, 1, -1]], [[NAN] * 2, [NAN] * 3]),
    "one-sided labels": ([[1, 1], [-1, -1, -1]], [[NAN] * 2, [NAN] * 3]),
    "negatives": ([[-1, -1]], [[NAN] * 2]),
    "values": ([[1, -1], [1, 1]], [[0.5, 0.0], [1.0, 1.0]]),
    "equal values": ([[1, -1], [1, 1]], [[0.5, 0.5], [NAN, 1.0]]),
    "one-sided values": ([[1, 1]], [[0.5, 0.25]]),
}


def dataset(labels: list[list[int]], values: list[list[float]]) -> Any:
    first = np.cumsum([0, *map(len, labels)])
    store = SimpleNamespace(
        path=Path("a.store"),
        first_response_G1=first,
        labels_R=np.concatenate(labels).astype(np.int8),
        values_R=np.concatenate(values).astype(np.float32),
    )

    class Dataset:
        stores = (store,)

        def __len__(self) -> int:
            return len(labels)

    return Dataset()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_refused_is_exactly_what_has_no_active_group(data: str, objective: str):
    import torch

    labels, values = DATA[data]
    options = {"beta": 0.1} if objective == "ipo_pairs" else {}
    active = [
        bool(
            active_groups(objective, torch.tensor([own]), torch.tensor([given]), group_keys_G=torch.zeros(1), **options)
        )
        for own, given in zip(labels, values)
    ]
    if any(active):
        check_groups(dataset(labels, values), objective)
    else:
        with pytest.raises(DataError, match=f"a.store: objective '{objective}' needs groups with .* none of"):
            check_groups(dataset(labels, values), objective)


@pytest.mark.parametrize("objective", [name for name, described in OBJECTIVES.items() if described.needs_values])
def test_data_without_values_are_told_what_gives_them_values(objective: str):
    """Another --partition, which helps where labels or ties leave nothing, cannot."""
    with pytest.raises(DataError, match="give each response a score") as refused:
        check_groups(dataset(*DATA["labels"]), objective)
    assert "--partition" not in str(refused.value)
    with pytest.raises(DataError, match="another --partition"):
        check_groups(dataset([[1, 1]], [[0.5, 0.5]]), objective)


def checkpoint_with_order(folder: Path, order: dict[str, Any]) -> Path:
    """What a checkpoint says beside its tensors, and nothing else."""
    import json

    import torch

    folder.mkdir()
    torch.save({"groupdpo_format": 1, "config": {"order": order}}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


@pytest.mark.parametrize(("saved", "goes_on_with"), [({}, 1), ({"blend": 1}, 1), ({"blend": 2}, 2), (None, 2)])
def test_a_resumed_run_goes_on_with_the_blend_it_began_with(tmp_path: Path, saved: dict | None, goes_on_with: int):
    """None: nothing is resumed. A checkpoint older than the number has the first blend."""
    from megatron_groupdpo.convert.start_weights import StartWeights
    from megatron_groupdpo.run.build import data_order

    config: Any = SimpleNamespace(
        training=SimpleNamespace(seed=7),
        data=SimpleNamespace(shuffle=True, data_weights=(1.0, 2.0), curriculum="none", valid_fraction=0.0),
    )
    stores: Any = SimpleNamespace(stores=[SimpleNamespace(digest="a"), SimpleNamespace(digest="b")])
    whole = data_order(config, stores, None)
    assert whole["blend"] == 2
    own = {name: value for name, value in whole.items() if name != "blend"}
    source = None if saved is None else StartWeights(folder=checkpoint_with_order(tmp_path / "iter", own | saved))
    order = data_order(config, stores, source)
    assert order == own | {"blend": goes_on_with}
    if source is not None:
        check_order(source.folder, order)


def test_a_blend_that_is_not_known_here_is_refused(tmp_path: Path):
    folder = checkpoint_with_order(tmp_path / "iter", {"seed": 7, "blend": 3})
    with pytest.raises(CheckpointError, match="blend: checkpoint 3, run 2"):
        check_order(folder, {"seed": 7, "blend": 2})
