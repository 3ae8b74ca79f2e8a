"""Corners of the objectives: draws, missing values, ends of ranges, and whole messages."""

from __future__ import annotations

import math

import pytest
import torch
from test_objective_laws import _splitmix

from megatron_groupdpo.errors import ConfigError, UserError
from megatron_groupdpo.objectives import (
    OBJECTIVES,
    active_groups,
    coefficients,
    get_objective,
    group_keys,
    group_loss,
    hyperparameters_for,
    nll_responses,
    used_responses,
)
from megatron_groupdpo.objectives.keys import draw

NAN = math.nan
LABELS = torch.tensor([[1, -1, 1, -1, 1, -1], [1, -1, 0, 0, 0, 0]]).repeat(20, 1)
"""A group of three on each side, and one of a single pair, in turn."""
KEYS = group_keys(torch.arange(40), seed=3)
TIES = torch.randint(-(2**62), 2**62, LABELS.shape, generator=torch.Generator().manual_seed(5))


def test_draws_are_fixed_for_all_time():
    """A change of these numbers changes every drawn pair of every resumed run."""
    keys = torch.tensor([5, -7, 2**62])
    for stream in (0, 1):
        wanted = [_splitmix(_splitmix(key) + stream) % count for key, count in zip(keys.tolist(), (3, 8, 1))]
        assert draw(keys, torch.tensor([3, 8, 1]), stream=stream).tolist() == wanted


def test_a_side_of_one_is_always_drawn():
    used = used_responses("dpo", LABELS, pair_selection="random", group_keys_G=KEYS)
    assert used[1::2, :2].all()
    assert (used.sum(1) == 2).all()


def test_a_drawn_pair_follows_the_content_not_the_column():
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    given = {"pair_selection": "random", "group_keys_G": KEYS}
    used = used_responses("dpo", LABELS, tie_keys_GK=TIES, **given)
    assert torch.equal(used_responses("dpo", LABELS[:, order], tie_keys_GK=TIES[:, order], **given), used[:, order])


def test_every_function_draws_the_same_pair():
    given = {"pair_selection": "random", "group_keys_G": KEYS, "tie_keys_GK": TIES}
    used = used_responses("dpo", LABELS, **given)
    scores = torch.randn(LABELS.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(coefficients("dpo", scores, LABELS, **given) != 0, used)
    assert torch.equal(nll_responses("dpo", LABELS, **given), used & (LABELS == 1))
    assert active_groups("dpo", LABELS, **given).all()
    pair = torch.where(used, scores * LABELS, 0.0).sum(1)
    torch.testing.assert_close(group_loss("dpo", scores, LABELS, **given), torch.log1p(torch.exp(-pair)))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_response_without_a_value_is_taken_only_alone_on_its_side(sign: int):
    """Whatever the sign of the others' values."""
    labels = torch.tensor([[1, 1, -1, -1]])
    used = used_responses("dpo", labels, torch.tensor([[NAN, sign * 0.5, NAN, sign * 0.25]]))
    assert used.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(("value", "fits"), [(0.0, True), (1.0, True), (-0.01, False), (1.01, False), (2.0, False)])
def test_given_psi_may_be_the_ends_of_the_unit_interval(value: float, fits: bool):
    labels, values = torch.tensor([[1, -1]]), torch.tensor([[value, 0.5]])
    if fits:
        assert group_loss("lipo_lambda", torch.zeros(1, 2), labels, values, psi_scaling="given") > 0
        return
    with pytest.raises(UserError, match="psi_scaling 'group'"):
        group_loss("lipo_lambda", torch.zeros(1, 2), labels, values, psi_scaling="given")


def test_messages_are_whole():
    with pytest.raises(UserError) as caught:
        used_responses("dpo", LABELS, pair_selection="random")
    assert str(caught.value) == (
        "pair_selection 'random' draws from the group's key; pass group_keys_G (see group_keys)."
    )
    with pytest.raises(ConfigError) as unknown:
        get_objective("nothing_like_it_at_all")
    assert str(unknown.value) == (
        f"unknown objective 'nothing_like_it_at_all'. The objectives are: {', '.join(OBJECTIVES)}."
    )
    with pytest.raises(ConfigError) as unused:
        hyperparameters_for("mpo", {"zzzzzz": 1.0})
    assert str(unused.value) == (
        "objective 'mpo' does not use option 'zzzzzz'. It has no options. Remove 'zzzzzz' or choose another objective."
    )
