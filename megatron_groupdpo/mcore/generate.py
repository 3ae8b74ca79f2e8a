"""Sampling from the policy with Megatron-Core's static key-value cache.

Draws are made from hashed counters, not from a generator's state: the n-th response to a prompt is the same whatever
the batch size, the order of prompts or the data-parallel layout (up to rounding of the probabilities).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.policy import Policy
from megatron_groupdpo.mcore.weights import finish_param_gather
from megatron_groupdpo.objectives.keys import mix


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How responses are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Smallest set of tokens with at least this probability."""
    seed: int = 0
    batch_size: int = 256
    """Sequences decoded together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledResponse:
    """One response."""

    tokens: np.ndarray
    """[L] int32, the end token included when there is one."""
    finished: bool
    """Whether it ended with the end token, rather than at the length limit."""


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[np.ndarray],
    keys: Sequence[int],
    options: SamplingOptions,
    *,
    end_token: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[SampledResponse]:
    """One response to each prompt; give a prompt several times, with different keys, for several responses.

    Args:
        policy: a model without pipeline parallelism; every tensor-parallel rank makes the same call, and with gathers
            that overlap (``--overlap-param-gather``) every rank.
        prompts: token ids [P] each.
        keys: int64 source of each response's draws.
        options: see :class:`SamplingOptions`.
        end_token: ends a response.
        on_done: called with the number of responses just finished.

    Raises:
        ConfigError: pipeline, context or expert parallelism; prompt and response are longer than the model's positions.
    """
    _check_layout(policy, prompts, options)
    finish_param_gather(policy.chunks)  # the output weight is read outside its module's forward
    responses: list[SampledResponse | None] = [None] * len(prompts)
    # Only prompts of one length share a batch: no padding, so no mask, and the cache is exact.
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    start = 0
    while start < len(order):
        stop = start
        while stop < min(len(order), start + options.batch_size) and len(prompts[order[stop]]) == len(
            prompts[order[start]]
        ):
            stop += 1
        batch = order[start:stop]
        prompts_BS = torch.from_numpy(np.stack([prompts[index] for index in batch]).astype(np.int64))
        keys_B = torch.tensor([keys[index] for index in batch], dtype=torch.int64)
        for index, response in zip(batch, _sample_batch(policy, prompts_BS, keys_B, options, end_token)):
            responses[index] = response
        on_done(len(batch))
        start = stop
    return [response for response in responses if response is not None]


def _check_layout(policy: Policy, prompts: Sequence[np.ndarray], options: SamplingOptions) -> None:
    if policy.ranks.pp_group.size() > 1 or policy.ranks.cp_group.size() > 1:
        raise ConfigError(
            "sampling runs with pipeline and context parallel size 1; load the checkpoint with tensor and data "
            "parallelism alone"
        )
    # Ranks that share experts would have to decode in step, and each has prompts of its own.
    if policy.config.expert_model_parallel_size > 1:
        raise ConfigError(
            f"sampling runs with expert_model_parallel_size 1, it is {policy.config.expert_model_parallel_size}; load "
            "the checkpoint with tensor and data parallelism alone"
        )
    longest = max((len(prompt) for prompt in prompts), default=0) + options.max_new_tokens
    if longest > policy.model.max_position_embeddings:
        raise ConfigError(
            f"prompt and response may have {longest} tokens, max_position_embeddings is "
            f"{policy.model.max_position_embeddings}; lower max_new_tokens or leave out long prompts"
        )


def _sample_batch(
    policy: Policy, prompts_BS: Tensor, keys_B: Tensor, options: SamplingOptions, end_token: int
) -> list[SampledResponse]:
    device = policy.ranks.device
    batch, prompt_length = prompts_BS.shape
    context = StaticInferenceContext(batch, prompt_length + options.max_new_tokens)
    keys_B = mix(mix(keys_B.to(device)) + options.seed)
    rows_B = torch.arange(batch, device=device)
    tokens_BL = torch.full((batch, options.max_new_tokens), end_token, dtype=torch.int64, device=device)
    lengths_B = torch.full((batch,), options.max_new_tokens, device=device)
    finished_B = torch.zeros(batch, dtype=torch.bool, device=device)
    inputs_BS = prompts_BS.to(device)
    for step in range(options.max_new_tokens):
        logits_BV = _next_logits(policy, inputs_BS, context)
        next_B = _draw(logits_BV, mix(keys_B[rows_B] + step), options)
        tokens_BL[rows_B, step] = next_B
        ended_B = next_B == end_token
        lengths_B[rows_B[ended_B]] = step + 1
        finished_B[rows_B[ended_B]] = True
        if bool(ended_B.all()):
            break
        context.sequence_len_offset += inputs_BS.shape[1]
        # Finished rows leave the batch and the cache.
        if bool(ended_B.any()):
            rows_B, next_B = rows_B[~ended_B], next_B[~ended_B]
            context.key_value_memory_dict = {
                layer: (keys[:, ~ended_B], values[:, ~ended_B])
                for layer, (keys, values) in context.key_value_memory_dict.items()
            }
        inputs_BS = next_B[:, None]
    return [
        SampledResponse(tokens=tokens_BL[b, : int(lengths_B[b])].to("cpu", torch.int32).numpy(), finished=bool(done))
        for b, done in enumerate(finished_B.tolist())
    ]


def _next_logits(policy: Policy, inputs_BS: Tensor, context: StaticInferenceContext) -> Tensor:
    """[B, vocabulary] float32 logits after the last input, equal on all tensor-parallel ranks."""
    length = inputs_BS.shape[1]
    positions_S = torch.arange(length, device=inputs_BS.device) + context.sequence_len_offset
    (chunk,) = policy.chunks
    return chunk(
        input_ids=inputs_BS,
        position_ids=positions_S.expand_as(inputs_BS),
        attention_mask=None,
        inference_context=context,
        output_processor=_last_logits,
        output_processor_context=policy,
    )


def _last_logits(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Policy, **_: Any
) -> Tensor:
    weight_VH = output_layer.weight if output_weight is None else output_weight
    logits_BV = torch.matmul(hidden_states[-1], weight_VH.t()).float()
    group = context.ranks.tp_group
    if group.size() > 1:
        shards = [torch.empty_like(logits_BV) for _ in range(group.size())]
        dist.all_gather(shards, logits_BV.contiguous(), group=group)
        logits_BV = torch.cat(shards, dim=1)
    return logits_BV[:, : context.model.vocab_size]


def _draw(logits_BV: Tensor, keys_B: Tensor, options: SamplingOptions) -> Tensor:
    """[B] int64 tokens: inverse of the cumulative distribution at a uniform number hashed from the key."""
    if options.temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV, tokens_BV = torch.softmax(logits_BV.double() / options.temperature, -1).sort(-1, descending=True)
    cumulative_BV = probs_BV.cumsum(-1)
    kept_BV = cumulative_BV - probs_BV < options.top_p  # always the first
    cumulative_BV = (probs_BV * kept_BV).cumsum(-1)
    # 53 high bits of the key, as a float64 in [0, 1).
    uniform_B = ((keys_B >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
    place_B = torch.searchsorted(cumulative_BV, (uniform_B * cumulative_BV[:, -1])[:, None], right=True)
    return tokens_BV.gather(1, place_B.clamp_max(logits_BV.shape[1] - 1)).squeeze(1)
