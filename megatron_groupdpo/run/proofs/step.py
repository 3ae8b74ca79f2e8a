"""What a run proves of itself, and stops at (docs/proofs.md). All ranks stop together, with one message."""

from __future__ import annotations

import dataclasses
import math

import torch

from megatron_groupdpo.errors import UserError
from megatron_groupdpo.mcore.checkpoint.digest import differing_replicas
from megatron_groupdpo.mcore.passes.gradient import PlainEngine, gradient_pieces
from megatron_groupdpo.run.batches import PlannedBatch
from megatron_groupdpo.run.parts import Run
from megatron_groupdpo.run.proofs.tolerances import drift_threshold, gradient_tolerance, logp_tolerance, shown
from megatron_groupdpo.step.coefficients import group_loss
from megatron_groupdpo.step.coupled import accumulate_coupled_gradient
from megatron_groupdpo.step.train_step import StepResult, accumulate_gradient
from megatron_groupdpo.step.verify import choose_groups, compare_gradients


def reference_logps(run: Run, planned: PlannedBatch) -> torch.Tensor:
    """[R] float64 reference log-probabilities; what the last stage holds is what counts."""
    if run.reference_policy is None:
        return planned.ref_logps_R
    logps_R = run.reference_policy.engine.score(planned.microbatches, planned.batch.num_responses)
    return planned.ref_logps_R if logps_R is None else logps_R


def calibrate_fp8(run: Run, planned: PlannedBatch) -> None:
    """Set the first scales of delayed scaling on the first batch, without an update; nothing where there are some."""
    if run.config.precision.fp8_recipe != "delayed":
        return
    ref_logps_R = reference_logps(run, planned)
    engine = run.policy.engine
    rounds = engine.calibrate(
        lambda: accumulate_gradient(engine, planned.microbatches, planned.batch, ref_logps_R, run.loss)
    )
    if rounds and run.ranks.is_logger:
        print(f"fp8: scales of delayed scaling set by {rounds} steps on the first batch, without an update", flush=True)


def check_step0_identity(run: Run, planned: PlannedBatch) -> None:
    """Policy and reference have the same weights: every score must be 0 and the loss its closed form.

    The reference may have been scored on another layout, so a response of |y| tokens may differ by t |y| (t: the
    tolerance of the precision). Rounding errs to both sides: for the loss, each may be off by t sqrt(|y|), times
    the loss's derivative by it.

    Raises:
        UserError: they do not agree; both numbers are given.
    """
    if not planned.batch.num_responses:
        return
    ref_logps_R = reference_logps(run, planned)
    logps_R = run.policy.engine.score(planned.microbatches, planned.batch.num_responses)
    enforced = logp_tolerance(run.config)
    tolerance = math.inf if enforced is None else enforced
    per_response = 0.0 if enforced is None else enforced
    findings = torch.zeros(7, dtype=torch.float64, device=run.ranks.device)
    if logps_R is not None:
        ref_logps_R = ref_logps_R.to(logps_R.device)
        num_tokens_R = planned.batch.num_tokens_R.to(logps_R.device).clamp_min(1)
        gaps_R = (logps_R - ref_logps_R).abs() / num_tokens_R
        worst = int(gaps_R.argmax())
        preference = dataclasses.replace(run.loss, nll_coeff=0.0)
        closed_form = group_loss(ref_logps_R, ref_logps_R, planned.batch, preference)
        found = group_loss(logps_R, ref_logps_R, planned.batch, preference)
        findings[:] = torch.stack(
            [
                gaps_R[worst],
                logps_R[worst],
                ref_logps_R[worst],
                found.scores_R.abs().max(),
                found.preference_loss,
                closed_form.preference_loss,
                (closed_form.weights_R.abs() * per_response * num_tokens_R.sqrt()).sum(),
            ]
        )
    per_token, ours, theirs, score, loss, expected, allowed = run.ranks.broadcast_from_last_stage(findings).tolist()
    way_out = "score the reference again with tools/score_reference.py"
    if not per_token <= tolerance:  # NaN is no agreement
        raise UserError(
            f"the policy starts with the reference's weights, but a response has log-probability {ours:.6f} here and "
            f"{theirs:.6f} in the reference ({per_token:.2e} per token, tolerance {tolerance:.0e}); {way_out}"
        )
    if enforced is not None and not abs(loss - expected) <= allowed:
        raise UserError(
            f"the policy starts with the reference's weights, but the preference loss is {loss:.8f}, not its closed "
            f"form {expected:.8f} (difference {abs(loss - expected):.2e}, tolerance {allowed:.2e}), though no response "
            f"differs by more than {per_token:.2e} per token: the differences have a side; {way_out}"
        )
    if run.ranks.is_logger:
        print(
            f"step 0: policy = reference; largest score {score:.1e}, {per_token:.1e} per token; preference loss "
            f"{loss:.6f}, closed form {expected:.6f}, {shown(enforced and allowed)}",
            flush=True,
        )


