"""How far numbers that should be equal may be apart, by precision: measured, given, or not known."""

from __future__ import annotations

from megatron_groupdpo.config import TrainConfig
from megatron_groupdpo.config.fp8 import precision_name
from megatron_groupdpo.step.verify import BF16_TOLERANCE, FP32_TOLERANCE

LOGP_TOLERANCES: dict[str, float] = {"fp32": 1e-4, "bf16": 2e-2}
"""Between two layouts, of a log-probability per token of its response. FP8 was not measured; see docs/precision.md."""
GRADIENT_TOLERANCES: dict[str, float] = {"fp32": FP32_TOLERANCE, "bf16": BF16_TOLERANCE}
"""Of ||difference|| / ||gradient||, by precision as above."""


def logp_tolerance(config: TrainConfig) -> float | None:
    """Between two layouts at this precision, per token; None: none was measured, and none given."""
    return config.training.logp_tolerance or LOGP_TOLERANCES.get(precision_name(config.precision))


def gradient_tolerance(config: TrainConfig) -> float:
    """Of --verify-gradients; a configuration without a measured or given one is refused."""
    given = config.training.gradient_tolerance or GRADIENT_TOLERANCES.get(precision_name(config.precision))
    assert given is not None
    return given


def drift_threshold(config: TrainConfig, longest_response: int) -> float | None:
    """Largest difference of a score between the passes; None: not enforced.

    With FP8 a pass that saw other scales or other copies of the weights must not go unnoticed, so there is a default:
    what bf16's tolerance between two layouts comes to for a response of ``longest_response`` tokens. The passes share
    layout and kernels, and should agree far better.
    """
    given = config.training.score_drift_threshold
    if given is not None or config.precision.fp8_format is None:
        return given
    objective = config.objective
    return objective.beta * LOGP_TOLERANCES["bf16"] * (1 if objective.score_average else longest_response)


def shown(tolerance: float | None) -> str:
    """For a line of the log."""
    return "not enforced: give --logp-tolerance" if tolerance is None else f"tolerance {tolerance:.0e}"
