"""Optimizer and schedule change freely at a resume: the next update is the new flags', and the change is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rank_pool import RankPool
from resumed_step import resume_on_rank
from tiny_run import TinyData, train_on_rank, write_reference

# The rate of the third update: 8 groups of the 24 of the decay are consumed, 2 of 2 iterations of warm-up.
PEAK, ROOT = 5e-3, ("--lr-decay-iters", "6")


def cosine(peak: float, least: float, done: float, warmup: float, whole: float) -> float:
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (whole - warmup)))


OLD_LR = cosine(PEAK, 0.0, 8, 4, 24)
SCHEDULE: dict[tuple[str, ...], tuple[str, float]] = {
    (): ("", OLD_LR),
    ("--lr", "2e-3"): ("lr: 0.005 -> 0.002", cosine(2e-3, 0.0, 8, 4, 24)),
    ("--min-lr", "1e-3"): ("min_lr: 0.0 -> 0.001", cosine(PEAK, 1e-3, 8, 4, 24)),
    ("--lr", "8e-3", "--min-lr", "4e-3"): (
        "lr: 0.005 -> 0.008, min_lr: 0.0 -> 0.004",
        cosine(8e-3, 4e-3, 8, 4, 24),
    ),
    ("--lr-decay-style", "linear"): ("lr_decay_style: cosine -> linear", PEAK * (1 - 4 / 20)),
    ("--lr-decay-style", "constant"): ("lr_decay_style: cosine -> constant", PEAK),
    ("--lr-decay-iters", "12"): ("lr_decay_iters: 6 -> 12", cosine(PEAK, 0.0, 8, 4, 48)),
    ("--lr-warmup-iters", "4"): ("lr_warmup_iters: 1 -> 4", PEAK * 8 / 16),
    ("--lr-warmup-iters", "0", "--lr-warmup-fraction", "0.5"): (
        "lr_warmup_iters: 1 -> 3, lr_warmup_fraction: None -> 0.5",
        PEAK * 8 / 12,
    ),
}
OPTIMIZER: dict[tuple[str, ...], str] = {
    ("--weight-decay", "0.3"): "weight_decay: 0.01 -> 0.3",
    ("--clip-grad", "0.05"): "clip_grad: 1.0 -> 0.05",
    ("--clip-grad", "0"): "clip_grad: 1.0 -> 0.0",
    ("--adam-beta1", "0.5"): "adam_beta1: 0.9 -> 0.5",
    ("--adam-beta2", "0.9"): "adam_beta2: 0.999 -> 0.9",
    ("--adam-eps", "1e-2"): "adam_eps: 0.001 -> 0.01",
}
SGD = ("--optimizer", "sgd", "--adam-eps", "1e-8")
SGD_CHANGES: dict[tuple[str, ...], str] = {
    (): "",
    ("--lr", "2e-3"): "lr: 0.005 -> 0.002",
    ("--sgd-momentum", "0.5"): "sgd_momentum: 0.9 -> 0.5",
    ("--sgd-momentum", "0"): "sgd_momentum: 0.9 -> 0.0",
    ("--weight-decay", "0.3"): "weight_decay: 0.01 -> 0.3",
}


@pytest.fixture
def resumed(pool: RankPool, config_file: Callable[..., Path], tmp_path: Path) -> Callable[..., list[list]]:
    """Save after two updates, resume with each of the changes; the results of all ranks, change by change."""

    def run(num_ranks: int, flags: Sequence[str], changes: Sequence[Sequence[str]]) -> list[list]:
        config = config_file(optimizer={"lr_warmup_iters": 1}, training={"train_iters": 2})
        folder = str(tmp_path / "run")
        argv = ["--config", str(config), *ROOT, *flags, "--save", folder, "--load", folder]
        pool.run(num_ranks, train_on_rank, argv)
        return [list(own) for own in zip(*pool.run(num_ranks, resume_on_rank, [*argv, "--train-iters", "3"], changes))]

    return run


def check(results: list, said: str, lr: float | None) -> None:
    assert [result.said for result in results] == [[f"changed     {said}"] if said else [], *[[]] * (len(results) - 1)]
    for result in results:
        assert result.num_entries > 1000
        assert result.worst <= 1e-7 < 1e-5 < result.moved, result
        if lr is not None:
            assert result.lr == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    ("num_ranks", "flags"),
    [(1, ()), (2, ("--use-distributed-optimizer",))],
    ids=["one-rank", "DP2-distributed-optimizer"],
)
def test_every_field_of_adam_and_the_schedule_holds_from_the_next_update_on(
    resumed: Callable[..., list[list]], num_ranks: int, flags: Sequence[str]
):
    results = resumed(num_ranks, flags, [*SCHEDULE, *OPTIMIZER])
    for own, (said, lr) in zip(results, SCHEDULE.values()):
        check(own[::-1] if len(own) > 1 and own[-1].said else own, said, lr)
    for own, said in zip(results[len(SCHEDULE) :], OPTIMIZER.values(), strict=True):
        check(own[::-1] if len(own) > 1 and own[-1].said else own, said, OLD_LR)
    assert results[0][0].grad_norm > 0.05, "or clipping at 0.05 would change nothing"


@pytest.mark.parametrize(
    ("num_ranks", "flags"),
    [(1, ("--bf16",)), (2, ("--expert-model-parallel-size", "2", "--use-distributed-optimizer"))],
    ids=["bf16", "experts"],
)
def test_another_rate_where_groups_lie_deeper(
    resumed: Callable[..., list[list]], tiny_data: TinyData, tmp_path: Path, num_ranks: int, flags: Sequence[str]
):
    """Master weights of bf16, and the optimizer that Megatron chains for experts."""
    if "--bf16" in flags:
        write_reference(tiny_data.store, tmp_path / "reference", precision="bf16")
        flags = [*flags, "--reference-logprobs", str(tmp_path / "reference")]
    mixture = ("--num-moe-experts", "4", "--moe-ffn-hidden-size", "16") if num_ranks == 2 else ()
    changes = {change: SCHEDULE[change] for change in ((), ("--lr", "8e-3", "--min-lr", "4e-3"))}
    for own, (said, lr) in zip(resumed(num_ranks, [*flags, *mixture], list(changes)), changes.values(), strict=True):
        check(own[::-1] if len(own) > 1 and own[-1].said else own, said, lr)


def test_every_field_of_sgd(resumed: Callable[..., list[list]]):
    for own, said in zip(resumed(1, SGD, list(SGD_CHANGES)), SGD_CHANGES.values(), strict=True):
        check(own, said, None)


def test_sgd_takes_up_momentum_that_was_not_saved(resumed: Callable[..., list[list]]):
    (own,) = resumed(1, [*SGD, "--sgd-momentum", "0"], [("--sgd-momentum", "0.8")])
    check(own, "sgd_momentum: 0.0 -> 0.8", OLD_LR)
