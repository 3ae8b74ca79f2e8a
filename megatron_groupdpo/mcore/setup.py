"""Start of a run: the device, torch.distributed, Megatron's process groups, seeds."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_groupdpo.config import ParallelConfig
from megatron_groupdpo.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Where this process stands in the mesh, and the groups it speaks to."""

    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    expert_dp_group: dist.ProcessGroup
    """Ranks that hold the same experts, where experts are shared out; else as ``dp_cp_group``."""

    def replicas_of(self, parameter: torch.Tensor) -> dist.ProcessGroup:
        """The ranks that hold the same as this one of a parameter, and sum its gradient."""
        # Megatron's mark of experts that are shared out over the ranks
        return self.dp_cp_group if getattr(parameter, "allreduce", True) else self.expert_dp_group

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer: scores and losses live here."""
        return self.pp_group.rank() == self.pp_group.size() - 1

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_group.rank() == 0

    @property
    def is_logger(self) -> bool:
        """The one rank that writes logs: last stage, first in every other axis."""
        return (
            self.is_last_stage and self.tp_group.rank() == 0 and self.dp_group.rank() == 0 and self.cp_group.rank() == 0
        )

    def broadcast_from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Give every stage what the last one holds; ``values`` must have one shape and dtype everywhere."""
        if self.pp_group.size() > 1:
            last = dist.get_global_rank(self.pp_group, self.pp_group.size() - 1)
            dist.broadcast(values, src=last, group=self.pp_group)
        return values


def choose_device(requested: str) -> tuple[torch.device, str | None]:
    """The device of this rank, and a line to print when it is not the expected GPU.

    Args:
        requested: ``auto``, ``cpu`` or ``cuda``. ``auto`` takes the GPUs when every local rank has one.

    Raises:
        ConfigError: ``cuda`` was asked for and there are fewer GPUs than ranks on this node.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "cuda" and gpus < local_ranks:
        raise ConfigError(
            f"device 'cuda' needs one GPU per rank of the node: {local_ranks} ranks, {gpus} GPUs; "
            + (f"start at most {gpus} ranks per node or set --device cpu" if gpus else "set --device cpu")
        )
    if requested == "cpu" or gpus < local_ranks:
        reason = "asked for" if requested == "cpu" else f"{gpus} GPUs for {local_ranks} local ranks"
        return torch.device("cpu"), f"device: CPU with gloo ({reason}); a stand-in answers Megatron's CUDA calls"
    return torch.device("cuda", local_rank), None


def initialize(parallel: ParallelConfig, *, seed: int, deterministic: bool = False) -> Ranks:
    """Start torch.distributed and Megatron's groups; a plain ``python`` start is a world of one.

    Raises:
        ConfigError: the device or the layout cannot be had.
    """
    device, line = choose_device(parallel.device)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT="0")
    if device.type == "cpu":
        from megatron_groupdpo.mcore import host_device

        host_device.activate()
    else:
        torch.cuda.set_device(device)
    # Megatron's overlap of communication and computation relies on one hardware queue per context. On the CPU nothing
    # does, but Megatron asks for it there as well.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not dist.is_initialized():
        dist.init_process_group(
            backend="gloo" if device.type == "cpu" else "nccl",
            timeout=timedelta(minutes=parallel.distributed_timeout_minutes),
        )
    if line and dist.get_rank() == 0:
        print(line, flush=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        torch.use_deterministic_algorithms(True)
    _initialize_megatron(parallel)
    set_seeds(seed)
    return current_ranks(device)


def _initialize_megatron(parallel: ParallelConfig) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )


def set_seeds(seed: int) -> None:
    """Seed every generator, with Megatron's per-rank offsets for tensor-parallel regions."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def current_ranks(device: torch.device) -> Ranks:
    """The mesh as Megatron's parallel state has it now."""
    from megatron.core import parallel_state

    state: Any = parallel_state  # its getters are annotated with what they return before initialisation
    return Ranks(
        device=device,
        tp_group=state.get_tensor_model_parallel_group(),
        pp_group=state.get_pipeline_model_parallel_group(),
        dp_group=state.get_data_parallel_group(),
        cp_group=state.get_context_parallel_group(),
        dp_cp_group=state.get_data_parallel_group(with_context_parallel=True),
        expert_dp_group=state.get_expert_data_parallel_group(),
    )


def shut_down() -> None:
    """Undo :func:`initialize`, so that a process can start another layout.

    A gloo group keeps its threads and its connections until the last reference to it has gone, destroyed or not: what
    Megatron remembers of groups is forgotten here, and models that hold them are the caller's to drop.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as megatron_random

    if "transformer_engine" in sys.modules:
        from megatron_groupdpo.mcore.fp8.state import forget_models

        forget_models()
    parallel_state.destroy_model_parallel()
    _forget_groups()
    megatron_random._CUDA_RNG_STATE_TRACKER = None
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    if dist.is_initialized():
        dist.destroy_process_group()


def _forget_groups() -> None:
    """Drop the groups that Megatron still holds after it has destroyed its parallel state."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    # The last 32 calls of each are kept, with the module that was called and its context-parallel group.
    for rotary in (RotaryEmbedding, YarnRotaryEmbedding):
        rotary.forward.cache_clear()
