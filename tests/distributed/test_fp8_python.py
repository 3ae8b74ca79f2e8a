"""FP8 over Transformer Engine's real autocast, modules and scaling state, with PyTorch for kernels (te_runtime.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_examples import decoder
from te_pool import TePool

RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]


def fp8(format_: str, recipe: str) -> dict[str, Any]:
    return {"bf16": True, "fp8_format": format_, "fp8_recipe": recipe}


def test_casts_of_blocks_are_those_that_transformer_engine_reads(te_pool: TePool):
    """By rows and by columns, with edges that fill no block, as a weight and as activations."""
    for recipe in ("blockwise", "mxfp8"):
        for gap, read, other in te_pool.one("casts_of_blocks", {"fp8_recipe": recipe}):
            assert gap < 2**-4, "e4m3 keeps four bits"
            assert read is None or read == 0.0, "its own reader sees other numbers"
            assert other < 2**-4


@pytest.mark.parametrize("format_", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_both_passes_see_one_function(te_pool: TePool, format_: str, recipe: str):
    check_contract(te_pool.one("contract", fp8(format_, recipe)), recipe)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "options",
    [FULL, {"recompute_granularity": "selective"}, {"gradient_accumulation_fusion": True}],
    ids=["recomputed", "attention recomputed", "gradients accumulated by the products"],
)
def test_options_keep_the_contract(te_pool: TePool, recipe: str, options: dict[str, Any]):
    check_contract(te_pool.one("contract", fp8("hybrid", recipe) | options), recipe)


def test_first_and_last_layers_in_bf16_keep_the_contract(te_pool: TePool):
    options = {"first_last_layers_bf16": True}
    check_contract(te_pool.one("contract", fp8("hybrid", "tensorwise") | options), "tensorwise")


@pytest.mark.parametrize("recipe", RECIPES)
def test_tensor_parallel_ranks_keep_the_contract(te_pool: TePool, recipe: str):
    """Maxima are those of all ranks, so that the ranks scale alike."""
    arguments = (fp8("hybrid", recipe), None, False, {"tensor_model_parallel_size": 2, "sequence_parallel": True})
    results = te_pool.run(2, "contract", *arguments)
    for result in results:
        check_contract(result, recipe)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_context_parallel_ranks_keep_the_contract(te_pool: TePool, recipe: str, packed: bool):
    """Its ring attention between products in FP8."""
    precision = fp8("hybrid", recipe) | {"attention_backend": "fused"}
    for result in te_pool.run(2, "contract", precision, None, packed, {"context_parallel_size": 2}):
        check_contract(result, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_keep_the_contract(te_pool: TePool, recipe: str):
    """Their tokens are padded expert by expert, and an expert may have none."""
    check_contract(te_pool.one("contract", fp8("hybrid", recipe), "mixtral", True), recipe)


def check_contract(result: dict[str, Any], recipe: str) -> None:
    assert max(result["drifts"]) == 0.0, result
    assert result["repeats"], "passes outside a step left a trace"
    assert result["repeats_gradient"] == 0.0
    # A frozen scale acts on each element alone; a tensor's own maximum depends on which responses share a microbatch.
    assert result["cosine"] > (0.999 if recipe == "delayed" else 0.97), result


def test_delayed_scaling_left_to_itself_drifts(te_pool: TePool):
    result = te_pool.one("contract_without_holding", fp8("hybrid", "delayed"))
    assert max(result["drifts"]) > 1e-3, result
    check_contract(te_pool.one("contract", fp8("hybrid", "delayed")), "delayed")


def test_weights_that_are_not_made_anew_would_be_seen(te_pool: TePool):
    """Passes of another kind, or before an update, made them."""
    fresh = te_pool.one("contract", fp8("hybrid", "tensorwise"))
    stale = te_pool.one("contract_with_stale_weights", fp8("hybrid", "tensorwise"))
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
        (fp8("e4m3", "blockwise") | IN_FP8, True),
    ],
    ids=["bf16", "bf16 distopt", "delayed", "delayed distopt", *(f"{recipe}, FP8 weights" for recipe in RECIPES[:3])],
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    te_pool: TePool, tmp_path: Path, precision: dict[str, Any], sharded: bool
):
    """Bit by bit, with its own Adam, and the scales that the layers keep."""
    result = te_pool.one("resume", precision, str(tmp_path), sharded)
    assert result["whole"]["optimizer"] == "Transformer Engine's FusedAdam"
    assert result["resumed"] == result["whole"]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
@pytest.mark.parametrize("kept", [True, False], ids=["then kept in FP8", "no longer kept"])
def test_a_resumed_run_may_keep_its_weights_otherwise(te_pool: TePool, tmp_path: Path, recipe: str, kept: bool):
    """With its optimizer's state, bit by bit."""
    before, after = (
        fp8("hybrid", recipe) | {"fp8_param_gather": not kept},
        fp8("hybrid", recipe) | {"fp8_param_gather": kept},
    )
    result = te_pool.one("resume", before, str(tmp_path), True, after)
    assert result["resumed"] == result["whole"]


