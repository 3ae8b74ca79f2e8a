"""The loss of one group under every objective, written out response by response: plain Python over float64 scalars.

Hyperparameters are the defaults. Nothing here is the package's; sources are the papers named in ``docs/algorithm.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Response:
    """One response in the graph."""

    logp: Tensor
    score: Tensor
    num_tokens: int
    positive: bool
    value: float


Group = Sequence[Response]


def sides(group: Group) -> tuple[list[Response], list[Response]]:
    """Positives and negatives."""
    return [r for r in group if r.positive], [r for r in group if not r.positive]


def is_active(group: Group, objective: str) -> bool:
    """Whether the group has a preference term."""
    if objective in {"nca", "info_nca", "plackett_luce", "lipo_lambda"}:
        return len({r.value for r in group}) > 1
    positives, negatives = sides(group)
    return bool(positives) if objective == "sft" else bool(positives and negatives)


def read_by(group: Group, objective: str) -> list[bool]:
    """Which responses of an active group the loss reads."""
    if objective == "dpo":
        pair = best_and_worst(group)
        return [any(r is chosen for chosen in pair) for r in group]
    return [r.positive or objective != "sft" for r in group]


def best_and_worst(group: Group) -> tuple[Response, Response]:
    """The pair of ``dpo``."""
    positives, negatives = sides(group)
    return max(positives, key=lambda r: r.value), min(negatives, key=lambda r: r.value)


def _log_sum_exp(terms: Sequence[Tensor]) -> Tensor:
    return torch.as_tensor(sum(term.exp() for term in terms)).log()


def _minus_log_sigmoid(x: Any) -> Tensor:
    return (1 + (-x).exp()).log()


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.as_tensor(sum(terms) / len(terms))


def _over_pairs(group: Group, of: Callable[[Tensor], Tensor]) -> Tensor:
    positives, negatives = sides(group)
    return _mean([of(p.score - n.score) for p in positives for n in negatives])


def _all_pairs(group: Group, beta: float) -> Tensor:
    return _over_pairs(group, _minus_log_sigmoid)


def _mpo(group: Group, beta: float) -> Tensor:
    return _log_sum_exp([r.score for r in group]) - _log_sum_exp([r.score for r in group if r.positive])


def _softmax(group: Group, beta: float) -> Tensor:
    positives, negatives = sides(group)
    return _mean([_log_sum_exp([p.score, *(n.score for n in negatives)]) - p.score for p in positives])


def _margin(group: Group, beta: float) -> Tensor:
    positives, negatives = sides(group)
    return _minus_log_sigmoid(_mean([p.score for p in positives]) - _mean([n.score for n in negatives]))


def _dpo(group: Group, beta: float) -> Tensor:
    best, worst = best_and_worst(group)
    return _minus_log_sigmoid(best.score - worst.score)


def _weighted_mpo(group: Group, beta: float) -> Tensor:
    mean = sum(r.value for r in group) / len(group)
    weighted = [(r, r.score + (1 if r.positive else -1) * (r.value - mean)) for r in group]
    return _log_sum_exp([s for _, s in weighted]) - _log_sum_exp([s for r, s in weighted if r.positive])


def _plackett_luce(group: Group, beta: float) -> Tensor:
    ordered = [r.score for r in sorted(group, key=lambda r: -r.value)]
    return torch.as_tensor(sum(_log_sum_exp(ordered[k:]) - ordered[k] for k in range(len(ordered))))


def _lipo_lambda(group: Group, beta: float) -> Tensor:
    low, high = min(r.value for r in group), max(r.value for r in group)
    psi = [(r.value - low) / (high - low) for r in group]
    by_score = sorted(range(len(group)), key=lambda i: -float(group[i].score.detach()))
    rank = {i: place + 1 for place, i in enumerate(by_score)}
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(group)):
        for j in range(len(group)):
            if psi[i] > psi[j]:
                gain = abs(2 ** psi[i] - 2 ** psi[j])
                discount = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                total = total + gain * discount * _minus_log_sigmoid(group[i].score - group[j].score)
    return total


def _targets(group: Group) -> list[float]:
    exponentials = [math.exp(r.value) for r in group]
    return [e / sum(exponentials) for e in exponentials]


def _info_nca(group: Group, beta: float) -> Tensor:
    norm = _log_sum_exp([r.score for r in group])
    return torch.as_tensor(sum(q * (norm - r.score) for q, r in zip(_targets(group), group)))


def _nca(group: Group, beta: float) -> Tensor:
    terms = [
        q * _minus_log_sigmoid(r.score) + _minus_log_sigmoid(-r.score) / len(group)
        for q, r in zip(_targets(group), group)
    ]
    return torch.as_tensor(sum(terms))


def _group_bce(group: Group, beta: float) -> Tensor:
    positives, negatives = sides(group)
    return _mean([_minus_log_sigmoid(p.score) for p in positives]) + _mean(
        [_minus_log_sigmoid(-n.score) for n in negatives]
    )


def _ipo_pairs(group: Group, beta: float) -> Tensor:
    return _over_pairs(group, lambda difference: (difference / beta - 1 / (2 * beta)) ** 2)


def _simpo_pairs(group: Group, beta: float) -> Tensor:
    return _over_pairs(group, lambda difference: _minus_log_sigmoid(difference - 0.5))


def _sft(group: Group, beta: float) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


PHI: dict[str, Callable[[Group, float], Tensor]] = {
    "all_pairs": _all_pairs,
    "mpo": _mpo,
    "softmax": _softmax,
    "margin": _margin,
    "dpo": _dpo,
    "weighted_mpo": _weighted_mpo,
    "plackett_luce": _plackett_luce,
    "lipo_lambda": _lipo_lambda,
    "info_nca": _info_nca,
    "nca": _nca,
    "group_bce": _group_bce,
    "ipo_pairs": _ipo_pairs,
    "simpo_pairs": _simpo_pairs,
    "sft": _sft,
}
"""From a group, and beta, to its preference loss."""
