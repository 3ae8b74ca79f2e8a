"""A run written out: one response at a time through the model, the loss as its equation, torch's own optimizer.

Shares with the package the model's forward pass and its initial weights, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from made_stores import VOCAB_SIZE, counted
from torch import Tensor

from megatron_groupdpo.data.store.writer import PreparedGroup


def logps_by_hand(model: Any, item: PreparedGroup) -> list[Tensor]:
    """Summed log-probability of each response, [] float64, in the graph of the weights."""
    sums = []
    for k, tokens in enumerate(item.response_tokens):
        row_S = torch.tensor([*item.prompt_tokens.tolist(), *tokens.tolist()])
        places = torch.arange(len(row_S))
        logits_SV = model(input_ids=row_S[None], position_ids=places[None], attention_mask=None)[0]
        logps_SV = logits_SV[:, :VOCAB_SIZE].double().log_softmax(1)
        first = len(item.prompt_tokens)
        terms = [logps_SV[first + t - 1, int(tokens[t])] for t in range(len(tokens)) if counted(item, k)[t]]
        sums.append(torch.stack(terms).sum())
    return sums


@dataclass
class HandLoss:
    """Of one global batch."""

    loss: Tensor
    preference: float
    nll: float
    scores: list[float]
    num_active: int


def loss_by_hand(
    model: Any, groups: Sequence[PreparedGroup], refs: Sequence[Sequence[float]], *, beta: float, nll_coeff: float
) -> HandLoss:
    """``softmax`` with the NLL of the positives averaged over their tokens; ``refs`` as the groups' responses."""
    preferences, nlls, scores = [], [], []
    for item, ref in zip(groups, refs, strict=True):
        if len(set(item.labels)) < 2:
            continue
        logps = logps_by_hand(model, item)
        score = [beta * (logp - own) for logp, own in zip(logps, ref, strict=True)]
        positives = [k for k, label in enumerate(item.labels) if label > 0]
        negatives = [score[k] for k, label in enumerate(item.labels) if label < 0]
        terms = [torch.logsumexp(torch.stack([score[p], *negatives]), 0) - score[p] for p in positives]
        preferences.append(sum(terms) / len(terms))
        nlls.append(sum(-logps[p] / int(counted(item, p).sum()) for p in positives) / len(positives))
        scores += [float(s.detach()) for s in score]
    preference, nll = torch.stack(preferences).mean(), torch.stack(nlls).mean()  # type: ignore[arg-type]
    return HandLoss(
        preference + nll_coeff * nll, float(preference.detach()), float(nll.detach()), scores, len(preferences)
    )


def gradient_by_hand(model: Any, loss: Tensor) -> list[Tensor]:
    """Of every parameter, in their order."""
    return list(torch.autograd.grad(loss, list(model.parameters())))


def cosine_lr(iteration: int, *, peak: float, lowest: float, warmup: int, decay: int) -> float:
    """Learning rate of the update that makes ``iteration`` (from 1)."""
    done = iteration - 1
    if done <= warmup:
        return peak * done / warmup
    if done >= decay:
        return lowest
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * (done - warmup) / (decay - warmup))) / 2


class HandAdam:
    """torch's AdamW over a model, norms and biases without decay, the whole gradient clipped to ``clip``."""

    def __init__(self, model: Any, *, clip: float, weight_decay: float, eps: float, betas: tuple[float, float]) -> None:
        self.model, self.clip = model, clip
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        sides = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(sides, lr=1.0, eps=eps, betas=betas)

    def step(self, gradient: Sequence[Tensor], lr: float) -> float:
        """One update; the norm before clipping."""
        for parameter, own in zip(self.model.parameters(), gradient, strict=True):
            parameter.grad = own.clone()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip))
        for side in self.optimizer.param_groups:
            side["lr"] = lr
        self.optimizer.step()
        return norm
