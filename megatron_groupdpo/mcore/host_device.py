"""Stand-in for the CUDA device, so that real Megatron-Core runs on a CPU with gloo.

Megatron-Core 0.19 asks for ``torch.cuda`` in places that have nothing to do with computing (the current device,
streams, RNG state) and names ``device="cuda"`` in factory calls. :func:`activate` answers those from the host. It is
called once, before Megatron builds anything, and only when the run's device is the CPU; on a CUDA run nothing of
this module is active.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import torch.utils._device

_CPU = torch.device("cpu")
_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
]
_active = False


class _HostStream:
    """A stream on a machine that has one queue: every wait is already over."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return self if event is None else event  # all that is done with it is to wait for it


def _is_cuda(device: Any) -> bool:
    # A bare int names a CUDA device in torch's factories.
    return (
        (isinstance(device, int) and not isinstance(device, bool))
        or (isinstance(device, str) and device.startswith("cuda"))
        or (isinstance(device, torch.device) and device.type == "cuda")
    )


def _on_host(factory: Any) -> Any:
    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)  # asked for on its way to a GPU; torch refuses it where there is none
        return factory(*args, **kwargs)

    return build


def activate() -> None:
    """Put the stand-in in force for the rest of the process. Calling it again does nothing."""
    global _active
    if _active:
        return
    _active = True
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *_args, **_kwargs: None
    cuda.empty_cache = lambda: None
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    cuda.Stream = _HostStream
    cuda.current_stream = lambda *_args, **_kwargs: _HostStream()
    cuda.default_stream = lambda *_args, **_kwargs: _HostStream()
    cuda.stream = lambda _stream: contextlib.nullcontext()
    # ``with torch.device(...)`` collects the factories it answers for at its first use, and must see the plain ones:
    # otherwise it does nothing from here on, and transformers, which loads models under it, computes other positions.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_host(getattr(torch, name)))
    _patch_tensor_methods()
    _patch_rng_tracker()
    _patch_mixtures()
    _patch_uneven_collectives()
    _patch_fused_optimizers()
    # Megatron decorates its pointwise kernels with torch.compile, which on a host would call a C++ compiler.
    torch.compiler.set_stance("force_eager")


def _patch_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    plain_type, plain_to = tensor.type, tensor.to

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers sort parameters by the string "torch.cuda.FloatTensor".
        answer = plain_type(self, *args, **kwargs)
        if isinstance(answer, str) and self.device.type == "cpu" and "cuda" not in answer:  # a subclass answers twice
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(_CPU if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return plain_to(self, *args, **kwargs)

    tensor.type = type_as_on_cuda
    tensor.to = to
    tensor.cuda = lambda self, *_args, **_kwargs: self
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]


def _patch_rng_tracker() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _patch_mixtures() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron's leaves a tensor that is on the host as it is, and the all-to-all takes no tensors as sizes.
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host
    moe_utils.te_general_gemm = None  # Transformer Engine's product, which the router takes where it is installed


def _patch_uneven_collectives() -> None:
    """Parts of several lengths, as tokens come to experts cut over tensor-parallel ranks; gloo takes equal ones."""
    from megatron.core.tensor_parallel import mappings

    gather_even, scatter_even = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(part: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather_even(part, group, None, use_global_buffer)
        whole = part.new_empty((sum(output_split_sizes), *part.shape[1:]))
        copies = part.repeat(group.size(), *[1] * (part.dim() - 1))
        torch.distributed.all_to_all_single(whole, copies, output_split_sizes, [len(part)] * group.size(), group=group)
        return whole

    def reduce_scatter(whole: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter_even(whole, group, None, use_global_buffer)
        own = input_split_sizes[group.rank()]
        parts = whole.new_empty((group.size() * own, *whole.shape[1:]))
        sizes = [own] * group.size()
        torch.distributed.all_to_all_single(parts, whole.contiguous(), sizes, input_split_sizes, group=group)
        return parts.unflatten(0, (group.size(), own)).sum(0)

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = reduce_scatter


def _patch_fused_optimizers() -> None:
    """torch's optimizers and Megatron's own clipping, also where Transformer Engine or Apex brought CUDA kernels."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as optimizer_file

    optimizer.__dict__.update(Adam=torch.optim.AdamW, SGD=torch.optim.SGD, USING_PYTORCH_OPTIMIZER=True)
    distrib_optimizer.__dict__.update(
        Adam=torch.optim.Adam, HAVE_APEX_OR_TE=False, USING_TE_OPTIMIZER=False, USING_APEX_OPTIMIZER=False
    )
    apply, scale = utils.local_multi_tensor_applier, utils.local_multi_tensor_scale
    optimizer_file.__dict__.update(multi_tensor_applier=apply, multi_tensor_scale_impl=scale)
    clip_grads.__dict__.update(
        multi_tensor_applier=apply,
        multi_tensor_scale_impl=scale,
        l2_norm_impl=utils.local_multi_tensor_l2_norm,
        multi_tensor_scale_tensor_impl=None,
    )
