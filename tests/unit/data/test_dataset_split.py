"""Several stores as one: numbering runs on, and equal prompts fall on one side of the split."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_groupdpo.data.store import reader as dataset_module
from megatron_groupdpo.data.store.reader import GroupDataset, split_by_prompt
from megatron_groupdpo.errors import DataError


@pytest.fixture
def dataset(write_lines, build, tmp_path: Path) -> GroupDataset:
    paths = []
    for store, numbers in enumerate([range(40), range(20, 80), range(5)]):
        records = [
            {"prompt": f"p{i}", "responses": [{"text": f"{store} {k}", "label": k} for k in (1, -1)]} for i in numbers
        ]
        paths.append(str(tmp_path / f"s{store}"))
        build(write_lines(records, f"{store}.jsonl"), output=Path(paths[-1]))
    return GroupDataset.open(paths)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.02, 0.98), st.integers(1, 200))
def test_the_split_goes_by_the_prompt_alone(monkeypatch, dataset, fraction, block):
    monkeypatch.setattr(dataset_module, "_BLOCK_GROUPS", block)
    keys = [zlib.crc32(dataset[i].prompt_tokens.astype("<i4").tobytes()) for i in range(len(dataset))]
    expected = [i for i, key in enumerate(keys) if key < fraction * 2**32]
    if not 0 < len(expected) < len(dataset):
        with pytest.raises(DataError, match="choose another fraction"):
            split_by_prompt(dataset, fraction)
        return
    train, held_out = split_by_prompt(dataset, fraction)
    assert held_out.tolist() == expected
    assert sorted([*train, *held_out]) == list(range(len(dataset)))
    assert train.dtype == held_out.dtype == np.int32


def test_without_a_fraction_all_is_for_training(dataset):
    train, held_out = split_by_prompt(dataset, 0.0)
    assert train.tolist() == list(range(len(dataset)))
    assert not len(held_out)
