"""The equations again, one group at a time, in plain Python floats and loops: what the package is held to."""

from __future__ import annotations

import math


def nlls(z: float) -> float:
    """-log sigma(z)."""
    return math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z))


def lse(xs: list[float]) -> float:
    top = max(xs)
    return top + math.log(sum(math.exp(x - top) for x in xs))


def smoothed(z: float, e: float) -> float:
    return (1 - e) * nlls(z) + e * nlls(-z)


def sides(scores, labels):
    return [s for s, y in zip(scores, labels) if y == 1], [s for s, y in zip(scores, labels) if y == -1]


def all_pairs(scores, labels, values, keys, label_smoothing=0.0):
    positives, negatives = sides(scores, labels)
    if not positives or not negatives:
        return 0.0
    total = sum(smoothed(p - n, label_smoothing) for p in positives for n in negatives)
    return total / (len(positives) * len(negatives))


def mpo(scores, labels, values, keys):
    positives, negatives = sides(scores, labels)
    return lse(positives + negatives) - lse(positives) if positives and negatives else 0.0


def softmax(scores, labels, values, keys):
    positives, negatives = sides(scores, labels)
    if not positives or not negatives:
        return 0.0
    return sum(lse([p, *negatives]) - p for p in positives) / len(positives)


def margin(scores, labels, values, keys, label_smoothing=0.0):
    positives, negatives = sides(scores, labels)
    if not positives or not negatives:
        return 0.0
    return smoothed(sum(positives) / len(positives) - sum(negatives) / len(negatives), label_smoothing)


def dpo(scores, labels, values, keys, label_smoothing=0.0):
    def sort_key(sign):
        return lambda i: (math.isnan(values[i]), -sign * values[i] if values[i] == values[i] else 0.0, -keys[i], i)

    positives = sorted((i for i, y in enumerate(labels) if y == 1), key=sort_key(+1))
    negatives = sorted((i for i, y in enumerate(labels) if y == -1), key=sort_key(-1))
    if not positives or not negatives:
        return 0.0
    return smoothed(scores[positives[0]] - scores[negatives[0]], label_smoothing)


def valued(labels, values):
    return [i for i, y in enumerate(labels) if y != 0 and not math.isnan(values[i])]


def weighted_mpo(scores, labels, values, keys, weight_exponent=1.0):
    kept = valued(labels, values)
    if not kept:
        return 0.0
    mean = sum(values[i] for i in kept) / len(kept)
    moved = [scores[i] + weight_exponent * labels[i] * (values[i] - mean) for i in kept]
    return mpo(moved, [labels[i] for i in kept], None, None)


def plackett_luce(scores, labels, values, keys):
    kept = valued(labels, values)
    if len({values[i] for i in kept}) < 2:
        return 0.0
    order = sorted(kept, key=lambda i: (-values[i], -keys[i], i))
    return -sum(scores[i] - lse([scores[j] for j in order[k:]]) for k, i in enumerate(order))


def lipo_lambda(scores, labels, values, keys, psi_scaling="group"):
    kept = valued(labels, values)
    if len({values[i] for i in kept}) < 2:
        return 0.0
    low, high = min(values[i] for i in kept), max(values[i] for i in kept)
    psi = {i: (values[i] - low) / (high - low) if psi_scaling == "group" else values[i] for i in kept}
    order = sorted(kept, key=lambda i: (-scores[i], -psi[i], -keys[i], i))
    rank = {i: r for r, i in enumerate(order, start=1)}
    total = 0.0
    for i in kept:
        for j in kept:
            if psi[i] > psi[j]:
                gain = abs(2 ** psi[i] - 2 ** psi[j])
                discount = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                total += gain * discount * nlls(scores[i] - scores[j])
    return total


def targets(kept, values, temperature):
    norm = lse([values[i] / temperature for i in kept])
    return {i: math.exp(values[i] / temperature - norm) for i in kept}


def info_nca(scores, labels, values, keys, value_temperature=1.0):
    kept = valued(labels, values)
    if len({values[i] for i in kept}) < 2:
        return 0.0
    q = targets(kept, values, value_temperature)
    norm = lse([scores[i] for i in kept])
    return -sum(q[i] * (scores[i] - norm) for i in kept)


def nca(scores, labels, values, keys, value_temperature=1.0):
    kept = valued(labels, values)
    if len({values[i] for i in kept}) < 2:
        return 0.0
    q = targets(kept, values, value_temperature)
    return sum(q[i] * nlls(scores[i]) + nlls(-scores[i]) / len(kept) for i in kept)


def group_bce(scores, labels, values, keys):
    positives, negatives = sides(scores, labels)
    if not positives or not negatives:
        return 0.0
    return sum(map(nlls, positives)) / len(positives) + sum(nlls(-n) for n in negatives) / len(negatives)


def ipo_pairs(scores, labels, values, keys, beta):
    positives, negatives = sides(scores, labels)
    if not positives or not negatives:
        return 0.0
    total = sum(((p - n) / beta - 1 / (2 * beta)) ** 2 for p in positives for n in negatives)
    return total / (len(positives) * len(negatives))


def simpo_pairs(scores, labels, values, keys, simpo_gamma=0.5, label_smoothing=0.0):
    positives, negatives = sides(scores, labels)
    if not positives or not negatives:
        return 0.0
    total = sum(smoothed(p - n - simpo_gamma, label_smoothing) for p in positives for n in negatives)
    return total / (len(positives) * len(negatives))


def sft(scores, labels, values, keys):
    return 0.0


ORACLES = {
    f.__name__: f
    for f in (
        all_pairs,
        mpo,
        softmax,
        margin,
        dpo,
        weighted_mpo,
        plackett_luce,
        lipo_lambda,
        info_nca,
        nca,
        group_bce,
        ipo_pairs,
        simpo_pairs,
        sft,
    )
}
