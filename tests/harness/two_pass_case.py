"""One model, one batch, both passes, on any device and precision: what tests/gpu compares, and its CPU sibling runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_groupdpo.config import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.data.batches.batch import build_batch
from megatron_groupdpo.data.batches.microbatches import build_microbatches
from megatron_groupdpo.data.batches.planner import plan_batch, plan_options, plan_whole_groups
from megatron_groupdpo.mcore.passes.optimizer import Updater, build_lr_schedule, build_optimizer
from megatron_groupdpo.mcore.policy import Policy, build_policy
from megatron_groupdpo.mcore.setup import Ranks, initialize, shut_down
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.step.coupled import accumulate_coupled_gradient
from megatron_groupdpo.step.train_step import StepResult, accumulate_gradient
from megatron_groupdpo.types import GroupBatch

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 64,
    "ffn_hidden_size": 512,
    "vocab_size": 61,  # that of group_samples
    "max_position_embeddings": 256,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "init_method_std": 0.05,
}
"""Sizes that every FP8 recipe takes: multiples of 128."""
SMALLER: dict[str, Any] = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256}
"""The same on a CPU, where stand-ins for kernels take seconds; halves are still multiples of 128."""
NUM_GROUPS = {"cuda": 6, "cpu": 4}
LOSS = LossOptions(
    objective="all_pairs", beta=0.1, score_average=False, nll_coeff=0.1, nll_average="response", one_sided_nll=False
)
ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@contextmanager
def one_rank(device: str, **parallel: Any) -> Iterator[Ranks]:
    """Megatron's groups, by default for one process; attention backends may be chosen anew afterwards."""
    for name in ATTENTION_VARIABLES:
        os.environ.pop(name, None)
    ranks = initialize(ParallelConfig(device=device, **parallel), seed=1)  # type: ignore[arg-type]
    try:
        yield ranks
    finally:
        shut_down()


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a comparison varies."""

    model: Mapping[str, Any]
    precision: Mapping[str, Any]
    transformer_impl: str = "auto"
    packed: bool = False
    micro_batch_size: int = 3
    parallel: Mapping[str, Any] = field(default_factory=dict)
    clip_grad: float = 1.0


class Runner:
    """A policy with seeded weights (equal in every case of one model) and a batch."""

    def __init__(self, case: Case, ranks: Ranks) -> None:
        from group_samples import make_samples, reference_logps

        self.case = case
        parallel, precision = ParallelConfig(**case.parallel), PrecisionConfig(**case.precision)
        sizes = MODEL if ranks.device.type == "cuda" else MODEL | SMALLER
        model = ModelConfig(**sizes | dict(case.model), transformer_impl=case.transformer_impl)  # type: ignore[arg-type]
        self.policy: Policy = build_policy(model, parallel, precision, ranks, seed=7, training=True)
        self.engine = self.policy.engine
        options = OptimizerConfig(lr=1e-3, lr_decay_style="constant", clip_grad=case.clip_grad)
        optimizer = build_optimizer(self.policy.chunks, options, parallel, precision)
        schedule = build_lr_schedule(optimizer, options, warmup_groups=0, decay_groups=1000)
        self.updater = Updater(optimizer, schedule)
        size: dict[str, Any] = (
            {"max_tokens_per_microbatch": 256} if case.packed else {"micro_batch_size": case.micro_batch_size}
        )
        longest = MODEL["max_position_embeddings"]
        self.plan = plan_options(
            parallel, precision=precision, data_parallel_size=ranks.dp_group.size(), seq_length=longest, **size
        )
        samples = make_samples(NUM_GROUPS[ranks.device.type])
        keys_G = torch.arange(len(samples))
        self.batch: GroupBatch = build_batch(
            samples, group_keys_G=keys_G, needs_pass=lambda given: given["labels_GK"] != 0
        )
        self.ref_logps_R = torch.from_numpy(reference_logps(samples))[self.batch.response_ids_R]
        self.place = {"rank": ranks.dp_group.rank(), "context_rank": ranks.cp_group.rank()}
        self.microbatches = build_microbatches(plan_batch(self.batch, self.plan), self.plan, **self.place)

    def passes(self) -> StepResult:
        """Both passes; the gradient is left in the buffers."""
        outcome = self.passes_of_this_stage()
        assert outcome is not None
        return outcome

    def passes_of_this_stage(self) -> StepResult | None:
        """The same; what came of them is known on the last pipeline stage."""
        return accumulate_gradient(self.engine, self.microbatches, self.batch, self.ref_logps_R, LOSS)

    def step(self) -> StepResult:
        """As the training loop makes it, calibration included, without the update."""
        self.engine.calibrate(self.passes)
        with self.engine.step():
            return self.passes()

    def coupled(self) -> torch.Tensor:
        """Gradient of the one graph."""
        whole = build_microbatches(plan_whole_groups(self.batch, self.plan), self.plan, **self.place)
        accumulate_coupled_gradient(self.engine, whole, self.batch, self.ref_logps_R, LOSS)
        return self.gradient()

    def gradient(self) -> torch.Tensor:
        """[parameters] float64, in an order that both layer specs share."""
        named = {
            name.replace("linear_qkv.layer_norm_", "norm_in.").replace("linear_fc1.layer_norm_", "norm_mlp."): parameter
            for name, parameter in self.policy.chunks[0].named_parameters()
        }
        for name in list(named):  # experts of a grouped product, named as modules of their own
            if (found := re.search(r"experts\.(linear_fc[12])\.weight(\d+)$", name)) is not None:
                own = f"experts.local_experts.{found[2]}.{found[1]}.weight"
                named[name[: found.start()] + own] = named.pop(name)
        aliases = {"input_layernorm.": "self_attention.norm_in.", "pre_mlp_layernorm.": "mlp.norm_mlp."}
        for name in list(named):
            for local, fused in aliases.items():
                if local in name:
                    named[name.replace(local, fused)] = named.pop(name)
        return torch.cat([named[name].main_grad.detach().double().flatten().cpu() for name in sorted(named)])


def agreement(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Cosine, and the norm of the difference relative to ``wanted``'s."""
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=0)
    return float(cosine), float((found - wanted).norm() / wanted.norm())


