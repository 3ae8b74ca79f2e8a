"""One optimizer step of GroupDPO (arXiv 2604.15602): score, coefficients, backward, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_groupdpo import objectives
from megatron_groupdpo.engine import Engine
from megatron_groupdpo.step.coefficients import GroupLoss, LossOptions, LossPlan, group_loss, plan_loss
from megatron_groupdpo.step.timers import NO_TIMERS, StepTimers
from megatron_groupdpo.tensors import to_device
from megatron_groupdpo.types import GroupBatch, Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step tells the ranks that hold the output layer."""

    result: GroupLoss
    logps_R: Tensor
    """[R] float64."""
    ref_logps_R: Tensor
    """[R] float64."""
    drift: Tensor | None
    """[] float64: max_i |score in pass 2 - score in pass 1|; ``None`` when the objective needs no scoring pass."""

    @property
    def score_drift(self) -> float | None:
        """The drift as a number, which the host waits for."""
        return None if self.drift is None else float(self.drift)


def accumulate_gradient(
    engine: Engine,
    microbatches: Sequence[Microbatch],
    batch: GroupBatch,
    ref_logps_R: Tensor,
    options: LossOptions,
    *,
    timers: StepTimers = NO_TIMERS,
) -> StepResult | None:
    """Leave dL/dparameters in the engine's gradient buffers; the result where the output layer is, else ``None``.

    Nothing in here waits for the device: the loss's plan is made on the host while the scoring pass runs.
    """
    num_responses = batch.num_responses
    if objectives.get_objective(options.objective).separable:
        # c_i depends on s_i alone, and pass 2 computes s_i anyway: no scoring pass.
        likelihood = _SeparableLikelihood(batch=batch, ref_logps_R=ref_logps_R, options=options)
        with timers("backward"):
            logps_R = engine.backward(microbatches, num_responses, likelihood)
        if logps_R is None:
            return None
        ref_logps_R = to_device(ref_logps_R, logps_R.device)
        result = group_loss(logps_R, ref_logps_R, batch, options, plan=likelihood.plan)
        return StepResult(result=result, logps_R=logps_R, ref_logps_R=ref_logps_R, drift=None)

    with timers("scoring"):
        logps_R = engine.score(microbatches, num_responses)
    if logps_R is None:
        with timers("backward"):
            engine.backward(microbatches, num_responses, None)
        return None
    ref_logps_R = to_device(ref_logps_R, logps_R.device)
    with timers("coefficients"):
        result = group_loss(logps_R, ref_logps_R, batch, options)
    with timers("backward"):
        again_R = engine.backward(microbatches, num_responses, _WeightedLikelihood(result.weights_R))
    assert again_R is not None
    drift = _drift(logps_R, again_R, batch, options)
    return StepResult(result=result, logps_R=logps_R, ref_logps_R=ref_logps_R, drift=drift)


class _WeightedLikelihood:
    """``sum_r k_r * logp_r`` with the weights of the scoring pass: each response is on its own."""

    def __init__(self, weights_R: Tensor) -> None:
        self.weights_R = weights_R

    def __call__(self, responses_r: Tensor, logps_r: Tensor) -> Tensor:
        return (self.weights_R[responses_r] * logps_r).sum()


@dataclass(slots=True, kw_only=True)
class _SeparableLikelihood:
    """The same, with weights from the log-probabilities of the very pass that differentiates them."""

    batch: GroupBatch
    ref_logps_R: Tensor
    options: LossOptions
    plan: LossPlan | None = field(default=None, init=False)

    def __call__(self, responses_r: Tensor, logps_r: Tensor) -> Tensor:
        if self.plan is None:
            self.plan = plan_loss(self.batch, self.options, logps_r.device)
            self.ref_logps_R = to_device(self.ref_logps_R, logps_r.device)
        # The other responses' entries do not matter: no weight depends on another response's score.
        logps_R = self.ref_logps_R.clone().index_copy_(0, responses_r, logps_r.detach())
        weights_R = group_loss(logps_R, self.ref_logps_R, self.batch, self.options, plan=self.plan).weights_R
        return (weights_R[responses_r] * logps_r).sum()


def _drift(logps_R: Tensor, again_R: Tensor, batch: GroupBatch, options: LossOptions) -> Tensor:
    if logps_R.numel() == 0:
        return logps_R.new_zeros(())
    change_R = options.beta * (again_R - logps_R).abs()
    if options.score_average:
        change_R = change_R / to_device(batch.num_tokens_R, change_R.device).clamp_min(1)
    return torch.nan_to_num(change_R, nan=float("inf")).max()
