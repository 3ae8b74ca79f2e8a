"""Transformer Engine's fused attention in PyTorch, and the kernels of its ring over context-parallel ranks.

Queries, keys and values come as SBHD, BSHD or THD; the latter's sequences lie between bounds, each rank of a ring with
two chunks of every sequence. The logarithm of a row's sum of exponentials is kept for the backward: [B, H, S, 1], or
[T, H, 1] of packed sequences. The ring hands the backward that of the whole row, so a step's probabilities are the
whole row's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def fused_attn_fwd(
    max_q: int,
    max_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    zero_fill: bool,
    layout: Any,
    bias_type: Any,
    mask: Any,
    softmax_type: Any,
    window: tuple[int, int],
    cu_q: Tensor,
    cu_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype,
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    """Output, logarithms, and a random state that nothing draws from."""
    assert not (is_training and dropout)
    out = torch.zeros_like(q)
    packed = _format(layout) == "THD"
    logs = q.new_zeros(_logs_shape(q, layout), dtype=torch.float32)
    for at_q, at_kv, at_logs in _sequences(q, k, layout, cu_q, cu_kv, padded_q, padded_kv):
        scores_HQK, _ = _scores(q[at_q], k[at_kv], scale, mask, window)
        logs_HQ = scores_HQK.logsumexp(-1)
        values_HKD = _heads_of(v[at_kv].float(), q.shape[-2])
        out[at_q] = (torch.exp(scores_HQK - logs_HQ[..., None]) @ values_HKD).transpose(0, 1).to(out.dtype)
        logs[at_logs] = (logs_HQ.T if packed else logs_HQ)[..., None]
    return [out, logs, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q: int,
    max_kv: int,
    scale: float,
    dropout: float,
    zero_fill: bool,
    layout: Any,
    bias_type: Any,
    mask: Any,
    softmax_type: Any,
    window: tuple[int, int],
    deterministic: bool,
    cu_q: Tensor,
    cu_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    d_out: Tensor,
    dtype: torch.dtype,
    dqkv_dtype: Any,
    kept: list[Tensor],
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
    *_: Any,
) -> list[Tensor | None]:
    """Gradients of queries, keys and values; none of a bias."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    packed = _format(layout) == "THD"
    for at_q, at_kv, at_logs in _sequences(q, k, layout, cu_q, cu_kv, padded_q, padded_kv):
        scores_HQK, queries_HQD = _scores(q[at_q], k[at_kv], scale, mask, window)
        logs = kept[0][at_logs][..., 0]
        p_HQK = torch.exp(scores_HQK - (logs.T if packed else logs)[..., None])
        heads = q.shape[-2]
        keys_HKD, values_HKD = _heads_of(k[at_kv].float(), heads), _heads_of(v[at_kv].float(), heads)
        d_HQD, out_HQD = d_out[at_q].float().transpose(0, 1), out[at_q].float().transpose(0, 1)
        dp_HQK = d_HQD @ values_HKD.transpose(1, 2)
        ds_HQK = p_HQK * (dp_HQK - (d_HQD * out_HQD).sum(-1, keepdim=True)) * scale
        dq[at_q] = (ds_HQK @ keys_HKD).transpose(0, 1).to(dq.dtype)
        groups = k.shape[-2]
        dk[at_kv] = _groups_of(ds_HQK.transpose(1, 2) @ queries_HQD, groups).to(dk.dtype)
        dv[at_kv] = _groups_of(p_HQK.transpose(1, 2) @ d_HQD, groups).to(dv.dtype)
    return [dq, dk, dv, None, None]


def _format(layout: Any) -> str:
    """Of NVTE_SBHD_SBHD_SBHD and its like; NVTE_SB3HD, three in one tensor, says how they lie and not which way."""
    return str(layout._name).rsplit(".", 1)[-1].split("_")[1].replace("3", "")


def _logs_shape(q: Tensor, layout: Any) -> tuple[int, ...]:
    if _format(layout) == "THD":
        return (q.shape[0], q.shape[1], 1)
    batch, length = (q.shape[1], q.shape[0]) if _format(layout) == "SBHD" else q.shape[:2]
    return (batch, q.shape[2], length, 1)


