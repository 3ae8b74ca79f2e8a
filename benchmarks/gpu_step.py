"""Steps of the package's own path on one device: time by part, tokens per second, FLOPs, peak memory."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from gpu_context import Context
from memory_rank import equal_groups

from megatron_groupdpo.config import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.data.batches.planner import plan_options
from megatron_groupdpo.data.batches.sampler import GroupSampler
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore import policy as policy_module
from megatron_groupdpo.mcore.passes.optimizer import Updater, build_lr_schedule, build_optimizer
from megatron_groupdpo.mcore.policy import Policy, build_policy
from megatron_groupdpo.mcore.setup import Ranks, initialize, shut_down
from megatron_groupdpo.run.batches import BatchSource, PlannedBatch, on_device
from megatron_groupdpo.run.logs.flops import step_flops
from megatron_groupdpo.run.loop import peak_memory_bytes
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.step.coupled import accumulate_coupled_gradient
from megatron_groupdpo.step.timers import NO_TIMERS, StepTimers
from megatron_groupdpo.step.train_step import accumulate_gradient

Mode = Literal["decoupled", "coupled"]
_LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    # Llama 3.2 1B and Llama 2 7B, by their published configurations
    "1b": _LLAMA
    | {"num_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 8}
    | {"ffn_hidden_size": 8192, "vocab_size": 128256, "rotary_base": 500000},
    "7b": _LLAMA
    | {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 11008}
    | {"vocab_size": 32000, "untie_embeddings_and_output_weights": True},
}
_TINY = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
_TINY |= {"ffn_hidden_size": 128, "vocab_size": 128, "max_position_embeddings": 256}
RECIPES = ("tensorwise", "blockwise", "delayed", "mxfp8")
FULL_RECOMPUTE: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
LOSS = LossOptions(
    objective="all_pairs",
    beta=0.1,
    score_average=True,
    nll_coeff=1.0,
    nll_average="response",
    one_sided_nll=False,
)
PROMPT_SHARE = 8
"""An eighth of a sequence is prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model and how its steps run. Equal for all points of a sweep, so that one policy serves them."""

    shape: str
    precision: str = "bf16"
    """fp32, bf16, or fp8- and a recipe."""
    micro_batch_size: int = 2
    packed: bool = False
    transformer_impl: str = "auto"
    fused_logprobs: Literal["auto", "on", "off"] = "auto"
    recompute: bool = False
    cuda_graphs: bool = False
    fp8_weights: bool = False
    """Kept in FP8, which takes the distributed optimizer."""


def model_of(setting: Setting, context: Context) -> ModelConfig:
    fields = SHAPES[setting.shape] | (_TINY if context.tiny else {})
    return ModelConfig(**fields, transformer_impl=setting.transformer_impl)  # type: ignore[arg-type]


def precision_of(setting: Setting) -> PrecisionConfig:
    recompute = FULL_RECOMPUTE if setting.recompute else {}
    fp8: dict[str, Any] = {}
    if setting.precision.startswith("fp8-"):
        recipe = setting.precision.removeprefix("fp8-")
        block_scaled = recipe in ("blockwise", "mxfp8")
        fp8 = {"fp8_format": "e4m3" if block_scaled else "hybrid", "fp8_recipe": recipe}
        fp8["fp8_param_gather"] = setting.fp8_weights
    bf16 = setting.precision != "fp32"
    graphs = setting.cuda_graphs
    return PrecisionConfig(bf16=bf16, fused_logprobs=setting.fused_logprobs, cuda_graphs=graphs, **fp8, **recompute)


def refusal(setting: Setting, context: Context) -> str | None:
    """Why this machine cannot run the setting, before anything is built."""
    if setting.cuda_graphs and context.device == "cpu":
        return "CUDA graphs need a GPU, and the device is the CPU"
    needs_te = setting.precision.startswith("fp8-") or setting.transformer_impl == "transformer_engine"
    if not needs_te:
        return None
    if context.device == "cpu":
        return "needs Transformer Engine, and the device is the CPU"
    try:
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception as error:
        return f"needs Transformer Engine, and importing it fails ({error})"
    major, minor = torch.cuda.get_device_capability()
    if setting.precision == "fp8-mxfp8" and major < 10:
        return f"needs compute capability 10, and this GPU has {major}.{minor}"
    return None


class Bench:
    """A policy with its optimizer, and batches to run through it."""

    def __init__(
        self,
        setting: Setting,
        context: Context,
        ranks: Ranks,
        *,
        optimizer: bool = True,
        seed: int = 1,
        lr: float = 1e-6,
    ) -> None:
        self.setting, self.context, self.ranks = setting, context, ranks
        self.parallel = ParallelConfig(device=context.device, use_distributed_optimizer=setting.fp8_weights)
        model, precision = model_of(setting, context), precision_of(setting)
        with _quick_weights():
            self.policy: Policy = build_policy(model, self.parallel, precision, ranks, seed=seed, training=True)
        if precision.fp8_format is not None and not self.policy.config.fp8:
            # Megatron would otherwise compute in bf16 and say nothing.
            raise RuntimeError(f"{setting.precision}: Megatron's configuration has no fp8: the option did not reach it")
        self.updater = self._updater(precision, lr) if optimizer else None

    def _updater(self, precision: PrecisionConfig, lr: float) -> Updater:
        options = OptimizerConfig(lr=lr, lr_decay_style="constant")
        optimizer = build_optimizer(self.policy.chunks, options, self.parallel, precision)
        return Updater(optimizer, build_lr_schedule(optimizer, options, warmup_groups=0, decay_groups=1))

    def source(self, *, length: int, group_size: int, num_groups: int, steps: int, seed: int = 0) -> BatchSource:
        """Groups of random tokens whose responses all have ``length`` tokens, prompt included."""
        prompt = max(2, length // PROMPT_SHARE)
        samples = equal_groups(
            _Groups(num_groups * steps, prompt, {"vocab_size": self.policy.model.vocab_size}),  # type: ignore[arg-type]
            length - prompt,
            group_size,
        )
        setting = self.setting
        plan = plan_options(
            self.parallel,
            precision=self.policy.precision,
            data_parallel_size=1,
            micro_batch_size=None if setting.packed else setting.micro_batch_size,
            max_tokens_per_microbatch=setting.micro_batch_size * length if setting.packed else None,
            seq_length=length,
        )
        return BatchSource(
            samples,  # type: ignore[arg-type]
            range(len(samples)),
            loss=LOSS,
            plan=plan,
            data_parallel_rank=0,
            seed=seed,
            sampler=GroupSampler(len(samples), seed=seed, shuffle=False),
            reference=None,
        )

    def accumulate(self, mode: Mode, planned: PlannedBatch, source: BatchSource, timers: StepTimers) -> Any:
        given = (planned.batch, planned.ref_logps_R, source.loss)
        if mode == "decoupled":
            return accumulate_gradient(self.policy.engine, planned.microbatches, *given, timers=timers)
        with timers("backward"):
            return accumulate_coupled_gradient(self.policy.engine, planned.microbatches, *given)

    def one_step(self) -> AbstractContextManager[None]:
        """The passes in here belong to one optimizer step: an engine with FP8 sets the scales of the next."""
        return getattr(self.policy.engine, "step", nullcontext)()

    def calibrate(self, passes: Callable[[], object]) -> None:
        """Let an engine with FP8 find its first scales."""
        getattr(self.policy.engine, "calibrate", lambda _: 0)(passes)

    def measure(self, mode: Mode, *, length: int, group_size: int, num_groups: int) -> dict[str, Any]:
        """Medians over steps, each with another batch that is on the device already."""
        warm_ups, steps = self.context.pick((2, 3), (1, 1))
        source = self.source(length=length, group_size=group_size, num_groups=num_groups, steps=warm_ups + steps)
        batches = [self._planned(source, mode, index * num_groups, num_groups) for index in range(warm_ups + steps)]
        timers = StepTimers(self.ranks.device)
        self.calibrate(lambda: self.accumulate(mode, batches[0], source, NO_TIMERS))
        seconds, parts = [], []
        for index, planned in enumerate(batches):
            if index == warm_ups and self.ranks.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self._synchronize()
            started = time.perf_counter()
            with self.one_step():
                outcome = self.accumulate(mode, planned, source, timers)
            if self.updater is not None:
                with timers("optimizer"):
                    self.updater.step(num_groups)
            self._synchronize()
            if index >= warm_ups:
                seconds.append(time.perf_counter() - started)
                parts.append(timers.read())
            else:
                timers.read()
        drift = getattr(outcome, "score_drift", None)
        return self._point(mode, batches[-1], statistics.median(seconds), parts) | {"score_drift": drift}

    def _point(
        self, mode: Mode, planned: PlannedBatch, seconds: float, parts: list[dict[str, float]]
    ) -> dict[str, Any]:
        setting = self.setting
        scoring = mode == "decoupled"
        return {
            "mode": mode,
            "shape": setting.shape,
            "precision": setting.precision,
            "num_parameters": self.policy.num_parameters(),
            "group_size": len(planned.batch.labels_GK[0]),
            "num_responses": planned.batch.num_responses,
            "length": max(len(row.tokens_S) for row in planned.batch.rows),
            "num_microbatches": len(planned.microbatches),
            "recompute": setting.recompute,
            "seconds": seconds,
            "tokens_per_s": planned.num_tokens / seconds,
            "flops": step_flops(self.policy.model, planned.batch, scoring_pass=scoring),
            "optimizer_bytes": optimizer_bytes(self.policy.num_parameters(), setting)
            if self.updater is not None
            else 0,
            "peak_bytes": peak_memory_bytes(self.ranks.device),
            "split": {name: statistics.median(part.get(name, 0.0) for part in parts) for name in parts[0]},
        }

    def _planned(self, source: BatchSource, mode: Mode, consumed: int, num_groups: int) -> PlannedBatch:
        planned = source.batch(consumed, num_groups)
        if mode == "coupled":
            planned = replace(planned, microbatches=source.microbatches(planned.batch, whole_groups=True))
        return on_device(planned, self.ranks.device)

    def _synchronize(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class _Groups:
    """What :func:`memory_rank.equal_groups` reads of a layout."""

    num_groups: int
    prompt_length: int
    model: dict[str, Any]


def optimizer_bytes(num_parameters: int, setting: Setting) -> int:
    """Bytes an update cannot but move: float32 gradient, both moments and master weight, read; the last three, written.

    In half precision the model's own copy is written too, in FP8 where weights are kept so. The norm for clipping reads
    the gradient once more, and the buffer is zeroed for the next step.
    """
    own_copy = 0 if setting.precision == "fp32" else 1 if setting.fp8_weights else 2
    return num_parameters * (4 * (4 + 3) + 4 + 4 + own_copy)


@contextmanager
def _quick_weights() -> Iterator[None]:
    """Draw initial weights on the device: the package draws them on the host, for all layouts alike; minutes for 7B."""

    def fill(chunks: list[torch.nn.Module], model: ModelConfig, *, seed: int) -> None:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                with torch.no_grad():
                    if "norm" in name:
                        parameter.fill_(1.0)
                        continue
                    draw = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{seed}{name}".encode()))
                    # Of bf16 in every precision: what is compared is the computation.
                    values = torch.empty(parameter.shape, device=parameter.device).normal_(generator=draw)
                    parameter.copy_(values.mul_(model.init_method_std).bfloat16())

    kept, policy_module.initialize_weights = policy_module.initialize_weights, fill
    try:
        yield
    finally:
        policy_module.initialize_weights = kept


@contextmanager
def started(context: Context) -> Iterator[Ranks]:
    ranks = initialize(ParallelConfig(device=context.device), seed=1)  # type: ignore[arg-type]
    try:
        yield ranks
    finally:
        shut_down()


def attempt(name: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The point; or no memory for it, the package's refusal, or the error, which fails the part."""
    try:
        return name | work()
    except torch.OutOfMemoryError as error:
        return name | {"out_of_memory": str(error).splitlines()[0]}
    except ConfigError as error:
        return name | {"refused": str(error)}
    except Exception:
        return name | {"error": traceback.format_exc()}


