"""Everything a run prints and writes, step by step, against the same run written out in ``by_hand.py``.

Two stores in turn, padded microbatches, a group without a preference term; every score is below 0, which is what
padding cells hold. The clock goes on by a known time in each part of a step and stands still elsewhere.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from by_hand import HandAdam, HandLoss, cosine_lr, gradient_by_hand, loss_by_hand
from made_stores import made_groups, made_logps, write_reference, write_store
from one_rank_run import MODEL, hand_model, made_config

if TYPE_CHECKING:
    from megatron_groupdpo.mcore.setup import Ranks

SIDES = ((1, 1), (2, 3), (1, 2), (2, 0), (1, 4), (3, 2))
TRAIN, VALID = made_groups(8, sides=SIDES), made_groups(6, seed=3, sides=SIDES)
STEPS, SIZE, EVAL_EVERY, LINE_EVERY = 7, 3, 4, 2
OPTIMIZER: dict[str, Any] = {
    "lr": 4e-2,
    "min_lr": 1e-3,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 2,
    "lr_decay_iters": 6,
    "weight_decay": 0.1,
    "clip_grad": 0.5,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_eps": 1e-3,
}


SECONDS = {"data": 1.0, "reference": 16.0, "scoring": 2.0, "coefficients": 32.0, "backward": 4.0, "optimizer": 8.0}
BESIDE = 0.5
"""Seconds of a step outside its parts."""


def refs_of(groups: list[Any], seed: int) -> list[list[float]]:
    """Far above what the policy gives."""
    flat = iter(made_logps(groups, seed=seed, per_token=-0.5))
    return [[1.5 + next(flat) for _ in item.labels] for item in groups]


TRAIN_REFS, VALID_REFS = refs_of(TRAIN, 1), refs_of(VALID, 2)


@dataclass(frozen=True)
class Step:
    """What an iteration must log."""

    loss: HandLoss
    grad_norm: float
    lr: float
    groups: list[int]


@dataclass(frozen=True)
class Finished:
    """A run that is over, and what it must have said."""

    folder: Path
    records: list[dict[str, Any]]
    """The steps' lines of metrics.jsonl."""
    validations: dict[int, dict[str, Any]]
    """Those of the validations, by iteration."""
    output: list[str]
    memory_before: int
    steps: list[Step]
    wanted_validations: dict[int, dict[str, float]]


def write_out(config: Any, ranks: Ranks) -> tuple[list[Step], dict[int, dict[str, float]]]:
    model = hand_model(config, ranks)
    adam = HandAdam(model, clip=0.5, weight_decay=0.1, eps=1e-3, betas=(0.8, 0.9))

    def validated() -> dict[str, float]:
        parts = [slice(0, 3), slice(3, 6)]
        losses = [loss_by_hand(model, VALID[p], VALID_REFS[p], beta=0.3, nll_coeff=0.7) for p in parts]
        weight = [loss.num_active for loss in losses]
        values = {
            "eval/loss": [float(loss.loss.detach()) for loss in losses],
            "eval/preference_loss": [loss.preference for loss in losses],
            "eval/trained/nll_loss": [loss.nll for loss in losses],
        }
        return {name: sum(w * x for w, x in zip(weight, own)) / sum(weight) for name, own in values.items()}

    steps, validations = [], {0: validated()}
    for iteration in range(1, STEPS + 1):
        groups = [place % 8 for place in range(SIZE * (iteration - 1), SIZE * iteration)]
        loss = loss_by_hand(model, [TRAIN[g] for g in groups], [TRAIN_REFS[g] for g in groups], beta=0.3, nll_coeff=0.7)
        lr = cosine_lr(iteration, peak=4e-2, lowest=1e-3, warmup=2, decay=6)
        steps.append(Step(loss, adam.step(gradient_by_hand(model, loss.loss), lr), lr, groups))
        if iteration % EVAL_EVERY == 0:
            validations[iteration] = validated()
    return steps, validations


class Clock:
    """A clock of seconds that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, of so many seconds."""

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return slow


