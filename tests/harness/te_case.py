"""Runs on ranks that came through ``te_runtime.call``: policies of Transformer Engine's layers on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import graph_case
import te_runtime
import torch
import two_pass_case
from fused_layers import sized
from layout_case import LayoutCase
from layout_run import RankResult, run_case
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from te_patches import UNFUSED, gathered_bucket_by_bucket, its_optimizer, layers_allowed_on_a_cpu
from two_pass_case import Case, Runner, agreement, one_rank

from megatron_groupdpo.mcore import host_device
from megatron_groupdpo.mcore.checkpoint.digest import parameter_names
from megatron_groupdpo.mcore.checkpoint.folders import Progress
from megatron_groupdpo.mcore.checkpoint.training import load_training, load_weights, save_checkpoint
from megatron_groupdpo.mcore.fp8 import state as te_fp8
from megatron_groupdpo.mcore.passes.optimizer import optimizer_origin


def both_specs(family: str, packed: bool) -> dict[str, float]:
    """How far Transformer Engine's layers are from the local ones in log-probabilities and gradient."""
    results = []
    for impl in ("local", "transformer_engine"):
        with one_rank("cpu") as ranks, layers_allowed_on_a_cpu():
            kernel = UNFUSED if impl == "transformer_engine" else {}
            runner = Runner(
                Case(model=sized(family, small=True), precision=kernel, transformer_impl=impl, packed=packed), ranks
            )
            assert runner.policy.transformer_impl == impl
            outcome = runner.step()
            modules = {type(module).__module__ for module in runner.policy.chunks[0].modules()}
            assert any("transformer_engine" in name for name in modules) == (impl == "transformer_engine")
            experts = {name for name in parameter_names(runner.policy.chunks[0]) if ".experts." in name}
            results.append((outcome.logps_R, runner.gradient(), runner.policy.weights_digest(), experts))
    (local_R, local, local_digest, local_experts), (fused_R, fused, fused_digest, fused_experts) = results
    assert local_experts == fused_experts, "messages name experts otherwise"
    assert local_digest == fused_digest, "other names, shapes or initial weights"
    return {"logps": float((fused_R - local_R).abs().max()), "gradient": agreement(fused, local)[1]}


def layout(case: LayoutCase) -> RankResult:
    """A case of the layout matrix in its layers."""
    with layers_allowed_on_a_cpu():
        return run_case(dataclasses.replace(case, precision=UNFUSED | dict(case.precision)))


def waits(case: LayoutCase) -> list[str]:
    """What makes the host wait in a step of its layers."""
    import test_no_sync

    with layers_allowed_on_a_cpu():
        return test_no_sync.waits(case)


def captured(case: LayoutCase) -> graph_case.Seen:
    """A case in its layers, as graphs."""
    with layers_allowed_on_a_cpu():
        return graph_case.captured(case)


def uncaptured(case: LayoutCase) -> RankResult:
    """The same microbatches in the layers themselves."""
    with layers_allowed_on_a_cpu():
        return graph_case.uncaptured(case)


def contract(
    precision: Mapping[str, Any],
    family: str | None = None,
    packed: bool = False,
    parallel: Mapping[str, Any] | None = None,
    num_layers: int = 2,
) -> dict[str, Any]:
    """The two passes with FP8, as the GPU tests make them."""
    with layers_allowed_on_a_cpu():
        model = {"num_layers": num_layers} if family is None else sized(family, small=True)
        how: dict[str, Any] = {"model": model, "packed": packed, "parallel": parallel, "num_steps": 2}
        return two_pass_case.contract("cpu", UNFUSED | dict(precision), **how)


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


