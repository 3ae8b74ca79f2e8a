"""Runs on ranks that came through ``te_runtime.call``: policies of Transformer Engine's layers on the CPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import graph_case
import te_runtime
import torch
import two_pass_case
from fused_layers import sized
from layout_case import LayoutCase
from layout_run import RankResult, run_case
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.transformer.module import MegatronModule
from two_pass_case import Case, Runner, agreement, one_rank

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.convert.hf_model import is_hf_folder, open_hf_model
from megatron_groupdpo.convert.weights import load_hf_weights
from megatron_groupdpo.mcore import host_device, kernels, te_fp8
from megatron_groupdpo.mcore.checkpoint import Progress, load_training, load_weights, save_checkpoint
from megatron_groupdpo.mcore.digest import differing_replicas, parameter_names
from megatron_groupdpo.mcore.fp8_weights import raw_parts, reload_masters
from megatron_groupdpo.mcore.optimizer import optimizer_origin
from megatron_groupdpo.mcore.swapped import swapped_reference

UNFUSED = {"attention_backend": "unfused"}
"""Its attention that is written in PyTorch."""


@contextmanager
def layers_allowed_on_a_cpu() -> Iterator[None]:
    """Only the device speaks against them."""
    plain = kernels._why_local
    for name in two_pass_case.ATTENTION_VARIABLES:  # of the model before
        os.environ.pop(name, None)

    def why_local(model: ModelConfig, device: Any, *rest: Any) -> str | None:
        return plain(model, torch.device("cuda"), *rest)

    kernels._why_local = why_local
    try:
        yield
    finally:
        kernels._why_local = plain


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
) -> dict[str, Any]:
    """The two passes with FP8, as the GPU tests make them."""
    with layers_allowed_on_a_cpu():
        model = {} if family is None else sized(family)
        return two_pass_case.contract("cpu", UNFUSED | dict(precision), model=model, packed=packed, parallel=parallel)


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


@contextmanager
def gathered_bucket_by_bucket() -> Iterator[None]:
    """Weights of several number formats: NCCL gathers them in one call, gloo would take all for the first one's."""
    from megatron.core.distributed import param_and_grad_buffer as file

    group = file._ParamAndGradBucketGroup
    plain_sync, plain_gather, plain_manager = (
        group.start_param_sync,
        file.dist_all_gather_func,
        file._coalescing_manager,
    )

    @contextmanager
    def each_by_itself(_group: Any, async_ops: bool = False) -> Iterator[Any]:
        works: list[Any] = []
        file.dist_all_gather_func = lambda *a, async_op, **k: works.append(plain_gather(*a, async_op=True, **k))
        manager = SimpleNamespace(wait=lambda: [work.wait() for work in works])
        try:
            yield manager
        finally:
            file.dist_all_gather_func = plain_gather
        if not async_ops:
            manager.wait()

    def sync(self: Any, force_sync: bool = False) -> None:
        file._coalescing_manager = each_by_itself
        try:
            plain_sync(self, force_sync)
        finally:
            file._coalescing_manager = plain_manager

    group.start_param_sync = sync  # type: ignore[method-assign]
    try:
        yield
    finally:
        group.start_param_sync = plain_sync  # type: ignore[method-assign]


