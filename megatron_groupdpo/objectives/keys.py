"""Integer keys: the same draw on every rank, layout and device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_groupdpo.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch has no unsigned 64-bit shift: the sign bits that >> copies in are masked away.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Scramble int64 elementwise; one step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


def group_keys(group_ids_G: Tensor, *, seed: int, epoch: int = 0) -> Tensor:
    """Keys [G] int64 for a group's random draw, from its id [G] int64, the run's seed and the epoch."""
    start = torch.tensor([seed], dtype=torch.int64, device=group_ids_G.device)
    return mix(mix(mix(start) + epoch) + group_ids_G.to(torch.int64))


def draw(keys_G: Tensor, counts_G: Tensor, *, stream: int) -> Tensor:
    """An index in ``[0, counts_G)`` for every group: [G] int64; 0 where the count is 0.

    Different ``stream`` numbers give independent draws from one key.
    """
    return torch.remainder(mix(mix(keys_G) + stream), counts_G.clamp_min(1))
