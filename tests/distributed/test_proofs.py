"""What a run proves of itself: each proof passes on every layout, and stops a run with a fault injected into it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import CP2, DISTRIBUTED_OPTIMIZER, EP2, PP2, SP, TP2, VPP2
from rank_pool import RankPool
from tiny_run import (
    TinyData,
    output_on_rank,
    read_metrics,
    refusal_on_rank,
    score_own_weights_on_rank,
    train_on_rank,
    write_config,
    write_reference,
)

ConfigFile = Callable[..., Path]
Layout = tuple[int, dict[str, Any]]
OVERLAP: dict[str, Any] = {"overlap_grad_reduce": True}
PACKED: dict[str, Any] = {"micro_batch_size": None, "max_tokens_per_microbatch": 128}
SEPARABLE: dict[str, Any] = {"objective": "group_bce"}
MIXTURE: dict[str, Any] = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16}
NO_WARMUP: dict[str, Any] = {"optimizer": {"lr_warmup_iters": 0}}
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
    "mean over microbatches": ("the schedule's mean", (1, {}), {"micro_batch_size": 3}),
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


@pytest.mark.costly
def test_the_norm_counts_every_element_of_the_model_once(pool: RankPool, config_file: ConfigFile):
    """Norms under tensor parallelism, both ends of a tied embedding, replicas and shards of the optimizer."""
    norms = []
    for num_ranks, parallel in (
        (1, {}),
        (2, TP2 | SP),
        (2, PP2),
        (2, {}),
        (2, DISTRIBUTED_OPTIMIZER | OVERLAP),
        (4, TP2 | PP2),
    ):
        config = config_file(parallel=parallel, training={"train_iters": 1, "verify_gradients": 1}, **NO_WARMUP)
        output = "".join(pool.run(num_ranks, output_on_rank, ["--config", str(config)]))
        (found,) = re.findall(r"\|\|one graph\|\| (\S+) = \S+, two passes (\S+),", output)
        norms += map(float, found)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


@pytest.mark.costly
def test_the_norm_counts_every_element_of_a_mixture_once(pool: RankPool, config_file: ConfigFile):
    """Experts have other replicas than the rest; each run also verifies its gradient, on as many groups each."""
    norms = []
    for num_ranks, parallel in (
        (1, {}),
        (2, EP2 | DISTRIBUTED_OPTIMIZER),
        (4, TP2 | SP | EP2),
        (4, PP2 | EP2),
    ):
        training = {"train_iters": 1, "verify_gradients": 1}
        config = config_file(model=MIXTURE, parallel=parallel, training=training, **NO_WARMUP)
        output = "".join(pool.run(num_ranks, output_on_rank, ["--config", str(config)]))
        (found,) = re.findall(r"\|\|one graph\|\| (\S+) = \S+, two passes (\S+),", output)
        norms += map(float, found)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


def test_one_bit_of_one_expert_stops_every_rank(pool: RankPool, config_file: ConfigFile):
    """Ranks 1 and 3 hold the same experts, 0 and 2 the others."""
    config = config_file(
        model=MIXTURE,
        parallel=EP2,
        training={"check_weight_hash_across_dp_replicas_interval": 2, "train_iters": 2},
        **NO_WARMUP,
    )
    answers = pool.run(4, refusal_on_rank, ["--config", str(config)], "a flipped bit of an expert on rank 3")
    assert len(set(answers)) == 1, "every rank must stop with the same message"
    expert = r"decoder\.layers\.1\.mlp\.experts\.local_experts\.3\.linear_fc2\.weight"
    assert re.search(rf"{expert}: \w+ on rank 1; \w+ on rank 3\.", answers[0][1]), answers[0][1]


def test_bf16_has_a_tolerance_of_its_own_and_a_lost_response_is_out_of_it(
    pool: RankPool, config_file: ConfigFile, tiny_data: TinyData, tmp_path: Path
):
    reference, save = tmp_path / "reference", tmp_path / "run"
    write_reference(tiny_data.store, reference, precision="bf16")
    config = config_file(
        precision={"bf16": True},
        training={"train_iters": 2, "verify_gradients": 2},
        objective={"reference_logprobs": str(reference)},
        checkpoint={"save": str(save)},
        **NO_WARMUP,
    )
    argv = ["--config", str(config)]
    pool.run(2, train_on_rank, argv)
    assert all(1e-4 < line["gradient_gap"] <= 1e-1 for line in read_metrics(save))
    shutil.rmtree(save)
    answers = pool.run(2, refusal_on_rank, argv, "a response without a weight")
    assert "the gradient of the two passes is not that of the loss" in answers[0][1]
    assert "tolerance 1e-01" in answers[0][1]


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


@pytest.mark.acts("TrainingConfig.check_weight_hash_across_dp_replicas_interval")
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
    "one rank packed": ((1, {}), PACKED),
    "TP2 sequence parallel": ((2, TP2 | SP), {}),
    "PP2 VPP2": ((2, PP2 | VPP2), {}),
    "DP2": ((2, {}), {}),
    "CP2": ((2, CP2), {}),
    "CP2 packed": ((2, CP2), PACKED),
    "CP2 PP2 packed": ((4, CP2 | PP2), PACKED),
}


@pytest.fixture(scope="module")
def own_reference(pool: RankPool, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scored by one rank, padded, from the weights that the runs start from."""
    folder = tmp_path_factory.mktemp("own")
    config = write_config(folder / "run.yaml", tiny_data.store, tiny_data.reference)
    pool.run(1, score_own_weights_on_rank, ["--config", str(config)], str(tiny_data.store), str(folder / "reference"))
    return folder / "reference"


