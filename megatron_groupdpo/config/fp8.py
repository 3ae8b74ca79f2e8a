"""FP8 recipes and precisions: what a recipe asks of shapes and of the GPU, and the name of a precision. Needs no torch.

Sizes are Transformer Engine 2.11's: a tensor is quantized if its last dimension is a multiple of 16 and the others'
product of 8 (``assert_dim_for_fp8_exec`` in ``transformer_engine/pytorch/utils.py``), and the weight gradient, whose
inner dimension is the tokens, needs 16 (``get_align_size_for_quantization`` in
``transformer_engine/pytorch/quantization.py``: 32 for mxfp8). The blocks of mxfp8 have 32 elements, those of blockwise
128; what sequence parallelism gathers must hold whole blocks in both directions (``is_quantizable`` of the tensors of
either kind). Blocks are kept whole on every layout, so that which tokens share one does not depend on it; but those of
an expert's tokens, which Megatron pads to 16 (32 for mxfp8) expert by expert.
"""

from __future__ import annotations

import dataclasses
import math

from megatron_groupdpo.config.sections.machine import ParallelConfig, PrecisionConfig

TILE = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
"""By recipe: tokens of a rank, and both dimensions of a rank's weights, are multiples of this."""

_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def fp8_recipes(capability: tuple[int, int]) -> tuple[str, ...]:
    """FP8 recipes of Transformer Engine that run on a device of this compute capability.

    Source: ``check_recipe_support`` in ``transformer_engine/pytorch/quantization.py``; 12.0 has no mxfp8 for all
    layouts.
    """
    able = (recipe for recipe, least in _CAPABILITY.items() if capability >= least)
    return tuple(recipe for recipe in able if recipe != "mxfp8" or capability < (12, 0))


def recipe_problem(recipe: str, capability: tuple[int, int]) -> str | None:
    """Why a device cannot run a recipe, with the way out; None: it can."""
    able = fp8_recipes(capability)
    if recipe in able:
        return None
    needs = f"compute capability {'.'.join(map(str, _CAPABILITY[recipe]))}" + (" to 11" if recipe == "mxfp8" else "")
    way_out = f"choose {', '.join(able)}" if able else "train in bf16"
    here = ".".join(map(str, capability))
    return f"fp8_recipe {recipe!r} needs a GPU of {needs}, this one has {here}; {way_out}"


def row_multiple(context_parallel_size: int) -> int:
    """A packed response is padded to a multiple of this: context parallelism cuts each into two chunks a rank."""
    return 2 * context_parallel_size if context_parallel_size > 1 else 1


def length_multiple(parallel: ParallelConfig, precision: PrecisionConfig | None = None) -> int:
    """The length of a microbatch, padded row or packed, is a multiple of this.

    Context parallelism cuts it into two chunks a rank, sequence parallelism cuts what is left; with FP8 what is left
    then holds whole tiles.
    """
    cp = parallel.context_parallel_size
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    multiple = row_multiple(cp) * shards
    if precision is None or precision.fp8_format is None or precision.fp8_recipe is None:
        return multiple
    return math.lcm(multiple, TILE[precision.fp8_recipe] * cp * shards)


def precision_name(precision: PrecisionConfig) -> str:
    """What log-probabilities depend on besides the weights: equal names, comparable numbers."""
    if precision.fp8_format is None:
        return "bf16" if precision.bf16 else "fp32"
    name = f"fp8-{precision.fp8_format}-{precision.fp8_recipe}"
    if precision.first_last_layers_bf16:
        name += f"-bf16-{precision.num_layers_at_start_in_bf16}-{precision.num_layers_at_end_in_bf16}"
    return name


def reference_precision(precision: PrecisionConfig) -> PrecisionConfig:
    """That of the reference: the policy's; but bf16 under delayed scaling, whose function moves with its history."""
    if precision.fp8_recipe != "delayed":
        return precision
    plain = PrecisionConfig()
    fp8 = [field.name for field in dataclasses.fields(plain) if field.name.startswith("fp8_")]
    return dataclasses.replace(precision, **{name: getattr(plain, name) for name in fp8})
