"""Transformer Engine's spec puts every norm where the local one does, and checkpoints serve both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fused_layers import FAMILIES, compare_specs
from rank_pool import RankPool


@pytest.mark.parametrize("family", FAMILIES)
def test_both_specs_are_one_model(pool: RankPool, family: str, tmp_path: Path):
    (result,) = pool.run(1, compare_specs, family, {}, str(tmp_path))
    check(result)
    assert ("NormColumn" in result["modules"]) == (FAMILIES[family].get("norm_position") != "post")


def test_on_a_sharded_layout_too(pool: RankPool, tmp_path: Path):
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    for result in pool.run(2, compare_specs, "gemma3", layout, str(tmp_path)):
        check(result)


def check(result: dict[str, Any]) -> None:
    np.testing.assert_allclose(result["fused"], result["local"], rtol=2e-6)
    assert result["digests"][0] == result["digests"][1], "the tensors have other names or shards"
