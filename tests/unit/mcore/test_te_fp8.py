"""The adapter to Transformer Engine, on modules that keep its state under its names; the real ones: tests/gpu."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_groupdpo.mcore.fp8 import state as te_fp8
from megatron_groupdpo.mcore.fp8.passes import TwoPassScaling


class Manager:
    """As ``FP8GlobalStateManager``: updates by itself, through the class, after passes with gradients."""

    updates: list[str]

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None:
        cls.updates.append("forward" if forward else "backward")

    @classmethod
    def autocast_exit(cls) -> None:
        if torch.is_grad_enabled():
            cls.reduce_and_update_fp8_tensors(forward=True)


class Linear(torch.nn.Module):
    """State appears at the first forward, as in Transformer Engine's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self._fp8_workspaces: dict[str, object] = {}

    def forward(self, amax: float) -> None:
        if "scaling_fwd" not in self.fp8_meta:
            for key in ("scaling_fwd", "scaling_bwd"):
                self.fp8_meta[key] = SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(4, 3))
        self.fp8_meta["scaling_fwd"].amax_history[0] = amax
        self._fp8_workspaces["weight"] = object()
        Manager.autocast_exit()


class Chunk(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = torch.nn.ModuleList([Linear(), Linear()])
        self.first_microbatch_set = 0

    def set_is_first_microbatch(self) -> None:
        self.first_microbatch_set += 1

    def forward(self, amax: float) -> None:
        for linear in self.linears:
            linear(amax)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Manager]]:
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.quantization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["transformer_engine.pytorch.quantization"].FP8GlobalStateManager = Manager  # type: ignore[attr-defined]
    plain = Manager.__dict__["reduce_and_update_fp8_tensors"]
    Manager.updates = []
    monkeypatch.setattr(te_fp8, "_held_update", None)
    yield Manager
    Manager.reduce_and_update_fp8_tensors = plain


def scaling_of(chunk: Chunk, recipe: str = "delayed") -> TwoPassScaling:
    return TwoPassScaling(te_fp8.TransformerEngineState([chunk], recipe=recipe, device=torch.device("cpu")))


def test_updates_wait_for_the_end_of_the_step(manager: type[Manager]):
    chunk = Chunk()
    chunk(1.0)
    assert manager.updates == ["forward"] * 2, "left alone, it updates by itself"
    manager.updates.clear()
    scaling = scaling_of(chunk)
    scaling_of(chunk)  # a second model of the process: holding twice must not lose the update
    with scaling.step():
        for _ in range(2):
            with scaling.one_pass():
                chunk(2.0)
        manager.reduce_and_update_fp8_tensors(forward=False)  # a backward
        assert manager.updates == []
    assert manager.updates == ["forward", "backward"]


def test_stateless_recipes_are_left_alone(manager: type[Manager]):
    chunk = Chunk()
    scaling = scaling_of(chunk, "tensorwise")
    with scaling.step(), scaling.one_pass():
        chunk(2.0)
    assert manager.updates == ["forward"] * 2


def test_a_pass_outside_a_step_is_undone_also_where_it_made_the_state(manager: type[Manager]):
    chunk = Chunk()
    scaling = scaling_of(chunk)
    with scaling.one_pass():
        chunk(3.0)
    state = chunk.linears[0].fp8_meta["scaling_fwd"]  # type: ignore[union-attr, index]
    assert state.amax_history.eq(0).all()
    assert state.scale.eq(1).all()
    state.scale.fill_(7.0)
    state.amax_history[1] = 5.0
    with scaling.one_pass():
        chunk(3.0)
        state.scale.fill_(9.0)
    assert state.scale.eq(7).all()
    assert state.amax_history[:2].tolist() == [[0.0] * 3, [5.0] * 3]


def test_every_pass_empties_the_weight_cache_and_sets_megatrons_flag(manager: type[Manager]):
    chunk = Chunk()
    scaling = scaling_of(chunk, "blockwise")
    for number in (1, 2):
        with scaling.one_pass():
            assert not any(linear._fp8_workspaces for linear in chunk.linears)
            assert chunk.first_microbatch_set == number
            chunk(1.0)


def test_gradient_fusion_is_set_on_every_linear_layer():
    chunk = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert te_fp8.fuse_weight_gradients(chunk) == 0
    chunk[0].fuse_wgrad_accumulation = False
    assert te_fp8.fuse_weight_gradients(chunk) == 1
    assert chunk[0].fuse_wgrad_accumulation
