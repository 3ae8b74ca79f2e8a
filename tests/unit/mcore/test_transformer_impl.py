"""Which layers a run takes, and what is refused where Transformer Engine or the GPU is not there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from megatron_groupdpo.config import ModelConfig, PrecisionConfig
from megatron_groupdpo.errors import ConfigError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
WINDOW = {"position_embedding_type": "rope", "window_size": (3, 0)}
FP8: dict[str, Any] = {"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "tensorwise"}


def choice(
    impl: Any,
    device: torch.device = CUDA,
    *,
    context: int = 1,
    fields: Any = None,
    precision: dict[str, Any] | None = None,
) -> str:
    from megatron_groupdpo.mcore.model import implementation as kernels

    model = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, transformer_impl=impl, **(fields or {}))
    return kernels.choose_transformer_impl(
        model, device, context_parallel_size=context, precision=PrecisionConfig(**(precision or {}))
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_groupdpo.mcore.fp8 import state as te_fp8

    monkeypatch.setattr(te_fp8, "transformer_engine_problem", lambda: None)


@pytest.mark.acts(
    "ModelConfig.transformer_impl",
    reason="which layers a GPU run takes; test_transformer_engine_python.py shows that they are one model",
)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_position": "post"},
        {"qk_layernorm": True, "qk_layernorm_across_heads": True},
        {**WINDOW, "rotary_base_local": 500},
        {"qk_layernorm": True, "rope_scaling_type": "yarn"},
    ],
)
def test_every_family_can_have_its_layers(installed: None, fields: dict[str, Any]):
    assert choice("auto", fields=fields) == choice("transformer_engine", fields=fields) == "transformer_engine"
    assert choice("local", fields=fields) == "local"


def test_a_model_that_its_attention_cannot_be_is_refused_and_auto_says_so(installed: None, capsys: Any):
    with pytest.raises(ConfigError, match="sliding window under ring context parallelism"):
        choice("transformer_engine", context=2, fields=WINDOW)
    assert choice("auto", context=2, fields=WINDOW) == "local"
    assert "--attention-backend local has it" in capsys.readouterr().out
    local = {"attention_backend": "local"}
    assert choice("transformer_engine", context=2, fields=WINDOW, precision=local) == "transformer_engine"


def test_context_parallelism_takes_its_layers_only_where_they_have_it(installed: None, capsys: Any):
    """Flash and fused attention are of half precision, and its unfused one has no context parallelism."""
    assert choice("auto", context=2, precision={"bf16": True}) == "transformer_engine"
    assert choice("auto", context=2) == "local"
    assert "context_parallel_size 2) is flash or fused, in bf16" in capsys.readouterr().out
    for given in ({}, {"attention_backend": "unfused", "bf16": True}):
        with pytest.raises(ConfigError, match="is flash or fused, in bf16"):
            choice("transformer_engine", context=2, precision=given)
    assert choice("auto", context=2, precision={"attention_backend": "local"}) == "transformer_engine"


@pytest.mark.acts(
    "PrecisionConfig.apply_rope_fusion",
    reason="Megatron takes it with Transformer Engine alone; tests/gpu compare the fused rotation with the plain one",
)
@pytest.mark.parametrize(
    ("precision", "named"),
    [
        (FP8, "fp8_format 'hybrid' needs"),
        ({"attention_backend": "fused", "bf16": True}, "attention_backend 'fused' needs"),
        ({"apply_rope_fusion": True}, "apply_rope_fusion needs"),
    ],
)
def test_auto_never_drops_an_option_that_only_transformer_engine_has(
    precision: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
):
    """Megatron itself ignores ``fp8`` without it, in silence."""
    from megatron_groupdpo.mcore.fp8 import state as te_fp8

    monkeypatch.setattr(te_fp8, "transformer_engine_problem", lambda: "importing it fails (say why)")
    for device, why in ((CPU, "the run's device is the CPU"), (CUDA, "importing it fails")):
        with pytest.raises(ConfigError, match=re.escape(named)) as refusal:
            choice("auto", device, precision=precision)
        assert why in str(refusal.value)


def test_what_the_machine_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch):
    from megatron_groupdpo.mcore.fp8 import state as te_fp8
    from megatron_groupdpo.mcore.model import implementation as kernels

    def check(recipe: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(te_fp8, "device_capability", lambda _device: capability)
        kernels.check_kernels(PrecisionConfig(**FP8 | {"fp8_recipe": recipe}), "transformer_engine", CUDA)

    monkeypatch.setattr(te_fp8, "recipe_problem_here", lambda _recipe: None)
    check("tensorwise", (9, 0))
    with pytest.raises(ConfigError, match=re.escape("'mxfp8' needs a GPU of compute capability 10.0")):
        check("mxfp8", (9, 0))
    with pytest.raises(ConfigError, match="'blockwise' needs"):
        check("blockwise", (8, 9))
    monkeypatch.setattr(te_fp8, "recipe_problem_here", lambda _recipe: "needs CUDA >= 12.9")
    with pytest.raises(ConfigError, match="CUDA"):
        check("blockwise", (9, 0))
    with pytest.raises(ConfigError, match="fused_weight_gradient_mlp_cuda"):
        kernels.check_kernels(PrecisionConfig(gradient_accumulation_fusion=True), "local", CUDA)
    monkeypatch.setattr(te_fp8, "flash_attention_is_installed", lambda: False)
    with pytest.raises(ConfigError, match="flash-attn"):
        kernels.check_kernels(PrecisionConfig(attention_backend="flash", bf16=True), "transformer_engine", CUDA)


@pytest.mark.acts(
    "PrecisionConfig.attention_backend",
    reason="the value reaches Megatron's configuration; tests/gpu compare every attention packed and padded",
)
def test_options_reach_megatrons_configuration():
    from megatron_groupdpo.config import ParallelConfig
    from megatron_groupdpo.mcore.model.build import transformer_config

    model = ModelConfig(num_layers=6, hidden_size=64, num_attention_heads=2, num_query_groups=2, kv_channels=32)
    given = PrecisionConfig(
        **FP8, first_last_layers_bf16=True, num_layers_at_end_in_bf16=2, gradient_accumulation_fusion=True
    )
    config = transformer_config(model, ParallelConfig(), given, transformer_impl="transformer_engine")
    assert (config.fp8, config.fp8_recipe, config.first_last_layers_bf16) == ("hybrid", "tensorwise", True)
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 2)
    assert not config.gradient_accumulation_fusion, "its modules are told one by one; the output layer would want Apex"
    delayed = PrecisionConfig(
        bf16=True, fp8_format="e4m3", fp8_recipe="delayed", fp8_margin=1, attention_backend="unfused"
    )
    config = transformer_config(model, ParallelConfig(), delayed)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo, config.fp8_margin) == (16, "max", 1)
    assert config.attention_backend.name == "unfused"
    plain = transformer_config(model, ParallelConfig(), PrecisionConfig(), transformer_impl="local")
    assert plain.fp8 is None
