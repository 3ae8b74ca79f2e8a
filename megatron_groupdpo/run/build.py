"""From a configuration to the parts of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupdpo import objectives
from megatron_groupdpo.config import (
    ModelConfig,
    TrainConfig,
    lr_decay_iters,
    lr_warmup_iters,
    objective_hyperparameters,
    train_iters,
)
from megatron_groupdpo.config.changes import optimizer_changes
from megatron_groupdpo.config.fp8 import precision_name, reference_precision
from megatron_groupdpo.convert.hf.folder import is_hf_folder
from megatron_groupdpo.convert.hf.hub import is_hub_name
from megatron_groupdpo.convert.start_weights import StartWeights, find_weights, load_any_policy
from megatron_groupdpo.data.batches.planner import plan_options
from megatron_groupdpo.data.batches.sampler import BLENDS, GroupSampler, Sampler, build_sampler
from megatron_groupdpo.data.store.reader import GroupDataset, split_by_prompt
from megatron_groupdpo.data.text.identity import describe, differences
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import CheckpointError, ConfigError, DataError
from megatron_groupdpo.mcore.checkpoint.folders import Progress, find_checkpoint, latest_iteration, read_common
from megatron_groupdpo.mcore.checkpoint.training import load_progress, load_training
from megatron_groupdpo.mcore.fp8.weights import reload_masters
from megatron_groupdpo.mcore.passes.optimizer import Updater, build_lr_schedule, build_optimizer
from megatron_groupdpo.mcore.policy import Policy, build_policy
from megatron_groupdpo.mcore.setup import Ranks
from megatron_groupdpo.reference.store import ReferenceLogProbs
from megatron_groupdpo.reference.swapped import SwappedReference, swapped_reference
from megatron_groupdpo.run.batches import BatchSource
from megatron_groupdpo.run.checks import check_groups, check_order, check_outputs
from megatron_groupdpo.run.exports import response_ends
from megatron_groupdpo.run.logs.flops import attention_cost
from megatron_groupdpo.run.parts import Run
from megatron_groupdpo.run.proofs.reference import probe_reference
from megatron_groupdpo.step.coefficients import LossOptions


def build_run(config: TrainConfig, ranks: Ranks) -> Run:
    """Open the data, build the model, load what there is to load.

    Raises:
        UserError: anything that a user can put right.
    """
    source, resumes = _weights_to_load(config)
    check_outputs(config, source.folder if source is not None and resumes else None)
    train_data, valid_data = _open_data(config)
    if not (config.objective.one_sided_nll and config.objective.nll_coeff):
        check_groups(train_data, config.objective.objective)
    tokenizer = _tokenizer(config, train_data, source, ranks)
    order = data_order(config, train_data, source if resumes else None)
    if source is not None and source.hf is None and resumes:
        check_order(source.folder, order)
    config = dataclasses.replace(config, model=with_vocabulary(config.model, train_data.vocab_size))
    loss = loss_options(config)
    policy = build_policy(
        config.model, config.parallel, config.precision, ranks, seed=config.training.seed, training=True
    )
    optimizer = build_optimizer(policy.chunks, config.optimizer, config.parallel, config.precision)
    schedule = build_lr_schedule(
        optimizer,
        config.optimizer,
        warmup_groups=lr_warmup_iters(config) * config.training.global_batch_size,
        decay_groups=lr_decay_iters(config) * config.training.global_batch_size,
    )
    updater = Updater(optimizer, schedule)
    train, valid = _sources(config, loss, ranks, policy, train_data, valid_data, blend=order.get("blend", BLENDS[-1]))
    # These may use the policy's own memory, so they come before its weights.
    reference_policy = _resident_reference(config, policy)
    not_probed = _probe(config, policy, train, valid, source)
    progress = _load(config, source, policy, updater, resumes=resumes)
    starts_from_reference = progress.iteration == 0 and _same_weights(policy, reference_policy, train.reference)
    if not_probed is not None and not starts_from_reference and ranks.is_logger:
        print(f"reference: read as it is, no group of it was scored again: {not_probed}", flush=True)
    return Run(
        config=config,
        ranks=ranks,
        policy=policy,
        reference_policy=reference_policy,
        updater=updater,
        progress=progress,
        train=train,
        valid=valid,
        loss=loss,
        train_iters=train_iters(config),
        weights_from=None if source is None else source.folder,
        changes=() if source is None or not resumes else tuple(_changes(source.folder, config)),
        tokenizer=tokenizer,
        order=order,
        origin=None if source is None else source.origin(),
        starts_from_reference=starts_from_reference,
    )


def _changes(folder: Path, config: TrainConfig) -> list[str]:
    return optimizer_changes(read_common(folder)["config"].get("yaml"), config)


def loss_options(config: TrainConfig) -> LossOptions:
    """The loss of a run."""
    section = config.objective
    return LossOptions(
        objective=section.objective,
        beta=section.beta,
        score_average=section.score_average,
        nll_coeff=section.nll_coeff,
        nll_average=section.nll_average,
        one_sided_nll=section.one_sided_nll,
        hyperparameters=objective_hyperparameters(section),
    )


def with_vocabulary(model: ModelConfig, tokenizer_size: int) -> ModelConfig:
    """Fill in the vocabulary size from the tokenizer, or check that it holds the tokenizer's."""
    if model.vocab_size is None:
        return dataclasses.replace(model, vocab_size=tokenizer_size)
    if model.vocab_size < tokenizer_size:
        raise ConfigError(
            f"model.vocab_size {model.vocab_size} is smaller than the tokenizer's {tokenizer_size}; "
            "leave it out, or use the model's own tokenizer"
        )
    return model


