"""Every test of this folder starts ranks: it is marked ``distributed``, and may ask for the shared pool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_pool import RankPool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four ranks, started when the first test asks for them."""
    ranks = RankPool(4)
    yield ranks
    ranks.close()
