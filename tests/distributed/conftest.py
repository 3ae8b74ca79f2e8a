"""Every test of this folder starts ranks: it is marked ``distributed``, and may ask for the shared pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import te_runtime
import tiny_run
from rank_pool import RankPool
from te_pool import TePool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four ranks, started when the first test asks for them."""
    ranks = RankPool(4, ancestor="ancestor")
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def te_pool() -> Iterator[TePool]:
    """Ranks on which Transformer Engine's own Python runs."""
    if (problem := te_runtime.problem()) is not None:
        pytest.skip(problem)
    ranks = TePool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> tiny_run.TinyData:
    folder = tmp_path_factory.mktemp("tiny")
    data = tiny_run.TinyData(folder, folder / "store", folder / "reference", folder / "tokenizer.model")
    tiny_run.write_groups(folder / "groups.jsonl")
    tiny_run.train_tokenizer(data.tokenizer)
    tiny_run.preprocess(folder / "groups.jsonl", data.tokenizer, data.store)
    tiny_run.write_reference(data.store, data.reference)
    return data


@pytest.fixture
def config_file(tiny_data: tiny_run.TinyData, tmp_path: Path) -> Callable[..., Path]:
    """``config_file(section={field: value}, ...)``: the tiny run's YAML, with changes."""

    def write(**sections: Mapping[str, Any]) -> Path:
        path = tmp_path / "run.yaml"
        return tiny_run.write_config(path, tiny_data.store, tiny_data.reference, **sections)

    return write