def _open_data(config: TrainConfig) -> tuple[GroupDataset, GroupDataset | None]:
    data = config.data
    train_data = GroupDataset.open(data.data_path)
    valid_data = GroupDataset.open(data.valid_data_path) if data.valid_data_path else None
    for dataset, paths in ((train_data, data.data_path), (valid_data, data.valid_data_path)):
        if dataset is not None and dataset.longest_row > data.seq_length:
            raise DataError(
                f"{', '.join(paths)}: the longest prompt and response have {dataset.longest_row} tokens, seq_length is "
                f"{data.seq_length}; raise --seq-length or run tools/preprocess_data.py with it"
            )
    if valid_data is not None:
        ours, theirs = (d.stores[0].meta["tokenizer"] for d in (valid_data, train_data))
        if differ := differences(ours, theirs, with_template=True):
            raise DataError(
                f"{', '.join(data.valid_data_path)}: made with another tokenizer, {ours['model']}, than the training "
                f"data, {theirs['model']} ({'; '.join(differ)}); use one tokenizer"
            )
    return train_data, valid_data


_NEED_A_CHECKPOINT = ("exit_on_missing_checkpoint", "finetune", "no_load_optim")


def _tokenizer(config: TrainConfig, data: GroupDataset, source: StartWeights | None, ranks: Ranks) -> dict[str, Any]:
    """The tokenizer of the run: that of the stores, which must be the weights' own and the one that flags name."""
    made_with = dict(data.stores[0].meta["tokenizer"])
    kind, model = config.data.tokenizer_type, config.data.tokenizer_model
    if model is not None:
        named = TokenizerOptions(kind=kind or made_with["kind"], model=model, chat_template=made_with["chat_template"])
        made_with = describe(data.stores[0].load_tokenizer(named), named)
    start = None if source is None else source.own_tokenizer()
    untold = [] if source is None or start is not None else [source]
    if config.objective.reference == "resident" and config.checkpoint.pretrained_checkpoint is not None:
        reference = find_weights(config.checkpoint.pretrained_checkpoint)
        if (source is None or reference.folder != source.folder) and not reference.check_tokenizers([made_with]):
            untold.append(reference)
    for weights in untold if ranks.is_logger else []:
        print(f"tokenizer   {weights} has none; the data's, {made_with['model']}, is taken to be its own", flush=True)
    chosen = made_with if source is None else source.tokenizer_with(made_with, start)
    return {**chosen, "response_ends": response_ends(data, chosen)}


