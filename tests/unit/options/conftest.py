"""One rank of Megatron for the tests of this folder, and the stores that its runs read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from one_rank import OneRank, write_reference, write_store

from megatron_groupdpo.config import ParallelConfig
from megatron_groupdpo.mcore.setup import initialize, shut_down


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneRank]:
    """Two stores of 9 and 5 groups, both scored in one folder."""
    folder = tmp_path_factory.mktemp("one")
    stores = [write_store(folder / name, size, seed) for name, size, seed in (("large", 9, 1), ("small", 5, 2))]
    write_reference(stores, folder / "reference")
    ranks = initialize(ParallelConfig(device="cpu"), seed=1)
    yield OneRank(ranks, *stores, folder / "reference")
    shut_down()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