def clear() -> None:
    """Give memory back after an attempt that failed, once nothing refers to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sweep_groups(context: Context, shape: str, precision: str) -> Iterator[dict[str, Any]]:
    """Two passes at every N; one graph at every N until memory runs out (in bf16)."""
    big = shape == "7b"
    setting = Setting(shape=shape, precision=precision, micro_batch_size=1 if big else 2, recompute=big)
    sizes = context.pick((2, 8) if big else (2, 4, 8, 16, 32, 64), (2, 4))
    length = context.pick(2048, 32)
    modes: tuple[Mode, ...] = ("decoupled", "coupled") if precision == "bf16" else ("decoupled",)
    with benches({"": setting}, context) as built:
        for _, bench, refused in built:
            if bench is None:
                yield {"shape": shape, "precision": precision, **refused}
                continue
            for mode in modes:
                for size in sizes:
                    given = {"mode": mode, "shape": shape, "precision": precision, "group_size": size, "length": length}
                    num_groups = max(1, context.pick(8, 4) // size)
                    work = partial(bench.measure, mode, length=length, group_size=size, num_groups=num_groups)
                    point = attempt(given, work)
                    yield point
                    if "out_of_memory" in point:
                        bench.policy.engine.zero_gradient()
                        clear()
                        break


def sweep_lengths(context: Context) -> Iterator[dict[str, Any]]:
    """N = 4, growing sequences; a batch of 8 of the longest, or as many tokens in shorter ones."""
    lengths = context.pick((1024, 2048, 4096, 8192), (32, 64))
    settings = {name: Setting(shape="1b", precision=name) for name in ("bf16", "fp8-tensorwise")}
    with benches(settings, context) as built:
        for name, bench, refused in built:
            given = {"shape": "1b", "precision": name, "group_size": 4}
            if bench is None:
                yield given | refused
                continue
            for length in lengths:
                # As many tokens a microbatch at every length.
                bench.setting = replace(bench.setting, micro_batch_size=max(1, lengths[-1] // length))
                num_groups = max(1, 2 * lengths[-1] // (4 * length) * 2)
                work = partial(bench.measure, "decoupled", length=length, group_size=4, num_groups=num_groups)
                yield attempt(given | {"length": length}, work)


def sweep_variants(context: Context) -> Iterator[dict[str, Any]]:
    """One batch (N = 8), and what each choice costs or gains."""
    plain = Setting(shape="1b")
    settings: dict[str, Setting] = {
        "default": plain,
        "local layers": replace(plain, transformer_impl="local"),
        "local layers, packed": replace(plain, transformer_impl="local", packed=True),
        "TE layers, packed": replace(plain, transformer_impl="transformer_engine", packed=True),
        "plain log-probs": replace(plain, fused_logprobs="off"),
        "full recomputation": replace(plain, recompute=True),
        "CUDA graphs": replace(plain, cuda_graphs=True),
        "local layers, CUDA graphs": replace(plain, transformer_impl="local", cuda_graphs=True),
        **{f"FP8 {recipe}": replace(plain, precision=f"fp8-{recipe}") for recipe in RECIPES},
        "FP8 tensorwise, weights in FP8": replace(plain, precision="fp8-tensorwise", fp8_weights=True),
    }
    length = context.pick(2048, 32)
    with benches(settings, context) as built:
        for name, bench, refused in built:
            given = {"variant": name, "shape": "1b", "precision": settings[name].precision}
            if bench is None:
                yield given | refused
                continue
            work = partial(bench.measure, "decoupled", length=length, group_size=8, num_groups=1)
            yield attempt(given, work)


@contextmanager
def benches(
    settings: Mapping[str, Setting], context: Context, **how: Any
) -> Iterator[Iterator[tuple[str, Bench | None, dict[str, Any]]]]:
    """Each setting's policy in turn, the one before gone; none, and the reason, where it is refused or fails."""

    def build() -> Iterator[tuple[str, Bench | None, dict[str, Any]]]:
        for name, setting in settings.items():
            if why := refusal(setting, context):
                yield name, None, {"refused": why}
                continue
            bench: list[Bench] = []

            def make(setting: Setting = setting, bench: list[Bench] = bench) -> dict[str, Any]:
                bench.append(Bench(setting, context, ranks, **how))
                return {}

            failed = attempt({}, make)
            yield name, bench.pop() if bench else None, failed
            clear()

    with started(context) as ranks:
        yield build()
