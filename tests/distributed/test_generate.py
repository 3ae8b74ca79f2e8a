"""Sampling from the policy: the cache changes nothing, and neither does the company a prompt is in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from tiny_run import MODEL

END = 5
GPT = {"position_embedding_type": "learned_absolute", "normalization": "LayerNorm", "swiglu": False}
OLMO3 = {
    "window_size": (3, 0),
    "window_attn_skip_freq": (2,),
    "rotary_base_local": 100,
    "rope_scaling_type": "yarn",
    "rope_scaling_original_length": 16,
    "rope_scaling_attention_factor": 1.2,
    "norm_position": "post",
    "qk_layernorm": True,
    "qk_layernorm_across_heads": True,
}
GEMMA = {
    "window_size": (3, 0),
    "window_attn_skip_freq": (2,),
    "rotary_base_local": 100,
    "norm_position": "sandwich",
    "apply_layernorm_1p": True,
    "qk_layernorm": True,
    "scale_embeddings": True,
    "softmax_scale": 0.2,
}
MIXTURE = {"num_moe_experts": 4, "moe_layer_freq": (1, 0, 1, 1)}
MODELS = {"llama": {}, "gpt": GPT, "olmo3": OLMO3, "gemma3": GEMMA, "mixture": MIXTURE}


def tiny_policy(layout: dict[str, int], model: dict[str, Any]) -> Any:
    from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.setup import initialize

    parallel = ParallelConfig(device="cpu", **layout)
    ranks = initialize(parallel, seed=0)
    config = ModelConfig(**(MODEL | model), vocab_size=61)
    return build_policy(config, parallel, PrecisionConfig(), ranks, seed=3, training=False)


def prompts_of(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(6, 61, size=length).astype(np.int32) for length in lengths]


def sample_on_rank(
    layout: dict[str, int], model: dict[str, Any], lengths: list[int], options: dict[str, Any]
) -> list[list[int]]:
    from megatron_groupdpo.mcore.generate import SamplingOptions, sample
    from megatron_groupdpo.mcore.setup import shut_down

    try:
        policy = tiny_policy(layout, model)
        prompts = prompts_of(lengths)
        answers = sample(policy, prompts, range(len(prompts)), SamplingOptions(**options), end_token=END)
        return [answer.tokens.tolist() for answer in answers]
    finally:
        shut_down()


def largest_gap_to_uncached_on_rank(layout: dict[str, int], model: dict[str, Any]) -> float:
    """Largest difference between logits with the cache and of a forward over the whole prefix."""
    from megatron_groupdpo.mcore.generate import StaticInferenceContext, _next_logits
    from megatron_groupdpo.mcore.setup import shut_down

    try:
        policy = tiny_policy(layout, model)
        sequence_BS = torch.from_numpy(np.stack(prompts_of([12, 12, 12])).astype(np.int64))
        cached = StaticInferenceContext(3, 12)
        gap = 0.0
        with torch.no_grad():
            inputs_BS = sequence_BS[:, :4]
            for end in range(4, 12):
                with_cache = _next_logits(policy, inputs_BS, cached)
                cached.sequence_len_offset = end
                whole = _next_logits(policy, sequence_BS[:, :end], StaticInferenceContext(3, 12))
                gap = max(gap, float((with_cache - whole).abs().max()))
                inputs_BS = sequence_BS[:, end : end + 1]
        assert whole.shape == (3, 61), "columns that pad the vocabulary are no tokens"
        return gap
    finally:
        shut_down()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}], ids=["one", "tp2"])
def test_cached_decoding_gives_the_logits_of_the_whole_forward(
    pool: RankPool, layout: dict[str, int], model: dict[str, Any]
):
    ranks = layout.get("tensor_model_parallel_size", 1)
    gaps = pool.run(ranks, largest_gap_to_uncached_on_rank, layout, model)
    assert max(gaps) < 1e-5


@pytest.mark.acts("SamplingOptions.seed")
def test_what_is_drawn_does_not_depend_on_batch_size_order_or_layout(pool: RankPool):
    lengths = [3, 7, 3, 5, 7, 3, 3]
    draws = {"max_new_tokens": 20, "seed": 4}
    (one_by_one,) = pool.run(1, sample_on_rank, {}, {}, lengths, {**draws, "batch_size": 1})
    (in_one_batch,) = pool.run(1, sample_on_rank, {}, {}, lengths, {**draws, "batch_size": 64})
    split = pool.run(2, sample_on_rank, {"tensor_model_parallel_size": 2}, {}, lengths, {**draws, "batch_size": 2})
    assert one_by_one == in_one_batch == split[0] == split[1]
    assert len({tuple(answer) for answer in in_one_batch}) > 1
    (another_seed,) = pool.run(1, sample_on_rank, {}, {}, lengths, {**draws, "seed": 5, "batch_size": 64})
    assert another_seed != in_one_batch


def test_an_answer_ends_with_the_end_token_or_at_the_limit(pool: RankPool):
    (answers,) = pool.run(1, sample_on_rank, {}, {}, [3] * 40, {"max_new_tokens": 60, "batch_size": 16})
    assert all(END not in answer[:-1] for answer in answers)
    ended = [answer[-1] == END for answer in answers]
    assert any(ended)
    assert all(end or len(answer) == 60 for end, answer in zip(ended, answers))


def refusal_on_rank(layout: dict[str, int], max_new_tokens: int, model: dict[str, Any] | None = None) -> str:
    from megatron_groupdpo.errors import ConfigError

    try:
        sample_on_rank(layout, model or {}, [3], {"max_new_tokens": max_new_tokens})
    except ConfigError as error:
        return str(error)
    raise AssertionError("it sampled")


def test_sampling_refuses_pipeline_stages_shared_experts_and_too_long_answers(pool: RankPool):
    assert "pipeline" in pool.run(2, refusal_on_rank, {"pipeline_model_parallel_size": 2}, 4)[0]
    assert "expert_model" in pool.run(2, refusal_on_rank, {"expert_model_parallel_size": 2}, 4, MIXTURE)[0]
    assert "max_position_embeddings" in pool.run(1, refusal_on_rank, {}, 500)[0]
