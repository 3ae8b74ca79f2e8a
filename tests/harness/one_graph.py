"""The same training step, written a second time: plain PyTorch, float64, one process, one autograd graph.

Nothing here is Megatron's or the package's. All responses of all groups go through the model one by one, the coupled
loss is written out group by group in plain Python, and a single ``backward`` differentiates it.

Weights are given by their global names in the distributed checkpoint, where the rows of ``linear_qkv`` lie query
group by query group as [its query heads, its key head, its value head] and those of a gated ``linear_fc1`` as
[gate; up].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from one_graph_phi import PHI, Group, Response, is_active, read_by, sides
from torch import Tensor

from megatron_groupdpo.types import GroupSample

Weights = Mapping[str, Tensor]


def log_probabilities(weights: Weights, model: Mapping[str, Any], tokens_S: np.ndarray) -> Tensor:
    """[S, V] float64: entry (t, v) is the log-probability that token t + 1 is v."""
    tokens = torch.from_numpy(tokens_S.astype(np.int64))
    x = weights["embedding.word_embeddings.weight"][tokens]
    if model["position_embedding_type"] == "learned_absolute":
        x = x + weights["embedding.position_embeddings.weight"][: len(tokens)]
    for layer in range(model["num_layers"]):
        own = {
            name.removeprefix("decoder.layers.").removesuffix(f"#{layer}"): weight
            for name, weight in weights.items()
            if name.startswith("decoder.layers.") and name.endswith(f"#{layer}")
        }
        x = x + _attention(_norm(x, own, "input_layernorm"), own, model)
        after = _mixture if "mlp.router.weight" in own else _mlp
        x = x + after(_norm(x, own, "pre_mlp_layernorm"), own, model)
    final = {name.removeprefix("decoder."): weight for name, weight in weights.items()}
    x = _norm(x, final, "final_layernorm")
    output = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    return (x @ output.T).log_softmax(-1)


def _norm(x: Tensor, weights: Weights, name: str, eps: float = 1e-5) -> Tensor:
    if f"{name}.bias" in weights:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _attention(x: Tensor, weights: Weights, model: Mapping[str, Any]) -> Tensor:
    length, heads, width = len(x), model["num_attention_heads"], model["kv_channels"]
    num_query_groups = model.get("num_query_groups", heads)
    per_group = heads // num_query_groups
    mixed = _linear(x, weights, "self_attention.linear_qkv")
    outputs = []
    for group in range(num_query_groups):
        rows = (per_group + 2) * width
        own = mixed[:, group * rows : (group + 1) * rows]
        parts = [own[:, i * width : (i + 1) * width] for i in range(per_group + 2)]
        queries, key, value = parts[:per_group], parts[-2], parts[-1]
        if model["position_embedding_type"] == "rope":
            queries, key = [_rotate(query) for query in queries], _rotate(key)
        for query in queries:
            logits = query @ key.T / math.sqrt(width)
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            outputs.append(logits.masked_fill(future, -math.inf).softmax(-1) @ value)
    return _linear(torch.cat(outputs, dim=1), weights, "self_attention.linear_proj")


def _rotate(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions: channel i is paired with channel i + width / 2."""
    half = x.shape[1] // 2
    angles = torch.arange(len(x), dtype=x.dtype)[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[:, :half], x[:, half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=1
    )


def _mixture(x: Tensor, weights: Weights, model: Mapping[str, Any]) -> Tensor:
    """Every expert on every position, weighed by 0 where the position does not go."""
    probs = (x @ weights["mlp.router.weight"].T).softmax(-1)
    least = probs.sort(-1, descending=True).values[:, model["moe_router_topk"] - 1, None]
    shares = torch.where(probs >= least, probs, 0.0)
    if not model.get("moe_router_pre_softmax", False):
        shares = shares / shares.sum(-1, keepdim=True)
    outputs = []
    for expert in range(model["num_moe_experts"]):
        start = f"mlp.experts.experts.{expert}."
        own = {"mlp." + name.removeprefix(start): weight for name, weight in weights.items() if name.startswith(start)}
        outputs.append(shares[:, expert, None] * _mlp(x, own, model))
    return torch.stack(outputs).sum(0)


def _mlp(x: Tensor, weights: Weights, model: Mapping[str, Any]) -> Tensor:
    y = _linear(x, weights, "mlp.linear_fc1")
    if model.get("swiglu", False):
        gate, up = y.chunk(2, dim=1)
        y = gate * gate.sigmoid() * up
    else:
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return _linear(y, weights, "mlp.linear_fc2")


@dataclass(frozen=True)
class OneGraphLoss:
    """The loss of a global batch, in the graph."""

    loss: Tensor
    preference_loss: Tensor
    nll_loss: Tensor
    logps: dict[int, Tensor]
    """Log-probability by response id, of every response of the batch."""
    read: list[int]
    """Ids of the responses that the loss reads, in the order of the data."""
    scores: dict[int, Tensor]


def coupled_loss(
    weights: Weights,
    model: Mapping[str, Any],
    samples: Sequence[GroupSample],
    ref_logps: np.ndarray,
    options: Mapping[str, Any],
) -> OneGraphLoss:
    """``(1/B) sum_g phi_g + nll_coeff * NLL`` over the groups, all in one graph."""
    groups, logps, scores = [], {}, {}
    reference_free = options["objective"] == "simpo_pairs"
    for sample in samples:
        group = []
        for k, tokens in enumerate(sample.response_tokens):
            table = log_probabilities(weights, model, np.concatenate([sample.prompt_tokens, tokens]))
            first = len(sample.prompt_tokens)
            mask = sample.response_masks[k]
            counted = [t for t in range(len(tokens)) if mask is None or mask[t]]
            logp = sum((table[first + t - 1, int(tokens[t])] for t in counted), table.new_zeros(()))
            response_id = sample.first_response_id + k
            score = options["beta"] * (logp - (0.0 if reference_free else float(ref_logps[response_id])))
            if options["score_average"]:
                score = score / len(counted)
            logps[response_id], scores[response_id] = logp, score
            group.append(Response(logp, score, len(counted), bool(sample.labels_K[k] == 1), float(sample.values_K[k])))
        groups.append(group)
    active = [group for group in groups if is_active(group, options["objective"])]
    zero = sum(logps.values(), torch.zeros((), dtype=torch.float64)) * 0
    phi = PHI[options["objective"]]
    preference = sum((phi(group, options["beta"]) for group in active), zero) / max(len(active), 1)
    nll = zero + _nll(groups if options["one_sided_nll"] else active, options)
    loss = preference + options["nll_coeff"] * nll
    return OneGraphLoss(loss, preference, nll, logps, _read(samples, groups, options), scores)


def _read(samples: Sequence[GroupSample], groups: Sequence[Group], options: Mapping[str, Any]) -> list[int]:
    ids = []
    for sample, group in zip(samples, groups):
        if is_active(group, options["objective"]):
            reads = read_by(group, options["objective"])
        else:
            chosen = _chosen(group, options)
            reads = [options["one_sided_nll"] and any(r is c for c in chosen) for r in group]
        ids += [sample.first_response_id + k for k, read in enumerate(reads) if read]
    return ids


def _chosen(group: Group, options: Mapping[str, Any]) -> list[Response]:
    """The positives whose likelihood the NLL term raises."""
    positives = sides(group)[0]
    if options["objective"] == "dpo" and positives:
        return [max(positives, key=lambda r: r.value)]
    return positives


def _nll(groups: Sequence[Sequence[Response]], options: Mapping[str, Any]) -> Tensor:
    chosen = [positives for group in groups if (positives := _chosen(group, options))]
    total = torch.zeros((), dtype=torch.float64)
    if options["nll_average"] == "batch-tokens":
        for positives in chosen:
            for p in positives:
                total = total - p.logp
        return total / max(sum(p.num_tokens for positives in chosen for p in positives), 1)
    for positives in chosen:
        for p in positives:
            per_response = -p.logp / (p.num_tokens if options["nll_average"] == "response" else 1)
            total = total + per_response / len(positives)
    return total / max(len(chosen), 1)


def trained(
    weights: Weights,
    model: Mapping[str, Any],
    batches: Sequence[Sequence[GroupSample]],
    ref_logps: np.ndarray,
    options: Mapping[str, Any],
    *,
    optimizer: Mapping[str, Any],
) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Weights after one update per batch, and each step's loss and gradient norm before clipping."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    decayed = [leaf for leaf in leaves.values() if leaf.dim() > 1]
    plain = [leaf for leaf in leaves.values() if leaf.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optimizer["weight_decay"]},
        {"params": plain, "weight_decay": 0.0},
    ]
    update: torch.optim.Optimizer
    if optimizer["optimizer"] == "sgd":
        update = torch.optim.SGD(groups, lr=optimizer["lr"], momentum=optimizer["sgd_momentum"])
    else:
        betas = (optimizer["adam_beta1"], optimizer["adam_beta2"])
        update = torch.optim.AdamW(groups, lr=optimizer["lr"], betas=betas, eps=optimizer["adam_eps"])
    losses, norms = [], []
    for batch in batches:
        update.zero_grad()
        loss = coupled_loss(leaves, model, batch, ref_logps, options).loss
        loss.backward()
        norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves.values() if leaf.grad is not None))
        scale = min(1.0, optimizer["clip_grad"] / (norm + 1e-6))
        for leaf in leaves.values():
            if leaf.grad is not None:
                leaf.grad *= scale
        update.step()
        losses.append(float(loss.detach()))
        norms.append(norm)
    return {name: leaf.detach() for name, leaf in leaves.items()}, losses, norms
