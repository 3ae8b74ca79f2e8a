"""CUDA graphs on a machine without a GPU: what a layer computed is recorded and repeated, operation by operation.

As ``torch.cuda.make_graphed_callables`` does, :class:`StandIn` runs a layer's Python three times to warm up, and then
once for the forward and once for the backward that are captured. A replay repeats the recorded operations, collectives
included, on the same tensors: no Python of the model runs, whatever was not a tensor stays what it was, and results lie
where they lay. Stricter than the original:

- inputs of other shapes, dtypes or devices, a second microbatch between a forward and its backward, layers out of
  their order, a weight that was moved, and reading a number or the random state during a capture are errors;
- before a microbatch's first layer runs, everything that earlier replays left in the pool becomes NaN, outputs and
  gradients too: whoever reads them afterwards has NaN, or the new microbatch's numbers where its shape is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WARM_UPS = 3
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")


class Tape(TorchDispatchMode):
    """Records operations while it is entered; :meth:`replay` repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[tuple[Any, Any, Any, list[Any]]] = []
        self._collected: set[int] = set()
        self.made: list[Tensor] = []
        """What was allocated: a graph's own memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _READS:
            raise AssertionError(f"{func} makes the host wait, in a capture")
        results = func(*args, **kwargs)
        known = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if func is torch.ops.aten.copy_.default and _place(args[0]) in self._collected:
            return results  # how gloo hands over a result when it is waited for; the repeated call does so itself
        if func.namespace == "c10d":
            self._collected |= known
        kept = [_alias(leaf) for leaf in tree_leaves(results)]
        for leaf in kept:
            if isinstance(leaf, Tensor) and _place(leaf) not in known:
                self.made.append(leaf)
        writes = func._schema.is_mutable or func.namespace == "c10d"
        views = all(_place(leaf) in known for leaf in kept if isinstance(leaf, Tensor))
        if writes or not views:
            args, kwargs = tree_map(_alias, (args, kwargs))
            self._lines.append((func, args, kwargs, [] if writes else kept))
        return results

    def poison(self) -> None:
        for tensor in self.made:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, kept in self._lines:
                found = tree_leaves(func(*args, **kwargs))
                for old, new in zip(kept, found):
                    if isinstance(old, Tensor):
                        old.copy_(new)
                for leaf in found:
                    if hasattr(leaf, "wait") and not isinstance(leaf, Tensor):
                        leaf.wait()


def _alias(leaf: Any) -> Any:
    """The same memory, without a graph or a count of changes: a replay writes behind autograd's back."""
    return leaf.data if isinstance(leaf, Tensor) else leaf


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass
class Pool:
    """What all captures of one policy share."""

    tapes: list[Tape] = field(default_factory=list)
    open: list[tuple[int, int]] = field(default_factory=list)
    """(set, layer) of forward replays whose backward is to come."""
    last: tuple[int, int] | None = None
    replays: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})

    def forward(self, set_: int, layer: int, *, differentiable: bool) -> None:
        if layer == 0:
            if self.open:
                raise AssertionError(f"a microbatch begins before the backward of {self.open}")
            for tape in self.tapes:
                tape.poison()
        elif self.last != (set_, layer - 1):
            raise AssertionError(f"layer {layer} of set {set_} runs after {self.last}")
        if differentiable:
            self.open.append((set_, layer))
        self.last = (set_, layer)
        self.replays["forward"] += 1

    def backward(self, set_: int, layer: int) -> None:
        if not self.open or self.open.pop() != (set_, layer):
            raise AssertionError(f"backward of layer {layer} of set {set_}, which is not the last that ran")
        self.replays["backward"] += 1


