"""At one positive and one negative the package gives TRL's numbers, kept in ``tests/golden/trl_dpo.json``.

``benchmarks/trl_parity.py`` compares with TRL itself, tensor by tensor, and writes that file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pair_compare import GOLDEN, Numbers, differences_from_golden, read_golden, too_large
from pair_problem import (
    BETA,
    MODELS,
    NLL_COEFF,
    VARIANTS,
    ProblemFiles,
    checksums,
    problem_settings,
    write_problem,
)
from pair_run import PairJob, PairResult, numbers_of, run_pairs
from parity import PP2, SP, TP2
from rank_pool import RankPool

CASES = [(model, variant.name) for model in MODELS for variant in VARIANTS if model in variant.models]
BY_NAME = {variant.name: variant for variant in VARIANTS}
REGENERATE = "the problem is no longer TRL's: run benchmarks/trl_parity.py --write-golden, with TRL installed"

Run = Callable[..., list[Numbers]]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return read_golden()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, golden: dict[str, Any]) -> ProblemFiles:
    """The problem on disk; a changed generator stops here, before any number is compared."""
    made = write_problem(tmp_path_factory.mktemp("pairs"))
    found = {"checksums": checksums(made), "settings": problem_settings()}
    assert found == golden["problem"], REGENERATE
    return made


@pytest.fixture(scope="module")
def numbers(pool: RankPool, files: ProblemFiles) -> Run:
    """``numbers(model, losses, num_ranks=1, **job)``: of each loss, from one job of the ranks."""

    def run(model: str, losses: list[dict[str, Any]], *, num_ranks: int = 1, **fields: Any) -> list[Numbers]:
        job = PairJob(files=files, model=model, losses=tuple(losses), **fields)
        results: list[list[PairResult]] = pool.run(num_ranks, run_pairs, job)
        return [numbers_of(job, of_one_loss) for of_one_loss in zip(*results, strict=True)]

    return run


def check(found: Numbers, golden: dict[str, Any], model: str, variant: str) -> None:
    differences = differences_from_golden(found, golden["runs"][model][variant])
    assert not too_large(differences), differences


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_loss_log_probs_rewards_and_gradient_are_those_of_trl(
    numbers: Run, golden: dict[str, Any], model: str, variant: str
):
    for found in numbers(model, BY_NAME[variant].losses()):
        check(found, golden, model, variant)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2-sequence-parallel": (2, {**TP2, **SP}),
    "PP2": (2, PP2),
    "DP2": (2, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_a_layout_gives_trls_numbers(numbers: Run, golden: dict[str, Any], model: str, layout: str):
    num_ranks, parallel = LAYOUTS[layout]
    names = ["sum", "mean + sft"]
    losses = [dict(BY_NAME[name].ours) for name in names]
    for name, found in zip(names, numbers(model, losses, num_ranks=num_ranks, layout=layout, parallel=parallel)):
        check(found, golden, model, name)


WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str]]] = {
    "no reference": ("sum", {}, {"without_reference": True}, {"loss", "rewards", "gradient", "entry"}),
    "beta": ("sum", {"beta": BETA * 1.001}, {}, {"loss", "rewards", "gradient", "entry"}),
    "one token of a response": (
        "sum",
        {},
        {"uncounted_token": True},
        {"loss", "logps", "rewards", "gradient", "entry"},
    ),
    "sum for mean": ("mean", {"score_average": False}, {}, {"loss", "gradient", "entry"}),
    "NLL per response": ("sum + sft", {"nll_average": "response"}, {}, {"loss", "gradient", "entry"}),
    "NLL coefficient": ("sum + sft", {"nll_coeff": NLL_COEFF * 1.001}, {}, {"loss", "gradient", "entry"}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_loss_that_is_not_trls_is_seen(numbers: Run, golden: dict[str, Any], wrong: str):
    variant, loss, fields, seen_in = WRONG[wrong]
    (found,) = numbers("llama", [{**BY_NAME[variant].ours, **loss}], **fields)
    assert set(too_large(differences_from_golden(found, golden["runs"]["llama"][variant]))) == seen_in


def test_the_golden_file_is_small_and_covers_every_variant(golden: dict[str, Any]):
    assert GOLDEN.stat().st_size < 100_000
    assert [(model, name) for model, runs in golden["runs"].items() for name in runs] == CASES