def _sequences(
    q: Tensor,
    k: Tensor,
    layout: Any,
    cu_q: Tensor,
    cu_kv: Tensor,
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
) -> Iterator[tuple[Any, Any, Any]]:
    """Where each sequence lies among queries, keys and logarithms."""
    form = _format(layout)
    if form == "THD":
        starts_q = (cu_q if padded_q is None else padded_q).tolist()
        starts_kv = (cu_kv if padded_kv is None else padded_kv).tolist()
        lengths_q, lengths_kv = cu_q.diff().tolist(), cu_kv.diff().tolist()
        for start_q, start_kv, rows, columns in zip(starts_q, starts_kv, lengths_q, lengths_kv, strict=False):
            at_q = slice(start_q, start_q + rows)
            yield at_q, slice(start_kv, start_kv + columns), at_q
        return
    assert int(cu_q.diff().max()) == q.shape[form.index("S")], "rows are whole: padding is at their end, and causal"
    for row in range(q.shape[form.index("B")]):
        at = (slice(None), row) if form == "SBHD" else (row,)
        yield at, at, (row,)


def _scores(q_QHD: Tensor, k_KGD: Tensor, scale: float, mask: Any, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[H, Q, K] float32, hidden ones at minus infinity; and the queries by head."""
    queries_HQD = q_QHD.float().transpose(0, 1)
    scores_HQK = queries_HQD @ _heads_of(k_KGD.float(), q_QHD.shape[1]).transpose(1, 2) * scale
    if "CAUSAL" in str(mask._name):
        rows, columns = scores_HQK.shape[1:]
        assert rows == columns, "where a causal mask starts would matter"
        seen = torch.ones(rows, columns, dtype=torch.bool).tril()
        if window[0] >= 0:
            seen &= torch.ones_like(seen).triu(-window[0])
        scores_HQK = scores_HQK.masked_fill(~seen, float("-inf"))
    return scores_HQK, queries_HQD


def _heads_of(x_KGD: Tensor, heads: int) -> Tensor:
    """[H, K, D]: each group for its query heads."""
    return x_KGD.transpose(0, 1).repeat_interleave(heads // x_KGD.shape[1], 0)


def _groups_of(gradient_HKD: Tensor, groups: int) -> Tensor:
    """[K, G, D]: summed over a group's query heads."""
    return gradient_HKD.unflatten(0, (groups, -1)).sum(1).transpose(0, 1)


def _halves(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the first and of the second half of every sequence."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        middle = (start + end) // 2
        found[0].append(torch.arange(start, middle))
        found[1].append(torch.arange(middle, end))
    return torch.cat(found[0]), torch.cat(found[1])


def thd_read_half_tensor(tensor_THD: Tensor, bounds: Tensor, half: int) -> Tensor:
    """One half of every sequence."""
    return tensor_THD[_halves(bounds)[half]]


def thd_read_second_half_lse(logs_HT: Tensor, bounds: Tensor, packed: bool, _length: int) -> Tensor:
    """[H, T / 2]."""
    assert packed
    return logs_HT[:, _halves(bounds)[1]]


def thd_second_half_lse_correction(logs_HT: Tensor, step_HT: Tensor, bounds: Tensor, packed: bool) -> None:
    """Rows of second halves have seen more keys."""
    assert packed
    second = _halves(bounds)[1]
    logs_HT[:, second] = torch.logaddexp(logs_HT[:, second], step_HT)


def thd_out_correction(
    out_THD: Tensor,
    step_THD: Tensor,
    logs_HT: Tensor,
    step_HT: Tensor,
    bounds: Tensor,
    only_second_half: bool,
    packed: bool,
) -> None:
    """Add a step's output by its share of the row."""
    assert packed
    places = _halves(bounds)[1] if only_second_half else torch.arange(len(out_THD))
    share_TH = torch.exp(step_HT - logs_HT[:, places]).T
    out_THD[places] += (step_THD.view(len(places), *out_THD.shape[1:]).float() * share_TH[..., None]).to(out_THD.dtype)


def thd_grad_correction(gradient: Tensor, step: Tensor, bounds: Tensor, first: str, second: str) -> None:
    """Copy or add a step's gradient, half by half; a half of ``none`` is not in ``step``."""
    ways = [(places, way) for places, way in zip(_halves(bounds), (first, second), strict=True) if way != "none"]
    for places, way in ways:
        own = step[places] if len(ways) == 2 else step
        if way == "copy":
            gradient[places] = own
        else:
            gradient[places] += own
