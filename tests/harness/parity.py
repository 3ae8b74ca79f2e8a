"""Comparing a run of the package with ``one_graph.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from group_samples import make_samples, reference_logps
from layout_case import MODELS, LayoutCase
from layout_run import run_case, whole_tensors
from one_graph import OneGraphLoss, coupled_loss
from rank_pool import RankPool

Tensors = Mapping[str, torch.Tensor]

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}
SP: dict[str, Any] = {"sequence_parallel": True}
CP2: dict[str, Any] = {"context_parallel_size": 2}
VPP2: dict[str, Any] = {"virtual_pipeline_model_parallel_size": 2}
EP2: dict[str, Any] = {"expert_model_parallel_size": 2}
DISTRIBUTED_OPTIMIZER: dict[str, Any] = {"use_distributed_optimizer": True}


@cache
def weights_of(pool: RankPool, model: str) -> dict[str, torch.Tensor]:
    """Initial weights of a model by their global names, float64."""
    (result,) = pool.run(1, run_case, LayoutCase(model=model, num_groups=1))
    return whole_tensors([result.weights_before])


@cache
def expected_of(pool: RankPool, model: str, num_groups: int, loss: str) -> tuple[OneGraphLoss, dict[str, torch.Tensor]]:
    """Loss and gradient of the one graph from the initial weights; ``loss`` is JSON, so that it can be a key."""
    return graph_and_gradient(weights_of(pool, model), model, num_groups, json.loads(loss))


def graph_and_gradient(
    weights: Tensors, model: str, num_groups: int, loss: Mapping[str, Any]
) -> tuple[OneGraphLoss, dict[str, torch.Tensor]]:
    """Loss and gradient of the one graph."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    samples = make_samples(num_groups)
    graph = coupled_loss(leaves, MODELS[model], samples, reference_logps(samples), loss)
    graph.loss.backward()
    return graph, {name: leaf.grad if leaf.grad is not None else leaf.detach() * 0 for name, leaf in leaves.items()}


def relative_gap(found: Tensors, wanted: Tensors) -> float:
    """||found - wanted|| / ||wanted|| over all tensors."""
    assert found.keys() == wanted.keys()
    gap = sum(float((found[name] - tensor).square().sum()) for name, tensor in wanted.items())
    return (gap / sum(float(tensor.square().sum()) for tensor in wanted.values())) ** 0.5


def worst_entry(found: Tensors, wanted: Tensors) -> tuple[float, str]:
    """Largest difference of an entry relative to the largest entry of all, and the tensor it is in."""
    largest = max(float(tensor.abs().max()) for tensor in wanted.values())
    return max((float((found[name] - tensor).abs().max()) / largest, name) for name, tensor in wanted.items())
