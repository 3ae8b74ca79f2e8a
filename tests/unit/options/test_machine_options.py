"""Model, precision and layout options in the numbers of a model on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from one_rank import OneRank

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.data.batches.planner import plan_options
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.generate import SamplingOptions, sample
from megatron_groupdpo.mcore.model.build import transformer_config
from megatron_groupdpo.mcore.passes import logprobs
from megatron_groupdpo.mcore.setup import choose_device, initialize
from megatron_groupdpo.mcore.weights import optimizer_parts, unwrapped
from megatron_groupdpo.run.parts import Run
from megatron_groupdpo.step.train_step import accumulate_gradient

ROPE = {"position_embedding_type": "rope", "hidden_size": 16}


def model_of(run: Run) -> Any:
    return unwrapped(run.policy.chunks[0])


@pytest.mark.acts("ModelConfig.rotary_base", "ModelConfig.rotary_percent")
@pytest.mark.parametrize(("base", "percent", "rotated"), [(10000, 1.0, 8), (500, 0.5, 4)])
def test_so_many_channels_turn_at_the_bases_rates(one: OneRank, base: int, percent: float, rotated: int):
    run = one.build(**ROPE, rotary_base=base, rotary_percent=percent)
    angles_SD = model_of(run).rotary_pos_emb.get_emb(5)[:, 0, 0]
    rates = base ** (-np.arange(0, rotated, 2) / rotated)
    wanted_SD = np.tile(np.arange(5)[:, None] * rates, (1, 2))
    np.testing.assert_allclose(angles_SD.numpy(), wanted_SD, rtol=1e-6)


@pytest.mark.acts("ModelConfig.make_vocab_size_divisible_by", "ModelConfig.vocab_size")
@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(None, 1, 23), (None, 16, 32), (40, 1, 40), (41, 8, 48)])
def test_the_vocabulary_is_padded_to_a_multiple(one: OneRank, vocab: int | None, multiple: int, rows: int):
    run = one.build(vocab_size=vocab, make_vocab_size_divisible_by=multiple)
    assert model_of(run).embedding.word_embeddings.weight.shape[0] == rows
    assert run.policy.model.vocab_size == (vocab or 23)


@pytest.mark.acts("ModelConfig.init_method_std")
def test_initial_weights_are_so_wide(one: OneRank):
    narrow, wide = (model_of(one.build(init_method_std=std, vocab_size=4000)) for std in (0.1, 0.4))
    drawn, other = (model.embedding.word_embeddings.weight for model in (narrow, wide))
    assert float(drawn.std()) == pytest.approx(0.1, rel=0.02)
    torch.testing.assert_close(other, 4 * drawn, rtol=1e-6, atol=0)


@pytest.mark.acts("PrecisionConfig.bf16")
def test_weights_in_bf16_are_the_rounded_ones_with_masters_in_fp32(one: OneRank):
    plain, half = (
        one.build(),
        one.build(bf16=True, reference="none", reference_logprobs=None, objective="sft", beta=0.1),
    )
    weights = dict(model_of(plain).named_parameters())
    for name, rounded in model_of(half).named_parameters():
        assert torch.equal(rounded, weights[name].to(torch.bfloat16)), name
    masters = [m for group in optimizer_parts(half.updater.optimizer)[0].fp32_from_float16_groups for m in group]  # type: ignore[attr-defined]
    assert {master.dtype for master in masters} == {torch.float32}
    assert sum(master.numel() for master in masters) == sum(weight.numel() for weight in weights.values())


@contextmanager
def forwards_of_layers(run: Run) -> Iterator[dict[str, int]]:
    """How often each layer, and the core attention of all, is run forward."""
    counts: dict[str, int] = {}
    hooks = []
    for number, layer in enumerate(model_of(run).decoder.layers):
        for name, module in ((f"layer {number}", layer.mlp), ("attention", layer.self_attention.core_attention)):

            def count(*_: Any, name: str = name) -> None:
                counts[name] = counts.get(name, 0) + 1

            hooks.append(module.register_forward_pre_hook(count))
    yield counts
    for hook in hooks:
        hook.remove()


@pytest.mark.acts(
    "PrecisionConfig.recompute_granularity", "PrecisionConfig.recompute_method", "PrecisionConfig.recompute_num_layers"
)
@pytest.mark.parametrize(
    ("method", "number", "recomputed"),
    [(None, None, 0), ("block", 1, 1), ("block", 3, 3), ("uniform", 1, 4), ("uniform", 2, 4)],
)
def test_so_many_layers_are_run_again_in_the_backward(
    one: OneRank, method: str | None, number: int | None, recomputed: int
):
    """Two passes forward, and once more where the activations were not kept."""
    given = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": number}
    run = one.build(num_layers=4, micro_batch_size=100, **(given if method else {}))
    planned = run.train.batch(0, 2)
    with forwards_of_layers(run) as counts:
        accumulate_gradient(run.policy.engine, planned.microbatches, planned.batch, planned.ref_logps_R, run.loss)
    assert [counts[f"layer {n}"] for n in range(4)] == [3] * recomputed + [2] * (4 - recomputed)


@pytest.mark.acts("PrecisionConfig.recompute_granularity")
def test_selective_recomputation_runs_the_core_attention_alone_again(one: OneRank):
    run = one.build(num_layers=2, micro_batch_size=100, recompute_granularity="selective")
    planned = run.train.batch(0, 2)
    with forwards_of_layers(run) as counts:
        accumulate_gradient(run.policy.engine, planned.microbatches, planned.batch, planned.ref_logps_R, run.loss)
    assert counts == {"layer 0": 2, "layer 1": 2, "attention": 2 * 3}


@pytest.mark.acts("PrecisionConfig.log_probs_chunk_size")
@pytest.mark.parametrize("size", [1024, 7])
def test_no_more_rows_of_logits_are_held_than_asked_for(one: OneRank, size: int, monkeypatch: pytest.MonkeyPatch):
    run = one.build(log_probs_chunk_size=size, micro_batch_size=100)
    planned = run.train.batch(0, 9)
    tokens = sum(len(microbatch.targets_T) for microbatch in planned.microbatches)
    assert tokens > 20
    rows: list[int] = []
    compute = logprobs._chunk_logprobs

    def noting(hidden_TH: torch.Tensor, *rest: Any) -> Any:
        rows.append(len(hidden_TH))
        return compute(hidden_TH, *rest)

    monkeypatch.setattr(logprobs, "_chunk_logprobs", noting)
    run.policy.engine.score(planned.microbatches, planned.batch.num_responses)
    assert sum(rows) == tokens
    assert max(rows) == min(size, tokens)


@pytest.mark.acts("PrecisionConfig.cuda_graph_length_multiple")
@pytest.mark.parametrize(("multiple", "lengths"), [(16, [16, 16, 32, 40]), (3, [3, 18, 18, 33])])
def test_lengths_of_captured_microbatches_are_multiples(multiple: int, lengths: list[int]):
    """But not beyond the sequence."""
    precision = PrecisionConfig(cuda_graphs=True, cuda_graph_length_multiple=multiple)
    options = plan_options(
        ParallelConfig(), data_parallel_size=1, precision=precision, micro_batch_size=2, seq_length=40
    )
    assert [options.stepped(length) for length in (2, 16, 17, 33)] == lengths


@pytest.mark.acts("ParallelConfig.moe_token_dispatcher_type")
@pytest.mark.parametrize(
    ("kind", "name"), [("allgather", "MoEAllGatherTokenDispatcher"), ("alltoall", "MoEAlltoAllTokenDispatcher")]
)
def test_tokens_reach_their_experts_as_asked(one: OneRank, kind: str, name: str):
    """That both give the same numbers is the layout matrix's."""
    run = one.build(num_moe_experts=2, moe_router_topk=1, moe_router_pre_softmax=True, add_bias_linear=False,
                    moe_token_dispatcher_type=kind)  # fmt: skip
    assert type(model_of(run).decoder.layers[0].mlp.token_dispatcher).__name__ == name


