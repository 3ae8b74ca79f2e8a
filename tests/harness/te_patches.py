"""What a run of Transformer Engine's layers on the CPU needs beside kernels (te_runtime.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from two_pass_case import ATTENTION_VARIABLES

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.mcore import host_device
from megatron_groupdpo.mcore.model import implementation as kernels

UNFUSED = {"attention_backend": "unfused"}
"""Its attention that is written in PyTorch."""


@contextmanager
def layers_allowed_on_a_cpu() -> Iterator[None]:
    """Only the device speaks against them."""
    plain = kernels._why_local
    for name in ATTENTION_VARIABLES:  # of the model before
        os.environ.pop(name, None)

    def why_local(model: ModelConfig, device: Any, *rest: Any) -> str | None:
        return plain(model, torch.device("cuda"), *rest)

    kernels._why_local = why_local
    try:
        yield
    finally:
        kernels._why_local = plain


@contextmanager
def gathered_bucket_by_bucket() -> Iterator[None]:
    """Weights of several number formats: NCCL gathers them in one call, gloo would take all for the first one's."""
    from megatron.core.distributed import param_and_grad_buffer as file

    group = file._ParamAndGradBucketGroup
    plain_sync, plain_gather, plain_manager = (
        group.start_param_sync,
        file.dist_all_gather_func,
        file._coalescing_manager,
    )

    @contextmanager
    def each_by_itself(_group: Any, async_ops: bool = False) -> Iterator[Any]:
        works: list[Any] = []
        file.dist_all_gather_func = lambda *a, async_op, **k: works.append(plain_gather(*a, async_op=True, **k))
        manager = SimpleNamespace(wait=lambda: [work.wait() for work in works])
        try:
            yield manager
        finally:
            file.dist_all_gather_func = plain_gather
        if not async_ops:
            manager.wait()

    def sync(self: Any, force_sync: bool = False) -> None:
        file._coalescing_manager = each_by_itself
        try:
            plain_sync(self, force_sync)
        finally:
            file._coalescing_manager = plain_manager

    group.start_param_sync = sync  # type: ignore[method-assign]
    try:
        yield
    finally:
        group.start_param_sync = plain_sync  # type: ignore[method-assign]


@contextmanager
def its_optimizer() -> Iterator[None]:
    """Its Adam in place of torch's, which a run on the CPU takes."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from transformer_engine.pytorch.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    host_device.activate()
    kept = [(file, dict(vars(file))) for file in (optimizer, distrib_optimizer)]
    vars(optimizer).update(Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False)
    vars(distrib_optimizer).update(Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True)
    try:
        yield
    finally:
        for file, names in kept:
            vars(file).update(names)