def updates(device: str, precision: Mapping[str, Any]) -> list[torch.Tensor]:
    """[R] log-probabilities of a batch that is stepped on, before each of three updates and after the last."""
    parallel = {"use_distributed_optimizer": True}
    with one_rank(device, **parallel) as ranks:
        runner = Runner(Case(model={}, precision=precision, parallel=parallel), ranks)
        logps = []
        for _ in range(3):
            logps.append(runner.step().logps_R.cpu())
            runner.updater.step(runner.batch.num_groups)
        return [*logps, runner.passes().logps_R.cpu()]


def packed_against_padded(device: str, precision: Mapping[str, Any], transformer_impl: str) -> dict[str, Any]:
    """The same groups in packed and in padded microbatches: per-token log-probabilities and gradients."""
    with one_rank(device) as ranks:
        results = []
        for packed in (False, True):
            runner = Runner(
                Case(model={}, precision=precision, transformer_impl=transformer_impl, packed=packed), ranks
            )
            outcome = runner.step()
            results.append((outcome.logps_R.cpu(), runner.gradient(), runner.batch.num_tokens_R))
        (padded_R, padded, tokens_R), (packed_R, gradient, _) = results
        cosine, gap = agreement(gradient, padded)
        return {"logp_gap": float(((packed_R - padded_R).abs() / tokens_R).max()), "cosine": cosine, "gap": gap}


def contract(
    device: str,
    precision: Mapping[str, Any],
    *,
    model: Mapping[str, Any] | None = None,
    packed: bool = False,
    parallel: Mapping[str, Any] | None = None,
    num_steps: int = 3,
) -> dict[str, Any]:
    """Drift of several steps with updates, and the two passes' gradient against the one graph's after them."""
    parallel = parallel or {}
    with one_rank(device, **parallel) as ranks:
        runner = Runner(Case(model=model or {}, precision=precision, packed=packed, parallel=parallel), ranks)
        drifts = []
        for _ in range(num_steps):
            drifts.append(runner.step().score_drift)
            assert runner.updater.step(runner.batch.num_groups) > 0
        decoupled_outcome = runner.passes()
        decoupled = runner.gradient()
        cosine, gap = agreement(decoupled, runner.coupled())
        again = runner.passes()  # the passes in between left no trace
        return {
            "drifts": drifts,
            "logps": decoupled_outcome.logps_R.tolist(),
            "cosine": cosine,
            "gap": gap,
            "repeats": bool(torch.equal(decoupled_outcome.logps_R, again.logps_R)),
            "repeats_gradient": agreement(runner.gradient(), decoupled)[1],
        }


WINDOWED: dict[str, Any] = {"window_size": (7, 0), "window_attn_skip_freq": (2,), "qk_layernorm": True}
"""Every second layer attends within a window, by a mask."""


def captured_against_layers(
    device: str,
    precision: Mapping[str, Any],
    transformer_impl: str,
    *,
    model: Mapping[str, Any] | None = None,
    num_steps: int = 3,
) -> dict[str, Any]:
    """Steps with layers as CUDA graphs, each held against the layers themselves on the same weights."""
    fields = {"cuda_graphs": True, "cuda_graph_length_multiple": 16} | dict(precision)
    with one_rank(device) as ranks:
        runner = Runner(Case(model=model or {}, precision=fields, transformer_impl=transformer_impl), ranks)
        graphs = runner.engine.graphs
        assert graphs is not None
        found: dict[str, Any] = {"drifts": [], "logp_gaps": [], "gaps": [], "norms": []}
        for _ in range(num_steps):
            with graphs.off():
                plain, wanted = runner.passes(), runner.gradient()
            outcome = runner.passes()
            found["drifts"].append(outcome.score_drift)
            per_token_R = (outcome.logps_R - plain.logps_R).abs().cpu() / runner.batch.num_tokens_R
            found["logp_gaps"].append(float(per_token_R.max()))
            found["gaps"].append(agreement(runner.gradient(), wanted)[1])
            found["norms"].append(runner.updater.step(runner.batch.num_groups))
        return found | {"num_shapes": len(graphs.shapes)}