@pytest.fixture(scope="module")
def saved_weights(pool: RankPool, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    config = write_config(
        folder / "run.yaml",
        tiny_data.store,
        tiny_data.reference,
        training={"train_iters": 1},
        optimizer={"lr_warmup_iters": 0},
        checkpoint={"save": str(folder / "run")},
    )
    pool.run(1, train_on_rank, ["--config", str(config)])
    return folder / "run"


@pytest.mark.parametrize("kind", ["cached", "resident"])
@pytest.mark.parametrize("layout", STEP_0)
def test_a_policy_that_starts_from_its_reference_is_held_to_scores_of_0(
    pool: RankPool, config_file: ConfigFile, own_reference: Path, saved_weights: Path, layout: str, kind: str
):
    """Both that the check passes, and that it would not have with scores off by 0.1."""
    (num_ranks, parallel), training = STEP_0[layout]
    reference = {
        "cached": {"objective": {"reference_logprobs": str(own_reference)}},
        "resident": {
            "objective": {"reference": "resident", "reference_logprobs": None},
            "checkpoint": {"pretrained_checkpoint": str(saved_weights)},
        },
    }[kind]
    config = config_file(
        parallel=parallel, training={"train_iters": 1, **training}, optimizer={"lr_warmup_iters": 0}, **reference
    )
    argv = ["--config", str(config)]
    found = re.search(
        r"step 0: policy = reference; largest score (\S+), \S+ per token; preference loss (\S+), closed form (\S+),",
        "".join(pool.run(num_ranks, output_on_rank, argv)),
    )
    assert found
    assert float(found[1]) <= 1e-4
    assert float(found[2]) == pytest.approx(float(found[3]), abs=1e-5)
    answers = pool.run(num_ranks, refusal_on_rank, argv, "noisy policy")
    assert len(set(answers)) == 1
    assert "the policy starts with the reference's weights, but a response has" in answers[0][1]


def test_small_differences_that_all_push_the_loss_one_way_are_refused_at_step_0(
    pool: RankPool, config_file: ConfigFile, tiny_data: TinyData, tmp_path: Path
):
    """Nine tenths of the tolerance in every token: no response is out of it, the loss is."""
    reference = tmp_path / "reference"
    argv = ["--config", str(config_file())]
    pool.run(1, score_own_weights_on_rank, argv, str(tiny_data.store), str(reference), 0.0, 9e-5)
    config = config_file(parallel=CP2 | PP2, training=PACKED, objective={"reference_logprobs": str(reference)})
    answers = pool.run(4, refusal_on_rank, ["--config", str(config)])
    assert len(set(answers)) == 1
    assert re.search(r"the preference loss is \S+, not its closed form .* the differences have a side", answers[0][1])


@pytest.mark.parametrize(
    "layout", [(1, {}), (2, CP2), (4, CP2 | TP2 | SP)], ids=["one rank", "CP2", "CP2 TP2 sequence parallel"]
)
def test_drift_between_the_passes_stops_a_packed_run(pool: RankPool, config_file: ConfigFile, layout: Layout):
    num_ranks, parallel = layout
    config = config_file(parallel=parallel, training={"score_drift_threshold": 1e-3, **PACKED})
    answers = pool.run(num_ranks, refusal_on_rank, ["--config", str(config)], "noisy scores")
    assert len(set(answers)) == 1
    assert "differ by 3.000e-02, more than score_drift_threshold 1.000e-03" in answers[0][1]  # beta 0.3