@pytest.fixture(scope="module")
def finished(one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    from megatron_groupdpo.run import loop
    from megatron_groupdpo.run.build import build_run
    from megatron_groupdpo.step import train_step

    folder = tmp_path_factory.mktemp("logged")
    for name, groups, refs, cut in (("train", TRAIN, TRAIN_REFS, 3), ("valid", VALID, VALID_REFS, 4)):
        for part, own in (("0", slice(0, cut)), ("1", slice(cut, None))):
            store = write_store(folder / f"{name}{part}", groups[own])
            write_reference(folder / "reference", store, list(itertools.chain.from_iterable(refs[own])))
    config = made_config(
        folder / "run.yaml",
        [folder / "train0", folder / "train1"],
        data={"valid_data_path": [str(folder / "valid0"), str(folder / "valid1")]},
        objective={"reference_logprobs": str(folder / "reference"), "nll_coeff": 0.7},
        optimizer=OPTIMIZER,
        training={"global_batch_size": SIZE, "train_iters": STEPS, "eval_interval": EVAL_EVERY},
        logging={
            "run_dir": str(folder / "run"),
            "tensorboard_dir": str(folder / "board"),
            "log_interval": LINE_EVERY,
            "log_throughput": True,
        },
    )
    run = build_run(config, one_rank)
    clock = Clock()
    patch = pytest.MonkeyPatch()
    patch.setattr(time, "perf_counter", clock)
    patch.setattr(run.train, "batch", clock.takes(SECONDS["data"], run.train.batch))
    for name in ("score", "backward"):
        part = {"score": "scoring"}.get(name, name)
        patch.setattr(run.policy.engine, name, clock.takes(SECONDS[part], getattr(run.policy.engine, name)))
    patch.setattr(run.updater, "step", clock.takes(SECONDS["optimizer"], run.updater.step))
    patch.setattr(train_step, "group_loss", clock.takes(SECONDS["coefficients"], train_step.group_loss))
    patch.setattr(loop, "reference_logps", clock.takes(SECONDS["reference"], loop.reference_logps))
    patch.setattr(loop, "check_scores", clock.takes(BESIDE, loop.check_scores))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with redirect_stdout(io.StringIO()) as output:
        loop.train(run)
    patch.undo()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps, validations = write_out(run.config, one_rank)
    return Finished(
        folder=folder,
        records=[line for line in lines if "loss" in line],
        validations={line["iteration"]: line for line in lines if "eval/loss" in line},
        output=output.getvalue().splitlines(),
        memory_before=memory,
        steps=steps,
        wanted_validations=validations,
    )


def close(found: float, wanted: float) -> bool:
    return found == pytest.approx(wanted, rel=1e-4)


def test_losses_norms_and_rates_of_every_step(finished: Finished):
    assert [record["iteration"] for record in finished.records] == list(range(1, STEPS + 1))
    assert [record["consumed_groups"] for record in finished.records] == [SIZE * i for i in range(1, STEPS + 1)]
    for record, step in zip(finished.records, finished.steps, strict=True):
        assert max(step.loss.scores) < 0, "padding cells hold 0"
        assert close(record["loss"], float(step.loss.loss.detach()))
        assert close(record["preference_loss"], step.loss.preference)
        assert close(record["nll_loss"], step.loss.nll)
        assert record["lr"] == pytest.approx(step.lr, rel=1e-12)
        assert close(record["grad_norm"], step.grad_norm), "before clipping, of the whole model"
        assert step.grad_norm > 0.5, "clipped"
        assert 0 <= record["score_drift"] < 1e-5
    assert [finished.steps[i].lr for i in (0, 1, 2, 6)] == pytest.approx([0, 2e-2, 4e-2, 1e-3])
    assert len({round(step.lr, 9) for step in finished.steps}) == STEPS, "up, along the cosine, and at its end"


def test_validations_before_between_and_not_after(finished: Finished):
    """Of two batches with other numbers of active groups."""
    assert list(finished.validations) == list(finished.wanted_validations) == [0, 4]
    for iteration, wanted in finished.wanted_validations.items():
        for name, value in wanted.items():
            assert close(finished.validations[iteration][name], value), (iteration, name)


def test_speed_is_of_the_real_tokens(finished: Finished):
    """Prompt and response of every response that gets a pass; padding is not counted."""
    for record, step in zip(finished.records, finished.steps, strict=True):
        seconds = sum(seconds_of(record["iteration"]).values()) + BESIDE
        rows = [
            (len(TRAIN[g].prompt_tokens) + len(tokens), len(tokens) if mask is None else int(mask.sum()))
            for g in step.groups
            if len(set(TRAIN[g].labels)) == 2
            for tokens, mask in zip(TRAIN[g].response_tokens, TRAIN[g].response_masks)
        ]
        assert record["tokens_per_second"] == pytest.approx(sum(length for length, _ in rows) / seconds, rel=1e-12)
        hidden, ffn, vocabulary = MODEL["hidden_size"], MODEL["ffn_hidden_size"], MODEL["vocab_size"]
        layer = 2 * (4 * hidden * hidden + 3 * hidden * ffn)
        forward = sum(
            length * layer + 2 * length * length * hidden + 2 * counted * hidden * vocabulary
            for length, counted in rows
        )
        assert record["tflops_per_gpu"] == pytest.approx(4 * forward / seconds / 1e12, rel=1e-12)
        assert len(rows) == record["group/responses"]


def seconds_of(iteration: int) -> dict[str, float]:
    """By part: the next batch is made in a step, and after the last there is none."""
    return SECONDS | {"data": SECONDS["data"] if iteration < STEPS else 0.0}


def test_times_are_of_the_step_and_of_its_parts(finished: Finished):
    for record in finished.records:
        parts = seconds_of(record["iteration"])
        assert {name: x for name, x in record.items() if name.startswith("time/")} == {
            f"time/{part}_ms": 1000 * x for part, x in parts.items()
        }
        assert record["iteration_ms"] == 1000 * (sum(parts.values()) + BESIDE)


def test_memory_is_the_most_this_process_has_held_in_bytes(finished: Finished):
    held = [record["peak_memory_bytes"] for record in finished.records]
    assert finished.memory_before <= held[0]
    assert held == sorted(held)
    assert held[-1] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fields(line: str) -> dict[str, str]:
    return dict(part.strip().rsplit(": ", 1) for part in line.strip(" |").split(" | ")[1:])


def test_the_console_has_the_numbers_of_the_file(finished: Finished):
    lines = [line for line in finished.output if "consumed samples" in line]
    printed = [2, 4, 6, 7]
    assert len(lines) == len(printed)
    for line, iteration, before in zip(lines, printed, [0, *printed]):
        record = finished.records[iteration - 1]
        stamp = re.match(rf" \[(.*)\] iteration {iteration:8d}/{STEPS:8d} \|", line)
        assert stamp
        assert abs(datetime.now() - datetime.fromisoformat(stamp[1])) < timedelta(hours=1)
        times = [sum(seconds_of(i).values()) + BESIDE for i in range(before + 1, iteration + 1)]
        mean_ms = 1000 * sum(times) / len(times)
        assert fields(line) == {
            "consumed samples": f"{SIZE * iteration:12d}",
            "elapsed time per iteration (ms)": f"{mean_ms:.1f}",
            "learning rate": f"{record['lr']:.6E}",
            "global batch size": f"{SIZE:5d}",
            "loss": f"{record['loss']:.6E}",
            "preference loss": f"{record['preference_loss']:.6E}",
            "nll loss": f"{record['nll_loss']:.6E}",
            "accuracy": f"{record['rewards/accuracies']:.3f}",
            "margin": f"{record['rewards/margins']:.4f}",
            "grad norm": f"{record['grad_norm']:.3f}",
            "score drift": f"{record['score_drift']:.1E}",
            "tokens per second": f"{record['tokens_per_second']:.0f}",
            "data (ms)": f"{record['time/data_ms']:.1f}",
            "scoring (ms)": f"{record['time/scoring_ms']:.1f}",
            "backward (ms)": f"{record['time/backward_ms']:.1f}",
            "optimizer (ms)": f"{record['time/optimizer_ms']:.1f}",
            "throughput per GPU (TFLOP/s)": f"{record['tflops_per_gpu']:.2f}",
            "ETA": str(timedelta(seconds=round((STEPS - iteration) * mean_ms / 1000))),
        }


def test_validation_lines_have_the_numbers_of_the_file(finished: Finished):
    lines = [line for line in finished.output if line.startswith(" validation loss at iteration")]
    for line, (iteration, record) in zip(lines, finished.validations.items(), strict=True):
        assert line.startswith(f" validation loss at iteration {iteration} | loss: ")
        assert fields(line) == {
            name.removeprefix("eval/"): f"{value:.6E}" for name, value in record.items() if name != "iteration"
        }


def test_the_start_report_counts_data_and_epochs(finished: Finished):
    report = {line[:12].strip(): line[12:] for line in finished.output[:10]}
    assert report["data"] == "8 groups to train on, 6 to validate"
    first = finished.records[0]
    tokens = round(first["tokens_per_second"] * (sum(SECONDS.values()) + BESIDE))
    microbatches = -(-int(first["group/responses"]) // 3)
    assert report["batch"] == (
        f"3 groups = {first['group/responses']:.0f} responses = {tokens} tokens in {microbatches} microbatches of 3 "
        "responses on each data-parallel rank (first batch)"
    )
    assert report["run"] == f"iterations 0 to {STEPS}, {STEPS * SIZE / 8:.2f} epochs in all"


def test_tensorboard_has_every_number_of_the_file(finished: Finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.folder / "board"))
    events.Reload()
    wanted: dict[str, dict[int, float]] = {}
    lines: list[Mapping[str, Any]] = [*finished.records, *finished.validations.values()]
    for line in lines:
        for name, value in line.items():
            if name != "iteration":
                wanted.setdefault(name, {})[line["iteration"]] = value
    found = {name: {p.step: p.value for p in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert set(found) == set(wanted)
    for name, points in wanted.items():
        assert found[name] == {step: pytest.approx(value, rel=1e-6) for step, value in points.items()}, name
