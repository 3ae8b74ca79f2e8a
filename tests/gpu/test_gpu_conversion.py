"""A converted model in bf16 on the GPU computes what transformers computes in bf16, up to bf16's rounding."""

from __future__ import annotations

from pathlib import Path

import gpu_policies as gpu
import numpy as np
import pytest
import torch

from megatron_groupdpo.config import PrecisionConfig

pytestmark = pytest.mark.gpu


def test_log_probs_of_an_imported_model_are_those_of_transformers(tmp_path: Path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from megatron_groupdpo.convert.hf.model import open_hf_model
    from megatron_groupdpo.convert.verify import megatron_logprobs, transformers_logprobs
    from megatron_groupdpo.convert.weights.loading import load_hf_weights
    from megatron_groupdpo.mcore.policy import build_policy

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    sequences = [np.random.default_rng(i).integers(0, 2000, size=length) for i, length in enumerate((300, 77, 12))]
    exact = torch.cat(transformers_logprobs(tmp_path, sequences))
    with gpu.one_gpu() as ranks:
        model = open_hf_model(tmp_path).model
        policy = build_policy(model, gpu.PARALLEL, PrecisionConfig(bf16=True), ranks, seed=0, training=False)
        load_hf_weights(tmp_path, policy)
        found = megatron_logprobs(policy, sequences)
        assert found is not None
        ours = torch.cat(found).float()
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).to(ranks.device).eval()
        parts = []
        for tokens in sequences:
            tokens_S = torch.from_numpy(tokens).to(ranks.device)
            with torch.no_grad():
                logits_SV = theirs(input_ids=tokens_S[None], use_cache=False).logits[0].float()
            parts.append(logits_SV[:-1].log_softmax(-1).gather(1, tokens_S[1:, None])[:, 0].cpu())
    off, their_off = (ours - exact).abs(), (torch.cat(parts) - exact).abs()
    # Each against float32: no further than transformers' own bf16, with room for another order of sums.
    assert float(off.mean()) <= 2 * float(their_off.mean())
    assert float(off.max()) <= 3 * float(their_off.max())
    assert float(their_off.mean()) > 0
