"""What one rank of a memory measurement does: the package's own two passes, and the coupled backward beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from memory_counters import CountedEngine, ForwardBytes, SavedBytes, expected_peak

from megatron_groupdpo.config import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.data.batches.planner import plan_options
from megatron_groupdpo.data.batches.sampler import GroupSampler
from megatron_groupdpo.mcore.passes.optimizer import Updater, build_lr_schedule, build_optimizer
from megatron_groupdpo.mcore.policy import Policy, build_policy
from megatron_groupdpo.mcore.setup import Ranks, initialize, shut_down
from megatron_groupdpo.run.batches import BatchSource
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.step.coupled import accumulate_coupled_gradient
from megatron_groupdpo.step.train_step import accumulate_gradient
from megatron_groupdpo.types import GroupBatch, GroupSample, Microbatch

MODES = ("decoupled", "coupled")
WARM_UPS = 3
"""Steps, updates included, before allocated memory is measured (the paper's protocol)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A layout with the response lengths and group sizes measured on it."""

    name: str
    pipeline: int = 1
    chunks: int | None = None
    """Model chunks a stage: interleaved."""
    recompute: bool = False
    """Whole layers are recomputed in the backward."""
    lengths: tuple[int, ...]
    group_sizes: tuple[int, ...]
    num_groups: int
    """Groups of a batch: the coupled backward's microbatches."""
    micro_batch_size: int = 2
    prompt_length: int = 16
    model: Mapping[str, Any]
    """Keyword arguments of the model configuration."""
    bf16: bool = False
    device: str = "cpu"

    @property
    def num_points(self) -> int:
        """Measurements on the layout, of either mode."""
        return len(self.lengths) * len(self.group_sizes) * len(MODES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What one stage held in one step."""

    mode: str
    length: int
    group_size: int
    stage: int
    num_microbatches: int
    num_responses: int
    peak_saved: int
    """Bytes of unique storages saved for backward, at their peak."""
    expected_saved: int
    """By the schedule, from what one microbatch saves: :func:`memory_counters.expected_peak`."""
    num_saved_scoring: int | None
    """Tensors the scoring pass saved; none without such a pass."""
    allocated: dict[str, int] = field(default_factory=dict)
    """CUDA: peak, parameters, optimizer, gradients and overhead in bytes."""


def measure_layout(layout: Layout, tell: Callable[[str], None] = lambda _: None) -> list[Point]:
    """Every point of a layout on this rank, one policy for all; ``tell`` hears of each point as it is done."""
    parallel = ParallelConfig(
        device=layout.device,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.chunks,
    )
    ranks = initialize(parallel, seed=1)
    try:
        meter = _Meter(layout, parallel, ranks)
        points = []
        for length in layout.lengths:
            for group_size in layout.group_sizes:
                for mode in MODES:
                    points.append(meter.measure(mode, length, group_size))
                    tell(f"{layout.name}, {length} tokens, N = {group_size}, {mode}")
        return points
    finally:
        shut_down()


class _Meter:
    """A policy with its optimizer, on one rank of a layout."""

    def __init__(self, layout: Layout, parallel: ParallelConfig, ranks: Ranks) -> None:
        full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        precision = PrecisionConfig(bf16=layout.bf16, **(full if layout.recompute else {}))
        self.layout, self.parallel, self.ranks = layout, parallel, ranks
        self.loss = LossOptions(
            objective="all_pairs",
            beta=0.1,
            score_average=True,
            nll_coeff=1.0,
            nll_average="response",
            one_sided_nll=False,
        )
        self.policy = build_policy(ModelConfig(**layout.model), parallel, precision, ranks, seed=1, training=True)
        self.on_cuda = ranks.device.type == "cuda"
        self.before_optimizer = 0
        if self.on_cuda:
            # Libraries take their workspaces at first use, from the same allocator; they are not the optimizer's.
            batch, microbatches = self._work("decoupled", layout.lengths[-1], layout.group_sizes[0])
            self._accumulate("decoupled", self.policy.engine, batch, microbatches)
            torch.cuda.synchronize()
            self.before_optimizer = torch.cuda.memory_allocated()
        options = OptimizerConfig(lr=1e-6, lr_decay_style="constant")
        optimizer = build_optimizer(self.policy.chunks, options, parallel, precision)
        self.updater = Updater(optimizer, build_lr_schedule(optimizer, options, warmup_groups=0, decay_groups=1))

    def measure(self, mode: str, length: int, group_size: int) -> Point:
        """One step for the saved bytes; on CUDA, warm-ups and one more for the allocated ones."""
        batch, microbatches = self._work(mode, length, group_size)
        allocated = self._allocated(mode, batch, microbatches) if self.on_cuda else {}
        # Megatron's wrapper has another `buffers`, those of gradients.
        kept = [t for chunk in self.policy.chunks for t in (*chunk.module.parameters(), *chunk.module.buffers())]
        layers = _layers(self.policy) if self.layout.recompute else []
        with SavedBytes(excluded=kept) as counter:
            chunks = ForwardBytes(self.policy.chunks, counter)
            # A recomputed layer's forward runs again, with a graph, while the backward is at that layer.
            again = ForwardBytes(layers, counter)
            engine = CountedEngine(self.policy.engine, counter)
            self._accumulate(mode, engine, batch, microbatches)
            chunks.remove()
            again.remove()
        assert counter.live == 0, f"{counter.live} bytes are still saved after the backward"
        assert counter.peak > 0, "a backward without anything saved has not been seen"
        stage = self.ranks.pp_group.rank()
        held = expected_peak(
            chunks.added, stage=stage, num_stages=self.layout.pipeline, num_microbatches=len(microbatches)
        )
        return Point(
            mode=mode,
            length=length,
            group_size=group_size,
            stage=stage,
            num_microbatches=len(microbatches),
            num_responses=batch.num_responses,
            peak_saved=counter.peak,
            expected_saved=held + max(again.added, default=0),
            num_saved_scoring=engine.num_saved_scoring,
            allocated=allocated,
        )

    def _work(self, mode: str, length: int, group_size: int) -> tuple[GroupBatch, list[Microbatch]]:
        layout = self.layout
        source = BatchSource(
            equal_groups(layout, length, group_size),  # type: ignore[arg-type]
            range(layout.num_groups),
            loss=self.loss,
            plan=plan_options(self.parallel, data_parallel_size=1, micro_batch_size=layout.micro_batch_size),
            data_parallel_rank=0,
            seed=0,
            sampler=GroupSampler(layout.num_groups, seed=0, shuffle=False),
            reference=None,
        )
        planned = source.batch(0, layout.num_groups)
        if mode == "coupled":
            return planned.batch, source.microbatches(planned.batch, whole_groups=True)
        return planned.batch, planned.microbatches

    def _accumulate(self, mode: str, engine: Any, batch: GroupBatch, microbatches: Sequence[Microbatch]) -> None:
        zeros_R = torch.zeros(batch.num_responses, dtype=torch.float64)
        accumulate = accumulate_gradient if mode == "decoupled" else accumulate_coupled_gradient
        accumulate(engine, microbatches, batch, zeros_R, self.loss)

    def _allocated(self, mode: str, batch: GroupBatch, microbatches: Sequence[Microbatch]) -> dict[str, int]:
        """The paper's protocol: the peak of a forward and backward, less what parameters and optimizer hold.

        The optimizer's transient is left out, as the peak is read before the update. Gradient buffers are part of
        the overhead, and given.
        """
        for _ in range(WARM_UPS):
            self._accumulate(mode, self.policy.engine, batch, microbatches)
            self.updater.step(batch.num_groups)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        optimizer = torch.cuda.memory_allocated() - self.before_optimizer
        torch.cuda.reset_peak_memory_stats()
        self._accumulate(mode, self.policy.engine, batch, microbatches)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        parameters = _storage_bytes(p for chunk in self.policy.chunks for p in chunk.parameters())
        gradients = _storage_bytes(p.main_grad for chunk in self.policy.chunks for p in chunk.parameters())
        return {
            "peak": peak,
            "parameters": parameters,
            "optimizer": optimizer,
            "gradients": gradients,
            "overhead": peak - parameters - optimizer,
        }


def equal_groups(layout: Layout, length: int, group_size: int) -> list[GroupSample]:
    """Groups of random tokens, half positive, half negative, every response ``length`` tokens: only N varies."""
    draw = np.random.default_rng(0)
    vocab_size = layout.model["vocab_size"]
    return [
        GroupSample(
            group_id=group,
            first_response_id=group * group_size,
            prompt_tokens=draw.integers(0, vocab_size, size=layout.prompt_length, dtype=np.int32),
            response_tokens=tuple(draw.integers(0, vocab_size, size=length, dtype=np.int32) for _ in range(group_size)),
            response_masks=(None,) * group_size,
            labels_K=np.where(np.arange(group_size) % 2 == 0, 1, -1).astype(np.int8),
            values_K=np.full(group_size, np.nan, dtype=np.float32),
        )
        for group in range(layout.num_groups)
    ]


def law_breaks(points: Sequence[Point], *, value: Callable[[Point], int], tolerance: float = 0.02) -> list[str]:
    """Where decoupled memory moves with N by more than ``tolerance`` of its size at the smallest N, on any stage.

    Raises:
        AssertionError: a scoring pass saved something, or there are too few microbatches to fill the pipeline.
    """
    broken = []
    by_sweep: dict[tuple[int, int], list[Point]] = {}
    for point in points:
        if point.mode == "decoupled":
            assert point.num_saved_scoring == 0, f"the scoring pass saved {point.num_saved_scoring} tensors"
            by_sweep.setdefault((point.length, point.stage), []).append(point)
    for (length, stage), sweep in by_sweep.items():
        sweep.sort(key=lambda point: point.group_size)
        first = sweep[0]
        broken += [
            f"{length} tokens, stage {stage}: {value(point):,} bytes at N = {point.group_size}, "
            f"{value(first):,} at N = {first.group_size}"
            for point in sweep[1:]
            if abs(value(point) - value(first)) > tolerance * value(first)
        ]
    return broken


def _layers(policy: Policy) -> list[torch.nn.Module]:
    modules = (module for chunk in policy.chunks for module in chunk.modules())
    return [module for module in modules if type(module).__name__ == "TransformerLayer"]


def _storage_bytes(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
