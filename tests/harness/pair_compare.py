"""Numbers of one loss on one model, how far two sides' numbers lie apart, and the short form kept in a file."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "trl_dpo.json"
NUM_PROJECTIONS = 4
"""Random projections that stand for a tensor of the gradient in the file."""

TOLERANCES = {"loss": 1e-5, "logps": 5e-5, "rewards": 5e-5, "metrics": 5e-5, "gradient": 1e-5, "entry": 1e-5}
"""fp32: the loss relative to the other's; log-probabilities (of about -30), rewards and logged metrics absolute; the
gradient ||difference|| / ||gradient|| over all tensors; its entries relative to the largest entry of all tensors."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What either side says; lists run over the pairs in the order of the data."""

    loss: float
    chosen_logps: list[float]
    rejected_logps: list[float]
    chosen_rewards: list[float]
    """beta * (log pi - log pi_ref), summed over tokens, as TRL logs it under every loss."""
    rejected_rewards: list[float]
    gradient: Mapping[str, Tensor] = field(default_factory=dict)
    """float64, by Hugging Face name."""


def differences(found: Numbers, wanted: Numbers) -> tuple[dict[str, float], str]:
    """By the names of :data:`TOLERANCES`, and the tensor with the worst entry."""
    assert found.gradient.keys() == wanted.gradient.keys(), found.gradient.keys() ^ wanted.gradient.keys()
    gaps = {name: found.gradient[name] - tensor for name, tensor in wanted.gradient.items()}
    worst = max(gaps, key=lambda name: float(gaps[name].abs().max()))
    largest = max(float(tensor.abs().max()) for tensor in wanted.gradient.values())
    return {
        **_of_scalars(found, vars(wanted)),
        "gradient": total_norm(gaps) / total_norm(wanted.gradient),
        "entry": float(gaps[worst].abs().max()) / largest,
    }, worst


def total_norm(tensors: Mapping[str, Tensor]) -> float:
    """Over all tensors."""
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


def _of_scalars(found: Numbers, wanted: Mapping[str, Any]) -> dict[str, float]:
    def gap(kind: str) -> float:
        sides = [(getattr(found, f"{side}_{kind}"), wanted[f"{side}_{kind}"]) for side in ("chosen", "rejected")]
        return max(abs(ours - theirs) for pair in sides for ours, theirs in zip(*pair, strict=True))

    return {
        "loss": abs(found.loss - wanted["loss"]) / abs(wanted["loss"]),
        "logps": gap("logps"),
        "rewards": gap("rewards"),
    }


def too_large(found: Mapping[str, float]) -> list[str]:
    """The names of the differences over their tolerance; one that is not a number is."""
    return [name for name, value in found.items() if not value <= TOLERANCES[name]]


# The file. Of each tensor of a gradient it holds [norm, largest absolute entry, projections on random signs]: the mean
# square of a difference's projections is its squared norm, in expectation over the signs.


def sketch(gradient: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """By tensor."""
    return {name: _sketch(name, tensor.double()) for name, tensor in gradient.items()}


def _sketch(name: str, tensor: Tensor) -> list[float]:
    draw = np.random.default_rng(zlib.crc32(f"signs {name}".encode()))
    signs = torch.from_numpy(draw.integers(0, 2, size=(NUM_PROJECTIONS, tensor.numel())) * 2.0 - 1.0)
    numbers = [float(tensor.norm()), float(tensor.abs().max()), *(signs @ tensor.flatten()).tolist()]
    return [float(f"{number:.9g}") for number in numbers]


def differences_from_golden(found: Numbers, golden: Mapping[str, Any]) -> dict[str, float]:
    """As :func:`differences`, the gradient from its sketches; ``entry`` compares the largest entries of tensors."""
    wanted = {name: np.array(numbers) for name, numbers in golden["gradient"].items()}
    ours = {name: np.array(numbers) for name, numbers in sketch(found.gradient).items()}
    assert ours.keys() == wanted.keys(), ours.keys() ^ wanted.keys()
    norm = math.sqrt(sum(numbers[0] ** 2 for numbers in wanted.values()))
    largest = max(numbers[1] for numbers in wanted.values())
    projected = math.sqrt(sum(float(((ours[name] - wanted[name])[2:] ** 2).mean()) for name in wanted))
    norms = max(abs(ours[name] - wanted[name])[0] for name in wanted)
    return {
        **_of_scalars(found, golden),
        "gradient": max(projected, norms) / norm,
        "entry": max(abs(ours[name] - wanted[name])[1] for name in wanted) / largest,
    }


def golden_form(numbers: Numbers) -> dict[str, Any]:
    """What the file keeps."""
    return {**vars(numbers), "gradient": sketch(numbers.gradient)}


def write_golden(made_with: Mapping[str, Any], problem: Mapping[str, Any], runs: Mapping[str, Any]) -> None:
    """Lists of numbers on one line each."""
    text = json.dumps({"made_with": made_with, "problem": problem, "runs": runs}, indent=1)
    text = re.sub(r"\[\s+([-+\d.,e\s]+?)\s+\]", lambda match: "[" + " ".join(match[1].split()) + "]", text)
    GOLDEN.parent.mkdir(exist_ok=True)
    partial = GOLDEN.with_suffix(".part")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(GOLDEN)


def read_golden() -> dict[str, Any]:
    """``made_with``, ``problem``, and ``runs`` by model and variant."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def metric_gap(found: Mapping[str, float], wanted: Mapping[str, float], names: Sequence[str]) -> float:
    """Largest difference of the named metrics."""
    return max(abs(found[name] - wanted[name]) for name in names)
