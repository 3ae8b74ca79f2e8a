"""Every logged metric, worked out response by response in plain Python: what tests compare the package's with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Scored:
    """One response; nothing here knows of batches or of padding."""

    label: int
    value: float
    logp: float
    ref_logp: float
    tokens: int
    trained: bool = True
    """The loss reads it."""


Group = Sequence[Scored]
TIE = 1e-6


def expected_metrics(
    groups: Sequence[Group],
    *,
    phi: Callable[[list[float], list[float]], float],
    beta: float,
    nll_coeff: float,
    nll_average: str = "response",
    score_average: bool = False,
) -> dict[str, float]:
    """Metrics of a step of training on the groups, over the trained responses; ``phi`` of their scores, by side."""

    def score(one: Scored) -> float:
        return beta * (one.logp - one.ref_logp) / (one.tokens if score_average else 1)

    read = [[one for one in group if one.trained] for group in groups]
    sides = [([one for one in group if one.label > 0], [one for one in group if one.label < 0]) for group in read]
    scores = [([score(one) for one in good], [score(one) for one in bad]) for good, bad in sides]
    two_sided = [(good, bad) for good, bad in scores if good and bad]
    preference = _mean_or_zero([phi(good, bad) for good, bad in two_sided])
    nll = _nll([good for good, _ in sides], nll_average)
    found = {
        "loss": preference + nll_coeff * nll,
        "preference_loss": preference,
        "nll_loss": nll,
        "group/groups": float(len(groups)),
        "group/active": float(len(two_sided)),
        "group/one_sided_rate": fmean(len({one.label for one in group}) < 2 for group in groups),
    }
    return found | _of_responses(read, sides, scores, two_sided)


def _of_responses(
    read: list[list[Scored]],
    sides: list[tuple[list[Scored], list[Scored]]],
    scores: list[tuple[list[float], list[float]]],
    two_sided: list[tuple[list[float], list[float]]],
) -> dict[str, float]:
    good = [one for own, _ in sides for one in own]
    bad = [one for _, own in sides for one in own]
    every = [one for group in read for one in group]
    terms = {
        "rewards/chosen": [s for own, _ in scores for s in own],
        "rewards/rejected": [s for _, own in scores for s in own],
        "logps/chosen": [one.logp for one in good],
        "logps/rejected": [one.logp for one in bad],
        "rewards/accuracies": [fmean(_right(p - n) for p in own for n in other) for own, other in two_sided],
        "rewards/margins": [fmean(own) - fmean(other) for own, other in two_sided],
        "group/top1_accuracy": [_top1(own, other) for own, other in two_sided],
        "group/mean_response_tokens": [one.tokens for one in every],
        "group/logp_minus_ref": [one.logp - one.ref_logp for one in every],
    }
    found = {name: fmean(values) for name, values in terms.items() if values}
    return found | {"group/responses": float(len(every))}


def expected_held_out(groups: Sequence[Group], **options: Any) -> dict[str, float]:
    """The ``eval/`` metrics: over all responses, and under ``trained/`` over those that the loss reads."""
    trained = expected_metrics(groups, **options)
    opened = [[replace(one, trained=True) for one in group] for group in groups]
    every = expected_metrics(opened, **(options | {"phi": lambda good, bad: 0.0}))
    of_loss = ("loss", "preference_loss", "group/active", "group/groups", "group/one_sided_rate")
    found = {name: trained[name] if name in of_loss else value for name, value in every.items()}
    if trained["group/responses"] != every["group/responses"]:
        found |= {f"trained/{name}": value for name, value in trained.items() if name not in of_loss}
    return {f"eval/{name}": value for name, value in found.items()}


def dpo_phi(good: list[float], bad: list[float]) -> float:
    """-log sigma of the margin of the one pair."""
    ((chosen,), (rejected,)) = good, bad
    return math.log1p(math.exp(rejected - chosen))


def all_pairs_phi(good: list[float], bad: list[float]) -> float:
    """The mean over all pairs."""
    return fmean(math.log1p(math.exp(n - p)) for p in good for n in bad)


def _nll(positives: list[list[Scored]], average: str) -> float:
    carried = [own for own in positives if own]
    if average == "batch-tokens":
        tokens = sum(one.tokens for own in carried for one in own)
        return sum(-one.logp for own in carried for one in own) / tokens if tokens else 0.0
    return _mean_or_zero(
        [fmean(-one.logp / (one.tokens if average == "response" else 1) for one in own) for own in carried]
    )


def _mean_or_zero(values: list[float]) -> float:
    return fmean(values) if values else 0.0


def _right(gap: float) -> float:
    return 0.5 if abs(gap) <= TIE else float(gap > 0)


def _top1(good: list[float], bad: list[float]) -> float:
    best = max(good + bad)
    tied_good, tied_bad = (sum(best - score <= TIE for score in side) for side in (good, bad))
    return tied_good / (tied_good + tied_bad)
