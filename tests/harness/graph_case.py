"""Runs on the ranks: steps with captured layers, and the same steps without."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import tiny_run
import torch
from graph_stand_in import StandIn, graphs_on_a_cpu
from layout_case import SEQ_LENGTH, LayoutCase
from layout_run import RankResult, run_case
from megatron.core import parallel_state
from two_pass_case import LOSS, Case, Runner, agreement, captured_against_layers, one_rank

from megatron_groupdpo.data.batches.microbatches import build_microbatches
from megatron_groupdpo.data.batches.planner import plan_whole_groups
from megatron_groupdpo.mcore.generate import SamplingOptions, sample
from megatron_groupdpo.mcore.model import build as model
from megatron_groupdpo.mcore.passes.gradient import PlainEngine
from megatron_groupdpo.step.coupled import accumulate_coupled_gradient

GRAPHS: dict[str, Any] = {"cuda_graphs": True, "cuda_graph_length_multiple": 8, "cuda_graph_shapes": 4}
"""At most three lengths of at most 24 tokens: every shape is captured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """A rank's run, and what the stand-in saw."""

    result: RankResult
    num_sets: int
    replays: Mapping[str, int]


@contextlib.contextmanager
def stand_ins(*, capture: bool = True) -> Iterator[list[StandIn]]:
    """Those made in here, one for each policy with graphs; without ``capture`` the layers run in their place."""
    made: list[StandIn] = []

    def make() -> Any:
        made.append(StandIn())
        return made[-1] if capture else lambda layers, _sample_args: layers

    with graphs_on_a_cpu(make):
        yield made


def captured(case: LayoutCase) -> Seen:
    """The case with graphs."""
    with stand_ins() as made:
        result = run_case(case)
    (one,) = made
    assert not one.pool.open
    return Seen(result=result, num_sets=one.num_sets, replays=one.pool.replays)


def uncaptured(case: LayoutCase) -> RankResult:
    """The case's microbatches, the layers themselves."""
    with stand_ins(capture=False):
        return run_case(case)


def with_graphs(case: LayoutCase, **changes: Any) -> LayoutCase:
    """The case with the options set."""
    assert 3 * GRAPHS["cuda_graph_length_multiple"] == SEQ_LENGTH
    return dataclasses.replace(case, precision=GRAPHS | dict(case.precision) | changes)


def check_bits(captured: list[Seen], uncaptured: list[RankResult], *, num_sets: int | None = None) -> None:
    """Equal, bit by bit: scores of both passes, gradients, weights after all steps.

    By default every microbatch is captured, since :data:`GRAPHS` allows more shapes than there are.
    """
    for seen, plain in zip(captured, uncaptured, strict=True):
        assert seen.num_sets in ((2, 3) if num_sets is None else (num_sets,)), "one set a shape, both passes' own"
        assert seen.result.losses == plain.losses
        assert all(step["drift"] <= 0.0 for step in seen.result.losses)  # -1: there was no scoring pass
        assert seen.result.grad_norms == plain.grad_norms
        for ours, theirs in (
            (seen.result.gradient, plain.gradient),
            (seen.result.weights_after, plain.weights_after),
        ):
            assert [shard.name for shard in ours] == [shard.name for shard in theirs]
            different = [a.name for a, b in zip(ours, theirs) if not np.array_equal(a.values, b.values)]
            assert different == []
        for ours_R, theirs_R in zip(seen.result.logps, plain.logps, strict=True):
            assert np.array_equal(ours_R, theirs_R)


def layout(case: LayoutCase) -> RankResult:
    """The case with graphs, for comparisons with the one graph of a loss."""
    return captured(case).result


def result_and_notes(case: LayoutCase) -> tuple[Seen, list[str]]:
    """The case with graphs, and the lines it printed of them."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        seen = captured(case)
    return seen, [line for line in output.getvalue().splitlines() if line.startswith("cuda_graphs")]


def trained(argv: Sequence[str], graphs: bool) -> str:
    """A whole training run, with graphs or with the layers themselves in the same microbatches; its weights' digest."""
    with stand_ins(capture=graphs) as made:
        digest = tiny_run.train_on_rank(argv)
    (one,) = made  # a reference with a model of its own has none
    assert bool(one.pool.replays["backward"]) == graphs
    return digest


@contextlib.contextmanager
def a_runner(**precision: Any) -> Iterator[tuple[Runner, StandIn]]:
    """One rank's policy, optimizer and batch with stand-in graphs."""
    fields = {"cuda_graphs": True, "cuda_graph_length_multiple": 16} | precision
    with one_rank("cpu") as ranks, stand_ins() as made:
        yield Runner(Case(model={}, precision=fields, transformer_impl="local"), ranks), made[0]


