"""The core attention of the local layer spec, padded and packed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

HEADS, WIDTH = 4, 8


def build_attention(**fields):
    # Here: importing Megatron takes seconds, which a run of other tests should not pay.
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_groupdpo.mcore.model.attention import SdpaAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=2,
        kv_channels=WIDTH,
        attention_dropout=0.0,
        **fields,
    )
    return SdpaAttention(config, 1, AttnMaskType.causal, "self")


@pytest.fixture(scope="module")
def core_attention():
    return build_attention()


def packed_params(bounds: list[int]):
    from megatron.core.packed_seq_params import PackedSeqParams

    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(q_SND: Tensor, k_SMD: Tensor, v_SMD: Tensor, left: int = 99) -> Tensor:
    """Causal attention of one sequence, head by head: [S, N * D]."""
    length, heads = q_SND.shape[:2]
    outputs = []
    for n in range(heads):
        m = n * k_SMD.shape[1] // heads
        logits = q_SND[:, n] @ k_SMD[:, m].T / math.sqrt(WIDTH)
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        logits = logits.masked_fill(torch.ones(length, length).tril(-left - 1).bool(), -math.inf)
        outputs.append(logits.softmax(-1) @ v_SMD[:, m])
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_padded_attention_is_causal_grouped_attention(core_attention, num_kv_heads: int):
    length, batch = 7, 3
    q = draw(length, batch, HEADS, WIDTH, seed=1)
    k, v = (draw(length, batch, num_kv_heads, WIDTH, seed=seed) for seed in (2, 3))
    found_SBH = core_attention(q, k, v, None)
    for b in range(batch):
        torch.testing.assert_close(found_SBH[:, b], by_hand(q[:, b], k[:, b], v[:, b]))


def test_packed_sequences_do_not_see_each_other(core_attention):
    bounds = [0, 5, 6, 13]
    q, k, v = draw(13, HEADS, WIDTH, seed=1), draw(13, 2, WIDTH, seed=2), draw(13, 2, WIDTH, seed=3)
    found = core_attention(q, k, v, None, packed_seq_params=packed_params(bounds))
    wanted = torch.cat([by_hand(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(bounds)])
    torch.testing.assert_close(found, wanted)


def test_packed_equals_padded_sequence_by_sequence_gradients_included(core_attention):
    lengths = [4, 7, 1]
    longest, total = max(lengths), sum(lengths)
    bounds = [0, 4, 11, 12]
    packed = [draw(total, heads, WIDTH, seed=i).requires_grad_() for i, heads in enumerate((HEADS, 2, 2))]
    padded = []
    for tensor in packed:
        rows = [tensor[a:b] for a, b in pairwise(bounds)]
        filled = [torch.cat([row, row.new_ones(longest - len(row), *row.shape[1:])]) for row in rows]
        padded.append(torch.stack(filled, dim=1))
    weights = draw(total, HEADS * WIDTH, seed=9)
    out_packed = core_attention(*packed, None, packed_seq_params=packed_params(bounds))
    out_padded_SBH = core_attention(*padded, None)
    same = torch.cat([out_padded_SBH[:length, b] for b, length in enumerate(lengths)])
    torch.testing.assert_close(out_packed, same)
    for one, other in zip(
        torch.autograd.grad((out_packed * weights).sum(), packed), torch.autograd.grad((same * weights).sum(), packed)
    ):
        torch.testing.assert_close(one, other)


def test_one_query_against_a_longer_cache_sees_all_of_it(core_attention):
    q, k, v = draw(1, 1, HEADS, WIDTH, seed=1), draw(6, 1, 2, WIDTH, seed=2), draw(6, 1, 2, WIDTH, seed=3)
    query_last = torch.cat([draw(5, HEADS, WIDTH, seed=4), q[:, 0]])
    torch.testing.assert_close(core_attention(q, k, v, None)[0], by_hand(query_last, k[:, 0], v[:, 0])[-1:])


@pytest.mark.parametrize("left", [0, 1, 3, 12, 13])
def test_a_window_counts_the_positions_to_the_left_padded_packed_and_decoding(left: int):
    attention = build_attention(window_size=(left, 0))
    bounds = [0, 5, 6, 13]
    q, k, v = draw(13, HEADS, WIDTH, seed=1), draw(13, 2, WIDTH, seed=2), draw(13, 2, WIDTH, seed=3)
    wanted = by_hand(q, k, v, left)
    torch.testing.assert_close(attention(q[:, None], k[:, None], v[:, None], None)[:, 0], wanted)
    torch.testing.assert_close(attention(q[-1:, None], k[:, None], v[:, None], None)[:, 0], wanted[-1:])
    packed = attention(q, k, v, None, packed_seq_params=packed_params(bounds))
    torch.testing.assert_close(packed, torch.cat([by_hand(q[a:b], k[a:b], v[a:b], left) for a, b in pairwise(bounds)]))


def test_a_windows_mask_is_made_on_the_device():
    """A copy from the host would make it wait, and no CUDA graph could repeat it."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    devices = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            devices.update(leaf.device.type for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
            return made

    with Watch():
        mask_SA = build_attention(window_size=(3, 0))._mask(7, torch.device("meta"))
    assert devices == {"meta"}
    assert mask_SA is not None
    assert mask_SA.shape == (7, 7)
