"""What a run says of itself before the first step."""

from __future__ import annotations

from pathlib import Path

from megatron_groupdpo import objectives
from megatron_groupdpo.config.fp8 import precision_name
from megatron_groupdpo.convert.hf.hub import is_hub_name
from megatron_groupdpo.data.batches.sampler import BlendedSampler
from megatron_groupdpo.mcore.passes.optimizer import optimizer_origin
from megatron_groupdpo.run.batches import PlannedBatch
from megatron_groupdpo.run.parts import Run

_LAYERS = {"local": "local", "transformer_engine": "Transformer Engine's"}


def print_start(run: Run, first: PlannedBatch) -> None:
    """Layout, batch, model and loss, and a warning for what is odd; a collective call that prints on one rank."""
    num_parameters = run.policy.num_parameters()
    if not run.ranks.is_logger:
        return
    config, batch = run.config, first.batch
    parallel, loss = config.parallel, run.loss
    layout = (
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}"
        f" x CP {parallel.context_parallel_size} x DP {run.ranks.dp_group.size()}"
    )
    chunks = parallel.virtual_pipeline_model_parallel_size
    training = config.training
    each = (
        f"of {training.micro_batch_size} responses"
        if training.max_tokens_per_microbatch is None
        else f"of at most {training.max_tokens_per_microbatch} packed tokens"
    )
    extras = [
        name
        for name, on in (
            (f"{chunks} chunks per stage", chunks is not None),
            ("sequence parallel", parallel.sequence_parallel),
            ("distributed optimizer", parallel.use_distributed_optimizer),
            ("gradients reduced in the backward", parallel.overlap_grad_reduce),
            ("weights gathered in the forward", parallel.overlap_param_gather),
            ("weights kept in FP8", config.precision.fp8_param_gather),
            ("fused log-probabilities", run.policy.engine.fused_logprobs),
            ("layers as CUDA graphs", run.policy.engine.graphs is not None),
        )
        if on
    ]
    equation = objectives.get_objective(loss.objective).equation
    lines = [
        f"layout      {', '.join([layout, *extras])}, {precision_name(config.precision)}",
        f"kernels     {_LAYERS[run.policy.transformer_impl]} layers, attention {config.precision.attention_backend}, "
        f"{optimizer_origin(run.updater.optimizer)}",
        f"model       {num_parameters:,} parameters, vocabulary {run.policy.model.vocab_size}",
        f"weights     {run.weights_from or 'initial ones, drawn from the seed'}",
        *([f"changed     {', '.join(run.changes)}"] if run.changes else []),
        f"data        {len(run.train.group_ids):,} groups to train on"
        + (f", {len(run.valid.group_ids):,} to validate" if run.valid is not None else ""),
        *_shares(run),
        f"batch       {batch.num_groups} groups = {batch.num_responses} responses = {first.num_tokens:,} tokens in "
        f"{len(first.microbatches)} microbatches {each} on each data-parallel rank"
        " (first batch)",
        f"objective   {loss.objective}: {equation}",
        f"            beta {loss.beta}, {'mean' if loss.score_average else 'summed'} log-probs, NLL x {loss.nll_coeff}"
        f" ({loss.nll_average}), reference {config.objective.reference}",
        f"run         iterations {run.progress.iteration} to {run.train_iters}, "
        f"{run.train_iters * config.training.global_batch_size / len(run.train.group_ids):.2f} epochs in all",
    ]
    print("\n".join(lines), flush=True)
    for warning in _oddities(run, first):
        print(f"warning     {warning}", flush=True)


def _shares(run: Run) -> list[str]:
    """One line a store, where the order blends them by weight."""
    sampler = run.train.sampler
    if not isinstance(sampler, BlendedSampler):
        return []
    total = run.train_iters * run.config.training.global_batch_size
    return [
        f"            {path}: {share / sampler.shares.sum():.2%} of the order, "
        f"{total * share / sampler.shares.sum() / source.num_groups:.2f} epochs of its {source.num_groups:,} groups"
        for path, share, source in zip(run.config.data.data_path, sampler.shares, sampler.sources)
    ]


def _oddities(run: Run, first: PlannedBatch) -> list[str]:
    found = []
    config, batch = run.config, first.batch
    if config.training.global_batch_size > len(run.train.group_ids):
        found.append(
            f"one batch of {config.training.global_batch_size} groups holds some of the {len(run.train.group_ids)} "
            "groups more than once"
        )
    two_sided = int(((batch.labels_GK > 0).any(1) & (batch.labels_GK < 0).any(1)).sum())
    if two_sided < batch.num_groups / 2 and not objectives.get_objective(run.loss.objective).separable:
        found.append(f"only {two_sided} of {batch.num_groups} groups of the first batch have both sides")
    if not batch.num_responses:
        found.append("no response of the first batch gets a pass")
    if config.training.score_drift_threshold is None and precision_name(config.precision) == "bf16":
        found.append("score_drift_threshold is not set: drift between the passes is only reported")
    load = config.checkpoint.load
    is_start = load is not None and (is_hub_name(load, bare=False) or run.weights_from == Path(load))
    if load is not None and not is_start and run.progress.iteration == 0 and not config.checkpoint.finetune:
        found.append(f"load {load} holds no checkpoint yet: the run starts at iteration 0")
    if run.progress.iteration >= run.train_iters:
        found.append(f"nothing to do: the checkpoint is at iteration {run.progress.iteration} of {run.train_iters}")
    if config.checkpoint.save is None:
        found.append("save is not set: no checkpoint will be written")
    return found
