"""Every test here is marked ``gpu``; the bodies lie beside the multi-rank tests, which run them on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "harness"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def transformer_engine() -> None:
    """Skips where it is not installed, with the reason."""
    from megatron_groupdpo.mcore.fp8.state import transformer_engine_problem

    if (problem := transformer_engine_problem()) is not None:
        pytest.skip(f"Transformer Engine: {problem}")
