"""What the objectives refuse, and that the message says rule, values and way out."""

from __future__ import annotations

import math
import re

import pytest
import torch

from megatron_groupdpo.errors import ConfigError, UserError
from megatron_groupdpo.objectives import (
    OBJECTIVES,
    active_groups,
    group_loss,
    hyperparameters_for,
    separable_terms,
    used_responses,
)

LABELS = torch.tensor([[1, -1]])
SCORES = torch.zeros(1, 2)


def refused(error, *fragments):
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(f) for f in fragments))


def test_unknown_objective_is_refused_with_a_suggestion():
    with refused(ConfigError, "unknown objective 'all_pair'; did you mean 'all_pairs'?", "lipo_lambda"):
        group_loss("all_pair", SCORES, LABELS)


def test_option_an_objective_does_not_use_is_refused():
    with refused(ConfigError, "objective 'mpo' does not use option 'label_smoothing'", "It has no options"):
        group_loss("mpo", SCORES, LABELS, label_smoothing=0.1)
    with refused(ConfigError, "'simpo_pairs'", "'gamma'", "did you mean 'simpo_gamma'?", "label_smoothing"):
        hyperparameters_for("simpo_pairs", {"gamma": 1.0})
    with refused(ConfigError, "'sft' does not use"):
        active_groups("sft", LABELS, beta=0.1)


def test_required_option_is_asked_for():
    with refused(ConfigError, "objective 'ipo_pairs' needs option 'beta'"):
        group_loss("ipo_pairs", SCORES, LABELS)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("all_pairs", "label_smoothing", (-0.1, 0.5, math.nan)),
        ("dpo", "label_smoothing", (0.7,)),
        ("dpo", "pair_selection", ("best",)),
        ("weighted_mpo", "weight_exponent", (-1.0, math.inf)),
        ("info_nca", "value_temperature", (0.0, -1.0, math.nan)),
        ("lipo_lambda", "psi_scaling", ("minmax",)),
        ("ipo_pairs", "beta", (0.0, -1.0)),
        ("simpo_pairs", "simpo_gamma", (-0.5, math.nan)),
        ("simpo_pairs", "label_smoothing", (0.5,)),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name, option, values):
    for value in values:
        with refused(ConfigError, option, str(value)):
            hyperparameters_for(name, {option: value})


def test_values_must_be_given_where_they_are_read():
    for name, objective in OBJECTIVES.items():
        if objective.needs_values:
            with refused(UserError, name, "pass values_GK"):
                group_loss(name, SCORES, LABELS)


def test_psi_outside_the_unit_interval_is_refused_unless_scaled():
    with refused(UserError, "[0, 1]", "psi_scaling 'group'"):
        group_loss("lipo_lambda", SCORES, LABELS, torch.tensor([[3.0, 1.0]]), psi_scaling="given")


def test_random_pairs_need_group_keys():
    with refused(UserError, "group_keys_G"):
        used_responses("dpo", LABELS, pair_selection="random")


@pytest.mark.parametrize(
    "arrays",
    [
        {"labels_GK": torch.tensor([1, -1])},
        {"labels_GK": torch.tensor([[1, 2]])},
        {"values_GK": torch.zeros(2, 2)},
        {"values_GK": torch.tensor([[math.inf, 0.0]])},
        {"tie_keys_GK": torch.zeros(1, 3, dtype=torch.int64)},
        {"group_keys_G": torch.zeros(2, dtype=torch.int64)},
        {"scores_GK": torch.zeros(1, 3)},
        {"scores_GK": torch.zeros(1, 2, dtype=torch.int64)},
    ],
    ids=lambda arrays: next(iter(arrays)),
)
def test_arrays_that_do_not_fit_are_refused_by_name(arrays):
    name = next(iter(arrays))
    with refused(UserError, name):
        group_loss("dpo", **{"scores_GK": SCORES, "labels_GK": LABELS, **arrays})


def test_terms_of_a_coupled_objective_are_refused():
    with refused(UserError, "'mpo' couples", "nca, group_bce, sft"):
        separable_terms("mpo", SCORES, LABELS)


def test_every_objective_says_its_equation_and_source():
    for name, objective in OBJECTIVES.items():
        assert objective.name == name
        assert objective.equation
        assert objective.source


def test_arguments_of_another_kind_are_refused():
    with refused(UserError, "labels_GK must hold +1, -1 or 0, not booleans", "torch.where"):
        group_loss("mpo", SCORES, LABELS > 0)
    with refused(UserError, "labels_GK must be a torch.Tensor, not list"):
        group_loss("mpo", SCORES, [[1, -1]])  # type: ignore[arg-type]
    with refused(UserError, "scores_GK must be a torch.Tensor, not list"):
        group_loss("mpo", [[0.0, 0.0]], LABELS)  # type: ignore[arg-type]
    with refused(UserError, "at least one response", "(2, 0)"):
        group_loss("nca", torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int8), torch.zeros(2, 0))
    for given in ("0.1", None, True):
        with refused(ConfigError, "option 'label_smoothing'", "must be a number"):
            group_loss("dpo", SCORES, LABELS, label_smoothing=given)
    with refused(ConfigError, "unknown objective None"):
        group_loss(None, SCORES, LABELS)  # type: ignore[arg-type]
