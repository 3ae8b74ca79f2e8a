"""What a run is told of batches, length, seed, validation and logs, in the numbers it then has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_rank import OneRank
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_groupdpo.errors import UserError
from megatron_groupdpo.objectives import group_keys
from megatron_groupdpo.run.batches import BatchSource
from megatron_groupdpo.run.logs.flops import step_flops
from megatron_groupdpo.run.loop import evaluate


@pytest.mark.acts("TrainingConfig.train_iters", "TrainingConfig.train_samples", "TrainingConfig.global_batch_size")
@pytest.mark.parametrize(
    ("changes", "consumed"),
    [
        ({"train_iters": 3, "global_batch_size": 4}, [4, 8, 12]),
        ({"train_iters": 2, "global_batch_size": 5}, [5, 10]),
        ({"train_iters": None, "train_samples": 11, "global_batch_size": 3}, [3, 6, 9]),
    ],
)
def test_a_run_takes_as_many_groups_as_asked_for(
    one: OneRank, folder: Path, changes: dict[str, Any], consumed: list[int]
):
    done = one.train(folder, **changes)
    assert done.of("consumed_groups") == consumed
    assert done.run.progress.consumed_groups == consumed[-1]


@pytest.mark.acts("TrainingConfig.micro_batch_size", "PlanOptions.micro_batch_size")
@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_padded_microbatch_holds_so_many_responses(one: OneRank, size: int):
    batch = one.build(micro_batch_size=size).train.batch(0, 6)
    rows = [microbatch.tokens_BS.shape[0] for microbatch in batch.microbatches]
    assert len(rows) == -(-batch.batch.num_responses // size)
    assert max(rows) == size
    assert sum(rows) >= batch.batch.num_responses


@pytest.mark.acts("TrainingConfig.max_tokens_per_microbatch", "PlanOptions.max_tokens_per_microbatch")
@pytest.mark.parametrize("budget", [12, 30, 60])
def test_a_packed_microbatch_holds_so_many_tokens(one: OneRank, budget: int):
    batch = one.build(micro_batch_size=None, max_tokens_per_microbatch=budget).train.batch(0, 6)
    lengths = [microbatch.tokens_BS.shape for microbatch in batch.microbatches]
    assert {rows for rows, _ in lengths} == {1}
    assert max(length for _, length in lengths) <= budget
    full = batch.num_tokens / budget
    assert full <= len(lengths) <= 2 * full + 1, "any two of them would not have fitted into one"


@pytest.mark.acts("TrainingConfig.seed")
def test_the_seed_decides_weights_order_and_pairs(one: OneRank):
    """The order is NumPy's permutation by (seed, epoch), and a pair's key is of seed, group and epoch."""
    digests = set()
    for seed in (5, 6):
        run = one.build(seed=seed, objective="dpo", pair_selection="random")
        digests.add(run.policy.weights_digest())
        for epoch in (0, 1, 2):
            planned = run.train.batch(9 * epoch, 9)
            order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(9)
            assert planned.group_ids == order.tolist()
            keys_G = group_keys(torch.tensor(planned.group_ids), seed=seed, epoch=epoch)
            assert pairs_drawn(run.train, epoch) == pairs_of(run.train, keys_G, planned.group_ids)
    assert len(digests) == 2


def pairs_drawn(source: BatchSource, epoch: int) -> list[int]:
    """Responses that random pairs give a pass to, in an epoch."""
    return source.batch(9 * epoch, 9).batch.response_ids_R.tolist()


def pairs_of(source: BatchSource, keys_G: torch.Tensor, group_ids: list[int]) -> list[int]:
    from megatron_groupdpo.data.batches.batch import build_batch

    samples = [source.dataset[group_id] for group_id in group_ids]
    batch = build_batch(samples, group_keys_G=keys_G, needs_pass=source._needs_pass)
    return batch.response_ids_R.tolist()


@pytest.mark.acts("TrainingConfig.eval_interval", "DataConfig.valid_data_path")
def test_a_run_is_validated_at_its_start_and_every_so_many_iterations(one: OneRank, folder: Path):
    done = one.train(folder, valid_data_path=(str(one.small),), eval_interval=2, train_iters=5)
    assert [line["iteration"] for line in done.lines if "eval/loss" in line] == [0, 2, 4]
    assert len(re.findall(r"validation loss at iteration \d", done.printed)) == 3
    assert done.run.valid is not None
    taken = list(done.run.valid.once(2))
    assert [planned.group_ids for planned in taken] == [[0, 1], [2, 3], [4]]
    responses = torch.cat([planned.batch.response_ids_R for planned in taken]).tolist()
    sizes = [len(done.run.valid.dataset[group_id].labels_K) for group_id in range(5)]
    assert sorted(responses) == list(range(sum(sizes))), "a validation scores every response"


@pytest.mark.acts("TrainingConfig.eval_iters")
def test_a_validation_takes_so_many_batches(one: OneRank):
    """Means over the groups of the first n batches: those of one batch of that many groups."""

    def validated(groups: int, iterations: int) -> dict[str, float]:
        run = one.build(
            valid_data_path=(str(one.large),), data_path=(str(one.small),), eval_interval=1, global_batch_size=groups,
            eval_iters=iterations,
        )  # fmt: skip
        return evaluate(run)

    by_iterations = {n: validated(2, n)["eval/preference_loss"] for n in (1, 2, 3, 4)}
    for n, value in by_iterations.items():
        assert value == pytest.approx(validated(2 * n, 1)["eval/preference_loss"], rel=1e-6)
    assert len({round(value, 6) for value in by_iterations.values()}) == 4
    assert validated(2, 5) == validated(2, 100), "five batches are all there are"


@pytest.mark.acts("TrainingConfig.verify_gradients", "TrainingConfig.gradient_tolerance")
def test_gradients_are_verified_in_the_first_iterations_to_the_tolerance(one: OneRank, folder: Path):
    done = one.train(folder, verify_gradients=2, micro_batch_size=1)
    gaps = done.of("gradient_gap")
    assert [line["iteration"] for line in done.lines if "gradient_gap" in line] == [1, 2]
    with pytest.raises(UserError, match="not that of the loss"):
        one.train(folder / "tight", micro_batch_size=1, verify_gradients=1, gradient_tolerance=gaps[0] / 2)
    one.train(folder / "wide", micro_batch_size=1, verify_gradients=1, gradient_tolerance=gaps[0] * 2, train_iters=1)


@pytest.mark.acts("LoggingConfig.log_interval", "LoggingConfig.log_throughput", "LoggingConfig.run_dir")
def test_the_console_has_a_line_every_so_many_iterations_and_the_file_has_all(one: OneRank, folder: Path):
    done = one.train(folder, log_interval=2, train_iters=5, log_throughput=True)
    assert [int(number) for number in re.findall(r"iteration +(\d+)/", done.printed)] == [2, 4, 5]
    assert done.printed.count("throughput per GPU (TFLOP/s)") == 3
    assert [line["iteration"] for line in done.lines] == [1, 2, 3, 4, 5]
    for place, line in enumerate(done.lines):
        planned = done.run.train.batch(2 * place, 2)
        flops = step_flops(done.run.policy.model, planned.batch, scoring_pass=True)
        assert line["tflops_per_gpu"] * line["iteration_ms"] * 1e9 == pytest.approx(flops, rel=1e-9)
    assert (folder / "config.yaml").is_file()
    assert "tflops_per_gpu" not in one.train(folder / "plain").lines[0]


@pytest.mark.acts("LoggingConfig.tensorboard_dir")
def test_tensorboard_has_the_numbers_of_the_file(one: OneRank, folder: Path):
    done = one.train(folder, tensorboard_dir=str(folder / "boards"))
    boards = EventAccumulator(str(folder / "boards")).Reload()
    for name in ("loss", "grad_norm", "lr"):
        assert [event.value for event in boards.Scalars(name)] == pytest.approx(done.of(name), rel=1e-6)


@pytest.mark.acts("LoggingConfig.profile", "LoggingConfig.profile_step_start", "LoggingConfig.profile_step_end")
def test_a_run_traces_the_iterations_asked_for(one: OneRank, folder: Path):
    one.train(folder, profile=True, profile_step_start=2, profile_step_end=4)
    assert [path.name for path in (folder / "profile").iterdir()] == ["rank0_iterations_2_to_3.json"]