def fp8_steps(
    precision: Mapping[str, Any],
    family: str | None,
    parallel: Mapping[str, Any],
    load: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    """Three steps, by weights of ``load`` where given: log-probabilities, digests, what is held of the weights."""
    parallel = {"use_distributed_optimizer": True} | dict(parallel)
    layers = 4 if "pipeline_model_parallel_size" in parallel else 2
    model = {"num_layers": layers} if family is None else sized(family)
    if load is not None and is_hf_folder(Path(load)):
        model = dataclasses.asdict(open_hf_model(Path(load)).model)
        del model["transformer_impl"]
    case = Case(
        model=model,
        precision=UNFUSED | dict(precision),
        packed=family is not None,
        parallel=parallel,
        clip_grad=0.0,  # the norm is summed buffer by buffer, and FP8 weights have one of their own
    )
    with layers_allowed_on_a_cpu(), gathered_bucket_by_bucket(), one_rank("cpu", **parallel) as ranks:
        runner = Runner(case, ranks)
        result = _steps_of(runner, load)
        if save is not None:
            policy = runner.policy
            save_checkpoint(Path(save), policy.chunks, progress=Progress(), model=policy.identity, config={})
        return result


def _steps_of(runner: Runner, load: str | None) -> dict[str, Any]:
    policy, updater = runner.policy, runner.updater
    found: dict[str, Any] = {"initial": policy.weights_digest()}
    if load is not None:
        if is_hf_folder(Path(load)):
            load_hf_weights(Path(load), policy)
        else:
            load_weights(Path(load) / "iter_0000000", policy.chunks, model=policy.identity)
        reload_masters(policy.chunks, updater.optimizer)
        found["loaded"] = policy.weights_digest()
    found["steps"] = []
    for _ in range(3):
        runner.engine.calibrate(runner.passes_of_this_stage)
        with runner.engine.step():
            outcome = runner.passes_of_this_stage()
        assert updater.step(runner.batch.num_groups) > 0
        scored_R = policy.engine.score(runner.microbatches, runner.batch.num_responses)
        if outcome is not None and scored_R is not None:  # the last stage
            found["steps"].append((outcome.logps_R.tolist(), outcome.score_drift, scored_R.tolist()))
    found |= {
        "digest": policy.weights_digest(),
        "parameters": policy.num_parameters(),
        "replicas": differing_replicas(policy.chunks, policy.ranks),
        "names": sorted(parameter_names(policy.chunks[0])),
    }
    assert bool(found["steps"]) == policy.ranks.is_last_stage
    weights = [p for chunk in policy.chunks for p in chunk.parameters()]
    quantized = [p for p in weights if is_float8tensor(p)]
    whole = sum(p.numel() * 2 for p in weights)
    held = sum(part.numel() * part.element_size() for p in weights for part in raw_parts(p))
    return {"same": found, "quantized": len(quantized), "bytes": held / whole}


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


def altered_replicas(precision: Mapping[str, Any]) -> list[str | None]:
    """What is said of two replicas whose weights are equal; differ in a byte; differ in a scale."""
    parallel = {"use_distributed_optimizer": True}
    case = Case(model={}, precision=UNFUSED | dict(precision), parallel=parallel)
    with layers_allowed_on_a_cpu(), one_rank("cpu", **parallel) as ranks:
        policy = Runner(case, ranks).policy
        weight = next(p for p in policy.chunks[0].parameters() if is_float8tensor(p))
        said = [differing_replicas(policy.chunks, ranks)]
        for part in raw_parts(weight):
            changed = part.view(-1).view(torch.uint8)
            changed[-1] ^= ranks.dp_group.rank()
            said.append(differing_replicas(policy.chunks, ranks))
            changed[-1] ^= ranks.dp_group.rank()
        return said


def swapped_steps(precision: Mapping[str, Any]) -> dict[str, Any]:
    """A reference that takes the policy's place, after steps that took the policy elsewhere."""
    parallel = {"use_distributed_optimizer": True}
    case = Case(model={}, precision=UNFUSED | dict(precision), parallel=parallel, clip_grad=0.0)
    with layers_allowed_on_a_cpu(), gathered_bucket_by_bucket(), one_rank("cpu", **parallel) as ranks:
        runner = Runner(case, ranks)
        reference = swapped_reference(runner.policy)
        found: dict[str, Any] = {"initial": runner.policy.weights_digest(), "reference": reference.weights_digest()}
        scores = []
        for _ in range(2):
            runner.step()
            runner.updater.step(runner.batch.num_groups)
            own = found["digest"] = runner.policy.weights_digest()
            for engine in (runner.engine, reference.engine, runner.engine):
                logps_R = engine.score(runner.microbatches, runner.batch.num_responses)
                assert logps_R is not None
                scores.append(logps_R.tolist())
            assert runner.policy.weights_digest() == own
        return found | {"scores": scores}


def expert_scales(folder: str, save: bool, parallel: Mapping[str, Any]) -> dict[str, Any]:
    """Delayed scales of each expert, by its number: after a step that is saved, or as loaded on a layout."""
    precision = UNFUSED | {"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "delayed"}
    case = Case(model=sized("mixtral"), precision=precision, packed=True, parallel=parallel)
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


@contextmanager
def its_optimizer() -> Iterator[None]:
    """Its Adam in place of torch's, which a run on the CPU takes."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from transformer_engine.pytorch.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    host_device.activate()
    kept = [(file, dict(vars(file))) for file in (optimizer, distrib_optimizer)]
    vars(optimizer).update(Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False)
    vars(distrib_optimizer).update(Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True)
    try:
        yield
    finally:
        for file, names in kept:
            vars(file).update(names)


def suite_points(names: Sequence[str], sizes: Mapping[str, Any] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Parts of the GPU suite on toy sizes, or on ``sizes``, in its layers, with the recipes of one generation."""
    import gpu_step
    from gpu_parts import PARTS, Context

    kept = gpu_step.refusal, dict(gpu_step._TINY)

    def refusal(setting: gpu_step.Setting, context: Context) -> str | None:
        if setting.cuda_graphs:
            return kept[0](setting, context)
        newer = torch.cuda.get_device_capability()[0] >= te_runtime.BLACKWELL
        wrong = setting.precision.startswith("fp8-") and (setting.precision == "fp8-mxfp8") != newer
        return "of another generation than the one that is pretended" if wrong else None

    gpu_step.refusal = refusal
    gpu_step._TINY |= sizes or {}
    for name in two_pass_case.ATTENTION_VARIABLES:
        os.environ.pop(name, None)
    context = Context(device="cpu", tiny=True, output=Path())
    try:
        with layers_allowed_on_a_cpu(), its_optimizer(), gathered_bucket_by_bucket():
            return {name: list(PARTS[name].run(context)) for name in names}
    finally:
        gpu_step.refusal, gpu_step._TINY = kept[0], kept[1]
