"""Transformer Engine's own Python with PyTorch for kernels (te_runtime.py): its layers are the local ones."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import pytest
from graph_case import check_bits, with_graphs
from layout_case import LayoutCase
from layout_run import whole_tensors
from matrix import LAYOUTS, MICROBATCHES, MIXTURE_LAYOUTS, SGD
from parity import expected_of, relative_gap
from rank_pool import RankPool
from te_pool import TePool

FAMILIES = ["gpt2", "llama", "qwen3", "mistral", "olmo2", "olmo3", "gemma3", "mixtral", "qwen3-moe", "olmoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_its_layers_are_the_local_ones(te_pool: TePool, family: str):
    for packed in (False, True):
        gap = te_pool.one("both_specs", family, packed)
        assert gap["logps"] < 2e-5, packed
        assert gap["gradient"] < 5e-6, packed


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama", "one rank"),
        ("llama", "TP2 SP"),
        ("llama", "PP2 VPP2"),
        ("llama", "TP2 PP2"),
        ("gpt", "TP2"),
        ("gpt", "DP2 distopt"),
        ("mixture", "EP2"),
        ("mixture", "TP2 EP2 SP"),
    ],
)
def test_its_gradient_is_the_one_graphs_on_every_layout(te_pool: TePool, pool: RankPool, model: str, layout: str):
    num_ranks, parallel = (LAYOUTS | MIXTURE_LAYOUTS)[layout]
    case = LayoutCase(num_ranks=num_ranks, parallel=parallel, model=model)
    results = te_pool.run(case.num_ranks, "layout", case)
    _, gradient = expected_of(pool, model, case.num_groups, json.dumps(case.loss_options))
    found = whole_tensors([r.gradient for r in results], replicas_agree_to=1e-6)
    assert relative_gap(found, gradient) <= 1e-5


@pytest.mark.parametrize(("layout", "backend"), [("one rank", "unfused"), ("one rank", "local"), ("TP2 SP", "unfused")])
def test_its_captured_layers_are_its_layers_bit_for_bit(te_pool: TePool, layout: str, backend: str):
    num_ranks, parallel = LAYOUTS[layout]
    case = LayoutCase(num_ranks=num_ranks, parallel=parallel, precision={"attention_backend": backend}, num_steps=2)
    case = with_graphs(dataclasses.replace(case, optimizer=SGD))
    seen, plain = (te_pool.run(num_ranks, name, case, timeout=90) for name in ("captured", "uncaptured"))
    check_bits(seen, plain)


BF16 = {"bf16": True, "attention_backend": "fused"}


RINGS = [
    ("llama", "CP2"),
    ("llama", "CP4"),
    ("llama", "CP2 DP2 distopt"),
    ("llama", "TP2 CP2 SP"),
    ("llama", "PP2 VPP2 CP2"),
    ("gpt", "CP2"),
    ("mixture", "CP2 EP2 allgather"),
]
BOTH = ("mbs 2", "packed 100")
TAKES_TURNS = {(*ring, microbatches) for ring, microbatches in zip(RINGS, itertools.cycle(BOTH))}


def bf16_gap(te_pool: TePool, pool: RankPool, case: LayoutCase) -> float:
    """How far a gradient of half precision is from that of the one graph in fp32."""
    _, gradient = expected_of(pool, case.model, case.num_groups, json.dumps(case.loss_options))
    results = te_pool.run(case.num_ranks, "layout", case)
    return relative_gap(whole_tensors([r.gradient for r in results], replicas_agree_to=1e-6), gradient)


@functools.cache
def bf16_gap_of_one_rank(te_pool: TePool, pool: RankPool, model: str, microbatches: str) -> float:
    return bf16_gap(te_pool, pool, LayoutCase(model=model, precision=BF16, **MICROBATCHES[microbatches]))


@pytest.mark.parametrize(
    ("model", "layout", "microbatches"),
    [
        pytest.param(*case, marks=[] if case in TAKES_TURNS else [pytest.mark.slow])
        for case in ((*ring, microbatches) for ring in RINGS for microbatches in BOTH)
    ],
)
def test_its_ring_of_context_parallel_ranks_adds_no_error_to_that_of_bf16(
    te_pool: TePool, pool: RankPool, model: str, layout: str, microbatches: str
):
    """Its fused attention and its ring are of half precision: held to the one graph in fp32, as one rank without a ring
    is."""
    num_ranks, parallel = (LAYOUTS | MIXTURE_LAYOUTS)[layout]
    case = LayoutCase(num_ranks=num_ranks, parallel=parallel, model=model, precision=BF16, **MICROBATCHES[microbatches])
    alone = bf16_gap_of_one_rank(te_pool, pool, model, microbatches)
    ring = bf16_gap(te_pool, pool, case)
    print(f"{model} {layout} {microbatches}: gradient off by {ring:.2e}, on one rank by {alone:.2e}")
    assert ring < 1.5 * alone < 0.15


@pytest.mark.parametrize("microbatches", ["mbs 2", "packed 100"])
@pytest.mark.parametrize("layout", ["one rank", "TP2 SP"])
def test_a_step_of_its_layers_does_not_wait_for_the_device(te_pool: TePool, layout: str, microbatches: str):
    """But for what its kernels do."""
    num_ranks, parallel = LAYOUTS[layout]
    case = LayoutCase(num_ranks=num_ranks, parallel=parallel, precision=BF16, **MICROBATCHES[microbatches])
    assert te_pool.run(num_ranks, "waits", case) == [[]] * num_ranks