def data_order(config: TrainConfig, data: GroupDataset, resumed: StartWeights | None) -> dict[str, Any]:
    """What the order of the groups follows from; of a run that goes on, as its checkpoint has it."""
    order: dict[str, Any] = {
        "stores": [store.digest for store in data.stores],
        "seed": config.training.seed,
        "shuffle": config.data.shuffle,
        "weights": list(config.data.data_weights),
        "curriculum": config.data.curriculum,
        "valid_fraction": config.data.valid_fraction,
    }
    if config.data.data_weights:
        order["blend"] = BLENDS[-1]
        saved = None if resumed is None else read_common(resumed.folder)["config"].get("order")
        if saved is not None and saved.get("blend", BLENDS[0]) in BLENDS:
            order["blend"] = saved.get("blend", BLENDS[0])  # goes on as it began
    return order


def _weights_to_load(config: TrainConfig) -> tuple[StartWeights | None, bool]:
    """The latest of ``load`` if there is one, else ``pretrained_checkpoint``, else none; and whether it resumes.

    A Hugging Face model in ``load`` holds no run to go on with: that is in ``save``, once it has a checkpoint.
    """
    checkpoint = config.checkpoint
    if checkpoint.load is not None:
        weights = _at_load(checkpoint.load)
        own = None if checkpoint.save is None or checkpoint.finetune else Path(checkpoint.save)
        if weights is not None and weights.hf is not None and own is not None and latest_iteration(own) is not None:
            return StartWeights(folder=find_checkpoint(own)), True
        if weights is not None:
            return weights, weights.hf is None and not checkpoint.finetune
        asked = [name for name in _NEED_A_CHECKPOINT if getattr(checkpoint, name)]
        if asked:
            raise CheckpointError(
                f"no checkpoint at {checkpoint.load}, and {asked[0]} is set; give the folder of one to --load"
            )
    if checkpoint.pretrained_checkpoint is not None:
        return find_weights(checkpoint.pretrained_checkpoint), False
    return None, False


def _at_load(load: str) -> StartWeights | None:
    """What ``load`` names; None: nothing yet, the run begins there."""
    root = Path(load)
    if is_hub_name(load, bare=False) or is_hf_folder(root):
        return find_weights(load, bare=False)
    if (root / "metadata.json").exists() or latest_iteration(root) is not None:
        return StartWeights(folder=find_checkpoint(root))
    return None


def _load(
    config: TrainConfig, source: StartWeights | None, policy: Policy, updater: Updater, *, resumes: bool
) -> Progress:
    if source is None:
        return Progress()
    if resumes and not config.checkpoint.no_load_optim:
        return load_training(source.folder, policy.chunks, updater.optimizer, updater.schedule, model=policy.identity)
    source.load_into(policy)
    reload_masters(policy.chunks, updater.optimizer)  # the float32 master weights are still the initial ones
    return load_progress(source.folder, updater.schedule) if resumes else Progress()


def _resident_reference(config: TrainConfig, policy: Policy) -> Policy | SwappedReference | None:
    if config.objective.reference != "resident":
        return None
    if config.checkpoint.pretrained_checkpoint is None:
        raise ConfigError(
            "reference 'resident' is the model of pretrained_checkpoint, which is not set; set --pretrained-checkpoint"
        )
    named = config.checkpoint.pretrained_checkpoint
    if config.objective.reference_offload:
        find_weights(named).load_into(policy)
        return swapped_reference(policy)
    return load_any_policy(named, config.parallel, reference_precision(config.precision), policy.ranks)


