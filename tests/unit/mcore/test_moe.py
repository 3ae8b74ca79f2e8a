"""Mixtures: the router of our layer spec is that of transformers, the same with and without gradients; refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from megatron_groupdpo.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_groupdpo.errors import ConfigError
from megatron_groupdpo.mcore.model.build import transformer_config
from megatron_groupdpo.mcore.model.moe import SoftmaxRouter
from megatron_groupdpo.mcore.policy import build_policy
from megatron_groupdpo.mcore.setup import Ranks, initialize, shut_down

EXPERTS, TOPK, HIDDEN = 16, 4, 32


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield initialize(ParallelConfig(device="cpu"), seed=1)
    shut_down()


def model(**fields: Any) -> ModelConfig:
    given = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "add_bias_linear": False,
    }
    return ModelConfig(**given | fields)


def router(ranks: Ranks, **fields: Any) -> SoftmaxRouter:
    policy = build_policy(
        model(**fields), ParallelConfig(device="cpu"), PrecisionConfig(), ranks, seed=3, training=False
    )
    (found,) = [module for module in policy.chunks[0].modules() if isinstance(module, SoftmaxRouter)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pre_softmax", [False, True], ids=["mixtral", "olmoe"])
def test_tokens_go_where_transformers_sends_them(ranks: Ranks, dtype: torch.dtype, pre_softmax: bool):
    ours = router(ranks, moe_router_pre_softmax=pre_softmax).to(dtype)
    shape = {"num_experts_per_tok": TOPK, "hidden_size": HIDDEN}
    theirs: Any = (
        OlmoeTopKRouter(OlmoeConfig(num_experts=EXPERTS, norm_topk_prob=False, **shape))
        if pre_softmax
        else MixtralTopKRouter(MixtralConfig(num_local_experts=EXPERTS, **shape))
    )
    theirs.weight = ours.weight
    hidden_SBH = torch.randn(50, 2, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype) * 30
    weights_TE, goes_TE = ours(hidden_SBH)
    _, scores_TK, experts_TK = theirs(hidden_SBH)
    wanted_TE = torch.zeros(100, EXPERTS, dtype=dtype).scatter(1, experts_TK, scores_TK.to(dtype))
    assert torch.equal(weights_TE, wanted_TE)
    assert torch.equal(goes_TE, wanted_TE > 0)
    assert (goes_TE.sum(1) == TOPK).all()


def test_equal_experts_are_chosen_alike_with_and_without_gradients(ranks: Ranks):
    ours = router(ranks)
    logits_SBE = torch.randint(0, 2, (400, 1, EXPERTS), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        scored = ours.routing(logits_SBE)
    differentiated = ours.routing(logits_SBE.requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(scored, differentiated))


def test_a_pass_keeps_no_statistics(ranks: Ranks):
    ours = router(ranks)
    assert not list(ours.buffers())
    before = {name: value for name, value in vars(ours).items() if isinstance(value, int | float | str | bool)}
    ours(torch.randn(8, 1, HIDDEN))[0].sum().backward()
    assert before == {name: vars(ours)[name] for name in before}
    assert not ours.is_aux_loss_enabled()


@pytest.mark.acts("ModelConfig.moe_router_dtype")
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_router_computes_in_the_precision_asked_for(ranks: Ranks, dtype: str):
    config = transformer_config(
        model(moe_router_dtype=dtype, ffn_hidden_size=64, num_query_groups=4, kv_channels=8),
        ParallelConfig(device="cpu"),
        PrecisionConfig(bf16=True),
    )
    assert config.moe_router_dtype == dtype
    ours = router(ranks, moe_router_dtype=dtype).to(torch.bfloat16)
    weights_TE, _ = ours(torch.randn(8, 1, HIDDEN).to(torch.bfloat16))
    assert weights_TE.dtype == {"fp32": torch.float32, "fp64": torch.float64}[dtype]


def test_an_environment_that_contradicts_the_attention_backend_is_answered_in_one_line(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    with pytest.raises(ConfigError, match="NVTE_FLASH_ATTN set to 0, but expected 1"):
        build_policy(model(), ParallelConfig(), PrecisionConfig(), ranks, seed=0, training=False)
