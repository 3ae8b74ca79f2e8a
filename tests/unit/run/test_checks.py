"""Data of which no group has a preference term are refused before a model is built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_groupdpo.errors import DataError
from megatron_groupdpo.objectives import OBJECTIVES, active_groups
from megatron_groupdpo.run.checks import check_groups

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
