"""Watches for operations that make the host wait for the GPU, on a machine that has none.

Tensors that would be on the GPU are followed: the weights, what is moved there by ``to_device``, and whatever is
computed from those. Reading a number of one of them, or an operation whose result's size depends on their contents, is
a wait. Tensors that stay on the host, such as the bounds of packed responses, may be read freely.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
_KERNELS = ("te_kernels.py", "te_attention.py", "te_blocks.py")
"""What stands in for them may read what a kernel has on the device."""
_SIZED_BY_CONTENTS = (
    "nonzero",
    "masked_select",
    "_local_scalar_dense",
    "_unique2",
    "unique_dim",
    "equal",
    "is_nonzero",
)


class SyncWatch(TorchDispatchMode):
    """A context in which :attr:`found` collects the waits, each with the lines of the package that made it."""

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        super().__init__()
        self.found: list[str] = []
        self._device: dict[int, StorageWeakRef] = {}
        self._patches = ExitStack()
        for tensor in on_device:
            self.follow(tensor)

    def follow(self, tensor: Tensor) -> Tensor:
        """From here on the tensor counts as on the GPU."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._device[reference.cdata] = reference
        return tensor

    def follows(self, tensor: Tensor) -> bool:
        reference = self._device.get(StorageWeakRef(tensor.untyped_storage()).cdata)
        return reference is not None and not reference.expired()

    def __enter__(self) -> SyncWatch:
        from megatron_groupdpo.mcore.passes import engine
        from megatron_groupdpo.step import coefficients, coupled, train_step

        for name in _READS:
            self._patches.enter_context(mock.patch.object(Tensor, name, self._read(name, getattr(Tensor, name))))
        for module in (engine, coefficients, coupled, train_step):
            real = module.to_device
            moved = lambda tensor, device, real=real: self.follow(real(tensor, device).clone())  # noqa: E731
            self._patches.enter_context(mock.patch.object(module, "to_device", moved))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(self.follows(tensor) for tensor in inputs)
        name = func.overloadpacket.__name__
        if on_device and (name in _SIZED_BY_CONTENTS or (name.startswith("index") and _by_mask(args))):
            self._note(name)
        result = func(*args, **kwargs)
        if on_device:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.follow(leaf)
        return result

    def _read(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.follows(tensor):
                self._note(name)
            return real(tensor, *args, **kwargs)

        return read

    def _note(self, what: str) -> None:
        stack = traceback.extract_stack()
        if any(Path(frame.filename).name in _KERNELS for frame in stack):
            return
        ours = [frame for frame in stack if "megatron" in frame.filename or "transformer_engine" in frame.filename]
        self.found.append(f"{what}: " + " < ".join(f"{f.filename}:{f.lineno}" for f in reversed(ours[-3:])))


def _by_mask(args: Any) -> bool:
    """An index that is a mask has as many elements as it has True: they must be counted first.

    Not for writing one number: PyTorch then fills by the mask itself, as Megatron's embedding relies on.
    """
    if len(args) > 2 and isinstance(args[2], Tensor) and args[2].numel() == 1:
        return False
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
