"""Megatron's optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_groupdpo.config import OptimizerConfig as OptimizerOptions
from megatron_groupdpo.config import ParallelConfig, PrecisionConfig
from megatron_groupdpo.mcore.fp8.weights import attach_masters
from megatron_groupdpo.mcore.weights import optimizer_parts


def build_optimizer(
    chunks: list[DistributedDataParallel],
    options: OptimizerOptions,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
) -> MegatronOptimizer:
    """Adam or SGD over the chunks' gradient buffers. Norms and biases get no weight decay (Megatron's rule)."""
    config = OptimizerConfig(
        optimizer=options.optimizer,
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        bf16=precision.bf16,
        params_dtype=torch.bfloat16 if precision.bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        sgd_momentum=options.sgd_momentum,
        clip_grad=options.clip_grad,
    )
    optimizer = get_megatron_optimizer(config, list(chunks))
    attach_masters(chunks, optimizer)
    return optimizer


def build_lr_schedule(
    optimizer: MegatronOptimizer, options: OptimizerOptions, *, warmup_groups: int, decay_groups: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then decay until ``decay_groups`` groups are consumed."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=warmup_groups,
        lr_decay_steps=decay_groups,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=decay_groups,
        wd_incr_style="constant",
        # On a resume the flags of the run hold, not what the checkpoint remembers of the old ones.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


class Updater:
    """Applies the accumulated gradient and moves the schedule on."""

    def __init__(self, optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler) -> None:
        self.optimizer = optimizer
        self.schedule = schedule

    def step(self, num_groups: int) -> float:
        """One update over a batch of ``num_groups`` groups; the gradient norm before clipping."""
        outcome: Any = self.optimizer.step()
        updated, grad_norm, _ = outcome
        assert updated, "only a dynamic loss scale skips updates, and there is none"
        self.schedule.step(increment=num_groups)
        return float(grad_norm)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        groups: Any = self.optimizer.param_groups
        return float(groups[0]["lr"])


def optimizer_origin(optimizer: MegatronOptimizer) -> str:
    """Whose update Megatron took: Transformer Engine's, else Apex's, else torch's (``megatron/core/optimizer``)."""
    update = type(optimizer_parts(optimizer)[0].optimizer)
    package = update.__module__.split(".")[0]
    names = {"transformer_engine": "Transformer Engine", "apex": "Apex", "torch": "torch"}
    return f"{names.get(package, package)}'s {update.__name__}"
