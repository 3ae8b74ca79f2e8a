"""FP8: padding by recipe and layout, what the hardware runs, and which options go together."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from config_examples import example

from megatron_groupdpo.config import ParallelConfig, PrecisionConfig, validate
from megatron_groupdpo.config.fp8 import (
    TILE,
    fp8_recipes,
    length_multiple,
    precision_name,
    recipe_problem,
    reference_precision,
)
from megatron_groupdpo.data.batches.microbatches import build_microbatches
from megatron_groupdpo.data.batches.planner import plan_batch, plan_options
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.types import GroupBatch, ResponseRow

RECIPES = tuple(TILE)
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor_model_parallel_size": 4},
    {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    {"context_parallel_size": 2},
    {"context_parallel_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2, "context_parallel_size": 2},
]


def fp8(recipe: str, **more: Any) -> PrecisionConfig:
    return PrecisionConfig(bf16=True, fp8_format="hybrid", fp8_recipe=recipe, **more)  # type: ignore[arg-type]


def batch_of(lengths: list[int]) -> GroupBatch:
    import torch

    rows = tuple(
        ResponseRow(index=i, tokens_S=np.arange(length, dtype=np.int32), target_positions_T=np.array([length - 1]))
        for i, length in enumerate(lengths)
    )
    zeros_GK = torch.zeros((1, len(rows)), dtype=torch.int64)
    return GroupBatch(
        rows=rows,
        flat_index_GK=torch.arange(len(rows))[None],
        labels_GK=torch.ones((1, len(rows)), dtype=torch.int8),
        values_GK=zeros_GK.double(),
        tie_keys_GK=zeros_GK,
        group_keys_G=torch.zeros(1, dtype=torch.int64),
        response_ids_R=torch.arange(len(rows)),
        num_tokens_R=torch.ones(len(rows), dtype=torch.int64),
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_rank_multiplies_whole_tiles_of_tokens(recipe: str, layout: dict[str, Any], packed: bool):
    parallel = ParallelConfig(**layout)
    size = {"max_tokens_per_microbatch": 4096} if packed else {"micro_batch_size": 3}
    plan = plan_options(parallel, precision=fp8(recipe), data_parallel_size=2, **size)  # type: ignore[arg-type]
    planned = plan_batch(batch_of([5, 17, 100, 333, 64, 1000, 2]), plan)
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    for rank in range(2):
        for context_rank in range(parallel.context_parallel_size):
            for microbatch in build_microbatches(planned, plan, rank=rank, context_rank=context_rank):
                tokens, rest = divmod(microbatch.tokens_BS.numel(), shards)
                assert rest == 0
                assert tokens % TILE[recipe] == 0
                if microbatch.cu_seqlens is not None:
                    assert microbatch.cu_seqlens[-1] == microbatch.tokens_BS.numel() * parallel.context_parallel_size
                    chunks = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
                    assert not (microbatch.cu_seqlens % chunks).any()


@pytest.mark.parametrize(
    ("recipe", "layout", "multiple"),
    [
        ("delayed", {}, 16),
        ("tensorwise", {"tensor_model_parallel_size": 8}, 16),
        ("tensorwise", {"tensor_model_parallel_size": 8, "sequence_parallel": True}, 128),
        ("mxfp8", {"context_parallel_size": 2}, 64),
        ("blockwise", {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}, 512),
    ],
)
def test_the_multiple_in_numbers(recipe: str, layout: dict[str, Any], multiple: int):
    assert length_multiple(ParallelConfig(**layout), fp8(recipe)) == multiple
    assert length_multiple(ParallelConfig(**layout)) == length_multiple(ParallelConfig(**layout), PrecisionConfig())
    assert multiple % length_multiple(ParallelConfig(**layout)) == 0


def test_a_gpu_runs_what_its_generation_has():
    assert fp8_recipes((9, 0)) == ("delayed", "tensorwise", "blockwise")
    assert fp8_recipes((12, 0)) == ("delayed", "tensorwise", "blockwise")
    problem = recipe_problem("mxfp8", (9, 0))
    assert problem is not None
    assert re.search(r"capability 10.0 .*has 9.0; choose delayed, tensorwise, blockwise", problem)
    assert "train in bf16" in str(recipe_problem("delayed", (8, 0)))
    assert recipe_problem("mxfp8", (10, 0)) is None


EXPERTS: dict[str, Any] = {"num_moe_experts": 4, "moe_router_topk": 2, "add_bias_linear": False}
ROPE = {"position_embedding_type": "rope"}
PACKED = {"max_tokens_per_microbatch": 256, "micro_batch_size": None}
OK: dict[str, Any] = {"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "tensorwise"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("format_", ["e4m3", "hybrid"])
def test_every_recipe_is_accepted_as_a_configuration(recipe: str, format_: str):
    validate(example(**OK | {"fp8_recipe": recipe, "fp8_format": format_, "hidden_size": 512}), 1)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_weights_may_be_kept_in_fp8(recipe: str):
    kept = {"fp8_param_gather": True, "use_distributed_optimizer": True}
    validate(example(**OK | kept | {"fp8_recipe": recipe, "hidden_size": 512}), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp8_recipe": "delayed", "first_last_layers_bf16": True}, "does not go with fp8_recipe 'delayed'"),
        ({"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 3}, "(4) leave none of num_layers"),
        ({"fp8_param_gather": True}, "fp8_param_gather needs use_distributed_optimizer"),
        (
            {"fp8_param_gather": True, "use_distributed_optimizer": True, "fp8_recipe": "mxfp8"},
            "fp8_param_gather does not go with fp8_recipe 'mxfp8'",
        ),
        ({"device": "cpu"}, "fp8_format needs a GPU"),
        ({"verify_gradients": 1}, "needs gradient_tolerance with FP8"),
        ({"hidden_size": 40}, "hidden_size has 40"),
        ({"fp8_recipe": "blockwise"}, "multiples of 128: hidden_size has 64"),
        ({**EXPERTS, "moe_ffn_hidden_size": 40}, "multiples of 16: moe_ffn_hidden_size has 40"),
        ({"seq_length": 120}, "seq_length (120) must be a multiple of 16"),
        ({"fp8_amax_history_len": 4}, "fp8_recipe is not delayed"),
        ({"num_layers_at_end_in_bf16": 2}, "first_last_layers_bf16 is off"),
        ({"fp8_format": None}, "fp8_recipe (tensorwise) is set and fp8_format is not"),
        (
            {"attention_backend": "fused", "transformer_impl": "local"},
            "attention_backend 'fused' is Transformer Engine's",
        ),
        ({"attention_backend": "flash", "bf16": False}, "attention_backend 'flash' needs bf16"),
        ({"apply_rope_fusion": True}, "position_embedding_type is not rope"),
        ({"gradient_tolerance": 0.5}, "verify_gradients is 0"),
        (
            {"attention_backend": "unfused", "context_parallel_size": 2},
            "attention_backend 'unfused' has no context parallelism",
        ),
        (
            {**ROPE, "apply_rope_fusion": True, "attention_backend": "local"} | PACKED,
            "apply_rope_fusion reads the bounds of packed responses on the GPU",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(example(**OK | changes), 1)


def test_the_reference_is_scored_in_the_policys_precision_but_not_with_its_delayed_scales():
    assert precision_name(PrecisionConfig()) == "fp32"
    assert precision_name(PrecisionConfig(bf16=True)) == "bf16"
    assert precision_name(fp8("blockwise")) == "fp8-hybrid-blockwise"
    assert precision_name(fp8("tensorwise", first_last_layers_bf16=True)) == "fp8-hybrid-tensorwise-bf16-1-1"
    assert reference_precision(fp8("tensorwise")) == fp8("tensorwise")
    delayed = fp8("delayed", fp8_amax_history_len=3, attention_backend="fused")
    assert reference_precision(delayed) == PrecisionConfig(bf16=True, attention_backend="fused")


def te_partition(bounds: list[int], rank: int, size: int) -> list[int]:
    """Transformer Engine's ``thd_get_partitioned_indices``, token by token (``fused_attn/context_parallel.cu``)."""
    local = [bound // size for bound in bounds]
    places = []
    for token in range(local[-1]):
        sequence = max(i for i, bound in enumerate(local[:-1]) if bound <= token and local[i + 1] > token)
        half = (local[sequence + 1] - local[sequence]) // 2
        within = token - local[sequence]
        chunk = rank if within < half else 2 * (size - 1) - rank
        places.append(within + local[sequence] * size + half * chunk)
    return places


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallelism_cuts_packed_rows_as_transformer_engine_does(size: int):
    from megatron_groupdpo.tensors import packed_positions_of_rank

    bounds = [0, 2 * size, 8 * size, 8 * size + 6 * size, 30 * size]
    for rank in range(size):
        assert packed_positions_of_rank(bounds, rank, size).tolist() == te_partition(bounds, rank, size)
