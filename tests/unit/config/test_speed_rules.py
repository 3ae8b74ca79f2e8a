"""What overlap and profiling need."""

from __future__ import annotations

from typing import Any

import pytest
from config_examples import example

from megatron_groupdpo.config import validate
from megatron_groupdpo.errors import ConfigError

LATE = {"overlap_grad_reduce": True, "overlap_param_gather": True, "use_distributed_optimizer": True}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({**LATE, "use_distributed_optimizer": False}, "overlap_param_gather gathers what the distributed optimizer has"),
    ({**LATE, "overlap_grad_reduce": False}, "overlap_param_gather needs overlap_grad_reduce"),
    ({"ddp_bucket_size": 1000}, "ddp_bucket_size (1000) would act on nothing: without overlap_grad_reduce"),
    (
        {"profile": True, "save": "run", "profile_step_start": 5, "profile_step_end": 5},
        "(5) must be < profile_step_end",
    ),
    ({"profile": True, "save": "run", "profile_step_end": 102}, "profile_step_end (102) must be <= 101"),
    ({"profile": True}, "neither run_dir nor save is given"),
    ({"profile_step_start": 3}, "profile_step_start (3) would act on nothing: profile is off"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_would_not_act_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as refusal:
        validate(example(**changes), 1)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        LATE,
        {"overlap_grad_reduce": True, "ddp_bucket_size": 1000},
        {"profile": True, "save": "run", "profile_step_end": 101},
        {"profile": True, "run_dir": "run", "profile_step_start": 1, "profile_step_end": 2},
    ],
)
def test_what_acts_is_accepted(changes: dict[str, Any]):
    validate(example(**changes), 1)
