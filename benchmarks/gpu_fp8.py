"""What FP8 does to a step: coefficients and gradients by recipe and objective, and short loss curves."""

from __future__ import annotations

import math
import statistics
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from gpu_context import Context
from gpu_step import LOSS, RECIPES, SHAPES, Bench, Setting, benches
from torch import Tensor

from megatron_groupdpo.run.batches import BatchSource, on_device
from megatron_groupdpo.step.coefficients import LossOptions
from megatron_groupdpo.step.train_step import accumulate_gradient

OBJECTIVES = ("all_pairs", "mpo", "softmax", "margin", "group_bce")
# The 1B shape's width, fewer layers and words, so that gradients in fp32, bf16 and FP8 fit together.
SHAPES["probe"] = SHAPES["1b"] | {"num_layers": 8, "vocab_size": 32000}
SHAPES["curve"] = (
    SHAPES["1b"] | {"num_layers": 4, "hidden_size": 1024, "num_attention_heads": 16} | {"vocab_size": 8192}
)
SHAPES["curve"] |= {"ffn_hidden_size": 4096}
# The paper's betas are 2 to 15 on averaged scores: with 2, references that differ by 0.5 a token spread scores by 1.
BETA, SPREAD_PER_TOKEN = 2.0, 0.5


def compare_recipes(context: Context) -> Iterator[dict[str, Any]]:
    """Against fp32 on the same batch and weights, and FP8 against bf16 too.

    coefficient_error: max_i |k_i - k_i'| / max_i |k_i'|, k_i = dL/dlogp_i, which pass 2 multiplies by.
    """
    names = ("fp32", "bf16", *(f"fp8-{recipe}" for recipe in RECIPES))
    settings = {name: Setting(shape="probe", precision=name) for name in names}
    known: dict[str, dict[str, tuple[Tensor, dict[str, Tensor]]]] = {}
    reference_R: Tensor | None = None
    with benches(settings, context, optimizer=False) as built:
        for name, bench, refused in built:
            if bench is None:
                yield {"precision": name, **refused}
                continue
            source = bench.source(length=context.pick(512, 32), group_size=8, num_groups=2, steps=1)
            try:
                if reference_R is None:
                    reference_R = _reference(bench, source)
                yield from _compare(name, bench, source, reference_R, known)
            except Exception:  # what one recipe's kernels raise ends no other's measurement
                yield {"precision": name, "error": traceback.format_exc()}


def _compare(
    name: str,
    bench: Bench,
    source: BatchSource,
    reference_R: Tensor,
    known: dict[str, dict[str, tuple[Tensor, dict[str, Tensor]]]],
) -> Iterator[dict[str, Any]]:
    """One precision against those that are known; fp32 and bf16 become known."""
    for objective in OBJECTIVES:
        loss = replace(LOSS, objective=objective, beta=BETA, nll_coeff=0.0)
        weights_R, gradient, drift = _gradient(bench, source, loss, reference_R)
        for against, found in known.items():
            if against != name:
                gaps = _gaps((weights_R, gradient), found[objective])
                yield {"precision": name, "against": against, "objective": objective} | gaps | {"drift": drift}
        if name in ("fp32", "bf16"):
            known.setdefault(name, {})[objective] = (weights_R, gradient)


def _reference(bench: Bench, source: BatchSource) -> Tensor:
    """[R] the first policy's own log-probabilities, moved at random."""
    planned = on_device(source.batch(0, len(source.group_ids)), bench.ranks.device)
    logps_R = bench.policy.engine.score(planned.microbatches, planned.batch.num_responses)
    assert logps_R is not None
    draw = torch.Generator().manual_seed(5)
    noise_R = torch.randn(len(logps_R), generator=draw, dtype=torch.float64)
    return logps_R.cpu() + SPREAD_PER_TOKEN * planned.batch.num_tokens_R * noise_R


