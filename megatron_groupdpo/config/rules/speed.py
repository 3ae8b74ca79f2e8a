"""What the fields about step time must be together: overlap and profiling."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_groupdpo.config.derived import train_iters
from megatron_groupdpo.config.sections.train_config import TrainConfig


def speed_problems(config: TrainConfig) -> Iterator[str]:
    """Contradictions, one message each."""
    parallel, logging, training = config.parallel, config.logging, config.training
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield (
            "overlap_param_gather gathers what the distributed optimizer has updated and use_distributed_optimizer is "
            "off; turn it on, or remove overlap_param_gather."
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield "overlap_param_gather needs overlap_grad_reduce, as in Megatron; turn it on too."
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        yield (
            f"ddp_bucket_size ({parallel.ddp_bucket_size}) would act on nothing: without overlap_grad_reduce all "
            "gradients are reduced at once; remove it, or turn that on."
        )
    if not logging.profile:
        return
    start, end = logging.profile_step_start, logging.profile_step_end
    if not start < end:
        yield (
            f"profile_step_start ({start}) must be < profile_step_end ({end}): the trace holds iterations start to "
            "end - 1; raise the latter."
        )
    length_is_known = (training.train_iters is None) != (training.train_samples is None)
    if length_is_known and end - 1 > train_iters(config):
        yield (
            f"profile_step_end ({end}) must be <= {train_iters(config) + 1}, since the run has {train_iters(config)} "
            "iterations; lower it."
        )
    if logging.run_dir is None and config.checkpoint.save is None:
        yield "profile writes its trace into the run's folder, and neither run_dir nor save is given; give one."
