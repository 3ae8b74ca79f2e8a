"""FP8 over Transformer Engine's real autocast, modules and scaling state, with PyTorch for kernels (te_runtime.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_examples import decoder
from te_pool import TePool

RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]


def fp8(format_: str, recipe: str) -> dict[str, Any]:
    return {"bf16": True, "fp8_format": format_, "fp8_recipe": recipe}


def slow(*values: Any) -> Any:
    """A case of ``make test-slow``."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.costly
def test_casts_of_blocks_are_those_that_transformer_engine_reads(te_pool: TePool):
    """By rows and by columns, with edges that fill no block, as a weight and as activations."""
    for recipe in ("blockwise", "mxfp8"):
        for gap, read, other in te_pool.one("casts_of_blocks", {"fp8_recipe": recipe}):
            assert gap < 2**-4, "e4m3 keeps four bits"
            assert read is None or read == 0.0, "its own reader sees other numbers"
            assert other < 2**-4


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": FULL,
    "attention recomputed": {"recompute_granularity": "selective"},
    "gradients accumulated by the products": {"gradient_accumulation_fusion": True},
}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
SETTINGS: dict[str, tuple[int, dict[str, Any], str | None, bool]] = {
    "one rank": (1, {}, None, False),
    "experts": (1, {}, "mixtral", True),
    "TP2 SP": (2, TP2_SP, None, False),
    "CP2": (2, CP2, None, False),
    "CP2 packed": (2, CP2, None, True),
}
"""Ranks, parallel section, family, packed. Maxima are those of all tensor-parallel ranks, so that these scale alike;
context-parallel ones have their ring attention between products in FP8; an expert's tokens are padded, and it may have
none."""
FORMATS = ["hybrid", "e4m3"]
PAIRWISE = {
    (setting, recipe, list(OPTIONS)[(i + j) % 4], FORMATS[(i + j // 2) % 2])
    for i, setting in enumerate(SETTINGS)
    for j, recipe in enumerate(RECIPES)
}
"""Every two of setting, recipe, option and format meet."""


def contracts() -> Iterator[Any]:
    for case in itertools.product(SETTINGS, RECIPES, OPTIONS, FORMATS):
        yield pytest.param(*case, marks=[] if case in PAIRWISE else [pytest.mark.slow], id=", ".join(case))


def test_the_default_cases_are_pairwise():
    columns = (list(SETTINGS), RECIPES, list(OPTIONS), FORMATS)
    for (i, one), (j, other) in itertools.combinations(enumerate(columns), 2):
        assert {(case[i], case[j]) for case in PAIRWISE} == set(itertools.product(one, other))


@pytest.mark.parametrize(("setting", "recipe", "option", "format_"), contracts())
def test_both_passes_see_one_function(te_pool: TePool, setting: str, recipe: str, option: str, format_: str):
    num_ranks, parallel, family, packed = SETTINGS[setting]
    precision = fp8(format_, recipe) | OPTIONS[option]
    if "context_parallel_size" in parallel:
        precision |= {"attention_backend": "fused"}
    for result in te_pool.run(num_ranks, "contract", precision, family, packed, parallel):
        check_contract(result, recipe)


def test_first_and_last_layers_in_bf16_keep_the_contract(te_pool: TePool):
    options = {"first_last_layers_bf16": True}
    check_contract(te_pool.one("contract", fp8("hybrid", "tensorwise") | options, None, False, None, 3), "tensorwise")


def check_contract(result: dict[str, Any], recipe: str) -> None:
    assert max(result["drifts"]) == 0.0, result
    assert result["repeats"], "passes outside a step left a trace"
    assert result["repeats_gradient"] == 0.0
    # A frozen scale acts on each element alone; a tensor's own maximum depends on which responses share a microbatch.
    assert result["cosine"] > (0.999 if recipe == "delayed" else 0.97), result


@pytest.mark.costly
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
        slow({"bf16": True}, False),
        ({"bf16": True}, True),
        (fp8("hybrid", "delayed"), False),
        slow(fp8("hybrid", "delayed"), True),
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


@pytest.mark.parametrize(
    ("recipe", "kept"), [("delayed", True), ("tensorwise", False), slow("delayed", False), slow("tensorwise", True)]
)
@pytest.mark.costly
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


@pytest.mark.costly
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


@pytest.mark.costly
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


WEIGHTS: dict[str, tuple[str | None, int, dict[str, Any]]] = {
    "one rank": (None, 1, {}),
    "DP2 overlap": (None, 2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 100_000}),
    "TP2 SP DP2": (None, 4, TP2_SP),
    "PP2 VPP2": (None, 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "EP2": ("mixtral", 2, {"expert_model_parallel_size": 2}),
}
MEET = [("DP2 overlap", "tensorwise"), ("TP2 SP DP2", "delayed"), ("PP2 VPP2", "blockwise"), ("EP2", "tensorwise")]


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        (layout, recipe) if layout == "one rank" or (layout, recipe) in MEET else slow(layout, recipe)
        for layout in WEIGHTS
        for recipe in RECIPES[:3]
    ],
)
def test_weights_kept_in_fp8_are_those_of_a_run_that_keeps_them_in_bf16(te_pool: TePool, layout: str, recipe: str):
    """Log-probabilities, digests and what a validation pass sees, bit by bit over three updates."""
    family, num_ranks, parallel = WEIGHTS[layout]
    precisions = (fp8("hybrid", recipe), fp8("hybrid", recipe) | IN_FP8)
    runs = [te_pool.run(num_ranks, "te_weights.fp8_steps", p, family, parallel) for p in precisions]
    for wanted, found in zip(*runs, strict=True):
        assert found["same"] == wanted["same"]
        assert all(drift == 0.0 for _, drift, *_ in found["same"]["steps"])
        assert found["same"]["replicas"] is None
        assert wanted["quantized"] == 0 < found["quantized"]
        assert found["bytes"] < 0.6 < wanted["bytes"] == 1.0


@pytest.mark.costly
def test_a_stage_whose_layers_are_all_in_bf16_keeps_no_weights_in_fp8(te_pool: TePool):
    precision = fp8("hybrid", "tensorwise") | {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2}
    arguments = (None, {"pipeline_model_parallel_size": 2})
    runs = [te_pool.run(2, "te_weights.fp8_steps", precision | kept, *arguments) for kept in ({}, IN_FP8)]
    for wanted, found in zip(*runs, strict=True):
        assert found["same"] == wanted["same"]
    assert [stage["quantized"] > 0 for stage in runs[1]] == [False, True]


@pytest.mark.parametrize("recipe", ["delayed", slow("tensorwise"), "blockwise"])
@pytest.mark.costly
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


@pytest.mark.parametrize("recipe", ["delayed", slow("tensorwise")])
@pytest.mark.costly
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
@pytest.mark.costly
def test_a_reference_takes_the_place_of_weights_kept_in_fp8(te_pool: TePool, recipe: str):
    wanted, found = (te_pool.one("te_weights.swapped_steps", fp8("hybrid", recipe) | kept) for kept in ({}, IN_FP8))
    assert found == wanted
    assert found["reference"] == found["initial"] != found["digest"]
    policy, reference, again, moved, still, _ = found["scores"]
    assert policy == again != moved
    assert reference == still != policy
