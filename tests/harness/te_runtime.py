"""Transformer Engine's own Python on a CPU: modules, autocast and scaling state are the real ones, kernels stand in.

Its pure-Python package (``transformer_engine`` from the registry, no compiled part) is enough: what it imports from its
compiled one comes from ``te_kernels.py``. Megatron looks for Transformer Engine when it is imported, so :func:`start`
comes before, in a process that does nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

HOPPER, BLACKWELL = 9, 10
FOLDER = Path(sys.prefix) / "transformer_engine_python"
"""Where ``make setup`` puts the package: off the path, since Megatron-Core does not import beside half of it."""


def problem() -> str | None:
    """Why it cannot be run here, or None."""
    if _package() is None:
        return f"Transformer Engine's Python is neither installed nor in {FOLDER}; run make setup"
    return None


def version() -> str:
    """Of the package."""
    folder = _package()
    assert folder is not None, problem()
    return _version(folder)


def call(module: str, function: str, *args: Any, **kwargs: Any) -> Any:
    """A function of a module of this folder, after :func:`start`; what the ranks of a pool are given."""
    start(HOPPER)
    return getattr(importlib.import_module(module), function)(*args, **kwargs)


def call_on_blackwell(module: str, function: str, *args: Any, **kwargs: Any) -> Any:
    """The same, in a process that pretends the generation which has mxfp8."""
    start(BLACKWELL)
    return getattr(importlib.import_module(module), function)(*args, **kwargs)


def become_ancestor(generation: int) -> None:
    """Import what the ranks need, in the process that they are forked from."""
    start(generation)
    for module in ("te_case", "te_weights"):
        importlib.import_module(module)
    gc.freeze()


@functools.cache
def start(generation: int) -> None:
    """Make ``transformer_engine.pytorch`` importable and willing, for the rest of the process.

    Args:
        generation: compute capability of the device that is pretended, before the point.
    """
    assert "megatron" not in sys.modules, "Megatron has looked for Transformer Engine already"
    import torch

    folder = _package()
    assert folder is not None, problem()
    sys.path.append(str(FOLDER))  # for what else it imports
    sys.modules["transformer_engine_torch"] = _compiled_part()
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = _stub("transformer_engine.pytorch.onnx_extensions")
    # The package's own __init__ would load its compiled libraries, where there are any.
    package = ModuleType("transformer_engine")
    package.__path__ = [str(folder)]
    package.__spec__ = importlib.util.spec_from_loader("transformer_engine", None, is_package=True)
    package.__version__ = _version(folder)  # type: ignore[attr-defined]
    sys.modules["transformer_engine"] = package
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    common = importlib.import_module("transformer_engine.common")
    del os.environ["NVTE_PROJECT_BUILDING"]
    common.load_framework_extension = lambda _framework: None
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"  # its softmax in PyTorch
    package.pytorch = importlib.import_module("transformer_engine.pytorch")  # type: ignore[attr-defined]
    _pretend_a_device(torch, generation)


def _package() -> Path | None:
    spec = importlib.util.find_spec("transformer_engine")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    found = FOLDER / "transformer_engine"
    return found if found.is_dir() else None


def _version(package: Path) -> str:
    (metadata,) = package.parent.glob("transformer_engine-*.dist-info")
    return metadata.name.removeprefix("transformer_engine-").removesuffix(".dist-info")


class _Missing:
    """What has no stand-in: it may be named, and its members too, but not called."""

    def __init__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        self._name = name

    def __getattr__(self, member: str) -> _Missing:
        return _Missing(f"{self._name}.{member}" if not member.startswith("__") else member)

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"Transformer Engine's {self._name} has no stand-in in te_kernels.py")


def _stub(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__getattr__ = _Missing  # type: ignore[method-assign]
    return module


def _compiled_part() -> ModuleType:
    import te_kernels

    module = _stub("transformer_engine_torch")
    module.__dict__.update({name: value for name, value in vars(te_kernels).items() if not name.startswith("_")})
    return module


class _WaitedOnce:
    """A request that may be waited for again, as NCCL's may; gloo would wait for another message."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def wait(self) -> None:
        if self._request is not None:
            self._request.wait()
        self._request = None


def _pretend_a_device(torch: Any, generation: int) -> None:
    """Answers for what the package asks of CUDA before it calls a kernel."""
    from transformer_engine.pytorch import distributed  # pyright: ignore[reportMissingImports]
    from transformer_engine.pytorch.cpp_extensions import gemm  # pyright: ignore[reportMissingImports]
    from transformer_engine.pytorch.module import base  # pyright: ignore[reportMissingImports]

    class But:
        """A module, but for some names."""

        def __init__(self, module: Any, **names: Any) -> None:
            self.__dict__.update(names, _module=module)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._module, name)

    @contextlib.contextmanager
    def one_by_one(*_: Any, **__: Any) -> Iterator[Any]:  # gloo has no calls of several collectives
        yield SimpleNamespace(wait=lambda: None)

    ring = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.context_parallel")
    communicate = ring.flash_attn_p2p_communicate
    ring.flash_attn_p2p_communicate = lambda *args: [_WaitedOnce(request) for request in communicate(*args)]
    distributed.torch = But(torch, distributed=But(torch.distributed, _coalescing_manager=one_by_one))
    base.torch = But(torch, cuda=But(torch.cuda, is_available=lambda: True))
    device = SimpleNamespace(major=generation, minor=0, multi_processor_count=132, total_memory=1 << 37)
    torch.cuda.get_device_properties = lambda *_: device
    torch.cuda.get_device_capability = lambda *_: (device.major, device.minor)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.is_cuda = property(lambda _tensor: True)
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    workspace = functools.cache(lambda: torch.empty(1, dtype=torch.uint8))
    gemm.get_cublas_workspace = lambda _device, _ub, grouped: [workspace()] if grouped else workspace()