@pytest.mark.acts("ParallelConfig.device")
def test_the_device_asked_for_is_taken_or_missed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device 'cuda' needs one GPU per rank"):
        initialize(ParallelConfig(device="cuda"), seed=0)
    assert choose_device(ParallelConfig(device="cpu").device)[0] == torch.device("cpu")


@pytest.mark.acts(
    "PrecisionConfig.fp8_format",
    "PrecisionConfig.fp8_recipe",
    "PrecisionConfig.fp8_param_gather",
    "PrecisionConfig.fp8_margin",
    "PrecisionConfig.fp8_amax_history_len",
    "PrecisionConfig.fp8_amax_compute_algo",
    "PrecisionConfig.first_last_layers_bf16",
    "PrecisionConfig.num_layers_at_start_in_bf16",
    "PrecisionConfig.num_layers_at_end_in_bf16",
    "PrecisionConfig.gradient_accumulation_fusion",
    "PrecisionConfig.deterministic_mode",
    reason="the value reaches Megatron's configuration; its effect in numbers is shown by tests/gpu and, where "
    "Transformer Engine's Python is installed, by test_fp8_python.py",
)
@pytest.mark.parametrize(
    ("given", "theirs", "value"),
    [
        ({"fp8_format": "e4m3"}, "fp8", "e4m3"),
        ({"fp8_recipe": "delayed"}, "fp8_recipe", "delayed"),
        ({"fp8_recipe": "blockwise"}, "fp8_recipe", "blockwise"),
        ({"fp8_margin": 3}, "fp8_margin", 3),
        ({"fp8_amax_history_len": 5}, "fp8_amax_history_len", 5),
        ({"fp8_amax_compute_algo": "most_recent"}, "fp8_amax_compute_algo", "most_recent"),
        ({"fp8_param_gather": True}, "fp8_param", True),
        ({"first_last_layers_bf16": True}, "first_last_layers_bf16", True),
        ({"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2}, "num_layers_at_start_in_bf16", 2),
        ({"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 3}, "num_layers_at_end_in_bf16", 3),
        ({"gradient_accumulation_fusion": True}, "gradient_accumulation_fusion", True),
        ({"deterministic_mode": True}, "deterministic_mode", True),
    ],
)
def test_options_of_a_gpu_reach_megatrons_configuration(given: dict[str, Any], theirs: str, value: Any):
    fp8 = {"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "tensorwise"}
    model = ModelConfig(num_layers=6, hidden_size=64, num_attention_heads=2, num_query_groups=2, kv_channels=32)
    precision = PrecisionConfig(**(given if theirs == "deterministic_mode" else fp8 | given))
    config = transformer_config(model, ParallelConfig(), precision, fp8_weights=precision.fp8_param_gather)
    assert getattr(config, theirs) == value


@pytest.mark.acts("SamplingOptions.batch_size", "SamplingOptions.max_new_tokens")
@pytest.mark.parametrize(("size", "limit"), [(3, 4), (256, 6)])
def test_so_many_sequences_are_decoded_together_for_so_many_tokens(one: OneRank, size: int, limit: int):
    run = one.build()
    shapes: list[tuple[int, ...]] = []
    hook = model_of(run).embedding.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    options = SamplingOptions(max_new_tokens=limit, batch_size=size)
    answers = sample(run.policy, [np.array([5, 6, 7])] * 8, range(8), options, end_token=VOCAB_WITHOUT_END)
    hook.remove()
    assert [len(answer.tokens) for answer in answers] == [limit] * 8
    assert max(rows for rows, _ in shapes) == min(size, 8)
    assert len(shapes) == limit * -(-8 // size)


VOCAB_WITHOUT_END = -1
"""No token ends an answer."""
