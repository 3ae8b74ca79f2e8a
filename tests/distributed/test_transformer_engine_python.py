"""Transformer Engine's own Python with PyTorch for kernels (te_runtime.py).

Its layers are the local ones, and the FP8 contract holds over its real autocast, modules and scaling state.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import te_runtime
import torch
from graph_case import check_bits, with_graphs
from hf_examples import decoder
from layout_case import LayoutCase
from layout_run import whole_tensors
from matrix import LAYOUTS, MIXTURE_LAYOUTS, SGD
from parity import expected_of, relative_gap
from rank_pool import RankPool

FAMILIES = ["gpt2", "llama", "qwen3", "mistral", "olmo2", "olmo3", "gemma3", "mixtral", "qwen3-moe", "olmoe"]


@pytest.fixture(scope="module")
def te_pool() -> Iterator[RankPool]:
    """Ranks of their own: what stands in for kernels stays in a process."""
    if (problem := te_runtime.problem()) is not None:
        pytest.skip(problem)
    ranks = RankPool(4)
    yield ranks
    ranks.close()


def one(pool: RankPool, function: str, *args: Any) -> Any:
    (result,) = pool.run(1, te_runtime.call, "te_case", function, *args)
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_its_layers_are_the_local_ones(te_pool: RankPool, family: str):
    for packed in (False, True):
        gap = one(te_pool, "both_specs", family, packed)
        assert gap["logps"] < 2e-5, packed
        assert gap["gradient"] < 5e-6, packed


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama", "one rank"),
        ("llama", "TP2 SP"),
        ("llama", "PP2 VPP2"),
        ("llama", "TP2 PP2"),
        ("gpt", "TP2"),
        ("gpt", "DP2 distopt"),
        ("mixture", "EP2"),
        ("mixture", "TP2 EP2 SP"),
    ],
)
def test_its_gradient_is_the_one_graphs_on_every_layout(te_pool: RankPool, pool: RankPool, model: str, layout: str):
    num_ranks, parallel = (LAYOUTS | MIXTURE_LAYOUTS)[layout]
    case = LayoutCase(num_ranks=num_ranks, parallel=parallel, model=model)
    results = te_pool.run(case.num_ranks, te_runtime.call, "te_case", "layout", case)
    _, gradient = expected_of(pool, model, case.num_groups, json.dumps(case.loss_options))
    found = whole_tensors([r.gradient for r in results], replicas_agree_to=1e-6)
    assert relative_gap(found, gradient) <= 1e-5


@pytest.mark.parametrize(("layout", "backend"), [("one rank", "unfused"), ("one rank", "local"), ("TP2 SP", "unfused")])
def test_its_captured_layers_are_its_layers_bit_for_bit(te_pool: RankPool, layout: str, backend: str):
    num_ranks, parallel = LAYOUTS[layout]
    case = LayoutCase(num_ranks=num_ranks, parallel=parallel, precision={"attention_backend": backend}, num_steps=2)
    case = with_graphs(dataclasses.replace(case, optimizer=SGD))
    seen, plain = (
        te_pool.run(num_ranks, te_runtime.call, "te_case", name, case, timeout=90)
        for name in ("captured", "uncaptured")
    )
    check_bits(seen, plain)


FP8 = [("hybrid", "delayed"), ("e4m3", "delayed"), ("hybrid", "tensorwise"), ("e4m3", "tensorwise")]


def fp8(format_: str, recipe: str) -> dict[str, Any]:
    return {"bf16": True, "fp8_format": format_, "fp8_recipe": recipe}


@pytest.mark.parametrize(("format_", "recipe"), FP8)
def test_both_passes_see_one_function(te_pool: RankPool, format_: str, recipe: str):
    check_contract(one(te_pool, "contract", fp8(format_, recipe)), recipe)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
@pytest.mark.parametrize(
    "options",
    [FULL, {"recompute_granularity": "selective"}, {"gradient_accumulation_fusion": True}],
    ids=["recomputed", "attention recomputed", "gradients accumulated by the products"],
)
def test_options_keep_the_contract(te_pool: RankPool, recipe: str, options: dict[str, Any]):
    check_contract(one(te_pool, "contract", fp8("hybrid", recipe) | options), recipe)


def test_first_and_last_layers_in_bf16_keep_the_contract(te_pool: RankPool):
    options = {"first_last_layers_bf16": True}
    check_contract(one(te_pool, "contract", fp8("hybrid", "tensorwise") | options), "tensorwise")


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_tensor_parallel_ranks_keep_the_contract(te_pool: RankPool, recipe: str):
    """Maxima are those of all ranks, so that the ranks scale alike."""
    arguments = (fp8("hybrid", recipe), None, False, {"tensor_model_parallel_size": 2, "sequence_parallel": True})
    results = te_pool.run(2, te_runtime.call, "te_case", "contract", *arguments)
    for result in results:
        check_contract(result, recipe)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_experts_keep_the_contract(te_pool: RankPool, recipe: str):
    """Their tokens are padded expert by expert, and an expert may have none."""
    check_contract(one(te_pool, "contract", fp8("hybrid", recipe), "mixtral", True), recipe)


def check_contract(result: dict[str, Any], recipe: str) -> None:
    assert max(result["drifts"]) == 0.0, result
    assert result["repeats"], "passes outside a step left a trace"
    assert result["repeats_gradient"] == 0.0
    # A frozen scale acts on each element alone; a tensor's own maximum depends on which responses share a microbatch.
    assert result["cosine"] > (0.999 if recipe == "delayed" else 0.97), result


def test_delayed_scaling_left_to_itself_drifts(te_pool: RankPool):
    result = one(te_pool, "contract_without_holding", fp8("hybrid", "delayed"))
    assert max(result["drifts"]) > 1e-3, result
    check_contract(one(te_pool, "contract", fp8("hybrid", "delayed")), "delayed")


def test_weights_that_are_not_made_anew_would_be_seen(te_pool: RankPool):
    """Passes of another kind, or before an update, made them."""
    fresh = one(te_pool, "contract", fp8("hybrid", "tensorwise"))
    stale = one(te_pool, "contract_with_stale_weights", fp8("hybrid", "tensorwise"))
    assert stale["logps"] != fresh["logps"]


IN_FP8 = {"fp8_param_gather": True}


@pytest.mark.parametrize(
    ("precision", "sharded"),
    [
        ({"bf16": True}, False),
        ({"bf16": True}, True),
        (fp8("hybrid", "delayed"), False),
        (fp8("hybrid", "delayed"), True),
        (fp8("hybrid", "delayed") | IN_FP8, True),
        (fp8("hybrid", "tensorwise") | IN_FP8, True),
    ],
    ids=["bf16", "bf16 distopt", "delayed", "delayed distopt", "delayed, FP8 weights", "tensorwise, FP8 weights"],
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    te_pool: RankPool, tmp_path: Path, precision: dict[str, Any], sharded: bool
):
    """Bit by bit, with its own Adam, and the scales that the layers keep."""
    result = one(te_pool, "resume", precision, str(tmp_path), sharded)
    assert result["whole"]["optimizer"] == "Transformer Engine's FusedAdam"
    assert result["resumed"] == result["whole"]


@pytest.fixture(scope="module")
def suite(te_pool: RankPool) -> dict[str, list[dict[str, Any]]]:
    (points,) = te_pool.run(1, te_runtime.call, "te_case", "suite_points", SUITE_PARTS, timeout=400)
    return points


SUITE_PARTS = ("groups-1b-fp8", "variants-1b", "lengths-1b", "fp8-gradients", "fp8-curve")


def test_the_gpu_suites_parts_with_fp8_measure(suite: dict[str, list[dict[str, Any]]]):
    points = [point for part in suite.values() for point in part]
    assert [point["error"] for point in points if "error" in point] == []
    assert {point["refused"] for point in points if "refused" in point} == {
        "its blocks have no stand-in here",
        "CUDA graphs need a GPU, and the device is the CPU",
    }
    variants = {point["variant"]: point for point in suite["variants-1b"] if "refused" not in point}
    wanted = {"TE layers, packed", "FP8 tensorwise", "FP8 delayed", "full recomputation"}
    assert wanted | {"FP8 tensorwise, weights in FP8"} <= variants.keys()
    assert all(point["score_drift"] == 0.0 for point in variants.values())


def test_fp8_gradients_point_where_those_of_fp32_do(suite: dict[str, list[dict[str, Any]]]):
    rows = [point for point in suite["fp8-gradients"] if "objective" in point]
    of_fp8 = [row for row in rows if row["precision"].startswith("fp8")]
    assert {row["precision"] for row in of_fp8} == {"fp8-tensorwise", "fp8-delayed"}
    for row in of_fp8:
        assert 0.99 < row["gradient_cosine"] < 0.99999, row
        assert row["coefficient_error"] < 0.02, row
        assert not row["drift"], row
    assert {point["inside"] for point in suite["fp8-curve"] if "inside" in point} == {True}


def test_experts_keep_their_scales_on_every_layout(te_pool: RankPool, tmp_path: Path):
    """A checkpoint is cut expert by expert; each has its own scales wherever it is loaded."""
    arguments = ("te_case", "expert_scales", str(tmp_path))
    (saved,) = te_pool.run(1, te_runtime.call, *arguments, True, {})
    assert len({str(scales) for scales in saved.values()}) > len(saved) / 2, "scales that are alike show nothing"
    assert te_pool.run(1, te_runtime.call, *arguments, False, {}) == [saved]
    halves = te_pool.run(2, te_runtime.call, *arguments, False, {"expert_model_parallel_size": 2})
    assert halves[0] | halves[1] == saved


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
@pytest.mark.parametrize(
    ("family", "num_ranks", "parallel"),
    [
        (None, 1, {}),
        (None, 2, {}),
        (None, 2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 100_000}),
        (None, 4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (None, 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        ("mixtral", 2, {"expert_model_parallel_size": 2}),
    ],
    ids=["one rank", "DP2", "DP2 overlap", "TP2 SP DP2", "PP2 VPP2", "EP2"],
)
def test_weights_kept_in_fp8_are_those_of_a_run_that_keeps_them_in_bf16(
    te_pool: RankPool, recipe: str, family: str | None, num_ranks: int, parallel: dict[str, Any]
):
    """Log-probabilities, digests and what a validation pass sees, bit by bit over three updates."""
    precisions = (fp8("hybrid", recipe), fp8("hybrid", recipe) | IN_FP8)
    runs = [te_pool.run(num_ranks, te_runtime.call, "te_case", "fp8_steps", p, family, parallel) for p in precisions]
    for wanted, found in zip(*runs, strict=True):
        assert found["same"] == wanted["same"]
        assert all(drift == 0.0 for _, drift, *_ in found["same"]["steps"])
        assert found["same"]["replicas"] is None
        assert wanted["quantized"] == 0 < found["quantized"]
        assert found["bytes"] < 0.6 < wanted["bytes"] == 1.0


def test_a_stage_whose_layers_are_all_in_bf16_keeps_no_weights_in_fp8(te_pool: RankPool):
    precision = fp8("hybrid", "tensorwise") | {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2}
    arguments = (None, {"pipeline_model_parallel_size": 2})
    runs = [
        te_pool.run(2, te_runtime.call, "te_case", "fp8_steps", precision | kept, *arguments) for kept in ({}, IN_FP8)
    ]
    for wanted, found in zip(*runs, strict=True):
        assert found["same"] == wanted["same"]
    assert [stage["quantized"] > 0 for stage in runs[1]] == [False, True]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_a_checkpoint_of_weights_kept_in_fp8_holds_what_they_were_rounded_from(
    te_pool: RankPool, tmp_path: Path, recipe: str
):
    """Loaded into either kind of run, on another layout and with another history of scales, it goes on alike."""
    arguments = ("te_case", "fp8_steps")
    in_fp8 = fp8("hybrid", recipe) | IN_FP8
    (saved, _) = te_pool.run(2, te_runtime.call, *arguments, in_fp8, None, {}, None, str(tmp_path))
    history = {"fp8_amax_history_len": 4} if recipe == "delayed" else {}
    wanted, found = (
        one(te_pool, "fp8_steps", fp8("hybrid", recipe) | history | kept, None, {}, str(tmp_path))
        for kept in ({}, IN_FP8)
    )
    assert wanted["same"]["loaded"] == saved["same"]["digest"] != saved["same"]["initial"]
    assert found["same"] == wanted["same"]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_weights_kept_in_fp8_start_from_a_hugging_face_model(te_pool: RankPool, tmp_path: Path, recipe: str):
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(decoder("LlamaConfig", **sizes)).bfloat16().save_pretrained(tmp_path)
    arguments = (None, {"tensor_model_parallel_size": 2}, str(tmp_path))
    runs = [
        te_pool.run(2, te_runtime.call, "te_case", "fp8_steps", fp8("hybrid", recipe) | kept, *arguments)
        for kept in ({}, IN_FP8)
    ]
    for wanted, found in zip(*runs, strict=True):
        assert found["same"] == wanted["same"]
        assert found["same"]["loaded"] != found["same"]["initial"]


def test_replicas_of_weights_kept_in_fp8_are_compared_bit_by_bit(te_pool: RankPool):
    precision = fp8("hybrid", "tensorwise") | IN_FP8
    for equal, byte, scale in te_pool.run(2, te_runtime.call, "te_case", "altered_replicas", precision):
        assert equal is None
        assert "decoder.layers.0.self_attention.linear_proj.weight" in byte
        assert "on rank 0; " in byte
        assert "on rank 1" in scale


def test_a_reference_takes_the_place_of_weights_kept_in_fp8(te_pool: RankPool):
    wanted, found = (one(te_pool, "swapped_steps", fp8("hybrid", "tensorwise") | kept) for kept in ({}, IN_FP8))
    assert found == wanted
    assert found["reference"] == found["initial"] != found["digest"]
    policy, reference, again, moved, still, _ = found["scores"]
    assert policy == again != moved
    assert reference == still != policy
