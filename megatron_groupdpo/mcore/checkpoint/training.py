"""The state of a run as a distributed checkpoint: saved on one layout, loaded on any."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_groupdpo.errors import CheckpointError
from megatron_groupdpo.mcore.checkpoint.folders import (
    FORMAT,
    LOAD_ERRORS,
    TRACKER,
    Progress,
    check_same_model,
    iteration_folder,
    last_line,
    read_common,
)
from megatron_groupdpo.mcore.fp8.weights import full_weights
from megatron_groupdpo.mcore.weights import finish_param_gather, optimizer_parts, unwrapped

_EXTRA_STATE = "_extra_state"
# Megatron-Core 0.19.2 finds a saved group's successor by values that include these (optimizer.py,
# ``param_group_identifier_keys``): a saved group is given the run's own before it looks.
_SAME_IN_ALL_GROUPS = ("max_lr", "min_lr")
# Optimizer state laid out by parameter, not by buffer: loadable under another TP, PP and DP.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,  # the experts' optimizer names its state as the other does
}


def save_checkpoint(
    root: Path,
    chunks: Sequence[Any],
    *,
    progress: Progress,
    model: Mapping[str, Any],
    config: Mapping[str, Any],
    optimizer: MegatronOptimizer | None = None,
    schedule: OptimizerParamScheduler | None = None,
) -> Path:
    """Write ``ROOT/iter_...`` from every rank and then the tracker; returns the folder.

    Raises:
        CheckpointError: the folder cannot be written; the tracker still names the one before.
    """
    finish_param_gather(chunks)
    folder = iteration_folder(root, progress.iteration)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state |= {
        "groupdpo_format": FORMAT,
        "iteration": progress.iteration,
        "consumed_groups": progress.consumed_groups,
        "model": dict(model),
        "config": dict(config),
        "optimizer_kind": _optimizer_kind(optimizer),
        "schedule": schedule.state_dict() if schedule is not None else None,
    }
    try:
        dist_checkpointing.save(state, str(folder))
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be written ({last_line(error)}); look for a full disk or a folder that "
            "is not writable"
        ) from error
    dist.barrier()
    if dist.get_rank() == 0:
        temporary = root / (TRACKER + ".tmp")
        temporary.write_text(str(progress.iteration))
        os.replace(temporary, root / TRACKER)
    dist.barrier()
    return folder


def load_weights(folder: Path, chunks: Sequence[Any], *, model: Mapping[str, Any]) -> None:
    """Fill the chunks from a checkpoint of the same model, saved on any layout.

    Raises:
        CheckpointError: the checkpoint is of another model, or lacks a tensor.
    """
    check_same_model(folder, read_common(folder), model)
    _load_into(folder, chunks, None)


def load_training(
    folder: Path,
    chunks: Sequence[Any],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    *,
    model: Mapping[str, Any],
) -> Progress:
    """Weights, optimizer state and schedule; where the run stood.

    Raises:
        CheckpointError: the checkpoint is of another model, or was saved without optimizer state, or with another
            kind of it.
    """
    common = read_common(folder)
    check_same_model(folder, common, model)
    if common["optimizer_kind"] != _optimizer_kind(optimizer):
        raise CheckpointError(
            f"{folder} holds optimizer state of kind {common['optimizer_kind']!r}, this run needs "
            f"{_optimizer_kind(optimizer)!r}; set --use-distributed-optimizer and --optimizer as they were, take the "
            "package whose optimizer it was (FusedAdam: Transformer Engine or Apex, on a GPU; AdamW: torch), or start "
            "from the weights alone with --finetune"
        )
    _load_into(folder, chunks, optimizer)
    return load_progress(folder, schedule)


def load_progress(folder: Path, schedule: OptimizerParamScheduler) -> Progress:
    """Where the run stood, its schedule included."""
    common = read_common(folder)
    if common["schedule"] is None:
        raise CheckpointError(
            f"{folder} was saved without a schedule (converted weights); start from it with --finetune"
        )
    schedule.load_state_dict(common["schedule"])
    return Progress(iteration=common["iteration"], consumed_groups=common["consumed_groups"])


def _optimizer_kind(optimizer: MegatronOptimizer | None) -> str | None:
    if optimizer is None:
        return None
    parts = optimizer_parts(optimizer)
    return "+".join(f"{type(part).__name__}/{type(part.optimizer).__name__}" for part in parts)


def _sharded_state(chunks: Sequence[Any], optimizer: MegatronOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    # Tensor keys are global names; the outer key only tells the chunks of one rank apart.
    # A copy each time: Megatron writes the data-parallel group of the day into what it is given.
    metadata = dict(_METADATA)

    def models() -> dict[str, Any]:
        return {f"model{i}": unwrapped(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}

    state: dict[str, Any] = {}
    if optimizer is not None:
        # It finds its parameters among these by identity: FP8 ones too.
        own = models()
        model_state = own if len(chunks) > 1 else {"model": own["model0"]}
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    with full_weights(chunks, read=not is_loading):
        return models() | state


def _load_into(folder: Path, chunks: Sequence[Any], optimizer: MegatronOptimizer | None) -> None:
    options: list[dict[str, Any]] = []
    if optimizer is not None:
        _prepare_torch_adam(optimizer)
        _prepare_sgd(folder, optimizer)
        options = _group_options(optimizer)
    state = _sharded_state(chunks, optimizer, is_loading=True)
    _check_shapes(folder, state)
    _leave_out_absent_state(folder, state)
    loaded = _read(folder, state)
    with full_weights(chunks, read=False, changed=True):
        for index, chunk in enumerate(chunks):
            found = unwrapped(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
            wrong = [*found.unexpected_keys, *(key for key in found.missing_keys if not key.endswith(_EXTRA_STATE))]
            assert not wrong, f"the sharded state is not the module's: {wrong}"
    if optimizer is not None:
        if "param_groups" in loaded["optimizer"]:
            # SGD without momentum has no state, and an empty entry is not there after a load; Megatron looks for it.
            loaded["optimizer"].setdefault("state", {})
        for group in _saved_groups(loaded["optimizer"]):
            group.update({name: options[0][name] for name in _SAME_IN_ALL_GROUPS})
        optimizer.load_state_dict(loaded["optimizer"])
        _unshare_torch_adam_step(optimizer)
        for group, own in zip(_param_groups(optimizer), options):
            group.update(own)
    dist.barrier()


def _leave_out_absent_state(folder: Path, state: dict[str, Any]) -> None:
    """Transformer Engine's modules keep their scales as extra state, which a checkpoint of others lacks."""
    saved: Any = load_sharded_metadata(str(folder))
    for name in [name for name in state if name.startswith("model")]:
        state[name] = {
            key: entry
            for key, entry in state[name].items()
            if not isinstance(entry, ShardedObject) or entry.unique_key in saved
        }


