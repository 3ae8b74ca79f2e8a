"""Weights that are kept in FP8 (``--fp8-param-gather``): whoever reads or fills them sees them whole, in bf16.

Transformer Engine's linear layers then have no bf16 weights. What they are quantized from is left in the distributed
optimizer's float32 copies, each data-parallel rank with its part, and after an update the optimizer quantizes by
Transformer Engine's ``cast_master_weights_to_fp8``. That rounds to bf16 first, so the FP8 weights are those of a run
that keeps bf16 ones. Digests, checkpoints and exports of the rounded weights would be of another model, and float32
copies taken from them would lack what FP8 rounds away. So :func:`full_weights` puts bf16 parameters in their place
while they are read or filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_first_last_bf16_layer, is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_groupdpo.mcore.weights import finish_param_gather, optimizer_parts, unwrapped


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a module has a weight."""

    module: torch.nn.Module
    name: str
    quantized: Any
    """Transformer Engine's tensor, which gradient hooks and the optimizer know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Masters:
    """The optimizer's float32 copy of a weight: this rank's part, if it has one."""

    group: dist.ProcessGroup
    part: Tensor | None
    start: int


class _Fp8Weights:
    """The FP8 weights of one model chunk."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        self.places = [
            _Place(module=module, name=name, quantized=parameter)
            for module in chunk.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if is_float8tensor(parameter)
        ]
        self._masters: dict[Any, _Masters] | None = None

    def attach(self, optimizer: MegatronOptimizer) -> None:
        own, found = {place.quantized for place in self.places}, {}
        for part in optimizer_parts(optimizer):
            group = part.data_parallel_group
            for buffer in part.buffers:
                found |= {p: _Masters(group=group, part=None, start=0) for p in buffer.params if p in own}
            for models, mains in zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True):
                for parameter, main in zip(models, mains, strict=True):
                    if parameter in own:
                        start = part._get_model_param_range_map(parameter)["param"].start
                        found[parameter] = _Masters(group=group, part=main, start=start)
        assert found.keys() == own, "the distributed optimizer has every weight"
        self._masters = found

    def full(self, place: _Place) -> Tensor:
        """The weight as a bf16 model has it; a collective call once there is an optimizer."""
        weight = place.quantized
        if self._masters is None:
            return weight.get_high_precision_init_val().to(weight.device, copy=True)
        masters = self._masters[weight]
        whole = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        if masters.part is not None:
            _window(whole, masters).copy_(masters.part)
        # Bytes, each of which one rank has: sums of numbers would turn -0 into 0.
        dist.all_reduce(whole.view(torch.uint8), group=masters.group)
        return whole

    def empty(self, place: _Place) -> Tensor:
        return torch.empty(place.quantized.shape, dtype=place.quantized.dtype, device=place.quantized.device)

    def fill(self, place: _Place, value: Tensor) -> None:
        """Take ``value`` for the weight: what it is quantized from, and quantized."""
        if self._masters is None:
            place.quantized._high_precision_init_val = value.detach().cpu()
        elif (masters := self._masters[place.quantized]).part is not None:
            masters.part.copy_(_window(value, masters))
        self.quantize(place, value)

    def quantize(self, place: _Place, value: Tensor) -> None:
        module: Any = place.module
        quantizer = module.quantizers["scaling_fwd"][module.param_init_meta[place.name].fp8_meta_index]
        amax = getattr(quantizer, "amax", None)
        if amax is not None:
            if amax is not place.quantized._quantizer.amax:
                # The module has made its quantizers anew: a checkpoint has a history of another length.
                place.quantized._quantizer = quantizer.copy()
            # Delayed scaling notes the largest value that it quantizes: of this one, not of others before it.
            amax.zero_()
        *_, scales = raw_parts(place.quantized)
        scales.zero_()  # blockwise ones have padding that no kernel writes, and replicas are compared
        place.quantized.copy_(value)
        post_all_gather_processing([place.quantized])

    @contextmanager
    def masters_kept(self) -> Iterator[None]:
        assert self._masters is not None
        parts = [masters.part for masters in self._masters.values() if masters.part is not None]
        kept = [part.clone() for part in parts]
        yield
        for part, value in zip(parts, kept, strict=True):
            part.copy_(value)