def _gradient(
    bench: Bench, source: BatchSource, loss: LossOptions, reference_R: Tensor
) -> tuple[Tensor, dict[str, Tensor], float | None]:
    """dL/dlogp [R] and the gradient by parameter, where they are: 2 GB a precision and objective of the full size."""
    planned = on_device(source.batch(0, len(source.group_ids)), bench.ranks.device)
    given = (bench.policy.engine, planned.microbatches, planned.batch, reference_R, loss)
    bench.calibrate(lambda: accumulate_gradient(*given))
    with bench.one_step():
        outcome = accumulate_gradient(*given)
    assert outcome is not None
    chunk: Any = bench.policy.chunks[0]
    # In half precision a wrapper stands around the model.
    gradient = {
        name.removeprefix("module.module."): p.main_grad.detach().float().clone()
        for name, p in chunk.module.named_parameters(prefix="module" if bench.policy.config.bf16 else "module.module")
    }
    return outcome.result.weights_R.clone(), gradient, outcome.score_drift


def _gaps(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> dict[str, float]:
    (weights_R, gradient), (wanted_R, wanted_gradient) = found, wanted
    assert gradient.keys() == wanted_gradient.keys(), "the layers are named differently"
    sums = torch.zeros(4, dtype=torch.float64, device=weights_R.device)
    for name, values in gradient.items():
        wanted = wanted_gradient[name]
        products = (values * wanted, values.square(), wanted.square(), (values - wanted).square())
        sums += torch.stack([product.sum(dtype=torch.float64) for product in products])
    dot, own, other, difference = sums.tolist()
    return {
        "coefficient_error": float((weights_R - wanted_R).abs().max() / wanted_R.abs().max()),
        "gradient_cosine": dot / math.sqrt(own * other),
        "gradient_relative_error": math.sqrt(difference / other),
    }


def compare_curves(context: Context) -> Iterator[dict[str, Any]]:
    """bf16 from several seeds, each recipe from the first; a curve is inside if its end and its middle are.

    "Inside": no further from the middle of bf16's smallest and largest loss than the distance between those two.
    """
    num_steps, seeds = context.pick((40, (1, 2, 3, 4)), (6, (1, 2, 3)))
    settings = {f"bf16, seed {seed}": Setting(shape="curve") for seed in seeds}
    settings |= {f"fp8-{recipe}": Setting(shape="curve", precision=f"fp8-{recipe}") for recipe in RECIPES}
    curves: dict[str, list[float]] = {}
    for name, setting in settings.items():
        seed = int(name.rsplit(" ", 1)[-1]) if "seed" in name else seeds[0]
        with benches({name: setting}, context, seed=seed, lr=context.pick(1e-4, 1e-3)) as built:
            for _, bench, refused in built:
                if bench is None:
                    yield {"precision": setting.precision, "run": name, **refused}
                    continue
                try:
                    losses = _train(bench, context, num_steps)
                except Exception:
                    yield {"precision": setting.precision, "run": name, "error": traceback.format_exc()}
                    continue
                point: dict[str, Any] = {"precision": setting.precision, "run": name, "losses": losses}
                point |= {"first": losses[0], "last": losses[-1]}
                if setting.precision != "bf16":
                    point["inside"] = inside(losses, list(curves.values()))
                else:
                    curves[name] = losses
                yield point


def _train(bench: Bench, context: Context, num_steps: int) -> list[float]:
    """One batch again and again, from the policy's own start as reference: the loss falls from its closed form."""
    source = bench.source(length=context.pick(512, 32), group_size=8, num_groups=2, steps=1)
    loss = replace(LOSS, objective="mpo", beta=BETA)
    planned = on_device(source.batch(0, 2), bench.ranks.device)
    given = (bench.policy.engine, planned.microbatches, planned.batch)
    bench.calibrate(lambda: accumulate_gradient(*given, planned.ref_logps_R, loss))
    reference_R = bench.policy.engine.score(planned.microbatches, planned.batch.num_responses)
    assert reference_R is not None
    assert bench.updater is not None
    losses = []
    for _ in range(num_steps):
        with bench.one_step():
            outcome = accumulate_gradient(*given, reference_R, loss)
        bench.updater.step(2)
        assert outcome is not None
        losses.append(outcome.result.loss)
    return torch.stack(losses).tolist()


def inside(losses: list[float], others: list[list[float]]) -> bool:
    """Whether the mean of the last tenth, and of the tenth at the middle, is near the others'."""
    count = max(1, len(losses) // 10)
    for start in (len(losses) // 2, len(losses) - count):
        part = slice(start, start + count)
        means = [statistics.fmean(other[part]) for other in others]
        middle, spread = (min(means) + max(means)) / 2, max(means) - min(means)
        if not abs(statistics.fmean(losses[part]) - middle) <= spread:  # NaN is outside
            return False
    return True
