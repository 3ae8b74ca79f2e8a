"""The training loop: step, check, update, log, validate, save."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_groupdpo import objectives
from megatron_groupdpo.config import to_yaml
from megatron_groupdpo.mcore.checkpoint.folders import Progress
from megatron_groupdpo.mcore.checkpoint.training import save_checkpoint
from megatron_groupdpo.run.batches import DeviceFeed, PlannedBatch, Prefetcher
from megatron_groupdpo.run.exports import Exports
from megatron_groupdpo.run.logs.flops import step_flops
from megatron_groupdpo.run.logs.metrics import HeldOutMetrics, batch_metrics
from megatron_groupdpo.run.logs.profile import StepProfiler
from megatron_groupdpo.run.logs.start_report import print_start
from megatron_groupdpo.run.logs.writer import RunLogger
from megatron_groupdpo.run.parts import Run
from megatron_groupdpo.run.proofs.step import (
    calibrate_fp8,
    check_gradient,
    check_replicas,
    check_scores,
    check_step0_identity,
    reference_logps,
    verify_gradient,
)
from megatron_groupdpo.step.coefficients import group_loss
from megatron_groupdpo.step.timers import StepTimers
from megatron_groupdpo.step.train_step import accumulate_gradient


def train(run: Run) -> Progress:
    """Train to the end; where the run stands then.

    Raises:
        UserError: one of the checks of :mod:`megatron_groupdpo.run.proofs.step` failed.
    """
    logger = _open_logs(run) if run.ranks.is_logger else None
    size = run.config.training.global_batch_size
    end = run.progress.consumed_groups + (run.train_iters - run.progress.iteration) * size
    workers = run.config.data.num_workers
    try:
        with (
            Prefetcher(run.train, num_workers=workers, num_groups=size, end=end) as batches,
            StepProfiler(run.config.logging, run_folder(run), rank=dist.get_rank()) as profiler,
        ):
            return _train(run, DeviceFeed(batches, run.ranks.device, end=end), logger, profiler)
    finally:
        if logger is not None:
            logger.close()


def _train(run: Run, batches: DeviceFeed, logger: RunLogger | None, profiler: StepProfiler) -> Progress:
    timers = StepTimers(run.ranks.device, on=logger is not None)
    exports = Exports(run)
    planned = batches.batch(run.progress.consumed_groups)
    print_start(run, planned)
    calibrate_fp8(run, planned)
    if run.starts_from_reference:
        check_step0_identity(run, planned)
    if run.progress.iteration == 0 and run.config.training.eval_interval is not None:
        _validate(run, run.progress, logger)
    progress = run.progress
    saved = progress.iteration
    verify_until = progress.iteration + run.config.training.verify_gradients
    while progress.iteration < run.train_iters:
        started = time.perf_counter()
        profiler.before(progress.iteration + 1)
        with timers("data"):
            if progress != run.progress:
                planned = batches.batch(progress.consumed_groups)
        proofs = _verify(run, planned, progress) if progress.iteration < verify_until else {}
        progress = _iteration(run, planned, batches, progress, timers, logger, started, proofs)
        if (trace := profiler.after(progress.iteration)) is not None and run.ranks.is_logger:
            print(f"profile: {trace}", flush=True)
        if _due(progress.iteration, run.config.training.check_weight_hash_across_dp_replicas_interval):
            check_replicas(run, progress.iteration)
        if _due(progress.iteration, run.config.training.eval_interval):
            _validate(run, progress, logger)
        if _due(progress.iteration, run.config.checkpoint.save_interval):
            _save(run, progress)
            saved = progress.iteration
        exports.at(progress.iteration)
    if saved != progress.iteration:
        _save(run, progress)
    exports.at_end()
    return progress


def _verify(run: Run, planned: PlannedBatch, progress: Progress) -> dict[str, float | None]:
    return verify_gradient(run, planned, reference_logps(run, planned), progress.iteration + 1)


def _iteration(
    run: Run,
    planned: PlannedBatch,
    batches: DeviceFeed,
    progress: Progress,
    timers: StepTimers,
    logger: RunLogger | None,
    started: float,
    proofs: dict[str, float | None],
) -> Progress:
    size = run.config.training.global_batch_size
    with timers("reference"):
        ref_logps_R = reference_logps(run, planned)
    engine = run.policy.engine
    with engine.step():
        outcome = accumulate_gradient(engine, planned.microbatches, planned.batch, ref_logps_R, run.loss, timers=timers)
    # Both passes are queued: what follows costs a GPU nothing.
    with timers("data"):
        batches.prepare(progress.consumed_groups + size)
    check_scores(run, planned, outcome, progress.iteration + 1)
    lr = run.updater.lr
    with timers("optimizer"):
        grad_norm = run.updater.step(size)
    check_gradient(grad_norm, progress.iteration + 1)
    progress = Progress(iteration=progress.iteration + 1, consumed_groups=progress.consumed_groups + size)
    if logger is not None:
        assert outcome is not None, "the logging rank is on the last stage"
        metrics = batch_metrics(planned.batch, outcome.result, outcome.logps_R, outcome.ref_logps_R, run.loss)
        metrics |= {"grad_norm": grad_norm, "lr": lr, "score_drift": outcome.score_drift, **proofs}
        # The metrics have waited for the device, so the events are over.
        metrics |= _speed(run, planned, time.perf_counter() - started) | timers.read()
        logger.write(progress.iteration, {**metrics, "consumed_groups": progress.consumed_groups})
        if progress.iteration % run.config.logging.log_interval == 0 or progress.iteration == run.train_iters:
            logger.line(progress.iteration, metrics, consumed_groups=progress.consumed_groups, global_batch_size=size)
    return progress


def evaluate(run: Run) -> dict[str, float]:
    """Metrics over the groups of ``eval_iters`` validation batches; on ranks that hold the output layer, else empty."""
    assert run.valid is not None
    metrics = HeldOutMetrics(run.loss)
    for planned in run.valid.once(run.config.training.global_batch_size, limit=run.config.training.eval_iters):
        ref_logps_R = reference_logps(run, planned)
        logps_R = run.policy.engine.score(planned.microbatches, planned.batch.num_responses)
        if logps_R is None:
            continue
        ref_logps_R = ref_logps_R.to(logps_R.device)
        result = group_loss(logps_R, ref_logps_R, planned.batch, run.loss)
        metrics.add(planned.batch, result, logps_R, ref_logps_R, run.valid.trained_GK(planned.batch))
    return metrics.values()


def _validate(run: Run, progress: Progress, logger: RunLogger | None) -> None:
    if run.valid is None:
        return
    metrics = evaluate(run)
    if logger is not None:
        logger.write(progress.iteration, metrics)
        logger.validation_line(progress.iteration, metrics)


def _save(run: Run, progress: Progress) -> None:
    if run.config.checkpoint.save is None:
        return
    started = time.perf_counter()
    folder = save_checkpoint(
        Path(run.config.checkpoint.save),
        run.policy.chunks,
        progress=progress,
        model=run.policy.identity,
        config={
            "order": run.order,
            "yaml": to_yaml(run.config),
            "tokenizer": run.tokenizer,
            **({} if run.origin is None else {"hugging_face": run.origin}),
        },
        optimizer=run.updater.optimizer,
        schedule=run.updater.schedule,
    )
    if run.ranks.is_logger:
        print(f"saved {folder} in {time.perf_counter() - started:.1f} s", flush=True)


def _speed(run: Run, planned: PlannedBatch, seconds: float) -> dict[str, Any]:
    speed: dict[str, Any] = {
        "iteration_ms": 1000 * seconds,
        "tokens_per_second": planned.num_tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(run.ranks.device),
    }
    if run.config.logging.log_throughput:
        separable = objectives.get_objective(run.loss.objective).separable
        flops = step_flops(run.policy.model, planned.batch, scoring_pass=not separable)
        speed["tflops_per_gpu"] = flops / seconds / dist.get_world_size() / 1e12
    return speed


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def run_folder(run: Run) -> Path | None:
    """Where the run's own files go."""
    folder = run.config.logging.run_dir or run.config.checkpoint.save
    return None if folder is None else Path(folder)


def _open_logs(run: Run) -> RunLogger:
    logging, run_dir = run.config.logging, run_folder(run)
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(run.config), encoding="utf-8")
    return RunLogger(
        run_dir=run_dir,
        tensorboard_dir=None if logging.tensorboard_dir is None else Path(logging.tensorboard_dir),
        start_iteration=run.progress.iteration,
        train_iters=run.train_iters,
    )
