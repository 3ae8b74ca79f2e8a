"""Transformer Engine's layers on a GPU: against the local ones, packed against padded, and its fusions."""

from __future__ import annotations

from typing import Any

import pytest

# Two kernels' rounding, per token and of the gradient's norm. Not measured yet on a GPU; the numbers are printed.
LOGP_GAP, GRADIENT_GAP = 2e-2, 5e-2
# Of a mixture rounding sends some tokens to another expert. PyTorch for kernels, on the CPU: 0.054 and 0.050 at most.
MIXTURE_LOGP_GAP, MIXTURE_GRADIENT_GAP = 0.2, 0.2


FAMILIES = ["gpt2", "llama", "qwen3", "mistral", "olmo2", "olmo3", "gemma3", "mixtral", "qwen3-moe", "olmoe"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_its_layers_are_the_local_ones(transformer_engine: None, family: str, packed: bool):
    from fused_layers import sized
    from two_pass_case import Case, Runner, agreement, one_rank

    model = sized(family)
    results = []
    for impl in ("local", "transformer_engine"):
        with one_rank("cuda") as ranks:
            runner = Runner(Case(model=model, precision={"bf16": True}, transformer_impl=impl, packed=packed), ranks)
            assert runner.policy.transformer_impl == impl
            outcome = runner.step()
            results.append((outcome.logps_R.cpu(), runner.gradient(), runner.batch.num_tokens_R))
    (local_R, local, tokens_R), (fused_R, fused, _) = results
    gap = float(((fused_R - local_R).abs() / tokens_R).max())
    cosine, relative = agreement(fused, local)
    print(f"{family} packed={packed}: {gap:.2e} per token, gradient cosine {cosine:.6f}, relative {relative:.2e}")
    mixture = "num_moe_experts" in model
    assert gap < (MIXTURE_LOGP_GAP if mixture else LOGP_GAP)
    assert relative < (MIXTURE_GRADIENT_GAP if mixture else GRADIENT_GAP)


@pytest.mark.parametrize("backend", ["auto", "fused", "unfused", "local"])
def test_packed_is_padded_with_every_attention(transformer_engine: None, backend: str):
    from two_pass_case import packed_against_padded

    result = packed_against_padded("cuda", {"bf16": True, "attention_backend": backend}, "transformer_engine")
    print(f"{backend}: {result}")
    assert result["logp_gap"] < LOGP_GAP
    assert result["gap"] < GRADIENT_GAP


@pytest.mark.parametrize("option", ["gradient_accumulation_fusion", "apply_rope_fusion"])
@pytest.mark.parametrize("packed", [False, True])
def test_fusions_change_no_result(transformer_engine: None, option: str, packed: bool):
    from two_pass_case import Case, Runner, agreement, one_rank

    gradients: list[Any] = []
    for on in (False, True):
        with one_rank("cuda") as ranks:
            precision = {"bf16": True, option: on}
            runner = Runner(
                Case(model={}, precision=precision, transformer_impl="transformer_engine", packed=packed), ranks
            )
            runner.step()
            runner.step()  # a second time into the same buffers
            gradients.append(runner.gradient())
    cosine, relative = agreement(gradients[1], gradients[0])
    print(f"{option}: cosine {cosine:.6f}, relative {relative:.2e}")
    assert relative < GRADIENT_GAP


def test_packed_rows_are_cut_as_its_own_function_cuts_them(transformer_engine: None):
    import torch
    import transformer_engine_torch as tex

    from megatron_groupdpo.tensors import packed_positions_of_rank

    bounds = [0, 8, 32, 56, 120]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    for size in (2, 4):
        for rank in range(size):
            theirs = tex.thd_get_partitioned_indices(cu_seqlens, bounds[-1], size, rank)
            assert packed_positions_of_rank(bounds, rank, size).tolist() == theirs.tolist()


def test_its_fused_adam_is_taken(transformer_engine: None):
    from two_pass_case import Case, Runner, one_rank

    from megatron_groupdpo.mcore.passes.optimizer import optimizer_origin

    with one_rank("cuda") as ranks:
        runner = Runner(Case(model={}, precision={"bf16": True}), ranks)
        assert optimizer_origin(runner.updater.optimizer) == "Transformer Engine's FusedAdam"
