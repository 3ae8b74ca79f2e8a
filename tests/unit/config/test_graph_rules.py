"""CUDA graphs: what does not go with them is refused, each with its reason, and their sizes act with them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from config_examples import example

from megatron_groupdpo.config import PrecisionConfig, validate
from megatron_groupdpo.errors import ConfigError

OVERLAP = {"overlap_grad_reduce": True, "use_distributed_optimizer": True}
MIXTURE = {"num_moe_experts": 4, "transformer_impl": "local"}
FP8 = {"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "tensorwise"}
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"device": "cpu"}, 1, "cuda_graphs needs a GPU and device is 'cpu'; leave it out"),
    (
        {"micro_batch_size": None, "max_tokens_per_microbatch": 256},
        1,
        "packed microbatches (max_tokens_per_microbatch 256) have other bounds every time; use micro_batch_size",
    ),
    ({"pipeline_model_parallel_size": 2}, 2, "(pipeline_model_parallel_size 2) has several in flight; set it to 1"),
    ({"context_parallel_size": 2}, 2, "never tried on attention across ranks (context_parallel_size 2); set it to 1"),
    ({"recompute_granularity": "selective"}, 1, "recompute_granularity (selective) frees nothing with cuda_graphs"),
    (MIXTURE, 1, "experts (num_moe_experts 4) wait on the host for how many tokens each has"),
    (FP8, 1, "does not go with fp8_format (hybrid): Transformer Engine decides about scales"),
    ({"gradient_accumulation_fusion": True}, 1, "does not go with gradient_accumulation_fusion, whose backward marks"),
    ({**OVERLAP, "overlap_param_gather": True}, 1, "does not go with overlap_param_gather, which waits for weights"),
]


@pytest.mark.parametrize(("changes", "world_size", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_a_graph_cannot_repeat_is_refused(changes: dict[str, Any], world_size: int, message: str):
    with pytest.raises(ConfigError) as refusal:
        validate(example(cuda_graphs=True, **changes), world_size)
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", ["cuda_graph_shapes", "cuda_graph_length_multiple"])
def test_sizes_of_graphs_act_with_graphs_alone(name: str):
    with pytest.raises(ConfigError, match=rf"{name} \(3\) would act on nothing: cuda_graphs is off"):
        validate(example(**{name: 3}), 1)
    validate(example(cuda_graphs=True, **{name: 3}), 1)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, 1),
        ({"bf16": True}, 1),
        (OVERLAP, 2),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
        ({"window_size": (7, 0)}, 1),
        ({"transformer_impl": "local", "attention_backend": "local"}, 1),
    ],
)
def test_what_goes_with_graphs_is_accepted(changes: dict[str, Any], world_size: int):
    validate(example(cuda_graphs=True, **changes), world_size)


def test_a_run_that_finds_no_gpu_is_refused_before_a_model_is_built():
    from megatron_groupdpo.mcore.model import implementation as kernels

    precision = PrecisionConfig(cuda_graphs=True)
    with pytest.raises(ConfigError, match="cuda_graphs needs a GPU and the run's device is the CPU"):
        kernels.check_kernels(precision, "local", torch.device("cpu"))
    kernels.check_kernels(precision, "local", torch.device("cuda"))
