"""A run that was saved and resumed is the run that was not, on its own layout bit by bit, on another to rounding."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sentencepiece
import tiny_run
from rank_pool import RankPool
from tiny_run import read_metrics, refusal_on_rank, train_on_rank

Flags = Sequence[str]
ConfigFile = Callable[..., Path]

ONE: tuple[int, Flags] = (1, ())
TP2: tuple[int, Flags] = (2, ("--tensor-model-parallel-size", "2"))
PP2: tuple[int, Flags] = (2, ("--pipeline-model-parallel-size", "2"))
DP2: tuple[int, Flags] = (2, ())
ONE_SHARDED: tuple[int, Flags] = (1, ("--use-distributed-optimizer",))
DP2_SHARDED: tuple[int, Flags] = (2, ("--use-distributed-optimizer",))
PP2_DP2_SHARDED: tuple[int, Flags] = (4, (*PP2[1], "--use-distributed-optimizer"))
CP2_PACKED: tuple[int, Flags] = (
    2,
    ("--context-parallel-size", "2", "--max-tokens-per-microbatch", "128", "--micro-batch-size", "null"),
)
EP2_SHARDED: tuple[int, Flags] = (2, ("--expert-model-parallel-size", "2", "--use-distributed-optimizer"))
MIXTURE = ("--num-moe-experts", "4", "--moe-ffn-hidden-size", "16")
TP2_DP2_SHARDED: tuple[int, Flags] = (4, (*TP2[1], "--use-distributed-optimizer"))


@pytest.fixture
def train(pool: RankPool, config_file: ConfigFile) -> Callable[..., tuple[str, list[dict[str, float]]]]:
    """``train(layout, folder, *flags)``: digest of the final weights and the lines of metrics.jsonl."""
    config = config_file()

    def run(layout: tuple[int, Flags], folder: Path, *flags: str) -> tuple[str, list[dict[str, float]]]:
        num_ranks, own = layout
        argv = ["--config", str(config), *own, "--save", str(folder), "--load", str(folder), *flags]
        digests = pool.run(num_ranks, train_on_rank, argv)
        assert len(set(digests)) == 1
        return digests[0], read_metrics(folder)

    return run


TIMES = {"iteration_ms", "tokens_per_second", "peak_memory_bytes"}


def without_times(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if name not in TIMES and not name.startswith("time/")}
        for line in lines
    ]


@pytest.mark.parametrize(
    "layout",
    [TP2, PP2, DP2, DP2_SHARDED, CP2_PACKED],
    ids=["TP2", "PP2", "DP2", "DP2-distributed-optimizer", "CP2-packed"],
)
def test_resuming_on_the_same_layout_gives_the_same_bits(train, tmp_path: Path, layout: tuple[int, Flags]):
    digest, lines = train(layout, tmp_path / "whole")
    half, _ = train(layout, tmp_path / "parts", "--train-iters", "3", "--lr-decay-iters", "6")
    resumed, resumed_lines = train(layout, tmp_path / "parts")
    assert half != digest
    assert resumed == digest
    assert [line["iteration"] for line in resumed_lines] == [1, 2, 3, 4, 5, 6]
    assert without_times(resumed_lines) == without_times(lines)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TP2, PP2),
        (ONE, DP2),
        pytest.param(DP2, TP2, marks=pytest.mark.slow),
        (DP2, CP2_PACKED),
        pytest.param(CP2_PACKED, PP2, marks=pytest.mark.slow),
        (ONE_SHARDED, DP2_SHARDED),
        (TP2_DP2_SHARDED, PP2_DP2_SHARDED),
    ],
    ids=[
        "TP2-PP2",
        "DP1-DP2",
        "DP2-TP2",
        "DP2-CP2-packed",
        "CP2-packed-PP2",
        "sharded-DP1-DP2",
        "sharded-TP2xDP2-PP2xDP2",
    ],
)
@pytest.mark.costly
def test_resuming_on_another_layout_gives_the_same_losses(
    train, tmp_path: Path, first: tuple[int, Flags], second: tuple[int, Flags]
):
    _, lines = train(first, tmp_path / "whole")
    train(first, tmp_path / "parts", "--train-iters", "3", "--lr-decay-iters", "6")
    _, resumed_lines = train(second, tmp_path / "parts")
    for name in ("loss", "preference_loss", "nll_loss", "grad_norm", "rewards/margins", "lr", "consumed_groups"):
        wanted = [line[name] for line in lines]
        assert [line[name] for line in resumed_lines] == pytest.approx(wanted, rel=1e-5), name


@pytest.mark.costly
def test_a_mixture_resumes_where_its_experts_are_shared_out_otherwise(train, tmp_path: Path):
    """Weights and optimizer state; its gradient is verified on the way, experts shared out and whole."""
    verified = (*MIXTURE, "--verify-gradients", "1")
    _, lines = train(EP2_SHARDED, tmp_path / "whole", *verified)
    train(EP2_SHARDED, tmp_path / "parts", *MIXTURE, "--train-iters", "3", "--lr-decay-iters", "6")
    _, resumed_lines = train(ONE_SHARDED, tmp_path / "parts", *verified)
    for name in ("loss", "grad_norm", "lr"):
        wanted = [line[name] for line in lines]
        assert [line[name] for line in resumed_lines] == pytest.approx(wanted, rel=1e-5), name


@pytest.mark.costly
def test_worker_processes_change_nothing(train, tmp_path: Path):
    digest, lines = train(DP2, tmp_path / "none")
    prefetched, prefetched_lines = train(DP2, tmp_path / "two", "--num-workers", "1")
    assert prefetched == digest
    assert without_times(prefetched_lines) == without_times(lines)


def test_a_resumed_run_needs_the_optimizer_state(train, tmp_path: Path):
    """The law above would be empty if the state did not matter: weights alone give another run."""
    digest, _ = train(ONE, tmp_path / "whole")
    train(ONE, tmp_path / "parts", "--train-iters", "3", "--lr-decay-iters", "6")
    assert train(ONE, tmp_path / "parts", "--no-load-optim")[0] != digest


def test_a_checkpoint_that_does_not_fit_is_refused_with_its_reason(
    pool: RankPool, train, config_file: ConfigFile, tmp_path: Path
):
    folder = tmp_path / "one"
    train(ONE, folder, "--train-iters", "1", "--lr-warmup-iters", "0")
    before = sorted(path.name for path in folder.rglob("*"))
    argv = ["--config", str(config_file()), "--load", str(folder), "--save", str(folder)]
    for flags, fragments in {
        ("--hidden-size", "64"): ["another model", "hidden_size: checkpoint 32, run 64"],
        ("--norm-epsilon", "1e-6"): ["another model", "norm_epsilon"],
        ("--use-distributed-optimizer",): ["optimizer state", "--finetune"],
        ("--seed", "99"): ["another order of data", "seed: checkpoint 7, run 99"],
        ("--no-shuffle",): ["another order of data", "shuffle"],
        ("--load", "none"): ["holds another run, at iteration 1"],
        ("--finetune",): ["holds another run, at iteration 1"],
        ("--load", str(tmp_path / "nothing"), "--save", str(tmp_path / "new"), "--finetune"): ["finetune is set"],
        ("--load", str(tmp_path / "nothing"), "--exit-on-missing-checkpoint"): ["no checkpoint at"],
        ("--pretrained-checkpoint", str(tmp_path / "nothing"), "--load", str(tmp_path)): ["no checkpoint at"],
    }.items():
        for kind, message in pool.run(2, refusal_on_rank, [*argv, *flags]):
            assert kind == "CheckpointError", message
            for fragment in fragments:
                assert fragment in message
    assert sorted(path.name for path in folder.rglob("*")) == before, "a refused run changed the checkpoint folder"


def test_a_damaged_checkpoint_is_refused_with_its_name(pool: RankPool, train, config_file: ConfigFile, tmp_path: Path):
    folder = tmp_path / "one"
    train(ONE, folder, "--train-iters", "1", "--lr-warmup-iters", "0")
    for file in folder.glob("iter_*/*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    argv = ["--config", str(config_file()), "--load", str(folder), "--save", str(folder)]
    for kind, message in pool.run(2, refusal_on_rank, argv):
        assert kind == "CheckpointError"
        assert re.search(r"iter_0000001 (is damaged or incomplete|cannot be read)", message), message


def test_a_tokenizer_that_is_not_the_stores_is_refused(
    pool: RankPool, config_file: ConfigFile, tiny_data: tiny_run.TinyData, tmp_path: Path
):
    argv = ["--config", str(config_file()), "--train-iters", "3", "--tokenizer-type", "SentencePieceTokenizer"]
    argv += ["--tokenizer-model"]
    absent = pool.run(1, refusal_on_rank, [*argv, str(tmp_path / "absent.model")])[0]
    assert absent[0] == "DataError"
    assert "absent.model: no such file" in absent[1]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["other words make other pieces"] * 50),
        model_prefix=str(tmp_path / "other"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    other = pool.run(1, refusal_on_rank, [*argv, str(tmp_path / "other.model")])[0]
    assert other[0] == "DataError"
    assert "the store was made with the tokenizer" in other[1]
    pool.run(1, train_on_rank, [*argv, str(tiny_data.tokenizer)])
