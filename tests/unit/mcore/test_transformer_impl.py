"""Transformer Engine's layers are not taken for a model that they would compute otherwise."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from megatron_groupdpo.config import ModelConfig
from megatron_groupdpo.errors import ConfigError

WINDOW = {"position_embedding_type": "rope", "window_size": (3, 0)}


@pytest.mark.parametrize(
    ("fields", "context", "named"),
    [
        ({"norm_position": "post"}, 1, "norm_position 'post'"),
        ({"qk_layernorm": True, "qk_layernorm_across_heads": True}, 1, "qk_layernorm_across_heads"),
        ({**WINDOW, "rotary_base_local": 500}, 1, "rotary_base_local 500"),
        (WINDOW, 2, "context_parallel_size 2"),
        (WINDOW, 1, None),
        ({"qk_layernorm": True, "rope_scaling_type": "yarn"}, 1, None),
    ],
)
def test_a_model_that_its_layers_cannot_be_is_refused_and_auto_says_so(
    fields: dict[str, Any], context: int, named: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    from megatron_groupdpo.mcore import policy

    monkeypatch.setattr(policy, "_transformer_engine_problem", lambda: None)  # as if it were installed

    def choice(impl: Any) -> str:
        model = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, transformer_impl=impl, **fields)
        return policy.choose_transformer_impl(model, torch.device("cuda"), context_parallel_size=context)

    if named is None:
        assert choice("auto") == choice("transformer_engine") == "transformer_engine"
        return
    with pytest.raises(ConfigError, match=re.escape(named)):
        choice("transformer_engine")
    assert choice("auto") == "local"
    assert named in capsys.readouterr().out