def resume(
    precision: Mapping[str, Any], folder: str, sharded: bool, switched: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Three steps, and two saved with a third after a load: the last log-probabilities, and the weights after them.

    ``switched``: the third step's precision where it is another; gradients are then left unclipped, since the norm of
    FP8 weights is summed in another order.
    """
    with layers_allowed_on_a_cpu(), its_optimizer(), gathered_bucket_by_bucket():
        case = Case(model={}, precision=UNFUSED | dict(precision), parallel={"use_distributed_optimizer": sharded})
        then = case
        if switched is not None:
            case = dataclasses.replace(case, clip_grad=0.0)
            then = dataclasses.replace(case, precision=UNFUSED | dict(switched))
        whole = _steps(case, 3, load=None, save=None)
        _steps(case, 2, load=None, save=Path(folder))
        return {"whole": whole, "resumed": _steps(then, 1, load=Path(folder), save=None)}


def casts_of_blocks(precision: Mapping[str, Any]) -> list[tuple[float, float | None, float]]:
    """Of tensors of several shapes: the largest relative error of a cast by rows; how far Transformer Engine's own
    reader, where it has one in Python, is from the stand-in's; the error of the cast by columns."""
    import te_kernels
    import transformer_engine_torch as tex  # pyright: ignore[reportMissingImports]
    from te_blocks import plain_blocks
    from transformer_engine.pytorch.tensor import (  # pyright: ignore[reportMissingImports]
        Float8BlockQuantizer,
        MXFP8Quantizer,
    )

    host_device.activate()
    dtype, both = tex.DType.kFloat8E4M3, {"rowwise": True, "columnwise": True}
    quantizers: list[tuple[Any, tuple[int, ...]]] = [(MXFP8Quantizer(dtype, **both), (2, 32, 96))]
    if precision["fp8_recipe"] == "blockwise":
        quantizers = [
            (Float8BlockQuantizer(dtype, block_scaling_dim=2, **both), (200, 144)),
            (Float8BlockQuantizer(dtype, block_scaling_dim=1, **both), (3, 70, 144)),
            (Float8BlockQuantizer(dtype, block_scaling_dim=1, all_gather_usage=True, **both), (2, 128, 256)),
        ]
    torch.manual_seed(0)
    found = []
    for quantizer, shape in quantizers:
        x = torch.randn(shape)
        cast = te_kernels.quantize(x, quantizer)
        rows, columns = (plain_blocks(cast, torch.float8_e4m3fn, columnwise=side) for side in (False, True))
        read = None
        if precision["fp8_recipe"] == "blockwise":
            read = float((cast.dequantize() - rows).abs().max())
            if not quantizer.all_gather_usage and quantizer.block_scaling_dim == 1:
                cast.update_usage(rowwise_usage=False, columnwise_usage=True)
                read = max(read, float((cast.dequantize() - columns).abs().max()))
        normal = x.abs() > 2**-3  # below, a block's scale may leave fewer bits
        errors = [float(((side - x).abs() / x.abs())[normal].max()) for side in (rows, columns)]
        assert rows.shape == columns.shape == x.shape
        found.append((errors[0], read, errors[1]))
    return found


def expert_scales(folder: str, save: bool, parallel: Mapping[str, Any]) -> dict[str, Any]:
    """Delayed scales of each expert, by its number: after a step that is saved, or as loaded on a layout."""
    precision = UNFUSED | {"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "delayed"}
    case = Case(model=sized("mixtral", small=True), precision=precision, packed=True, parallel=parallel)
    with layers_allowed_on_a_cpu(), one_rank("cpu", **parallel) as ranks:
        runner = Runner(case, ranks)
        policy = runner.policy
        if save:
            runner.step()
            save_checkpoint(Path(folder), policy.chunks, progress=Progress(), model=policy.identity, config={})
        else:
            load_weights(Path(folder) / "iter_0000000", policy.chunks, model=policy.identity)
        found = {}
        for name, module in policy.chunks[0].named_modules():
            if name.endswith(("experts.linear_fc1", "experts.linear_fc2")):
                first = parallel_state.get_expert_model_parallel_rank() * module.num_gemms
                for key, count in (("scaling_fwd", 3), ("scaling_bwd", 2)):
                    state = module.fp8_meta[key]
                    scales = torch.cat([state.scale[None], state.amax_history]).unflatten(-1, (-1, count))
                    for expert in range(module.num_gemms):
                        found[name, key, first + expert] = scales[:, expert].tolist()
        return found


def _steps(case: Case, num_steps: int, *, load: Path | None, save: Path | None) -> dict[str, Any]:
    with one_rank("cpu") as ranks:
        runner = Runner(case, ranks)
        policy, updater = runner.policy, runner.updater
        if load is not None:
            load_training(
                load / "iter_0000000", policy.chunks, updater.optimizer, updater.schedule, model=policy.identity
            )
        for _ in range(num_steps):
            outcome = runner.step()
            updater.step(runner.batch.num_groups)
        if save is not None:
            save_checkpoint(
                save,
                policy.chunks,
                progress=Progress(),
                model=policy.identity,
                config={},
                optimizer=updater.optimizer,
                schedule=updater.schedule,
            )
        return {
            "logps": outcome.logps_R.tolist(),
            "digest": policy.weights_digest(),
            "optimizer": optimizer_origin(updater.optimizer),
        }


def suite_points(names: Sequence[str], sizes: Mapping[str, Any] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Parts of the GPU suite on toy sizes, or on ``sizes``, in its layers, with the recipes of one generation."""
    import gpu_step
    from gpu_context import Context
    from gpu_parts import PARTS

    kept = gpu_step.refusal, dict(gpu_step._TINY)

    def refusal(setting: gpu_step.Setting, context: Context) -> str | None:
        if setting.cuda_graphs:
            return kept[0](setting, context)
        newer = torch.cuda.get_device_capability()[0] >= te_runtime.BLACKWELL
        wrong = setting.precision.startswith("fp8-") and (setting.precision == "fp8-mxfp8") != newer
        return "of another generation than the one that is pretended" if wrong else None

    gpu_step.refusal = refusal
    gpu_step._TINY |= sizes or {}
    context = Context(device="cpu", tiny=True, output=Path())
    try:
        with layers_allowed_on_a_cpu(), its_optimizer(), gathered_bucket_by_bucket():
            return {name: list(PARTS[name].run(context)) for name in names}
    finally:
        gpu_step.refusal, gpu_step._TINY = kept[0], kept[1]