def _window(whole: Tensor, masters: _Masters) -> Tensor:
    assert masters.part is not None
    return whole.view(-1)[masters.start : masters.start + masters.part.numel()]


def keep_in_fp8(chunks: Sequence[torch.nn.Module]) -> None:
    """Of chunks that Megatron has built with FP8 weights: from now on :func:`full_weights` knows them."""
    for chunk in chunks:
        chunk.fp8_weights = own = _Fp8Weights(chunk)  # type: ignore[assignment]
        decoder: Any = chunk.decoder
        in_fp8 = [
            layer for layer in decoder.layers if not is_first_last_bf16_layer(layer.config, layer.layer_number - 1)
        ]
        assert bool(own.places) == bool(in_fp8), "Transformer Engine's layers were to keep FP8 weights"


def attach_masters(chunks: Sequence[Any], optimizer: MegatronOptimizer) -> None:
    """From now on the optimizer's float32 copies are what the weights are quantized from."""
    for weights in _of(chunks):
        weights.attach(optimizer)


@contextmanager
@torch.no_grad()
def full_weights(chunks: Sequence[Any], *, read: bool = True, changed: bool = False) -> Iterator[None]:
    """The one door to live weights: whoever names, hashes, saves, exports or fills them does it in here.

    Gathers that are still under way (``--overlap-param-gather``) are waited for, and weights that are kept in FP8 are
    there as of a bf16 model, for 2 bytes a weight meanwhile. A collective call. No forward in here.

    Args:
        chunks: wrapped or not.
        read: off: all of them will be filled, or only their shapes matter; what they hold at the start is arbitrary.
        changed: take what the parameters hold at the end, also as the optimizer's float32 copies.
    """
    finish_param_gather(chunks)  # also before they are filled: what arrives later would replace it
    kept = [(weights, place) for weights in _of(chunks) for place in weights.places]
    if not kept:
        yield
        return
    values = [weights.full(place) if read else weights.empty(place) for weights, place in kept]
    shown = [torch.nn.Parameter(value, requires_grad=False) for value in values]
    for (_, place), parameter in zip(kept, shown, strict=True):
        place.module._parameters[place.name] = parameter
    try:
        yield
    finally:
        for _, place in kept:
            place.module._parameters[place.name] = place.quantized
    if changed:
        for (weights, place), parameter in zip(kept, shown, strict=True):
            weights.fill(place, parameter.data)


@torch.no_grad()
def quantize_anew(chunks: Sequence[Any]) -> None:
    """Quantize the weights by the scales of now, from the optimizer's copies; a collective call."""
    for weights in _of(chunks):
        for place in weights.places:
            weights.quantize(place, weights.full(place))


def reload_masters(chunks: Sequence[Any], optimizer: MegatronOptimizer) -> None:
    """The optimizer's float32 copies of all weights from the model's, but for those of FP8 weights.

    Those were taken when the weights were filled, and Megatron would take them from the rounded ones.
    """
    with torch.no_grad(), ExitStack() as kept:
        for weights in _of(chunks):
            kept.enter_context(weights.masters_kept())
        optimizer.reload_model_params()


def raw_parts(parameter: Tensor) -> list[Tensor]:
    """The tensors that a weight consists of: itself, or FP8 numbers and their scales."""
    if not is_float8tensor(parameter):
        return [parameter.data]
    blocks = hasattr(parameter, "_rowwise_data")
    names = ("_rowwise_data", "_rowwise_scale_inv") if blocks else ("_data", "_scale_inv")
    return [getattr(parameter, name) for name in names]


def renew_transposes(chunks: Sequence[Any]) -> None:
    """After :func:`raw_parts` were written to: what Transformer Engine derived from them is of the old ones."""
    for weights in _of(chunks):
        post_all_gather_processing([place.quantized for place in weights.places])


def _of(chunks: Sequence[Any]) -> list[_Fp8Weights]:
    found = [getattr(unwrapped(chunk), "fp8_weights", None) for chunk in chunks]
    return [weights for weights in found if weights is not None]
