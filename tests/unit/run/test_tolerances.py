"""What may differ by how much follows from the precision, and from the flags where nothing was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "config"))
from config_examples import example

FP8: dict[str, Any] = {"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "tensorwise"}


@pytest.mark.acts("TrainingConfig.logp_tolerance")
def test_fp8_has_no_measured_tolerance_and_takes_what_is_given():
    from megatron_groupdpo.run.proofs.tolerances import gradient_tolerance, logp_tolerance, shown

    assert logp_tolerance(example()) == 1e-4
    assert logp_tolerance(example(bf16=True)) == 2e-2
    assert logp_tolerance(example(**FP8)) is None
    assert logp_tolerance(example(**FP8, logp_tolerance=0.25)) == 0.25
    assert "not enforced" in shown(None)
    assert gradient_tolerance(example(bf16=True)) == 1e-1
    assert gradient_tolerance(example(**FP8, gradient_tolerance=0.3)) == 0.3


def test_fp8_has_a_default_threshold_of_the_drift_that_grows_with_beta_and_length():
    from megatron_groupdpo.run.proofs.tolerances import drift_threshold

    assert drift_threshold(example(bf16=True), 100) is None
    assert drift_threshold(example(**FP8, beta=0.5), 100) == pytest.approx(0.5 * 2e-2 * 100)
    assert drift_threshold(example(**FP8, beta=0.5, score_average=True), 100) == pytest.approx(0.5 * 2e-2)
    assert drift_threshold(example(**FP8, score_drift_threshold=1e-6), 100) == 1e-6
