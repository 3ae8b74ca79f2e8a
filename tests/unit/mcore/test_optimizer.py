"""Megatron's optimizer and schedule as the options say: against torch's own, and against the schedule written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from by_hand import HandAdam, cosine_lr
from one_rank_run import made_config

if TYPE_CHECKING:
    from megatron_groupdpo.mcore.setup import Ranks

BATCH = 3
"""Groups of an update."""


def updater_of(ranks: Ranks, tmp_path: Path, *, warmup: int = 0, decay: int = 5, bf16: bool = False, **options: Any):
    """(updater, model) of a small policy; ``warmup`` and ``decay`` in updates."""
    from megatron_groupdpo.mcore.passes.optimizer import Updater, build_lr_schedule, build_optimizer
    from megatron_groupdpo.mcore.policy import build_policy
    from megatron_groupdpo.mcore.weights import unwrapped

    config = made_config(tmp_path / "run.yaml", [tmp_path], optimizer={"lr": 0.02} | options, precision={"bf16": bf16})
    policy = build_policy(config.model, config.parallel, config.precision, ranks, seed=3, training=True)
    optimizer = build_optimizer(policy.chunks, config.optimizer, config.parallel, config.precision)
    schedule = build_lr_schedule(optimizer, config.optimizer, warmup_groups=warmup * BATCH, decay_groups=decay * BATCH)
    return Updater(optimizer, schedule), unwrapped(policy.chunks[0])


def gradients(model: Any, count: int) -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=draw) for p in model.parameters()] for _ in range(count)]


def update(updater: Any, model: Any, gradient: list[torch.Tensor]) -> float:
    for parameter, own in zip(model.parameters(), gradient, strict=True):
        parameter.main_grad.copy_(own)
    return updater.step(BATCH)


class Copies:
    """Parameters alone, for torch's optimizers."""

    def __init__(self, model: Any) -> None:
        self.own = [torch.nn.Parameter(p.detach().float().clone()) for p in model.parameters()]

    def parameters(self) -> list[torch.nn.Parameter]:
        return self.own


def test_adam_updates_as_torchs_with_every_option_away_from_its_default(one_rank: Ranks, tmp_path: Path):
    options = {"weight_decay": 0.3, "clip_grad": 2.0, "adam_beta1": 0.6, "adam_beta2": 0.8, "adam_eps": 1e-2}
    updater, model = updater_of(one_rank, tmp_path, lr_decay_style="linear", min_lr=0.004, **options)
    copies = Copies(model)
    adam = HandAdam(copies, clip=2.0, weight_decay=0.3, eps=1e-2, betas=(0.6, 0.8))
    for done, gradient in enumerate(gradients(model, 3)):
        lr = 0.004 + (0.02 - 0.004) * (1 - done / 5)
        assert updater.lr == pytest.approx(lr, rel=1e-12)
        norm = update(updater, model, gradient)
        wanted = math.sqrt(sum(float(own.double().square().sum()) for own in gradient))
        assert norm == pytest.approx(wanted, rel=1e-5)
        assert adam.step(gradient, lr) == pytest.approx(wanted, rel=1e-5)
        for ours, theirs in zip(model.parameters(), copies.parameters(), strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-7)


def test_sgd_updates_as_torchs(one_rank: Ranks, tmp_path: Path):
    options = {"weight_decay": 0.0, "clip_grad": 0.0, "sgd_momentum": 0.7, "lr_decay_style": "constant"}
    updater, model = updater_of(one_rank, tmp_path, optimizer="sgd", **options)
    copies = Copies(model)
    sgd = torch.optim.SGD(copies.parameters(), lr=0.02, momentum=0.7)
    for gradient in gradients(model, 3):
        assert updater.lr == 0.02
        update(updater, model, gradient)
        for parameter, own in zip(copies.parameters(), gradient, strict=True):
            parameter.grad = own.clone()
        sgd.step()
        for ours, theirs in zip(model.parameters(), copies.parameters(), strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_the_rate_rises_and_falls_along_the_written_out_cosine(one_rank: Ranks, tmp_path: Path):
    options = {"lr_decay_style": "cosine", "min_lr": 0.001, "weight_decay": 0.2, "lr_warmup_iters": 2}
    updater, model = updater_of(one_rank, tmp_path, warmup=2, decay=6, **options)
    decays = sorted({group["weight_decay"] for group in updater.optimizer.param_groups})
    assert decays == [0.0, 0.2]
    gradient = gradients(model, 1)[0]
    for iteration in range(1, 10):
        wanted = cosine_lr(iteration, peak=0.02, lowest=0.001, warmup=2, decay=6)
        assert updater.lr == pytest.approx(wanted, rel=1e-12), iteration
        update(updater, model, gradient)
        assert sorted({group["weight_decay"] for group in updater.optimizer.param_groups}) == decays, "it stays"


def test_a_resumed_schedule_has_the_place_of_the_checkpoint_and_the_options_of_the_run(one_rank: Ranks, tmp_path: Path):
    old, model = updater_of(one_rank, tmp_path, decay=5, lr_decay_style="linear", lr=0.5, weight_decay=0.9)
    update(old, model, gradients(model, 1)[0])
    new, _ = updater_of(one_rank, tmp_path, decay=10, lr_decay_style="cosine", min_lr=0.004, weight_decay=0.1)
    new.schedule.load_state_dict(old.schedule.state_dict())
    assert new.lr == pytest.approx(cosine_lr(2, peak=0.02, lowest=0.004, warmup=0, decay=10), rel=1e-12)
    assert sorted({group["weight_decay"] for group in new.optimizer.param_groups}) == [0.0, 0.1]


def test_bf16_weights_are_the_rounded_float32_ones_that_torch_updates(one_rank: Ranks, tmp_path: Path):
    updater, model = updater_of(one_rank, tmp_path, bf16=True, lr_decay_style="constant", clip_grad=0.0, lr=1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    copies = Copies(model)
    adam = HandAdam(copies, clip=math.inf, weight_decay=0.01, eps=1e-8, betas=(0.9, 0.999))
    for gradient in gradients(model, 3):  # three small steps: one by one they would be lost to bf16's rounding
        update(updater, model, gradient)
        adam.step(gradient, 1e-3)
    for ours, theirs in zip(model.parameters(), copies.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach().bfloat16(), rtol=2**-7, atol=1e-6)


def test_the_update_is_said_to_be_torchs(one_rank: Ranks, tmp_path: Path):
    from megatron_groupdpo.mcore.passes.optimizer import optimizer_origin

    assert optimizer_origin(updater_of(one_rank, tmp_path)[0].optimizer) == "torch's AdamW"
    assert optimizer_origin(updater_of(one_rank, tmp_path, optimizer="sgd")[0].optimizer) == "torch's SGD"
