"""The one table of objectives, and the one way to make their hyperparameters."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.objectives.all_pairs import ALL_PAIRS
from megatron_groupdpo.objectives.base import Objective
from megatron_groupdpo.objectives.dpo import DPO
from megatron_groupdpo.objectives.group_bce import GROUP_BCE
from megatron_groupdpo.objectives.info_nca import INFO_NCA
from megatron_groupdpo.objectives.ipo_pairs import IPO_PAIRS
from megatron_groupdpo.objectives.lipo_lambda import LIPO_LAMBDA
from megatron_groupdpo.objectives.margin import MARGIN
from megatron_groupdpo.objectives.mpo import MPO
from megatron_groupdpo.objectives.nca import NCA
from megatron_groupdpo.objectives.plackett_luce import PLACKETT_LUCE
from megatron_groupdpo.objectives.sft import SFT
from megatron_groupdpo.objectives.simpo_pairs import SIMPO_PAIRS
from megatron_groupdpo.objectives.softmax import SOFTMAX
from megatron_groupdpo.objectives.weighted_mpo import WEIGHTED_MPO

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        objective.name: objective
        for objective in (
            ALL_PAIRS,
            MPO,
            SOFTMAX,
            MARGIN,
            DPO,
            WEIGHTED_MPO,
            PLACKETT_LUCE,
            LIPO_LAMBDA,
            INFO_NCA,
            NCA,
            GROUP_BCE,
            IPO_PAIRS,
            SIMPO_PAIRS,
            SFT,
        )
    }
)
"""Every objective by name."""


def get_objective(name: str) -> Objective:
    """The objective of that name.

    Raises:
        ConfigError: there is none; the message names the nearest, and all of them.
    """
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ConfigError(
            f"unknown objective {name!r}{_did_you_mean(str(name), OBJECTIVES) or '.'} "
            f"The objectives are: {', '.join(OBJECTIVES)}."
        )
    return OBJECTIVES[name]


def hyperparameter_names(name: str) -> tuple[str, ...]:
    """The options the objective of that name has, in order."""
    return tuple(field.name for field in dataclasses.fields(get_objective(name).hyperparameters))


def hyperparameters_for(name: str, given: Mapping[str, Any]) -> Any:
    """The objective's hyperparameters: ``given`` over the defaults.

    Raises:
        ConfigError: an option the objective does not use (it would act nowhere), one that is required and
            absent, or a value out of its range.
    """
    objective = get_objective(name)
    known = hyperparameter_names(name)
    for option in given:
        if option not in known:
            has = f"Its options are: {', '.join(known)}." if known else "It has no options."
            raise ConfigError(
                f"objective {name!r} does not use option {option!r}{_did_you_mean(option, known) or '.'} "
                f"{has} Remove {option!r} or choose another objective."
            )
    for field in dataclasses.fields(objective.hyperparameters):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            raise ConfigError(f"objective {name!r} needs option {field.name!r}, which has no default; give it.")
    for field in dataclasses.fields(objective.hyperparameters):
        value = given.get(field.name, 0.0)
        if "float" in str(field.type) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"option {field.name!r} of objective {name!r} must be a number; it is {value!r}.")
    return objective.hyperparameters(**given)


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