class StandIn:
    """A :class:`megatron_groupdpo.mcore.passes.cuda_graphs.Capture`."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.num_sets = 0

    def __call__(
        self, layers: tuple[torch.nn.Module, ...], sample_args: tuple[tuple[Tensor, ...], ...], /
    ) -> tuple[Callable[..., Tensor], ...]:
        set_, self.num_sets = self.num_sets, self.num_sets + 1
        for layer, args in zip(layers, sample_args, strict=True):
            _refuse(layer, args)
            inputs = [args[0], *layer.parameters()]
            for _ in range(WARM_UPS):
                output = layer(*args)
                torch.autograd.grad(output, inputs, torch.empty_like(output))
        if self.pool.open:
            raise AssertionError("a capture between a forward and its backward")
        graphs = [
            _Graph(self.pool, (set_, index), layer, args)
            for index, (layer, args) in enumerate(zip(layers, sample_args, strict=True))
        ]
        for graph in graphs:
            graph.capture_forward()
        for graph in reversed(graphs):
            graph.capture_backward()
        return tuple(graph.callable() for graph in graphs)


def _refuse(layer: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
    """As the original does."""
    assert torch.is_grad_enabled()
    assert all(isinstance(arg, Tensor) for arg in args)
    assert not any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks))
    assert not any(buffer.requires_grad for buffer in layer.buffers())


class _Graph:
    """A layer's two graphs at one shape."""

    def __init__(self, pool: Pool, name: tuple[int, int], layer: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        self.pool, self.name, self.layer, self.args = pool, name, layer, args
        self.weights = list(layer.parameters())
        self.addresses = [weight.data_ptr() for weight in self.weights]

    def capture_forward(self) -> None:
        self.forward_tape = Tape()
        with _capturing(), self.forward_tape:
            self.output = self.layer(*self.args)
        assert isinstance(self.output, Tensor), "a graph's outputs are tensors"
        self.static_output = self.output.data

    def capture_backward(self) -> None:
        self.grad_output = torch.empty_like(self.static_output)
        self.backward_tape = Tape()
        with _capturing(), self.backward_tape:
            found = torch.autograd.grad(self.output, [self.args[0], *self.weights], self.grad_output)
        self.grads = [grad.data for grad in found]
        del self.output
        self.pool.tapes += [self.forward_tape, self.backward_tape]

    def callable(self) -> Callable[..., Tensor]:
        graph = self

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, differentiable: bool, *inputs: Tensor) -> Tensor:
                graph.replay_forward(inputs[: len(graph.args)], differentiable=differentiable)
                return graph.static_output.detach()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
                graph.pool.backward(*graph.name)
                graph.grad_output.copy_(grad)
                graph.backward_tape.replay()
                hidden, *weights = (grad.detach() for grad in graph.grads)
                return None, hidden, *(None for _ in graph.args[1:]), *weights

        def replay(*args: Tensor) -> Tensor:
            return Graphed.apply(torch.is_grad_enabled(), *args, *graph.weights)  # type: ignore[no-any-return]

        return replay

    def replay_forward(self, args: tuple[Tensor, ...], *, differentiable: bool) -> None:
        assert [weight.data_ptr() for weight in self.weights] == self.addresses, "a weight was moved"
        for arg, sample in zip(args, self.args, strict=True):
            assert (arg.shape, arg.dtype, arg.device) == (sample.shape, sample.dtype, sample.device)
        self.pool.forward(*self.name, differentiable=differentiable)
        for arg, sample in zip(args, self.args, strict=True):
            if arg.data_ptr() != sample.data_ptr():
                sample.data.copy_(arg)
        self.forward_tape.replay()


@contextmanager
def _capturing() -> Iterator[None]:
    """What no capture allows: reading the random state."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the random state is read or written in a capture")

    with mock.patch.multiple(megatron_random, _get_cuda_rng_state=refuse, _set_cuda_rng_state=refuse):
        yield


@contextmanager
def graphs_on_a_cpu(capture: Callable[[], Any] = StandIn) -> Iterator[None]:
    """Policies that ask for CUDA graphs have them, with this in place of PyTorch's."""
    from megatron_groupdpo.mcore import policy
    from megatron_groupdpo.mcore.passes import cuda_graphs

    with mock.patch.object(cuda_graphs, "make_capture", capture), mock.patch.object(policy, "check_kernels"):
        yield
