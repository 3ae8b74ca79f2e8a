"""Faults injected into a built run, on the ranks: what the run's own proofs are there to see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from megatron_groupdpo.mcore.passes import engine
from megatron_groupdpo.mcore.passes import engine as context_parallel
from megatron_groupdpo.mcore.passes.engine import MegatronEngine
from megatron_groupdpo.mcore.passes.optimizer import Updater
from megatron_groupdpo.run.parts import Run
from megatron_groupdpo.step import train_step

Inject = Callable[[ExitStack, Run], object]


@contextmanager
def injected(fault: str | None, run: Run) -> Iterator[None]:
    """Undone at the end: the process goes on to other runs."""
    with ExitStack() as stack:
        if fault is not None:
            FAULTS[fault](stack, run)
        yield


def _replace(stack: ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))


def _weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Inject:
    """The per-response weights of pass 2."""

    def faulty(group_loss: Any) -> Any:
        def changed(*args: Any, **kwargs: Any) -> Any:
            result = group_loss(*args, **kwargs)
            return dataclasses.replace(result, weights_R=change(result.weights_R))

        return changed

    return lambda stack, run: _replace(stack, train_step, "group_loss", faulty)


def _loss_function(change: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]) -> Inject:
    """What Megatron's schedule gets from the backward's loss function."""

    def faulty(call: Any) -> Any:
        return lambda self, *args: change(self, call(self, *args))

    return lambda stack, run: _replace(stack, engine._Differentiated, "__call__", faulty)


def _cp_sum_counts_every_rank(stack: ExitStack, run: Run) -> None:
    size = run.ranks.cp_group.size()
    faulty = staticmethod(lambda ctx, gradient: (size * gradient, None))
    _replace(stack, context_parallel._Sum, "backward", lambda _: faulty)


def _lose_the_last_microbatch(stack: ExitStack, run: Run) -> None:
    def faulty(backward: Any) -> Any:
        return lambda self, microbatches, *args: backward(self, microbatches[:-1], *args)

    _replace(stack, MegatronEngine, "backward", faulty)


def _average_over_replicas(stack: ExitStack, run: Run) -> None:
    for chunk in run.policy.chunks:
        for group in chunk.bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor = 1 / run.ranks.dp_cp_group.size()


def _divide_by_the_microbatches(stack: ExitStack, run: Run) -> None:
    """Megatron's schedule then divides every loss by their number, whatever backward it runs."""
    stack.enter_context(mock.patch.object(run.policy.config, "calculate_per_token_loss", False))


def _sum_over_replicas_alone(stack: ExitStack, run: Run) -> None:
    """Neither norms under sequence parallelism nor tied embeddings get the other ranks' parts."""

    def faulty(model: Any, *args: Any, **kwargs: Any) -> None:
        for chunk in model:
            chunk.finish_grad_sync()

    _replace(stack, engine, "finalize_model_grads", lambda _: faulty)


def _corrupt(rank: int, after: int, name: str) -> Inject:
    """Flip the lowest bit of one weight of one rank after so many updates."""

    def inject(stack: ExitStack, run: Run) -> None:
        count = 0

        def faulty(step: Any) -> Any:
            def stepped(self: Updater, num_groups: int) -> float:
                nonlocal count
                norm, count = step(self, num_groups), count + 1
                if torch.distributed.get_rank() == rank and count == after:
                    for chunk in run.policy.chunks:
                        for own, parameter in chunk.named_parameters():
                            if own.endswith(name):
                                parameter.data.view(torch.int32).view(-1)[-1] ^= 1
                                return norm
                return norm

            return stepped

        _replace(stack, Updater, "step", faulty)

    return inject


def _poison(stack: ExitStack, run: Run) -> None:
    """One number of the first stage's embedding is NaN."""
    if run.ranks.is_first_stage:
        next(run.policy.chunks[0].parameters()).data.view(-1)[0] = float("nan")


def _noisy_scores(stack: ExitStack, run: Run) -> None:
    """A scoring pass that is off by 0.1."""

    def faulty(score: Any) -> Any:
        def noisy(self: Any, *args: Any) -> Any:
            logps_R = score(self, *args)
            return None if logps_R is None else logps_R + 0.1

        return noisy

    _replace(stack, MegatronEngine, "score", faulty)


def _noisy_policy(stack: ExitStack, run: Run) -> None:
    """The policy's scores alone are off, by 0.1."""
    score = run.policy.engine.score

    def noisy(*args: Any) -> Any:
        logps_R = score(*args)
        return None if logps_R is None else logps_R + 0.1

    run.policy.engine.score = noisy  # type: ignore[method-assign]


FAULTS: dict[str, Inject] = {
    "a coefficient of 1.001": _weights(lambda weights_R: 1.001 * weights_R),
    "a response without a weight": _weights(lambda weights_R: weights_R * (torch.arange(len(weights_R)) != 1)),
    "loss times cp": _loss_function(lambda self, found: (self.cp_group.size() * found[0], *found[1:])),
    "the schedule's rescaling": _loss_function(lambda self, found: (found[0], found[2])),
    "the schedule's mean": _divide_by_the_microbatches,
    "the cp sum counts every rank": _cp_sum_counts_every_rank,
    "a lost microbatch": _lose_the_last_microbatch,
    "a data-parallel average": _average_over_replicas,
    "no sum over parts of the model": _sum_over_replicas_alone,
    "a flipped bit on rank 1": _corrupt(rank=1, after=2, name="layers.1.mlp.linear_fc2.weight"),
    "a flipped bit on rank 3": _corrupt(rank=3, after=2, name="layers.0.mlp.linear_fc2.weight"),
    "a flipped bit of an expert on rank 3": _corrupt(
        rank=3, after=2, name="layers.1.mlp.experts.local_experts.1.linear_fc2.weight"
    ),
    "poisoned weight": _poison,
    "noisy scores": _noisy_scores,
    "noisy policy": _noisy_policy,
}
