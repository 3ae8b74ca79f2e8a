"""A run that does not start from the reference checks the stored numbers at load, and is not changed by the check."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_pool import RankPool
from test_reference import PP2, score_on_rank, start
from tiny_run import TinyData, read_metrics, refusal_on_rank, train_on_rank

ConfigFile = Callable[..., Path]
__all__ = ["start"]


def train_with_output_on_rank(argv: list[str]) -> tuple[str, str]:
    """The digest of the final weights and what the rank printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        digest = train_on_rank(argv)
    return digest, output.getvalue()


@pytest.fixture(scope="module")
def reference(pool: RankPool, tiny_data: TinyData, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe") / "reference"
    pool.run(1, score_on_rank, str(start), str(tiny_data.store), str(folder), {})
    return folder


@pytest.fixture
def argv_of(config_file: ConfigFile, reference: Path, start: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """``argv_of(run, *flags)``: a run that resumes from its own folder, and names the reference's weights."""

    def argv(name: str, *flags: str, **sections: dict[str, Any]) -> list[str]:
        objective = {"reference_logprobs": str(reference)} | sections.pop("objective", {})
        config = config_file(**sections, objective=objective)
        save = ["--save", str(tmp_path / name), "--load", str(tmp_path / name), "--lr-decay-iters", "6"]
        return ["--config", str(config), *save, "--pretrained-checkpoint", str(start), *flags]

    return argv


SHARDED = {"parallel": {"use_distributed_optimizer": True}, "training": {"train_iters": 6}}


@pytest.mark.acts("ObjectiveConfig.reference_probe_groups")
@pytest.mark.parametrize("sections", [SHARDED, {"parallel": PP2}], ids=["dp2-sharded", "pp2"])
@pytest.mark.costly
def test_a_resumed_run_probes_the_reference_and_goes_on_bit_for_bit(
    pool: RankPool, argv_of, tmp_path: Path, sections: dict[str, Any]
):
    whole = pool.run(2, train_with_output_on_rank, argv_of("whole", **sections))
    pool.run(2, train_with_output_on_rank, argv_of("parts", "--train-iters", "3", **sections))
    resumed = pool.run(2, train_with_output_on_rank, argv_of("parts", **sections))
    assert "step 0: policy = reference" in whole[0][1] + whole[1][1]
    output = resumed[0][1] + resumed[1][1]
    assert output.count("reference: 8 groups scored again by") == 1
    assert resumed[0][0] == whole[0][0]
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    skipped = pool.run(2, train_with_output_on_rank, argv_of("parts", "--reference-probe-groups", "0", **sections))
    assert "no group of it was scored again: reference_probe_groups is 0" in skipped[0][1] + skipped[1][1]


def copy_reference(reference: Path, folder: Path) -> Path:
    """A copy of the numbers; the path of its array."""
    (source,) = reference.iterdir()
    target = folder / source.name
    target.mkdir(parents=True)
    for name in ("meta.json", "logps.npy"):
        (target / name).write_bytes((source / name).read_bytes())
    return target / "logps.npy"


def test_a_number_that_is_not_the_weights_stops_a_resumed_run_with_both(
    pool: RankPool, argv_of, reference: Path, tmp_path: Path
):
    pool.run(2, train_on_rank, argv_of("run", "--train-iters", "3", parallel=PP2))
    changed = copy_reference(reference, tmp_path / "changed")
    logps = np.load(changed)
    before = logps[7]
    logps[7] += 0.5
    np.save(changed, logps)
    given: dict[str, Any] = {"parallel": PP2, "objective": {"reference_logprobs": str(tmp_path / "changed")}}
    answers = pool.run(2, refusal_on_rank, argv_of("run", "--reference-probe-groups", "10", **given))
    assert len(set(answers)) == 1, "every stage must stop with the same message"
    kind, message = answers[0]
    assert kind == "DataError"
    assert "groups.jsonl:" in message
    assert f"has reference log-probability {before + 0.5:.6f}" in message
    ours = re.search(r"but (-[0-9.]+) by /", message)
    assert ours is not None
    assert float(ours[1]) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--pretrained-checkpoint", "none"], "pretrained_checkpoint, which could name the weights that scored it"),
        (["--pretrained-checkpoint", "{start}/iter_0000001"], "it was scored by"),
        (["--pretrained-checkpoint", "{start}/gone"], "no checkpoint at"),
    ],
    ids=["not given", "other weights", "absent"],
)
def test_a_probe_that_is_not_possible_is_said_with_its_reason(
    pool: RankPool, argv_of, start: Path, flags: list[str], reason: str
):
    pool.run(1, train_on_rank, argv_of("run", "--train-iters", "3"))
    digest, output = pool.run(1, train_with_output_on_rank, argv_of("run", *(f.format(start=start) for f in flags)))[0]
    (line,) = [line for line in output.splitlines() if line.startswith("reference: ")]
    assert line.startswith("reference: read as it is, no group of it was scored again: ")
    assert reason in line
    assert "iteration" in output
    assert digest


def test_training_and_validation_numbers_must_be_of_one_model(
    pool: RankPool, argv_of, tiny_data: TinyData, reference: Path, tmp_path: Path
):
    """A folder holds a store once, so the other model's numbers are of a second store."""
    from tiny_run import preprocess, write_groups, write_reference

    write_groups(tmp_path / "valid.jsonl", 4)
    preprocess(tmp_path / "valid.jsonl", tiny_data.tokenizer, tmp_path / "valid")
    copy_reference(reference, tmp_path / "both")
    write_reference(tmp_path / "valid", tmp_path / "both")
    argv = argv_of(
        "run",
        objective={"reference_logprobs": str(tmp_path / "both")},
        data={"valid_data_path": [str(tmp_path / "valid")]},
        training={"eval_interval": 1},
    )
    ((kind, message),) = pool.run(1, refusal_on_rank, argv)
    assert kind == "DataError"
    assert "the validation data by of no model" in message
