"""The optimizer's update is torch's own with the same options, and its rate that of the schedule written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank

from megatron_groupdpo.mcore.weights import unwrapped
from megatron_groupdpo.run.parts import Run

ADAM = {"lr": 2e-2, "adam_beta1": 0.6, "adam_beta2": 0.8, "adam_eps": 0.05, "weight_decay": 0.3}
SGD = {"optimizer": "sgd", "lr": 3e-2, "sgd_momentum": 0.4, "weight_decay": 0.2}


@pytest.mark.acts(
    "OptimizerConfig.lr",
    "OptimizerConfig.optimizer",
    "OptimizerConfig.weight_decay",
    "OptimizerConfig.clip_grad",
    "OptimizerConfig.adam_beta1",
    "OptimizerConfig.adam_beta2",
    "OptimizerConfig.adam_eps",
    "OptimizerConfig.sgd_momentum",
)
@pytest.mark.parametrize(
    "options",
    [ADAM, ADAM | {"clip_grad": 0.0}, ADAM | {"clip_grad": 2.5}, SGD, SGD | {"clip_grad": 0.0}],
    ids=["adam", "adam unclipped", "adam clipped at 2.5", "sgd", "sgd unclipped"],
)
def test_an_update_is_torchs_with_the_same_options(one: OneRank, options: dict[str, Any]):
    """Over four steps; norms and biases are not decayed, and the gradient is cut at 1 where nothing else is said."""
    run = one.build(**options, lr_decay_style="constant")
    weights = parameters(run)
    twins = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    matrices = [twin for twin in twins.values() if twin.ndim > 1]
    rest = [twin for twin in twins.values() if twin.ndim == 1]
    assert matrices
    assert rest
    groups = [{"params": matrices, "weight_decay": options["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    if options.get("optimizer") == "sgd":
        other: Any = torch.optim.SGD(groups, lr=options["lr"], momentum=options["sgd_momentum"])
    else:
        betas = options["adam_beta1"], options["adam_beta2"]
        other = torch.optim.AdamW(groups, lr=options["lr"], betas=betas, eps=options["adam_eps"])
    draw = torch.Generator().manual_seed(0)
    for step in range(4):
        gradients = {
            name: torch.randn(weight.shape, generator=draw) * 0.1 * (step + 1) for name, weight in weights.items()
        }
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        limit = options.get("clip_grad", 1.0) or math.inf
        for name, gradient in gradients.items():
            weights[name].main_grad.copy_(gradient)
            twins[name].grad = gradient * min(1.0, limit / norm)
        assert run.updater.step(1) == pytest.approx(norm, rel=1e-6)
        other.step()
    for name, twin in twins.items():
        torch.testing.assert_close(weights[name].detach(), twin.detach(), rtol=1e-5, atol=1e-6, msg=name)


def parameters(run: Run) -> dict[str, Any]:
    return dict(unwrapped(run.policy.chunks[0]).named_parameters())


LONG = {"train_iters": 12, "global_batch_size": 3, "lr": 0.4}
SCHEDULES: dict[str, tuple[dict[str, Any], int, int]] = {
    # changes, iterations of warm-up, iterations of the decay
    "linear, as if nothing is said": ({}, 0, 12),
    "linear to min_lr after a warm-up": ({"lr_warmup_iters": 3, "min_lr": 0.05}, 3, 12),
    "cosine": ({"lr_decay_style": "cosine"}, 0, 12),
    "cosine to min_lr after a warm-up": ({"lr_decay_style": "cosine", "lr_warmup_iters": 2, "min_lr": 0.1}, 2, 12),
    "a decay that ends before the run": ({"lr_decay_style": "cosine", "lr_decay_iters": 7, "min_lr": 0.02}, 0, 7),
    "a decay that outlasts the run": ({"lr_decay_iters": 30, "min_lr": 0.02}, 0, 30),
    "a warm-up that is a fraction of the decay": ({"lr_warmup_fraction": 0.25, "lr_decay_iters": 8}, 2, 8),
    "a warm-up that is a fraction of the run": ({"lr_warmup_fraction": 0.3}, 3, 12),
    "constant after a warm-up": ({"lr_decay_style": "constant", "lr_warmup_iters": 4}, 4, 12),
    "a length in groups": ({"train_iters": None, "train_samples": 31, "lr_warmup_iters": 2}, 2, 10),
}


@pytest.mark.acts(
    "OptimizerConfig.lr",
    "OptimizerConfig.min_lr",
    "OptimizerConfig.lr_decay_style",
    "OptimizerConfig.lr_decay_iters",
    "OptimizerConfig.lr_warmup_iters",
    "OptimizerConfig.lr_warmup_fraction",
    "TrainingConfig.train_samples",
)
@pytest.mark.parametrize(("changes", "warmup", "decay"), SCHEDULES.values(), ids=SCHEDULES)
def test_every_groups_rate_is_that_of_the_schedule_written_out(
    one: OneRank, changes: dict[str, Any], warmup: int, decay: int
):
    given = LONG | changes
    run = one.build(**given)
    groups: Any = run.updater.optimizer.param_groups
    for done in range(run.train_iters + 3):
        wanted = rate(done, given["lr"], given.get("min_lr", 0.0), given.get("lr_decay_style", "linear"), warmup, decay)
        assert [group["lr"] for group in groups] == pytest.approx([wanted] * len(groups), rel=1e-12, abs=1e-15), done
        assert run.updater.lr == pytest.approx(wanted, rel=1e-12, abs=1e-15)
        run.updater.step(given["global_batch_size"])


def rate(done: int, highest: float, lowest: float, style: str, warmup: int, decay: int) -> float:
    """The rate of the update after ``done`` iterations."""
    if done < warmup:
        return highest * done / warmup
    if style == "constant":
        return highest
    part = min(1.0, (done - warmup) / (decay - warmup))
    left = {"linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[style]
    return lowest + (highest - lowest) * left


@pytest.mark.acts("OptimizerConfig.lr_warmup_iters", "OptimizerConfig.lr_decay_style")
def test_a_run_logs_the_rate_that_its_updates_had(one: OneRank, folder: Path):
    done = one.train(folder, lr_warmup_iters=2, lr_decay_style="cosine", train_iters=6, min_lr=1e-3)
    wanted = [rate(iteration, 1e-2, 1e-3, "cosine", 2, 6) for iteration in range(6)]
    assert done.of("lr") == pytest.approx(wanted, rel=1e-12)
