"""The next batch is made while a step runs; what goes wrong with it is said when it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_groupdpo.errors import DataError
from megatron_groupdpo.run.batches import DeviceFeed, PlannedBatch, device_tensors, on_device
from megatron_groupdpo.types import Microbatch

CPU = torch.device("cpu")


def microbatch(first: int) -> Microbatch:
    row_S = torch.arange(first, first + 4)
    return Microbatch(
        tokens_BS=row_S[None],
        position_ids_BS=row_S[None] * 0,
        hidden_positions_T=row_S[:2],
        targets_T=row_S[:2],
        owners_T=row_S[:2] * 0,
        responses_r=row_S[:1],
        cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
    )


class Source:
    """Stands where the prefetcher does, and notes what it is asked for."""

    def __init__(self, broken: int | None = None) -> None:
        self.asked: list[int] = []
        self.broken = broken

    def batch(self, consumed_groups: int) -> PlannedBatch:
        self.asked.append(consumed_groups)
        if consumed_groups == self.broken:
            raise DataError(f"group {consumed_groups} is broken")
        return PlannedBatch(
            batch=None,  # type: ignore[arg-type]
            microbatches=[microbatch(consumed_groups)],
            ref_logps_R=torch.zeros(1, dtype=torch.float64),
            num_tokens=4,
            group_ids=[consumed_groups],
        )


def feed(source: Any, *, end: int = 6) -> DeviceFeed:
    return DeviceFeed(source, CPU, end=end)


def test_a_prepared_batch_is_the_one_that_is_given_and_none_is_made_after_the_end():
    source = Source()
    batches = feed(source)
    given = []
    for place in (0, 2, 4):
        given.append(batches.batch(place))
        batches.prepare(place + 2)
        batches.prepare(place + 2)
    assert [planned.group_ids for planned in given] == [[0], [2], [4]]
    assert source.asked == [0, 2, 4]


def test_a_batch_of_another_place_is_made_anew():
    source = Source()
    batches = feed(source)
    batches.prepare(2)
    assert batches.batch(4).group_ids == [4]
    assert source.asked == [2, 4]


def test_a_broken_batch_is_reported_when_it_is_asked_for():
    batches = feed(Source(broken=2))
    batches.batch(0)
    batches.prepare(2)  # the step of batch 0 goes on
    with pytest.raises(DataError, match="group 2 is broken"):
        batches.batch(2)


def test_every_tensor_of_a_microbatch_is_moved_but_the_bounds_the_host_reads():
    planned = Source().batch(0)
    moved = on_device(planned, torch.device("meta"))
    found = {id(tensor) for tensor in device_tensors(moved)}
    for name in Microbatch.__slots__:
        tensor = getattr(moved.microbatches[0], name)
        assert tensor.device.type == ("cpu" if name == "cu_seqlens" else "meta"), name
        assert (id(tensor) in found) == (name != "cu_seqlens")
    assert moved.ref_logps_R.device.type == "meta"
    assert replace(moved, microbatches=[], ref_logps_R=planned.ref_logps_R).group_ids == planned.group_ids


@pytest.mark.gpu
def test_batches_reach_the_gpu_unchanged():
    source, device = Source(), torch.device("cuda", 0)
    batches = DeviceFeed(source, device, end=6)  # type: ignore[arg-type]
    batches.batch(0)
    batches.prepare(2)
    found, wanted = batches.batch(2), Source().batch(2)
    for tensor, host in zip(device_tensors(found), device_tensors(wanted)):
        assert tensor.device == device
        assert torch.equal(tensor.cpu(), host)
