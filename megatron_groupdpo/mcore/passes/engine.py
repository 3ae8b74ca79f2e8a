"""The two passes on Megatron-Core's pipeline schedules.

Scaling. Megatron's schedules and gradient buffers rescale by default: a 2-tuple from the loss function is
multiplied by the context-parallel size and divided by the number of microbatches, and gradients are averaged over
data-parallel ranks (megatron/core/pipeline_parallel/schedules.py, ``forward_step_calc_loss``). With
``calculate_per_token_loss`` and a 3-tuple none of that happens, and gradients are summed; the division by a token
count that Megatron would do at the end is skipped by :func:`_finalize_without_rescaling`. So what the step gets is the
plain sum over responses, and every 1/B is in the coefficients, where the formulas put it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_groupdpo.engine import MicrobatchLoss
from megatron_groupdpo.mcore.fp8.passes import TwoPassScaling
from megatron_groupdpo.mcore.model.rotary import positions
from megatron_groupdpo.mcore.passes.cuda_graphs import LayerGraphs
from megatron_groupdpo.mcore.passes.logprobs import selected_logprobs
from megatron_groupdpo.mcore.setup import Ranks
from megatron_groupdpo.mcore.weights import wait_for_parameter
from megatron_groupdpo.tensors import to_device
from megatron_groupdpo.types import Microbatch


def _finalize_without_rescaling(model: list[Any], _num_tokens: Any = None, **kwargs: Any) -> None:
    finalize_model_grads(model, None, **kwargs)


@contextlib.contextmanager
def _nothing_kept_to_recompute(config: TransformerConfig) -> Iterator[None]:
    """A pass that has no backward.

    Transformer Engine's checkpointing keeps the scales of each forward in a queue, with or without gradients, and its
    backward takes the oldest (``copy_forward_fp8_meta_tensors_for_recompute``): what a scoring pass left there would be
    what a later backward recomputes with.
    """
    kept, config.recompute_granularity = config.recompute_granularity, None
    try:
        yield
    finally:
        config.recompute_granularity = kept


class MegatronEngine:
    """Implements :class:`megatron_groupdpo.engine.Engine` on this rank's model chunks."""

    def __init__(
        self,
        chunks: Sequence[Any],
        config: TransformerConfig,
        ranks: Ranks,
        *,
        vocab_size: int,
        log_probs_chunk_size: int,
        fused_logprobs: bool = False,
        bounds_on_host: bool = True,
        scaling: TwoPassScaling | None = None,
        graphs: LayerGraphs | None = None,
    ) -> None:
        """``bounds_on_host``: the layers read the bounds of packed responses as numbers, as Megatron's own do;
        Transformer Engine's kernels take them from the device. ``scaling``: of a model with FP8 products. ``graphs``:
        of layers that are captured."""
        self.chunks = list(chunks)
        self.config = config
        self.ranks = ranks
        self.vocab_size = vocab_size
        self.log_probs_chunk_size = log_probs_chunk_size
        self.scaling = scaling
        self.graphs = graphs
        self.fused_logprobs = fused_logprobs
        self.bounds_on_host = bounds_on_host
        if isinstance(self.chunks[0], DistributedDataParallel):
            config.finalize_model_grads_func = _finalize_without_rescaling
            # The schedule holds back the gradient reduction until the last microbatch of each chunk.
            no_sync: Any = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def step(self) -> contextlib.AbstractContextManager[None]:
        """The passes in here belong to one optimizer step: with FP8, they set the scales of the next."""
        return contextlib.nullcontext() if self.scaling is None else self.scaling.step()

    def calibrate(self, passes: Callable[[], object]) -> int:
        """Run ``passes``, those of a step, as often as FP8's first scales need; how often. Buffers are left empty."""
        rounds = 0 if self.scaling is None else self.scaling.calibrate(passes)
        if rounds:
            self.zero_gradient()
        return rounds

    def score(self, microbatches: Sequence[Microbatch], num_responses: int) -> Tensor | None:
        """See :class:`Engine`. One pipelined forward-only schedule call over all microbatches."""
        with torch.no_grad():
            parts = self.run(microbatches, _collect, forward_only=True)
        return self.gather(parts, num_responses)

    def backward(
        self, microbatches: Sequence[Microbatch], num_responses: int, loss: MicrobatchLoss | None
    ) -> Tensor | None:
        """See :class:`Engine`. One forward-backward schedule call."""
        self.zero_gradient()
        parts = self.run(microbatches, _Differentiated(loss, cp_group=self.ranks.cp_group), forward_only=False)
        return self.gather(parts, num_responses)

    def zero_gradient(self) -> None:
        """Empty the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
            # The float32 optimizer hangs views of the buffers on param.grad; left there, autograd would add into them
            # and Megatron's hook would then count the gradient twice.
            chunk.zero_grad(set_to_none=True)

    def run(
        self, microbatches: Sequence[Microbatch], loss_of: Callable[..., Any], *, forward_only: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Drive Megatron's schedule; on the last stage, (responses_r, logps_r) per microbatch."""
        assert microbatches, "a schedule needs at least one microbatch"
        iterators: list[Iterator[Microbatch]] = [iter(microbatches) for _ in self.chunks]
        shape_BS = microbatches[0].tokens_BS.shape
        # Megatron takes the length before context and sequence parallelism divide it.
        seq_length = shape_BS[1] * self.ranks.cp_group.size()

        def forward_step(iterator: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
            microbatch = next(iterator)
            return self._forward(chunk, microbatch), lambda output, **kw: loss_of(microbatch, output, **kw)

        if self.graphs is not None:
            self.graphs.check_addresses()
        with contextlib.ExitStack() as around:
            if self.scaling is not None:
                around.enter_context(self.scaling.one_pass())
            if forward_only:
                around.enter_context(_nothing_kept_to_recompute(self.config))
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(microbatches),
                seq_length=seq_length,
                micro_batch_size=shape_BS[0],
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _forward(self, chunk: torch.nn.Module, microbatch: Microbatch) -> Tensor:
        device = self.ranks.device
        packed = None
        if microbatch.cu_seqlens is not None:
            bounds = microbatch.cu_seqlens if self.bounds_on_host else to_device(microbatch.cu_seqlens, device)
            longest = int((microbatch.cu_seqlens[1:] - microbatch.cu_seqlens[:-1]).max())
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=bounds,
                cu_seqlens_kv=bounds,
                # The same bounds: padding belongs to the sequence before it, where causality hides it. Transformer
                # Engine's context parallelism asks for these, and the flag saves it a comparison on the host.
                cu_seqlens_q_padded=bounds,
                cu_seqlens_kv_padded=bounds,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
                pad_between_seqs=False,
            )
        position_ids_BS = to_device(microbatch.position_ids_BS, device)
        with positions(chunk, None if packed is None else position_ids_BS[0]):
            return chunk(
                input_ids=to_device(microbatch.tokens_BS, device),
                position_ids=position_ids_BS,
                attention_mask=None,
                packed_seq_params=packed,
                output_processor=self._select_logprobs,
                output_processor_context=microbatch,
            )

    def _select_logprobs(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: Microbatch,
        **_: Any,
    ) -> Tensor:
        """Megatron's hook before the output layer: hidden states [S, B, H] to log-probabilities [T]."""
        tp_group = self.ranks.tp_group
        # Both regions sum the hidden gradient over tensor-parallel ranks, each of which has its vocabulary's part.
        if self.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        else:
            hidden_SBH = copy_to_tensor_model_parallel_region(hidden_states)
        weight_VH = output_layer.weight if output_weight is None else output_weight
        wait_for_parameter(self.chunks, weight_VH)
        positions_T = to_device(context.hidden_positions_T, hidden_SBH.device)
        return selected_logprobs(
            hidden_SBH.flatten(0, 1).index_select(0, positions_T),
            weight_VH,
            to_device(context.targets_T, hidden_SBH.device),
            vocab_size=self.vocab_size,
            chunk_size=self.log_probs_chunk_size,
            tp_group=tp_group,
            fused=self.fused_logprobs,
        )

    def gather(self, parts: list[tuple[Tensor, Tensor]], num_responses: int) -> Tensor | None:
        """Put the log-probabilities of this rank's microbatches, and of all data-parallel ranks, in flat order."""
        if not self.ranks.is_last_stage:
            return None
        logps_R = torch.zeros(num_responses, dtype=torch.float64, device=self.ranks.device)
        for responses_r, logps_r in parts:
            logps_R.index_add_(0, responses_r, logps_r)
        # Every response is on one data-parallel rank and split over the context-parallel ones: a sum serves both.
        if self.ranks.dp_cp_group.size() > 1:
            dist.all_reduce(logps_R, group=self.ranks.dp_cp_group)
        return logps_R


