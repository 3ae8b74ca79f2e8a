"""Every tensor of one model, paired between Megatron and Hugging Face, with the shapes both must have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.families import Family
from megatron_groupdpo.convert.families.transforms import COPY, GATE_UP, QKV, Transform
from megatron_groupdpo.convert.tensors.megatron_names import (
    Shape,
    is_in_layer,
    is_per_layer,
    megatron_tensors,
    rule_name,
)

Key = tuple[str, int | None]
"""Megatron's global name and the layer; None for tensors outside the layers."""
_MOVES_ROWS = (COPY, QKV, GATE_UP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    shape: Shape
    """Of the Megatron tensor, without the rows that pad the vocabulary."""
    hf: dict[str, Shape]
    """Names in the order the transform takes them."""
    transform: Transform
    model: ModelConfig

    def merge(self, parts: list[Tensor]) -> Tensor:
        """Hugging Face to Megatron."""
        return self.transform.merge(parts, self.model)

    @property
    def moves_rows(self) -> bool:
        """Whether each row of the Megatron tensor is a row of a Hugging Face tensor, columns untouched."""
        return any(self.transform is known for known in _MOVES_ROWS)

    def sources(self, rows: range) -> Iterator[tuple[str, int, int]]:
        """Where rows of the Megatron tensor come from: (name, first row, row after the last), in order."""
        if self.transform is COPY:  # also of a vocabulary, too long for numbers row by row
            if rows:
                yield next(iter(self.hf)), rows.start, rows.stop
            return
        # What the transform does to rows is what it does to their numbers: one bias-like vector for each part.
        sizes = [shape[0] for shape in self.hf.values()]
        numbers = self.merge(list(torch.arange(sum(sizes), device="cpu").split(sizes)))[rows.start : rows.stop]
        ends = torch.tensor(sizes, device="cpu").cumsum(0)
        names, parts = list(self.hf), torch.bucketize(numbers, ends, right=True)
        breaks = ((numbers.diff() != 1) | (parts.diff() != 0)).nonzero()[:, 0] + 1
        for run, part in zip(numbers.tensor_split(breaks), parts.tensor_split(breaks)):
            if len(run):
                before = int(ends[part[0]]) - sizes[part[0]]
                yield names[part[0]], int(run[0]) - before, int(run[-1]) - before + 1

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Megatron to Hugging Face."""
        return dict(zip(self.hf, self.transform.split(whole, self.model), strict=True))


def conversion_plan(family: Family, model: ModelConfig) -> dict[Key, Pair]:
    """A pair for each tensor of the model, in the model's order."""
    tensors = megatron_tensors(model)
    lacking = {rule_name(name)[0] for name in tensors} - family.rules.keys()
    assert not lacking, f"{family.name} lacks {lacking}"
    outside = [(name, None) for name in tensors if not is_per_layer(name)]
    inside = [
        (name, layer)
        for layer in range(model.num_layers)
        for name in tensors
        if is_per_layer(name) and is_in_layer(name, model, layer)
    ]
    return {(name, layer): _pair(family, model, name, layer, tensors[name]) for name, layer in [*outside, *inside]}


def _pair(family: Family, model: ModelConfig, name: str, layer: int | None, shape: Shape) -> Pair:
    general, expert = rule_name(name)
    rule = family.rules[general]
    names = [hf.format(layer=layer, expert=expert) for hf in rule.hf]
    parts = rule.transform.split(torch.empty(shape, device="meta"), model)
    shapes = [tuple(part.shape) for part in parts]
    return Pair(shape=shape, hf=dict(zip(names, shapes, strict=True)), transform=rule.transform, model=model)
