"""Both passes of a step see one FP8 function: the contract of ``mcore/fp8/passes.py``, on stand-in layers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fake_fp8 import E4M3, DelayedQuantizer, FakeFp8, FakeFp8Product, cast
from step_batches import make_batch, options
from torch import Tensor

from megatron_groupdpo.mcore.fp8.passes import CALIBRATION_STEPS, TwoPassScaling
from megatron_groupdpo.step.coupled import accumulate_coupled_gradient
from megatron_groupdpo.step.train_step import StepResult, accumulate_gradient
from megatron_groupdpo.types import GroupBatch, ResponseRow

SIDES = ((2, 2), (1, 2), (2, 1))
WIDTH, VOCAB = 16, 50


class TinyEngine:
    """Two residual blocks of FP8 products over running means of embeddings; a microbatch is a list of rows.

    ``frozen`` drives the library through :class:`TwoPassScaling`; otherwise it is left to itself.
    """

    def __init__(self, recipe: str = "delayed", *, frozen: bool = True) -> None:
        draw = torch.Generator().manual_seed(3)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).mul_(0.4).requires_grad_()

        self.embedding, self.output = weight(VOCAB, WIDTH), weight(VOCAB, WIDTH)
        self.weights = [weight(2 * WIDTH, WIDTH) if i % 2 == 0 else weight(WIDTH, 2 * WIDTH) for i in range(4)]
        self.library = FakeFp8(recipe)
        self.products = [FakeFp8Product(self.library) for _ in self.weights]
        self.scaling = TwoPassScaling(self.library) if frozen else None

    def step(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.scaling is None else self.scaling.step()

    def one_pass(self) -> contextlib.AbstractContextManager[None]:
        if self.scaling is not None:
            return self.scaling.one_pass()
        self.library.forget_weights()  # as Megatron's schedules ask for at the first microbatch
        return contextlib.nullcontext()

    def score(self, microbatches: Sequence[Any], num_responses: int) -> Tensor:
        with torch.no_grad(), self.one_pass():
            return self._gather([(rows, self._logps(rows)) for rows in microbatches], num_responses)

    def backward(self, microbatches: Sequence[Any], num_responses: int, loss: Any) -> Tensor:
        self.zero_gradient()
        parts = []
        with self.one_pass():
            for rows in microbatches:
                logps_r = self._logps(rows)
                self.library.update(forward=True)  # the end of the library's FP8 region
                loss(torch.tensor([row.index for row in rows]), logps_r).backward()
                parts.append((rows, logps_r.detach()))
        return self._gather(parts, num_responses)

    def zero_gradient(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def parameters(self) -> list[Tensor]:
        return [self.embedding, self.output, *self.weights]

    def gradient(self) -> Tensor:
        return torch.cat(
            [p.grad.flatten() if p.grad is not None else p.detach().flatten() * 0 for p in self.parameters()]
        )

    def _logps(self, rows: Sequence[ResponseRow]) -> Tensor:
        states, targets, owners = [], [], []
        for place, row in enumerate(rows):
            tokens_S = torch.from_numpy(row.tokens_S).long()
            counts_S = torch.arange(1, len(tokens_S) + 1)[:, None]
            positions_T = torch.from_numpy(row.target_positions_T)
            states.append((self.embedding[tokens_S].cumsum(0) / counts_S)[positions_T - 1])
            targets.append(tokens_S[positions_T])
            owners.append(torch.full((len(positions_T),), place))
        x_TH = torch.cat(states)
        for i in (0, 2):
            inner = self.products[i](x_TH, self.weights[i]).relu()
            x_TH = x_TH + self.products[i + 1](inner, self.weights[i + 1])
        logps_T = (x_TH @ self.output.t()).log_softmax(-1).gather(1, torch.cat(targets)[:, None]).squeeze(1)
        return torch.zeros(len(rows), dtype=torch.float64).index_add(0, torch.cat(owners), logps_T)

    @staticmethod
    def _gather(parts: list[Any], num_responses: int) -> Tensor:
        logps_R = torch.zeros(num_responses, dtype=torch.float64)
        for rows, logps_r in parts:
            logps_R[[row.index for row in rows]] = logps_r
        return logps_R


LOSS = options(nll_coeff=0.3)


def microbatches_of(batch: GroupBatch, size: int = 2) -> list[Any]:
    # Not the batch's order: a group's responses lie in several microbatches.
    rows = sorted(batch.rows, key=lambda row: len(row.tokens_S))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def whole_groups_of(batch: GroupBatch) -> list[Any]:
    return [[batch.rows[index] for index in own if index >= 0] for own in batch.flat_index_GK.tolist()]


def one_step(engine: Any, batch: GroupBatch, *, coupled: bool = False) -> StepResult | None:
    ref_logps_R = torch.zeros(batch.num_responses, dtype=torch.float64)
    with engine.step():
        if coupled:
            accumulate_coupled_gradient(engine, whole_groups_of(batch), batch, ref_logps_R, LOSS)
            return None
        return accumulate_gradient(engine, microbatches_of(batch), batch, ref_logps_R, LOSS)


def calibrated(**options: Any) -> tuple[TinyEngine, GroupBatch]:
    """After calibration and some steps, so that scales and histories are those of a run."""
    engine, batch = TinyEngine(**options), make_batch(LOSS, SIDES)
    if engine.scaling is not None:
        engine.scaling.calibrate(lambda: engine_passes(engine, batch))
    for seed in range(2):
        one_step(engine, make_batch(LOSS, SIDES, seed=10 + seed))
    engine.zero_gradient()
    return engine, batch


def engine_passes(engine: Any, batch: GroupBatch) -> None:
    ref_logps_R = torch.zeros(batch.num_responses, dtype=torch.float64)
    accumulate_gradient(engine, microbatches_of(batch), batch, ref_logps_R, LOSS)


def state_of(engine: TinyEngine) -> list[Tensor]:
    return engine.library.snapshot()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_the_stand_in_follows_the_recipes_rules():
    quantizer = DelayedQuantizer(E4M3, history=4)
    quantizer.amax_history.copy_(torch.tensor([3.0, 5.0, 2.0, 0.0]))
    quantizer.update()
    assert quantizer.amax_history.tolist() == [0.0, 2.0, 0.0, 3.0]
    assert float(quantizer.scale) == pytest.approx(89.6)
    quantizer.amax_history.zero_()
    quantizer.update()
    assert float(quantizer.scale) == pytest.approx(89.6), "an amax of 0 keeps the scale"
    with_margin = DelayedQuantizer(E4M3, history=2, algorithm="most_recent", margin=1)
    with_margin.amax_history.copy_(torch.tensor([2.0, 7.0]))
    with_margin.update()
    assert float(with_margin.scale) == 112.0
    assert cast(torch.tensor([1e4]), torch.ones(()), E4M3).item() == 448.0


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_pass_2_sees_the_scores_of_pass_1(recipe: str):
    engine, batch = calibrated(recipe=recipe)
    outcome = one_step(engine, batch)
    assert outcome is not None
    assert outcome.score_drift == 0.0


def test_the_library_left_to_itself_drifts_between_the_passes():
    engine, batch = calibrated(frozen=False)
    outcome = one_step(engine, batch)
    assert outcome is not None
    assert outcome.score_drift is not None
    assert outcome.score_drift > 1e-3


def test_with_frozen_scales_the_decoupled_gradient_is_the_coupled_one():
    engine, batch = calibrated()
    one_step(engine, batch)
    decoupled = engine.gradient()
    engine, batch = calibrated()
    one_step(engine, batch, coupled=True)
    assert relative(decoupled, engine.gradient()) < 1e-9


def test_without_freezing_it_is_not():
    engine, batch = calibrated(frozen=False)
    one_step(engine, batch)
    decoupled = engine.gradient()
    engine, batch = calibrated(frozen=False)
    one_step(engine, batch, coupled=True)
    assert relative(decoupled, engine.gradient()) > 1e-3


def test_scales_move_once_a_step_by_the_maxima_of_all_its_microbatches():
    engine, batch = calibrated()
    before = state_of(engine)
    with engine.step():
        engine_passes(engine, batch)
        for now, then in zip(state_of(engine), before):
            same = torch.equal(now, then) if now.dim() == 0 else torch.equal(now[1:], then[1:])
            assert same, "within a step only the newest maxima change"
        seen = [quantizer.amax_history.clone() for quantizer in quantizers(engine)]
    for quantizer, history in zip(quantizers(engine), seen):
        assert float(quantizer.scale) == pytest.approx(torch.finfo(quantizer.dtype).max / float(history.max()))
        assert quantizer.amax_history.tolist() == [0.0, *history[2:].tolist(), float(history[0])]
    # The newest maximum of the first product's input is that of all rows together.
    whole = TinyEngine()
    whole._logps(batch.rows)
    assert float(seen[0][0]) == float(quantizers(whole)[0].amax_history[0])


def quantizers(engine: TinyEngine) -> list[DelayedQuantizer]:
    return [q for layer in engine.library.layers for q in (layer.of_input, layer.of_weight, layer.of_gradient)]


def test_passes_outside_a_step_leave_no_trace():
    engine, batch = calibrated()
    before = state_of(engine)
    engine.score(microbatches_of(make_batch(LOSS, SIDES, seed=5)), batch.num_responses)  # validation
    engine_passes(engine, batch)  # --verify-gradients
    assert all(torch.equal(now, then) for now, then in zip(state_of(engine), before, strict=True))


def test_a_step_that_fails_moves_no_scale():
    engine, _ = calibrated()
    scales = [float(quantizer.scale) for quantizer in quantizers(engine)]
    with pytest.raises(RuntimeError), engine.step():
        raise RuntimeError
    assert [float(quantizer.scale) for quantizer in quantizers(engine)] == scales
    with engine.step():
        pass


def test_every_pass_quantizes_the_weights_anew():
    engine, batch = calibrated()
    one_step(engine, batch)
    rows = microbatches_of(batch)
    before = engine.score(rows, batch.num_responses)
    with torch.no_grad():
        for weight in engine.weights:  # the optimizer
            weight *= 1.5
    after = engine.score(rows, batch.num_responses)
    engine.library.forget_weights()
    assert not torch.equal(before, after)
    assert torch.equal(after, engine.score(rows, batch.num_responses))


def test_calibration_sets_every_scale_and_only_once():
    engine, batch = TinyEngine(), make_batch(LOSS, SIDES)
    assert engine.scaling is not None
    assert engine.scaling.calibrate(lambda: engine_passes(engine, batch)) == CALIBRATION_STEPS
    assert all(float(quantizer.scale) != 1.0 for quantizer in quantizers(engine))
    assert engine.scaling.calibrate(lambda: engine_passes(engine, batch)) == 0
    stateless = TinyEngine("tensorwise")
    assert stateless.scaling is not None
    assert stateless.scaling.calibrate(lambda: None) == 0


def test_with_its_first_scales_delayed_scaling_has_no_gradient_worth_an_update():
    """Why there is a calibration: gradients of 1e-7 underflow at scale 1."""

    def gap(*, rounds: int) -> float:
        engine, batch = TinyEngine(), make_batch(LOSS, SIDES)
        exact = TinyEngine("tensorwise")
        for _ in range(rounds):
            with engine.step():
                small_passes(engine, batch)
        small_passes(engine, batch)
        small_passes(exact, batch)
        inner = slice(-sum(weight.numel() for weight in engine.weights), None)
        return relative(engine.gradient()[inner], exact.gradient()[inner])

    assert gap(rounds=0) > 0.9
    assert gap(rounds=CALIBRATION_STEPS) < 0.2


def small_passes(engine: Any, batch: GroupBatch) -> None:
    loss = options(beta=1e-7, nll_coeff=0.0)
    ref_logps_R = torch.zeros(batch.num_responses, dtype=torch.float64)
    accumulate_gradient(engine, microbatches_of(batch), batch, ref_logps_R, loss)
