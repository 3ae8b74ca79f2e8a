"""A resumed run's next update, taken apart on the rank: every entry against the optimizer's equation written out."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_groupdpo.config import TrainConfig, load_config


@dataclass(frozen=True)
class Resumed:
    """What one resume showed on one rank."""

    said: list[str]
    """The line of the start report on what changed."""
    lr: float
    grad_norm: float
    num_entries: int
    worst: float
    """Largest difference of a weight from the equation's."""
    moved: float
    """Largest change of a weight."""


def resume_on_rank(argv: Sequence[str], changes: Sequence[Sequence[str]]) -> list[Resumed]:
    """Resume once with each of these flags, and take one update."""
    from megatron_groupdpo.mcore.setup import initialize, shut_down

    config = load_config(argv)
    ranks = initialize(config.parallel, seed=config.training.seed)
    try:
        return [_resume(load_config([*argv, *flags]), ranks) for flags in changes]
    finally:
        shut_down()


def _resume(config: TrainConfig, ranks: Any) -> Resumed:
    from megatron_groupdpo.mcore.weights import optimizer_parts
    from megatron_groupdpo.run.build import build_run
    from megatron_groupdpo.run.logs.start_report import print_start
    from megatron_groupdpo.run.proofs.step import reference_logps
    from megatron_groupdpo.step.train_step import accumulate_gradient

    run = build_run(config, ranks)
    planned = run.train.batch(run.progress.consumed_groups, config.training.global_batch_size)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        print_start(run, planned)
    accumulate_gradient(run.policy.engine, planned.microbatches, planned.batch, reference_logps(run, planned), run.loss)
    lr = run.updater.lr
    updates = [part.optimizer for part in optimizer_parts(run.updater.optimizer)]
    spies = [_Spy(update, config, lr) for update in updates]
    grad_norm = run.updater.step(config.training.global_batch_size)
    said = [line for line in output.getvalue().splitlines() if line.startswith("changed")]
    squares = sum(spy.squares for spy in spies)
    clipped = torch.tensor(squares, dtype=torch.float64)
    if config.parallel.use_distributed_optimizer:
        torch.distributed.all_reduce(clipped)
    limit = config.optimizer.clip_grad or math.inf
    assert math.sqrt(float(clipped)) <= limit * (1 + 1e-5)
    assert math.isclose(math.sqrt(float(clipped)), min(grad_norm, limit), rel_tol=1e-4)
    return Resumed(
        said=said,
        lr=lr,
        grad_norm=grad_norm,
        num_entries=sum(spy.num_entries for spy in spies),
        worst=max(spy.worst for spy in spies),
        moved=max(spy.moved for spy in spies),
    )


class _Spy:
    """Stands before an optimizer's own ``step``: what it does to each weight, and what the equation would."""

    def __init__(self, update: torch.optim.Optimizer, config: TrainConfig, lr: float) -> None:
        self.worst = self.moved = self.squares = 0.0
        self.num_entries = 0
        self._update, self._options, self._lr, self._own = update, config.optimizer, lr, update.step
        update.step = self._step  # type: ignore[method-assign]

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        given = [
            (param, group, param.detach().double(), param.grad.double(), _copy(self._update.state[param]))
            for group in self._update.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        outcome = self._own(*args, **kwargs)
        for param, group, before, grad, state in given:
            # Norms and biases have no decay: Megatron marks their groups.
            decay = self._options.weight_decay * group.get("wd_mult", 1.0)
            wanted = (_adam if self._options.optimizer == "adam" else _sgd)(
                before, grad, state, self._options, self._lr, decay
            )
            self.worst = max(self.worst, float((param.detach().double() - wanted).abs().max()))
            self.moved = max(self.moved, float((wanted - before).abs().max()))
            self.squares += float(grad.square().sum())
            self.num_entries += param.numel()
        return outcome


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.double().clone() for name, value in state.items() if value is not None}


def _adam(x: Any, grad: Any, state: Mapping[str, Any], options: Any, lr: float, decay: float) -> Any:
    first, second = options.adam_beta1, options.adam_beta2
    step = float(state["step"]) + 1
    assert step == 3, "two updates were saved"
    mean = first * state["exp_avg"] + (1 - first) * grad
    square = second * state["exp_avg_sq"] + (1 - second) * grad**2
    root = (square / (1 - second**step)).sqrt() + options.adam_eps
    return x * (1 - lr * decay) - lr * (mean / (1 - first**step)) / root


def _sgd(x: Any, grad: Any, state: Mapping[str, Any], options: Any, lr: float, decay: float) -> Any:
    moved = grad + decay * x
    return x - lr * (options.sgd_momentum * state.get("momentum_buffer", 0.0) + moved)
