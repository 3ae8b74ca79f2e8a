"""Reading the gradient buffers, and a backward that shares little with the one it is compared with.

:class:`PlainEngine` serves ``--verify-gradients``. It runs the same model on the same pipeline schedule, but whatever
the schedule multiplies the loss by, its gradient starts from 1; layers run as they are, not as CUDA graphs; Megatron's
reduction of the gradient (scaling, overlap, sharding, finalisation) is left out, and the sums over replicas are written
out here, one all-reduce each. So a factor or a sum that Megatron's configuration gets wrong shows as a difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_groupdpo.engine import GradientPiece, MicrobatchLoss
from megatron_groupdpo.mcore.checkpoint.digest import parameter_names
from megatron_groupdpo.mcore.passes.engine import MegatronEngine, sum_per_response
from megatron_groupdpo.types import Microbatch


def gradient_pieces(engine: MegatronEngine) -> Iterator[GradientPiece]:
    """What this rank answers for of the reduced gradient; over all ranks, every element weighs 1.

    Under the distributed optimizer a rank has its part of each bucket, otherwise all of it, as have the other replicas.
    """
    for chunk in engine.chunks:
        names = {parameter: name for name, parameter in parameter_names(chunk).items()}
        for bucket in _buckets(chunk):
            replicas = engine.ranks.replicas_of(bucket.params_list[0])
            start, end, copies = 0, bucket.grad_data.numel(), replicas.size()
            if chunk.ddp_config.use_distributed_optimizer:
                length = end // replicas.size()
                start, end, copies = replicas.rank() * length, (replicas.rank() + 1) * length, 1
            for parameter in bucket.params_list:
                first, last = bucket.param_to_index[parameter]
                values = bucket.grad_data[max(first, start) : max(0, min(last, end))]
                if values.numel():
                    weight = 1.0 / (copies * _copies_in_the_model(parameter, engine))
                    yield GradientPiece(name=names[parameter], values=values, weight=weight)


class PlainEngine:
    """An :class:`megatron_groupdpo.engine.Engine` around the run's own; see the head of this file."""

    def __init__(self, engine: MegatronEngine) -> None:
        self.engine = engine

    def score(self, microbatches: Sequence[Microbatch], num_responses: int) -> Tensor | None:
        """See :class:`Engine`."""
        return self.engine.score(microbatches, num_responses)

    def backward(
        self, microbatches: Sequence[Microbatch], num_responses: int, loss: MicrobatchLoss | None
    ) -> Tensor | None:
        """See :class:`Engine`. Every rank is left with the whole gradient of its parameters."""
        engine: Any = self.engine
        config = engine.config
        engine.zero_gradient()
        megatrons = config.no_sync_func, config.finalize_model_grads_func
        config.no_sync_func, config.finalize_model_grads_func = contextlib.nullcontext, None
        try:
            with contextlib.ExitStack() as held_back:
                if engine.graphs is not None:
                    held_back.enter_context(engine.graphs.off())
                for chunk in engine.chunks:
                    held_back.enter_context(chunk.no_sync())
                loss_of = _FromOne(loss, cp_group=engine.ranks.cp_group)
                parts = engine.run(microbatches, loss_of, forward_only=False)
        finally:
            config.no_sync_func, config.finalize_model_grads_func = megatrons
        self._sum_over_copies()
        return engine.gather(parts, num_responses)

    @torch.no_grad()
    def _sum_over_copies(self) -> None:
        """Over replicas; over tensor-parallel ranks that saw parts of the sequence; over both ends of a tied embedding.

        The rules for the latter two are Megatron's (``megatron/core/distributed/finalize_model_grads.py``).
        """
        engine, ranks = self.engine, self.engine.ranks
        for chunk in engine.chunks:
            for bucket in _buckets(chunk):
                dist.all_reduce(bucket.grad_data, group=ranks.replicas_of(bucket.params_list[0]))
            named: dict[str, Any] = parameter_names(chunk)
            for name, parameter in named.items():
                in_parts = engine.config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
                of_heads = engine.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
                if ranks.tp_group.size() > 1 and (in_parts or of_heads):
                    dist.all_reduce(parameter.main_grad, group=ranks.tp_group)
                if getattr(parameter, "shared_embedding", False):
                    dist.all_reduce(parameter.main_grad, group=_embedding_group())


class _FromOne:
    """Loss function of the plain backward, in the form Megatron's schedules take."""

    def __init__(self, loss: MicrobatchLoss | None, *, cp_group: dist.ProcessGroup) -> None:
        self.loss = loss
        self.cp_group = cp_group

    def __call__(self, microbatch: Microbatch, logps_T: Tensor) -> Any:
        assert self.loss is not None, "the last stage has the loss"
        responses_r, part_r = sum_per_response(microbatch, logps_T)
        others_r = part_r.detach().clone()
        dist.all_reduce(others_r, group=self.cp_group)
        # The other context-parallel ranks' tokens are constants here: this rank differentiates its own.
        loss = self.loss(responses_r, part_r + (others_r - part_r.detach()))
        loss.register_hook(torch.ones_like)
        no_count = torch.zeros((), dtype=torch.int, device=logps_T.device)
        return loss.float(), no_count, (responses_r, part_r.detach())


def _buckets(chunk: Any) -> Iterator[Any]:
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        yield from group.buckets


def _embedding_group() -> Any:
    return parallel_state.get_embedding_group()


def _copies_in_the_model(parameter: Any, engine: MegatronEngine) -> int:
    """Ranks of one model replica that hold the same elements: tensor-parallel duplicates, ends of a tied embedding."""
    copies = 1 if getattr(parameter, "tensor_model_parallel", False) else engine.ranks.tp_group.size()
    if getattr(parameter, "shared_embedding", False):
        copies *= _embedding_group().size()
    return copies
