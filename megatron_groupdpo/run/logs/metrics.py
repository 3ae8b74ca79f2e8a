"""What a step reports, computed from scores on the ranks that hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_groupdpo.step.coefficients import GroupLoss
from megatron_groupdpo.types import GroupBatch

# Where policy and reference are one model, scores differ from 0 by rounding; which way says nothing.
_TIE = 1e-6


def batch_metrics(batch: GroupBatch, result: GroupLoss, logps_R: Tensor, ref_logps_R: Tensor) -> dict[str, float]:
    """Metrics of a global batch under TRL's names, and ours under ``group/``.

    Rewards are the scores. Sides are averaged over the responses that got a pass; pairwise and margin metrics over
    the groups that have both sides. A metric without a single term is left out.
    """
    # To the host once: every number below would otherwise be a wait for the device of its own.
    result, logps_R, ref_logps_R = result.to_host(), logps_R.cpu(), ref_logps_R.cpu()
    held_GK, labels_GK = batch.flat_index_GK >= 0, batch.labels_GK
    positive_GK, negative_GK = held_GK & (labels_GK > 0), held_GK & (labels_GK < 0)
    scores_GK, logps_GK = batch.to_groups(result.scores_R), batch.to_groups(logps_R)
    two_sided_G = positive_GK.any(1) & negative_GK.any(1)

    sums = {
        "rewards/chosen": (scores_GK, positive_GK),
        "rewards/rejected": (scores_GK, negative_GK),
        "logps/chosen": (logps_GK, positive_GK),
        "logps/rejected": (logps_GK, negative_GK),
        "rewards/accuracies": (_pairwise_accuracy(scores_GK, positive_GK, negative_GK), two_sided_G),
        "rewards/margins": (_mean(scores_GK, positive_GK) - _mean(scores_GK, negative_GK), two_sided_G),
        "group/top1_accuracy": (_top1(scores_GK, held_GK, positive_GK), two_sided_G),
    }
    metrics = {
        "loss": float(result.loss),
        "preference_loss": float(result.preference_loss),
        "nll_loss": float(result.nll_loss),
    }
    metrics |= {name: float(values[where].mean()) for name, (values, where) in sums.items() if bool(where.any())}
    metrics["group/active"] = float(result.active_G.sum())
    metrics["group/one_sided_rate"] = float((~_two_sided(labels_GK)).double().mean())
    metrics["group/responses"] = float(batch.num_responses)
    metrics["group/mean_response_tokens"] = float(batch.num_tokens_R.double().mean()) if batch.num_responses else 0.0
    if bool((ref_logps_R != 0).any()):
        # Responses come from elsewhere, so this is no unbiased estimate of KL; it shows drift from the reference.
        metrics["group/logp_minus_ref"] = float((logps_R - ref_logps_R).mean())
    return metrics


def _two_sided(labels_GK: Tensor) -> Tensor:
    return (labels_GK > 0).any(1) & (labels_GK < 0).any(1)


def _mean(values_GK: Tensor, where_GK: Tensor) -> Tensor:
    return (values_GK * where_GK).sum(1) / where_GK.sum(1).clamp_min(1)


def _pairwise_accuracy(scores_GK: Tensor, positive_GK: Tensor, negative_GK: Tensor) -> Tensor:
    """[G]: share of (positive, negative) pairs in the right order; a tie, rounding aside, counts half."""
    pairs_GPN = positive_GK[:, :, None] & negative_GK[:, None, :]
    gaps_GPN = scores_GK[:, :, None] - scores_GK[:, None, :]
    right_GPN = (gaps_GPN > _TIE).double() + 0.5 * (gaps_GPN.abs() <= _TIE).double()
    return (right_GPN * pairs_GPN).sum((1, 2)) / pairs_GPN.sum((1, 2)).clamp_min(1)


def _top1(scores_GK: Tensor, held_GK: Tensor, positive_GK: Tensor) -> Tensor:
    """[G]: whether the response with the highest score is a positive."""
    best_G = scores_GK.masked_fill(~held_GK, float("-inf")).argmax(1)
    return positive_GK[torch.arange(len(best_G), device=best_G.device), best_G].double()