@pytest.fixture(scope="module")
def suite(te_pool: TePool) -> dict[str, list[dict[str, Any]]]:
    (points,) = te_pool.run(1, "suite_points", SUITE_PARTS, SUITE_SIZES, timeout=400)
    return points


SUITE_PARTS = ("groups-1b-fp8", "variants-1b", "lengths-1b", "fp8-gradients", "fp8-curve")
SUITE_SIZES = {"hidden_size": 128, "ffn_hidden_size": 128}  # whole blocks


def test_the_gpu_suites_parts_with_fp8_measure(suite: dict[str, list[dict[str, Any]]]):
    points = [point for part in suite.values() for point in part]
    assert [point["error"] for point in points if "error" in point] == []
    assert {point["refused"] for point in points if "refused" in point} == {
        "of another generation than the one that is pretended",
        "CUDA graphs need a GPU, and the device is the CPU",
    }
    variants = {point["variant"]: point for point in suite["variants-1b"] if "refused" not in point}
    wanted = {"TE layers, packed", "FP8 tensorwise", "FP8 delayed", "FP8 blockwise", "full recomputation"}
    assert wanted | {"FP8 tensorwise, weights in FP8"} <= variants.keys()
    assert all(point["score_drift"] == 0.0 for point in variants.values())


def test_fp8_gradients_point_where_those_of_fp32_do(suite: dict[str, list[dict[str, Any]]]):
    rows = [point for point in suite["fp8-gradients"] if "objective" in point]
    of_fp8 = [row for row in rows if row["precision"].startswith("fp8")]
    assert {row["precision"] for row in of_fp8} == {"fp8-tensorwise", "fp8-delayed", "fp8-blockwise"}
    for row in of_fp8:
        assert 0.98 < row["gradient_cosine"] < 0.99999, row
        assert row["coefficient_error"] < 0.02, row
        assert not row["drift"], row
    assert {point["inside"] for point in suite["fp8-curve"] if "inside" in point} == {True}


def test_experts_keep_their_scales_on_every_layout(te_pool: TePool, tmp_path: Path):
    """A checkpoint is cut expert by expert; each has its own scales wherever it is loaded."""
    arguments = ("expert_scales", str(tmp_path))
    (saved,) = te_pool.run(1, *arguments, True, {})
    assert len({str(scales) for scales in saved.values()}) > len(saved) / 2, "scales that are alike show nothing"
    assert te_pool.run(1, *arguments, False, {}) == [saved]
    halves = te_pool.run(2, *arguments, False, {"expert_model_parallel_size": 2})
    assert halves[0] | halves[1] == saved