def sum_per_response(microbatch: Microbatch, logps_T: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices [r] and summed log-probabilities [r] (float64) of the microbatch's responses."""
    responses_r = to_device(microbatch.responses_r, logps_T.device)
    owners_T = to_device(microbatch.owners_T, logps_T.device)
    zeros_r = torch.zeros(responses_r.numel(), dtype=torch.float64, device=logps_T.device)
    return responses_r, zeros_r.index_add(0, owners_T, logps_T.double())


def _collect(microbatch: Microbatch, logps_T: Tensor, non_loss_data: bool) -> tuple[Tensor, Tensor]:
    """Loss function of the scoring pass: nothing to lose, hand the log-probabilities over."""
    assert non_loss_data
    return sum_per_response(microbatch, logps_T)


class _Differentiated:
    """Loss function of the backward pass, in the form Megatron's schedules take."""

    def __init__(self, loss: MicrobatchLoss | None, *, cp_group: dist.ProcessGroup) -> None:
        self.loss = loss
        self.cp_group = cp_group

    def __call__(self, microbatch: Microbatch, logps_T: Tensor) -> Any:
        assert self.loss is not None, "the last stage has the coefficients"
        responses_r, part_r = sum_per_response(microbatch, logps_T)
        # Each context-parallel rank has some of a response's tokens; the loss is of the whole response.
        logps_r = sum_over_ranks(part_r, self.cp_group) if self.cp_group.size() > 1 else part_r
        loss = self.loss(responses_r, logps_r).float()
        no_count = torch.zeros((), dtype=torch.int, device=logps_T.device)
        return loss, no_count, (responses_r, part_r.detach())


def sum_over_ranks(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of the context-parallel ranks' parts of a value, equal on all; each part gets the whole gradient."""
    return _Sum.apply(partial, group)  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None