def against_layers(precision: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the GPU tests."""
    with graphs_on_a_cpu():
        return captured_against_layers("cpu", precision, "local", model=model)


def one_graph_runs_uncaptured() -> dict[str, Any]:
    """Replays that the loss's one graph makes, whose gradient --verify-gradients compares with; and how near it is."""
    with a_runner() as (runner, stand_in):
        runner.step()
        gradient, before = runner.gradient(), dict(stand_in.pool.replays)
        whole = build_microbatches(plan_whole_groups(runner.batch, runner.plan), runner.plan, rank=0)
        plain: Any = PlainEngine(runner.engine)
        accumulate_coupled_gradient(plain, whole, runner.batch, runner.ref_logps_R, LOSS)
        return {
            "replays": stand_in.pool.replays["forward"] - before["forward"],
            "sets": stand_in.num_sets,
            "gap": agreement(gradient, runner.gradient())[1],
        }


def broken(how: str) -> str:
    """What stops a step that breaks a rule of captured layers."""
    with a_runner() as (runner, stand_in):
        layers: Any = runner.policy.chunks[0].module.decoder.layers
        if how == "a hook in a layer":
            layers[1].mlp.linear_fc1.register_forward_hook(lambda *_: None)
        if how == "a hook before a layer's backward":
            layers[1].mlp.register_full_backward_pre_hook(lambda *_: None)
        runner.step()
        if how == "a moved weight":
            weight = layers[0].mlp.linear_fc1.weight
            weight.data = weight.data.clone()
        if how == "two microbatches in flight":
            engine, first = runner.engine, runner.microbatches[0]
            engine._forward(engine.chunks[0], first)
            engine._forward(engine.chunks[0], first)
        if how == "an output read too late":
            engine, first, other = runner.engine, runner.microbatches[0], runner.microbatches[-1]
            assert first.tokens_BS.shape != other.tokens_BS.shape
            late = engine._forward(engine.chunks[0], first).sum()
            in_flight, stand_in.pool.open = stand_in.pool.open, []  # the rule that would stop it
            with torch.no_grad():
                engine._forward(engine.chunks[0], other)
            stand_in.pool.open = in_flight
            engine.zero_gradient()
            late.backward()
            return "NaN" if bool(runner.gradient().isnan().any()) else "wrong numbers, unseen"
        runner.step()
        return "nothing"


def a_larger_buffer_leaves_the_captured_one() -> bool:
    """Whether the gather buffer that graphs know outlives the one that Megatron makes in its place."""
    with a_runner() as (runner, _):
        buffers = parallel_state.get_global_memory_buffer()
        captured_with = weakref.ref(buffers.get_tensor((10,), torch.float32, "mpu")._base)
        runner.step()
        buffers.get_tensor((1000,), torch.float32, "mpu")
        return captured_with() is not None


def streams_of_gradient_hooks(graphs: bool) -> list[str]:
    """What streams do while Megatron hangs its hooks on the weights' gradient nodes."""
    seen: list[str] = []
    build = model.DistributedDataParallel

    class Stream:
        def __init__(self, name: str = "own") -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            seen.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def entered(stream: Any) -> Iterator[None]:
        seen.append(f"in {stream.name}")
        yield
        seen.append(f"out of {stream.name}")

    def hook(*args: Any, **kwargs: Any) -> Any:
        seen.append("hooks")
        return build(*args, **kwargs)

    with one_rank("cpu") as ranks, graphs_on_a_cpu():
        fakes: dict[str, Any] = {"Stream": Stream, "current_stream": lambda *_: Stream("current"), "stream": entered}
        with mock.patch.multiple(torch.cuda, **fakes), mock.patch.object(model, "DistributedDataParallel", hook):
            Runner(Case(model={}, precision={"cuda_graphs": graphs}, transformer_impl="local"), ranks)
    return seen


def sampled_alike() -> bool:
    """A cache that grows, through layers with graphs: as without them."""
    with a_runner() as (runner, stand_in):
        runner.step()
        before = dict(stand_in.pool.replays)
        prompts = [np.arange(3, 9), np.arange(20, 31)]
        draws = []
        for on in (True, False):
            graphs: Any = runner.engine.graphs
            with contextlib.nullcontext() if on else graphs.off():
                answers = sample(runner.policy, prompts, range(2), SamplingOptions(max_new_tokens=5), end_token=60)
            draws.append([answer.tokens.tolist() for answer in answers])
        assert stand_in.pool.replays == before
        return draws[0] == draws[1]
