"""Mixtures of experts: Megatron's experts, one after the other or in grouped products, and a router of our own.

The router does what ``transformers`` does, and nothing else: no balancing loss, no counts, no capacity. So both passes
route alike, a token's experts depend on the token alone, and padding changes nothing.

The gradient of an expert needs no factor: tokens of all ranks come to the rank that has it, and Megatron sums what the
ranks with copies found (``calculate_per_token_loss``, see ``passes/engine.py``).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_groupdpo.config import ModelConfig, ParallelConfig


class SoftmaxRouter(TopKRouter):
    """Each token to its ``moe_router_topk`` likeliest experts."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[S, B, E] logits to weights [S * B, E], 0 where a token does not go, and where it goes.

        Of equally likely experts the choice is ``torch.topk``'s, as in ``transformers``. Megatron's own routing asks it
        for another order under ``no_grad``, which may break ties otherwise: the passes would differ.
        """
        logits_TE = logits.flatten(0, -2)
        probs_TE = logits_TE.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights_TK, experts_TK = probs_TE.topk(self.topk, dim=-1)
        if not self.config.moe_router_pre_softmax:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        goes_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, experts_TK, weights_TK.type_as(logits_TE))
        return weights_TE, goes_TE


class Mixture(MoELayer):
    """Megatron's layer, which lets go of each microbatch.

    Its dispatcher keeps the last one's probabilities, and with them the graph: that names the weights, their nodes the
    hooks of the data-parallel wrapper, and these the model again, in a circle that Python's collector cannot see. The
    model and its process groups would stay until the process ends.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's."""
        output = super().forward(*args, **kwargs)
        kept = vars(self.token_dispatcher)
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                kept[name] = None
        return output


def moe_fields(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Fields of Megatron's configuration that make the mixture; none for a dense model."""
    if model.num_moe_experts is None:
        return {}
    marks = [int(model.has_experts(layer)) for layer in range(1, model.num_layers + 1)]
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size or model.ffn_hidden_size,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_dtype": model.moe_router_dtype,
        # A list would give every layer tensors of its own in the checkpoint, also where all are alike.
        "moe_layer_freq": 1 if all(marks) else marks,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        # as it is by default in Megatron's process groups
        "expert_tensor_parallel_size": parallel.tensor_model_parallel_size,
    }


def mixture_mlp(num_experts: int) -> Any:
    """What stands in a layer spec in place of the MLP: Megatron's own parts, with our router."""
    mlp: Any = get_gpt_layer_local_submodules(num_experts=num_experts, moe_grouped_gemm=False).mlp
    parts = dataclasses.replace(mlp.keywords["submodules"], router=SoftmaxRouter, shared_experts=None)
    return partial(Mixture, submodules=parts)


def grouped_mixture_mlp(column: Any, row: Any) -> Any:
    """The same, with the experts of a rank in one product of ``column`` and one of ``row``, Transformer Engine's."""
    experts = partial(TEGroupedMLP, submodules=GroupedMLPSubmodules(linear_fc1=column, linear_fc2=row))
    return partial(Mixture, submodules=MoESubmodules(router=SoftmaxRouter, experts=experts, shared_experts=None))


def mark_experts(chunk: torch.nn.Module) -> None:
    """Give experts gradient buffers and an optimizer of their own on every layout.

    Megatron does so only where experts are shared out; its optimizer's state would then have other parts than that of a
    layout with whole mixtures, and a run could not go on there.
    """
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            experts: Any = module.experts
            for parameter in experts.parameters():
                parameter.allreduce = False


def allow_without_sequence_parallelism(chunk: torch.nn.Module) -> None:
    """Let a model that is never trained run on several tensor-parallel ranks without sequence parallelism.

    Megatron refuses it in training mode. Every rank then sends the same tokens, which costs time and is right.
    """
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            module.training = False
