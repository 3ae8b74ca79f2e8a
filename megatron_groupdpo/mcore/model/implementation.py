"""Which layers, attention and kernels a run takes, decided before a model is built; what cannot be had is refused."""

from __future__ import annotations

import importlib

import torch
import torch.distributed as dist

from megatron_groupdpo.config import ModelConfig, PrecisionConfig
from megatron_groupdpo.config.fp8 import recipe_problem
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.fp8 import state as te_fp8

_WINDOW = "sliding window under ring context parallelism (context_parallel_size {}); --attention-backend local has it"


def choose_transformer_impl(
    model: ModelConfig,
    device: torch.device,
    *,
    context_parallel_size: int = 1,
    precision: PrecisionConfig | None = None,
) -> str:
    """``local`` or ``transformer_engine``; the latter needs the package, a GPU, and a model that its layers can be.

    Raises:
        ConfigError: Transformer Engine is asked for, by name or by an option that is its, and cannot be had; or the GPU
            cannot run the FP8 recipe.
    """
    precision = precision or PrecisionConfig()
    reason = _why_local(model, device, context_parallel_size, precision)
    if reason is None:
        return "transformer_engine"
    impl, whose = model.transformer_impl, _options_of_its(precision)
    if impl == "transformer_engine" or whose:
        asked = [f"transformer_impl {impl!r}"] if impl == "transformer_engine" else whose
        raise ConfigError(
            f"{' and '.join(asked)} needs Transformer Engine's layers, and {reason}; install the 'te' extra on a "
            "machine with a GPU, or leave the option out and set --transformer-impl local"
        )
    if impl == "auto" and device.type == "cuda" and (not dist.is_initialized() or dist.get_rank() == 0):
        print(f"transformer_impl auto: local layers, since {reason}", flush=True)
    return "local"


def _why_local(
    model: ModelConfig, device: torch.device, context_parallel_size: int, precision: PrecisionConfig
) -> str | None:
    if model.transformer_impl == "local":
        return "transformer_impl is 'local'"
    if device.type == "cpu":
        return "the run's device is the CPU"
    problem = te_fp8.transformer_engine_problem()
    if problem is not None:
        return problem
    if context_parallel_size == 1 or precision.attention_backend == "local":
        return None
    if model.window_size:
        return f"its attention has no {_WINDOW.format(context_parallel_size)}"
    if not precision.bf16 or precision.attention_backend == "unfused":
        return (
            f"its attention under context parallelism (context_parallel_size {context_parallel_size}) is flash or "
            "fused, in bf16; --attention-backend local has it otherwise"
        )
    return None


def _options_of_its(precision: PrecisionConfig) -> list[str]:
    """Options that only Transformer Engine's layers have, as they are set."""
    found = [] if precision.fp8_format is None else [f"fp8_format {precision.fp8_format!r}"]
    if precision.attention_backend in ("flash", "fused", "unfused"):
        found.append(f"attention_backend {precision.attention_backend!r}")
    return found + (["apply_rope_fusion"] if precision.apply_rope_fusion else [])


def check_kernels(precision: PrecisionConfig, transformer_impl: str, device: torch.device) -> None:
    """Refuse what this machine's GPU or packages cannot do; a collective call where FP8 is asked for.

    Raises:
        ConfigError: the reason and the way out.
    """
    if precision.fp8_recipe is not None:
        problem = recipe_problem(precision.fp8_recipe, te_fp8.device_capability(device))
        if problem is None:
            problem = te_fp8.recipe_problem_here(precision.fp8_recipe)
        if problem is not None:
            raise ConfigError(problem)
    if precision.cuda_graphs and device.type == "cpu":
        raise ConfigError("cuda_graphs needs a GPU and the run's device is the CPU; leave it out")
    if precision.attention_backend == "flash" and not te_fp8.flash_attention_is_installed():
        raise ConfigError(
            "attention_backend 'flash' needs the flash-attn package, which Transformer Engine does not find; install "
            "it, or use fused (cuDNN)"
        )
    if precision.gradient_accumulation_fusion and transformer_impl == "local" and not _apex_fuses_gradients():
        raise ConfigError(
            "gradient_accumulation_fusion in local layers needs Apex's fused_weight_gradient_mlp_cuda, which does not "
            "import; build Apex with it (docs/install.md), take Transformer Engine's layers, or leave it out"
        )


def _apex_fuses_gradients() -> bool:
    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except Exception:  # a build for another torch raises what it likes
        return False
    return True
