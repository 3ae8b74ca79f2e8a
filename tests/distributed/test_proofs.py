"""What a run proves of itself: each proof passes on every layout, and stops a run with a fault injected into it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import CP2, DISTRIBUTED_OPTIMIZER, PP2, SP, TP2, VPP2
from rank_pool import RankPool
from tiny_run import read_metrics, refusal_on_rank, train_on_rank

ConfigFile = Callable[..., Path]
Layout = tuple[int, dict[str, Any]]
OVERLAP: dict[str, Any] = {"overlap_grad_reduce": True}
PACKED: dict[str, Any] = {"micro_batch_size": None, "max_tokens_per_microbatch": 128}
SEPARABLE: dict[str, Any] = {"objective": "group_bce"}
SFT: dict[str, Any] = {"objective": "sft", "beta": 0.1, "reference": "none", "reference_logprobs": None}
FP32 = 1e-5

VERIFIED: dict[str, tuple[Layout, dict[str, Any], dict[str, Any]]] = {
    "one rank": ((1, {}), {}, {}),
    "one rank, packed, dpo": ((1, {}), PACKED, {"objective": "dpo"}),
    "TP2 sequence parallel": ((2, TP2 | SP), {}, {"one_sided_nll": True, "nll_average": "batch-tokens"}),
    "PP2 tied": ((2, PP2), {}, {}),
    "PP2 VPP2 packed": ((2, PP2 | VPP2), PACKED, {"score_average": True}),
    "DP2": ((2, {}), {}, SEPARABLE),
    "DP2 distributed optimizer, overlap": ((2, DISTRIBUTED_OPTIMIZER | OVERLAP), {}, {}),
    "CP2 packed": ((2, CP2), PACKED, {}),
    "CP2": ((2, CP2), {}, SFT),
    "TP2 PP2 sequence parallel": ((4, TP2 | PP2 | SP), {}, {}),
    "CP2 DP2 distributed optimizer, packed": ((4, CP2 | DISTRIBUTED_OPTIMIZER), PACKED, SEPARABLE),
    "PP2 VPP2 DP2 overlap": ((4, PP2 | VPP2 | OVERLAP), {}, {}),
}


@pytest.mark.parametrize("case", VERIFIED)
def test_the_two_passes_gradient_is_the_one_graphs_and_verifying_changes_no_bit(
    pool: RankPool, config_file: ConfigFile, tmp_path: Path, case: str
):
    (num_ranks, parallel), training, objective = VERIFIED[case]
    digests = []
    for verified in (2, 0):
        save = tmp_path / str(verified)
        config = config_file(
            parallel=parallel,
            training={"train_iters": 3, "verify_gradients": verified, **training},
            objective=objective,
            checkpoint={"save": str(save)},
        )
        digests.append(pool.run(num_ranks, train_on_rank, ["--config", str(config)]))
        lines = read_metrics(save)
        assert [("gradient_gap" in line) for line in lines] == [step < verified for step in range(3)]
        for line in lines[:verified]:
            assert 0 < line["gradient_gap"] <= FP32, "0 would mean that a gradient was compared with itself"
        if objective in (SEPARABLE, SFT):
            assert all(line["score_drift"] is None for line in lines)
        else:
            assert all(line["score_drift"] <= 1e-5 for line in lines)
    assert digests[0] == digests[1]


CAUGHT: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "coefficient": ("a coefficient of 1.001", (1, {}), {}),
    "coefficient, TP2 PP2": ("a coefficient of 1.001", (4, TP2 | PP2), {}),
    "weight": ("a response without a weight", (2, {}), {}),
    "cp factor": ("loss times cp", (2, CP2), {}),
    "cp factor, packed": ("loss times cp", (4, CP2 | PP2), PACKED),
    "cp sum": ("the cp sum counts every rank", (2, CP2), {}),
    "schedule": ("the schedule's rescaling", (2, PP2), {}),
    "lost microbatch": ("a lost microbatch", (1, {}), {}),
    "lost microbatch, PP2": ("a lost microbatch", (2, PP2), {"micro_batch_size": 1}),
    "average": ("a data-parallel average", (2, {}), {}),
    "average, sharded": ("a data-parallel average", (2, DISTRIBUTED_OPTIMIZER | OVERLAP), {}),
    "average over cp": ("a data-parallel average", (2, CP2), {}),
    "norms": ("no sum over parts of the model", (2, TP2 | SP), {}),
    "tied embedding": ("no sum over parts of the model", (2, PP2), {}),
}


@pytest.mark.parametrize("case", CAUGHT)
def test_a_gradient_that_is_not_the_losss_stops_the_run_before_an_update(
    pool: RankPool, config_file: ConfigFile, tmp_path: Path, case: str
):
    fault, (num_ranks, parallel), training = CAUGHT[case]
    save = tmp_path / "run"
    config = config_file(
        parallel=parallel, training={"verify_gradients": 1, **training}, checkpoint={"save": str(save)}
    )
    answers = pool.run(num_ranks, refusal_on_rank, ["--config", str(config)], fault)
    assert len(set(answers)) == 1, "every rank must stop with the same message"
    kind, message = answers[0]
    assert kind == "UserError"
    numbers = re.search(r"= (\S+), two passes \S+, tolerance 1e-05; \d groups.*most of it in (\S+)\. Nothing", message)
    assert numbers, message
    assert float(numbers[1]) > 5e-4
    if case == "norms":
        assert "norm" in numbers[2]
    if case == "tied embedding":
        assert "embedding" in numbers[2] or "output_layer" in numbers[2]
    if case.startswith("average"):
        assert float(numbers[1]) == pytest.approx(0.5, rel=1e-3)
    assert read_metrics(save) == []


def test_gradients_are_verified_again_after_a_resume(pool: RankPool, config_file: ConfigFile, tmp_path: Path):
    save = tmp_path / "run"
    checkpoint = {"save": str(save), "load": str(save), "save_interval": 2}
    for train_iters in (2, 4):
        config = config_file(
            training={"train_iters": train_iters, "verify_gradients": 1},
            checkpoint=checkpoint,
            optimizer={"lr_decay_style": "constant", "lr_warmup_iters": 0},
        )
        pool.run(1, train_on_rank, ["--config", str(config)])
    assert [("gradient_gap" in line) for line in read_metrics(save)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("layout", "fault", "ranks"),
    [
        ((2, {}), "a flipped bit on rank 1", ("0", "1")),
        ((2, DISTRIBUTED_OPTIMIZER), "a flipped bit on rank 1", ("0", "1")),
        ((2, CP2), "a flipped bit on rank 1", ("0", "1")),
        ((4, PP2), "a flipped bit on rank 3", ("2", "3")),
    ],
    ids=["DP2", "DP2 distributed optimizer", "CP2", "PP2 DP2"],
)
def test_one_bit_of_one_replica_stops_every_rank_and_names_the_weight(
    pool: RankPool, config_file: ConfigFile, tmp_path: Path, layout: Layout, fault: str, ranks: tuple[str, str]
):
    num_ranks, parallel = layout
    save = tmp_path / "run"
    config = config_file(
        parallel=parallel,
        training={"check_weight_hash_across_dp_replicas_interval": 2},
        checkpoint={"save": str(save), "save_interval": 2},
    )
    answers = pool.run(num_ranks, refusal_on_rank, ["--config", str(config)], fault)
    assert len(set(answers)) == 1, "every rank must stop with the same message"
    kind, message = answers[0]
    assert kind == "UserError"
    layer = 2 if num_ranks == 4 else 1
    found = re.search(
        rf"decoder\.layers\.{layer}\.mlp\.linear_fc2\.weight: (\w+) on rank (\d); (\w+) on rank (\d)\.", message
    )
    assert found, message
    assert (found[2], found[4]) == ranks
    assert found[1] != found[3]
    assert message.startswith("iteration 2:")
    assert not list(save.glob("iter_*"))


def test_replicas_that_agree_go_on(pool: RankPool, config_file: ConfigFile):
    config = config_file(
        parallel=CP2 | DISTRIBUTED_OPTIMIZER,
        training={"check_weight_hash_across_dp_replicas_interval": 1, "train_iters": 3},
    )
    pool.run(4, train_on_rank, ["--config", str(config)])


STEP_0: dict[str, tuple[Layout, dict[str, Any]]] = {
    "one rank, packed": ((1, {}), PACKED),
    "TP2 sequence parallel": ((2, TP2 | SP), {}),
    "PP2 VPP2": ((2, PP2 | VPP2), {}),
    "CP2": ((2, CP2), {}),
    "CP2 packed": ((2, CP2), PACKED),
    "CP2 PP2 packed": ((4, CP2 | PP2), PACKED),
}