def _probe(
    config: TrainConfig, policy: Policy, train: BatchSource, valid: BatchSource | None, source: StartWeights | None
) -> str | None:
    """Check stored numbers; None, or why they could not be. A policy that starts as the reference is checked later."""
    if train.reference is None:
        return None
    sources = [train] if valid is None else [train, valid]
    digests = [part.reference.weights_digest for part in sources if part.reference is not None]
    if len(set(digests)) > 1:
        raise DataError(
            f"{config.objective.reference_logprobs}: the training data were scored by weights {digests[0]}, the "
            f"validation data by {digests[1]}; score both with one model"
        )
    if config.objective.reference_probe_groups == 0:
        return "reference_probe_groups is 0"
    if reference_precision(config.precision) != config.precision:
        return f"it is in bf16, the policy's passes are in FP8 ({config.precision.fp8_recipe})"
    return probe_reference(config, policy, sources, policy_from=None if source is None else source.folder)


def _sources(
    config: TrainConfig,
    loss: LossOptions,
    ranks: Ranks,
    policy: Policy,
    train_data: GroupDataset,
    valid_data: GroupDataset | None,
    *,
    blend: int,
) -> tuple[BatchSource, BatchSource | None]:
    train_ids, held_out_ids = split_by_prompt(train_data, config.data.valid_fraction)
    plan = plan_options(
        config.parallel,
        precision=config.precision,
        data_parallel_size=ranks.dp_group.size(),
        micro_batch_size=config.training.micro_batch_size,
        max_tokens_per_microbatch=config.training.max_tokens_per_microbatch,
        seq_length=config.data.seq_length,
        attention_cost=attention_cost(policy.model),
    )

    def source(
        dataset: GroupDataset, group_ids: np.ndarray, sampler: Sampler, *, every_response: bool = False
    ) -> BatchSource:
        return BatchSource(
            dataset,
            group_ids,
            sampler=sampler,
            loss=loss,
            plan=plan,
            data_parallel_rank=ranks.dp_group.rank(),
            context_parallel_rank=ranks.cp_group.rank(),
            seed=config.training.seed,
            reference=open_reference(config, dataset),
            every_response=every_response,
        )

    def held_out(dataset: GroupDataset, group_ids: np.ndarray) -> BatchSource:
        return source(dataset, group_ids, GroupSampler(len(group_ids), seed=0, shuffle=False), every_response=True)

    sampler = build_sampler(
        train_data,
        train_ids,
        seed=config.training.seed,
        shuffle=config.data.shuffle,
        weights=config.data.data_weights,
        curriculum=config.data.curriculum,
        blend=blend,
    )
    train = source(train_data, train_ids, sampler)
    if valid_data is not None:
        return train, held_out(valid_data, np.arange(len(valid_data)))
    return train, held_out(train_data, held_out_ids) if len(held_out_ids) else None


def open_reference(config: TrainConfig, dataset: GroupDataset) -> ReferenceLogProbs | None:
    """The stored log-probabilities of a dataset's responses, where the run reads them from disk."""
    section = config.objective
    if section.reference != "cached" or not objectives.get_objective(section.objective).needs_reference:
        return None
    if section.reference_logprobs is None:
        raise ConfigError(
            "reference 'cached' reads reference_logprobs, which is not set; run tools/score_reference.py and set "
            "--reference-logprobs to its output, or set --reference resident"
        )
    return ReferenceLogProbs.open(
        Path(section.reference_logprobs),
        dataset.stores,
        precision=precision_name(reference_precision(config.precision)),
    )


def _same_weights(policy: Policy, resident: Policy | SwappedReference | None, cached: ReferenceLogProbs | None) -> bool:
    if resident is not None:
        return policy.weights_digest() == resident.weights_digest()
    return cached is not None and policy.weights_digest() == cached.weights_digest
