"""Runs on ranks where ``te_runtime.start()`` has been called: policies of Transformer Engine's layers on the CPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import two_pass_case
from fused_layers import FAMILIES
from layout_case import LayoutCase
from layout_run import RankResult, run_case
from megatron.core.transformer.module import MegatronModule
from two_pass_case import MODEL, Case, Runner, agreement, one_rank

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.mcore import kernels, te_fp8

_EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2}
ALL: dict[str, dict[str, Any]] = FAMILIES | {
    "mixtral": FAMILIES["mistral"] | _EXPERTS,
    "qwen3-moe": FAMILIES["qwen3"] | _EXPERTS | {"moe_layer_freq": (1, 0, 1, 1), "moe_router_pre_softmax": True},
    "olmoe": FAMILIES["llama"] | _EXPERTS | {"qk_layernorm": True, "qk_layernorm_across_heads": True},
}
UNFUSED = {"attention_backend": "unfused"}
"""Its attention that is written in PyTorch."""


@contextmanager
def layers_allowed_on_a_cpu() -> Iterator[None]:
    """Only the device speaks against them."""
    plain = kernels._why_local

    def why_local(model: ModelConfig, device: Any, *rest: Any) -> str | None:
        return plain(model, torch.device("cuda"), *rest)

    kernels._why_local = why_local
    try:
        yield
    finally:
        kernels._why_local = plain


def sized(family: str) -> dict[str, Any]:
    """A family's model in sizes that FP8 takes."""
    plain = {"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True}
    sizes = {name: MODEL[name] for name in ("hidden_size", "ffn_hidden_size", "kv_channels")}
    experts = {"moe_ffn_hidden_size": 128} if "num_moe_experts" in ALL[family] else {}
    return plain | ALL[family] | sizes | experts


def both_specs(family: str, packed: bool) -> dict[str, float]:
    """How far Transformer Engine's layers are from the local ones in log-probabilities and gradient."""
    results = []
    for impl in ("local", "transformer_engine"):
        with one_rank("cpu") as ranks, layers_allowed_on_a_cpu():
            kernel = UNFUSED if impl == "transformer_engine" else {}
            runner = Runner(Case(model=sized(family), precision=kernel, transformer_impl=impl, packed=packed), ranks)
            assert runner.policy.transformer_impl == impl
            outcome = runner.step()
            modules = {type(module).__module__ for module in runner.policy.chunks[0].modules()}
            assert any("transformer_engine" in name for name in modules) == (impl == "transformer_engine")
            results.append((outcome.logps_R, runner.gradient(), runner.policy.weights_digest()))
    (local_R, local, local_digest), (fused_R, fused, fused_digest) = results
    assert local_digest == fused_digest, "other names, shapes or initial weights"
    return {"logps": float((fused_R - local_R).abs().max()), "gradient": agreement(fused, local)[1]}


def layout(case: LayoutCase) -> RankResult:
    """A case of the layout matrix in its layers."""
    with layers_allowed_on_a_cpu():
        for name in two_pass_case.ATTENTION_VARIABLES:
            os.environ.pop(name, None)
        return run_case(dataclasses.replace(case, precision=UNFUSED | dict(case.precision)))


def contract(precision: Mapping[str, Any], family: str | None = None, packed: bool = False) -> dict[str, Any]:
    """The two passes with FP8, as the GPU tests make them."""
    with layers_allowed_on_a_cpu():
        model = {} if family is None else sized(family)
        return two_pass_case.contract("cpu", UNFUSED | dict(precision), model=model, packed=packed)


def contract_without_holding(precision: Mapping[str, Any]) -> dict[str, Any]:
    """The same, left to what Transformer Engine does by itself."""
    held, kept = te_fp8._held_update, dict(vars(te_fp8.TransformerEngineState))
    if held is not None:
        te_fp8._manager().reduce_and_update_fp8_tensors = held
    try:
        for name, answer in (("hold", None), ("advance", None), ("is_fresh", False)):
            setattr(te_fp8.TransformerEngineState, name, lambda _self, answer=answer: answer)
        return contract(precision)
    finally:
        for name in ("hold", "advance", "is_fresh"):
            setattr(te_fp8.TransformerEngineState, name, kept[name])
        te_fp8._held_update = None
        te_fp8.TransformerEngineState([], recipe="delayed", device=torch.device("cpu")).hold()


def contract_with_stale_weights(precision: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with FP8 weights that neither the package nor Megatron's schedules have made anew."""
    state, module = te_fp8.TransformerEngineState, MegatronModule
    kept = state.forget_weights, module.set_is_first_microbatch
    state.forget_weights = module.set_is_first_microbatch = lambda _self: None  # type: ignore[method-assign]
    try:
        return contract(precision)
    finally:
        state.forget_weights, module.set_is_first_microbatch = kept  # type: ignore[method-assign]