@pytest.mark.parametrize("recipe", RECIPES[:3])
@pytest.mark.parametrize(
    ("family", "num_ranks", "parallel"),
    [
        (None, 1, {}),
        (None, 2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 100_000}),
        (None, 4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (None, 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        ("mixtral", 2, {"expert_model_parallel_size": 2}),
    ],
    ids=["one rank", "DP2 overlap", "TP2 SP DP2", "PP2 VPP2", "EP2"],
)
def test_weights_kept_in_fp8_are_those_of_a_run_that_keeps_them_in_bf16(
    te_pool: TePool, recipe: str, family: str | None, num_ranks: int, parallel: dict[str, Any]
):
    """Log-probabilities, digests and what a validation pass sees, bit by bit over three updates."""
    precisions = (fp8("hybrid", recipe), fp8("hybrid", recipe) | IN_FP8)
    runs = [te_pool.run(num_ranks, "te_weights.fp8_steps", p, family, parallel) for p in precisions]
    for wanted, found in zip(*runs, strict=True):
        assert found["same"] == wanted["same"]
        assert all(drift == 0.0 for _, drift, *_ in found["same"]["steps"])
        assert found["same"]["replicas"] is None
        assert wanted["quantized"] == 0 < found["quantized"]
        assert found["bytes"] < 0.6 < wanted["bytes"] == 1.0


def test_a_stage_whose_layers_are_all_in_bf16_keeps_no_weights_in_fp8(te_pool: TePool):
    precision = fp8("hybrid", "tensorwise") | {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2}
    arguments = (None, {"pipeline_model_parallel_size": 2})
    runs = [te_pool.run(2, "te_weights.fp8_steps", precision | kept, *arguments) for kept in ({}, IN_FP8)]
    for wanted, found in zip(*runs, strict=True):
        assert found["same"] == wanted["same"]
    assert [stage["quantized"] > 0 for stage in runs[1]] == [False, True]


@pytest.mark.parametrize("recipe", RECIPES[:3])
def test_a_checkpoint_of_weights_kept_in_fp8_holds_what_they_were_rounded_from(
    te_pool: TePool, tmp_path: Path, recipe: str
):
    """Loaded into either kind of run, on another layout and with another history of scales, it goes on alike."""
    arguments = ("te_weights.fp8_steps",)
    in_fp8 = fp8("hybrid", recipe) | IN_FP8
    (saved, _) = te_pool.run(2, *arguments, in_fp8, None, {}, None, str(tmp_path))
    history = {"fp8_amax_history_len": 4} if recipe == "delayed" else {}
    wanted, found = (
        te_pool.one("te_weights.fp8_steps", fp8("hybrid", recipe) | history | kept, None, {}, str(tmp_path))
        for kept in ({}, IN_FP8)
    )
    assert wanted["same"]["loaded"] == saved["same"]["digest"] != saved["same"]["initial"]
    assert found["same"] == wanted["same"]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_weights_kept_in_fp8_start_from_a_hugging_face_model(te_pool: TePool, tmp_path: Path, recipe: str):
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(decoder("LlamaConfig", **sizes)).bfloat16().save_pretrained(tmp_path)
    arguments = (None, {"tensor_model_parallel_size": 2}, str(tmp_path))
    runs = [te_pool.run(2, "te_weights.fp8_steps", fp8("hybrid", recipe) | kept, *arguments) for kept in ({}, IN_FP8)]
    for wanted, found in zip(*runs, strict=True):
        assert found["same"] == wanted["same"]
        assert found["same"]["loaded"] != found["same"]["initial"]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_replicas_of_weights_kept_in_fp8_are_compared_bit_by_bit(te_pool: TePool, recipe: str):
    precision = fp8("hybrid", recipe) | IN_FP8
    for equal, byte, scale in te_pool.run(2, "te_weights.altered_replicas", precision):
        assert equal is None
        assert "decoder.layers.0.self_attention.linear_proj.weight" in byte
        assert "on rank 0; " in byte
        assert "on rank 1" in scale


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_reference_takes_the_place_of_weights_kept_in_fp8(te_pool: TePool, recipe: str):
    wanted, found = (te_pool.one("te_weights.swapped_steps", fp8("hybrid", recipe) | kept) for kept in ({}, IN_FP8))
    assert found == wanted
    assert found["reference"] == found["initial"] != found["digest"]
    policy, reference, again, moved, still, _ = found["scores"]
    assert policy == again != moved
    assert reference == still != policy