def _read(folder: Path, state: dict[str, Any]) -> Any:
    try:
        return dist_checkpointing.load(state, str(folder))
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"{folder} is damaged or incomplete ({type(error).__name__}: {last_line(error)}); "
            f"load another iter_ folder: write its number into {folder.parent / TRACKER}"
        ) from error


def _param_groups(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    groups: Any = optimizer.param_groups
    return groups


def _group_options(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """What the run's own flags put into the optimizer's groups.

    A checkpoint brings its own values along; kept, they would make ``--lr`` or ``--adam-beta2`` of a resumed run do
    nothing without a word.
    """
    names = ("max_lr", "min_lr", "betas", "eps", "momentum")
    return [{name: group[name] for name in names if name in group} for group in _param_groups(optimizer)]


def _saved_groups(state: Any) -> Iterator[dict[str, Any]]:
    """The parameter groups of a loaded optimizer state, which lie deeper where optimizers are wrapped or chained."""
    if isinstance(state, dict):
        yield from state.get("param_groups", ())
        for value in state.values():
            yield from _saved_groups(value)


def _prepare_sgd(folder: Path, optimizer: MegatronOptimizer) -> None:
    """Make SGD loadable, with momentum or without, whatever the checkpoint was saved with.

    Megatron-Core 0.19.2 (optimizer/__init__.py) gives SGD no function that allocates state, and then calls it. Momentum
    that was not saved begins at nothing, as in a first step.
    """
    saved = any("momentum_buffer" in name for name in dist_checkpointing.load_tensors_metadata(str(folder)))

    def allocate(update: torch.optim.Optimizer, config: Any = None) -> None:
        for group in update.param_groups:
            for param in group["params"]:
                if saved and group["momentum"]:
                    update.state[param]["momentum_buffer"] = torch.zeros_like(param)

    for part in optimizer_parts(optimizer):
        if part.init_state_fn is None:
            part.init_state_fn = allocate


def _prepare_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Make the distributed optimizer over torch's Adam loadable before its first step.

    Megatron-Core 0.19.2 (distrib_optimizer.py) reads ``step`` from a state that torch's Adam has only after a step
    (``state_dict``), leaves ``step`` out of what it loads per parameter and then looks it up for every tensor of the
    state (``_set_main_param_and_optimizer_states``); the value itself comes with the parameter groups. With
    Transformer Engine's or Apex's Adam neither happens.
    """
    for part in _distributed_torch_adams(optimizer):
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                state = part.optimizer.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        load_one = type(part)._set_main_param_and_optimizer_states
        part._set_main_param_and_optimizer_states = (  # type: ignore[method-assign]
            lambda param, tensors, part=part, load_one=load_one: load_one(part, param, {"step": None, **tensors})
        )


def _unshare_torch_adam_step(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own ``step`` again.

    Megatron-Core 0.19.2 puts one tensor into every parameter's state (distrib_optimizer.py, ``load_state_dict``);
    torch's Adam then counts it up once per parameter, and the bias correction after a resume is wrong.
    """
    for part in _distributed_torch_adams(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _distributed_torch_adams(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    parts = optimizer_parts(optimizer)
    return [p for p in parts if isinstance(p, DistributedOptimizer) and isinstance(p.optimizer, torch.optim.Adam)]


def _check_shapes(folder: Path, state: Mapping[str, Any]) -> None:
    """One clear message before Megatron's own, deep in a planner."""
    saved = dist_checkpointing.load_tensors_metadata(str(folder))
    for chunk_state in (value for name, value in state.items() if name.startswith("model")):
        for tensor in chunk_state.values():
            if not isinstance(tensor, ShardedTensor):
                continue
            if tensor.key not in saved:
                raise CheckpointError(f"{folder} lacks the tensor {tensor.key!r} that this model has")
            there, here = tuple(saved[tensor.key].global_shape), tuple(tensor.global_shape)
            if there != here and not tensor.allow_shape_mismatch:
                raise CheckpointError(f"{folder}: tensor {tensor.key!r} has shape {there}, this model needs {here}")
