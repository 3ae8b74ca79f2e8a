"""CUDA graphs of single transformer layers, one set for each shape of a microbatch.

A step runs every microbatch twice, forward alone and then forward and backward. Where kernels are short, the host's
launches are what takes time. Here each layer's kernels are captured once for a shape, its forward as one graph and its
backward as another, by ``torch.cuda.make_graphed_callables``. Both passes replay the same forward graph, with autograd
on or off, so a response is scored by what its backward differentiates.

What a graph needs, and why it holds here:

Memory. A graph has fixed addresses, so a layer has room for the activations of one microbatch, and all shapes share one
pool, where a replay overwrites what another left. Without a pipeline Megatron's schedule runs a microbatch's forward
and backward before the next forward, and a scoring pass keeps sums of log-probabilities, which are computed outside the
graphs into memory of their own. What reads a layer's output later, the final norm's backward, is of the same
microbatch. What must outlive other replays (inputs, outputs, gradients) torch keeps referenced, so that the pool never
hands it to another graph.

Weights. They are read where they lay at the capture. The optimizers, the distributed one's all-gather, checkpoints and
the swapped reference all write in place; :meth:`LayerGraphs.check_addresses` holds them to it before every pass.

Gradients. Those of weights leave a replayed backward as autograd's outputs, and Megatron's hooks, which add them to its
buffers and start reductions, are on the nodes after that. Captures run backwards through ``torch.autograd.grad``, which
does not run those nodes, but does make their stream wait: so they are made in another one than the default
(``model/build.py``, ``wrap_for_training``).

Python. None runs in a replayed layer: no hooks of modules, no reads of the device, no copies from the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_groupdpo.config import PrecisionConfig
from megatron_groupdpo.mcore.setup import Ranks
from megatron_groupdpo.mcore.weights import unwrapped


class Capture(Protocol):
    """What makes callables that replay out of a model's layers, at one shape."""

    def __call__(
        self, layers: tuple[torch.nn.Module, ...], sample_args: tuple[tuple[Tensor, ...], ...], /
    ) -> tuple[Callable[..., Tensor], ...]:
        """The layers in the order in which they run, each with tensors of the shape, which become its inputs."""
        ...


