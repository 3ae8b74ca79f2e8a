"""Tokens are drawn with the probabilities that the options ask for."""

from __future__ import annotations

import pytest
import torch

from megatron_groupdpo.mcore.generate import SamplingOptions, _draw
from megatron_groupdpo.objectives.keys import mix

LOGITS_V = torch.tensor([0.0, 2.0, -1.0, 1.0, -30.0])
DRAWS = 40_000


def shares(options: SamplingOptions) -> torch.Tensor:
    keys_B = mix(torch.arange(DRAWS))
    drawn_B = _draw(LOGITS_V.expand(DRAWS, -1), keys_B, options)
    return torch.bincount(drawn_B, minlength=5) / DRAWS


@pytest.mark.acts("SamplingOptions.temperature")
def test_draws_follow_the_tempered_softmax():
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(LOGITS_V / temperature, 0)
        # three standard deviations of a share of one half over 40,000 draws
        assert (shares(SamplingOptions(max_new_tokens=1, temperature=temperature)) - expected).abs().max() < 0.0075


@pytest.mark.acts("SamplingOptions.top_p")
def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = torch.softmax(LOGITS_V, 0)
    kept = torch.tensor([False, True, False, True, False])  # 0.64 alone is below 0.8, with the next it is above
    assert probs[1] < 0.8 <= probs[kept].sum()
    found = shares(SamplingOptions(max_new_tokens=1, top_p=0.8))
    assert (found[~kept] == 0).all()
    assert (found - probs * kept / probs[kept].sum()).abs().max() < 0.0075


def test_temperature_zero_takes_the_likeliest_token():
    assert shares(SamplingOptions(max_new_tokens=1, temperature=0.0))[1] == 1