def verify_gradient(
    run: Run, planned: PlannedBatch, ref_logps_R: torch.Tensor, iteration: int
) -> dict[str, float | None]:
    """Compare the two passes' gradient with the coupled loss's on a few groups; the metric. Buffers are left empty.

    Raises:
        UserError: they differ by more than the precision's tolerance; the numbers are given.
    """
    engine = run.policy.engine
    groups = choose_groups(planned.batch, run.train.plan, run.loss)
    if not groups:
        if run.ranks.is_logger:
            print(f"verify-gradients: iteration {iteration}: no group has an active preference term", flush=True)
        return {"gradient_gap": None}
    batch = planned.batch.select(groups)
    given = (batch, ref_logps_R[planned.batch.responses_of(groups).to(ref_logps_R.device)], run.loss)
    gap = compare_gradients(
        lambda: accumulate_gradient(engine, run.train.microbatches(batch), *given),
        lambda: accumulate_coupled_gradient(
            PlainEngine(engine), run.train.microbatches(batch, whole_groups=True), *given
        ),
        lambda: gradient_pieces(engine),
        device=run.ranks.device,
    )
    engine.zero_gradient()
    tolerance = gradient_tolerance(run.config)
    numbers = (
        f"||difference|| {gap.difference_norm:.3e} / ||one graph|| {gap.coupled_norm:.6e} = {gap.relative:.2e}, "
        f"two passes {gap.decoupled_norm:.6e}, tolerance {tolerance:.0e}; {len(groups)} groups, "
        f"{batch.num_responses} responses"
    )
    if not gap.relative <= tolerance:  # NaN is no agreement
        raise UserError(
            f"iteration {iteration}: the gradient of the two passes is not that of the loss: {numbers}; most of it in "
            f"{gap.worst}. Nothing was updated. Training would follow another loss: report the layout and this line, "
            "and run on a layout where --verify-gradients passes."
        )
    if run.ranks.is_logger:
        print(f"verify-gradients: iteration {iteration}: {numbers}", flush=True)
    return {"gradient_gap": gap.relative}


def check_scores(run: Run, planned: PlannedBatch, outcome: StepResult | None, iteration: int) -> None:
    """Stop before the update on scores that cannot be trusted.

    Raises:
        UserError: scores that are not finite, or differ between the passes by more than the threshold.
    """
    findings = torch.zeros(3, dtype=torch.float64, device=run.ranks.device)  # bad responses, first bad, drift
    if outcome is not None:
        bad_R = ~(torch.isfinite(outcome.logps_R) & torch.isfinite(outcome.ref_logps_R))
        findings[0] = bad_R.sum()
        findings[1] = bad_R.double().argmax() if planned.batch.num_responses else 0
        findings[2] = 0.0 if outcome.drift is None else outcome.drift
    bad, first_bad, drift = run.ranks.broadcast_from_last_stage(findings).tolist()
    if bad:
        group = int((planned.batch.flat_index_GK == int(first_bad)).any(1).nonzero()[0])
        raise UserError(
            f"iteration {iteration}: {int(bad)} of {planned.batch.num_responses} log-probabilities are not finite, "
            f"the first in the group of {run.train.dataset.where(planned.group_ids[group])}; lower --lr, or look at "
            "the checkpoint the run started from. Nothing was updated."
        )
    longest = int(planned.batch.num_tokens_R.max()) if planned.batch.num_responses else 0
    threshold = drift_threshold(run.config, longest)
    if threshold is not None and drift > threshold:
        name = "score_drift_threshold" if run.config.training.score_drift_threshold else "FP8's default threshold"
        raise UserError(
            f"iteration {iteration}: scores of the two passes differ by {drift:.3e}, more than {name} {threshold:.3e}; "
            "the gradient would not be that of the loss. Nothing was updated."
        )


def check_gradient(grad_norm: float, iteration: int) -> None:
    """Stop before weights made by a broken gradient are saved.

    Raises:
        UserError: the norm is not finite.
    """
    if not math.isfinite(grad_norm):
        raise UserError(
            f"iteration {iteration}: the gradient norm is {grad_norm}, though every score was finite; lower --lr or "
            f"--beta and resume from an earlier checkpoint. The weights of iteration {iteration} were not saved."
        )


def check_replicas(run: Run, iteration: int) -> None:
    """Stop before weights that have come apart are saved.

    Raises:
        UserError: data- or context-parallel replicas do not hold the same bits.
    """
    finding = differing_replicas(run.policy.chunks, run.ranks)
    if finding is not None:
        raise UserError(
            f"iteration {iteration}: replicas of the weights have come apart, first in {finding}. A faulty device or "
            f"an exchange that failed in silence does this; resume from a checkpoint before iteration {iteration}, "
            "which was not saved, on other machines if it returns."
        )