class TorchCapture:
    """PyTorch's, with one pool for all that it is called for."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, layers: tuple[torch.nn.Module, ...], sample_args: tuple[tuple[Tensor, ...], ...], /
    ) -> tuple[Callable[..., Tensor], ...]:
        """See :class:`Capture`; memory errors of CUDA, where there is no room for one more shape."""
        return torch.cuda.make_graphed_callables(layers, sample_args, pool=self._pool)  # type: ignore[return-value]


make_capture: Callable[[], Capture] = TorchCapture
"""Replaced in tests on machines without a GPU."""


def layer_graphs(chunks: list[Any], precision: PrecisionConfig, ranks: Ranks) -> LayerGraphs | None:
    """Graphs of a policy's layers where ``precision`` asks for them; to be called once its weights lie where they stay.

    A policy that is never trained has forward passes alone, and is left as it is.
    """
    if not precision.cuda_graphs:
        return None
    assert len(chunks) == 1, "a pipeline is refused before"
    return LayerGraphs(chunks[0], make_capture(), max_shapes=precision.cuda_graph_shapes, says_so=ranks.is_logger)


class _PositionalLayer(torch.nn.Module):
    """A layer as a function of tensors by position. One for each capture, which replaces its ``forward``."""

    def __init__(self, layer: torch.nn.Module, forward: Callable[..., tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.layer = layer  # its parameters are inputs of the graphs
        self._forward = forward

    def forward(self, hidden_SBH: Tensor, *rotary: Tensor) -> Tensor:
        output_SBH, context = self._forward(
            hidden_states=hidden_SBH, attention_mask=None, rotary_pos_emb=rotary[0] if rotary else None
        )
        assert context is None, "no cross-attention in these models"
        return output_SBH


class LayerGraphs:
    """Stands in the place of the layers' ``forward``; captures where a shape is new, replays where it is known."""

    def __init__(self, chunk: Any, capture: Capture, *, max_shapes: int, says_so: bool = False) -> None:
        """
        Args:
            chunk: the model, wrapped or not; nothing but its layers' ``forward`` changes.
            capture: called once for each shape.
            max_shapes: how many are captured; microbatches of further ones run the layers themselves.
            says_so: print a line when there is a further one.
        """
        self._layers: list[Any] = list(unwrapped(chunk).decoder.layers)
        self._forwards = [layer.forward for layer in self._layers]
        self._capture = capture
        self._max_shapes = max_shapes
        self._says_so = says_so
        self._on = True
        self._sets: dict[tuple[torch.Size, ...], tuple[Callable[..., Tensor], ...] | None] = {}
        self._addresses: list[int] = []
        self._kept: list[Tensor] = []
        for index, layer in enumerate(self._layers):
            _without_random_state(layer)
            layer.forward = self._in_place_of(index)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """[S, B, H] of the hidden states that are captured."""
        return [tuple(shapes[0]) for shapes, graphs in self._sets.items() if graphs is not None]

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The layers themselves run, whatever was captured."""
        kept, self._on = self._on, False
        try:
            yield
        finally:
            self._on = kept

    def check_addresses(self) -> None:
        """Weights must lie where they were captured: a graph would go on reading the old place, and say nothing."""
        assert not self._addresses or self._addresses == self._weight_addresses(), (
            "a weight was moved after its layer was captured as a CUDA graph"
        )

    def _weight_addresses(self) -> list[int]:
        return [parameter.data_ptr() for layer in self._layers for parameter in layer.parameters()]

    def _in_place_of(self, index: int) -> Callable[..., tuple[Tensor, Any]]:
        plain = self._forwards[index]

        def forward(
            *, hidden_states: Tensor, rotary_pos_emb: Tensor | None = None, **others: Any
        ) -> tuple[Tensor, Any]:
            # Sampling feeds a cache that grows.
            if self._on and others.get("inference_context") is None:
                given = [name for name, value in others.items() if value is not None]
                assert not given, f"captured layers take hidden states and rotary angles alone, not {given}"
                args = (hidden_states,) if rotary_pos_emb is None else (hidden_states, rotary_pos_emb)
                graphs = self._graphs_of(args)
                if graphs is not None:
                    return graphs[index](*args), None
            return plain(hidden_states=hidden_states, rotary_pos_emb=rotary_pos_emb, **others)

        return forward

    def _graphs_of(self, args: tuple[Tensor, ...]) -> tuple[Callable[..., Tensor], ...] | None:
        """The set of these shapes, captured where it is new; none where there are enough sets."""
        shapes = tuple(arg.shape for arg in args)
        if shapes not in self._sets:
            beyond = len(self.shapes) >= self._max_shapes
            if beyond and self._says_so and None not in self._sets.values():
                length, rows, _ = args[0].shape
                print(
                    f"cuda_graphs: {self._max_shapes} shapes are captured, and a microbatch of {rows} rows has another "
                    f"length on this rank ({length}); it and further ones run without graphs. Raise "
                    "--cuda-graph-shapes, which costs memory, or --cuda-graph-length-multiple",
                    flush=True,
                )
            self._sets[shapes] = None if beyond else self._captured(args)
        return self._sets[shapes]

    def _captured(self, args: tuple[Tensor, ...]) -> tuple[Callable[..., Tensor], ...]:
        hidden, *rotary = args
        layers = []
        for layer, forward in zip(self._layers, self._forwards):
            # Torch looks at the module that it is given, which is ours; a hook further down would run at the capture
            # and never again.
            hooked = [
                type(module).__name__
                for module in layer.modules()
                if module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ]
            assert not hooked, f"hooks in a captured layer would not run: {hooked}"
            layers.append(_PositionalLayer(layer, forward))
        # A norm's backward reads its input, so each layer has one of its own. The angles are a table that is kept for
        # the length: all layers read it where it is, without a copy.
        inputs = [torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) for _ in layers]
        samples = tuple((each.requires_grad_(), *rotary) for each in inputs)
        with torch.enable_grad():  # the scoring pass meets a shape first
            graphs = self._capture(tuple(layers), samples)
        # Megatron gathers a sequence-parallel rank's input into a buffer that it replaces by a larger one when asked:
        # the graphs keep the one they know.
        self._kept += parallel_state.get_global_memory_buffer().buffer.values()
        self._addresses = self._weight_addresses()
        return graphs


def _without_random_state(layer: torch.nn.Module) -> None:
    """Transformer Engine's attention forks Megatron's random state around its dropout, which is 0 here; forking reads
    the state, which no capture allows."""
    for module in layer.modules():
        if hasattr(module, "attention_dropout_ctx"):
            module.attention_dropout_ctx = contextlib.nullcontext  # type: ignore[assignment]
