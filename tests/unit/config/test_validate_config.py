"""Fields that contradict each other are refused: the rule, the values, the way out."""

from __future__ import annotations

import re

import pytest
from config_examples import example

from megatron_groupdpo.config import (
    data_parallel_size,
    lr_decay_iters,
    lr_warmup_iters,
    train_iters,
    validate,
)
from megatron_groupdpo.errors import ConfigError

ACCEPTED = [
    ({}, 1),
    ({}, 3),
    ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}, 8),
    ({"num_query_groups": 2, "tensor_model_parallel_size": 4}, 4),
    ({"hidden_size": 60, "num_attention_heads": 8, "kv_channels": 8}, 1),
    ({"objective": "sft", "reference": "none", "reference_logprobs": None}, 1),
    ({"objective": "simpo_pairs", "reference": "none", "reference_logprobs": None, "score_average": True}, 1),
    ({"objective": "ipo_pairs"}, 1),
    ({"objective": "dpo", "label_smoothing": 0.1, "pair_selection": "random"}, 1),
    ({"nll_coeff": 0.0}, 1),
    ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, 1),
    ({"recompute_granularity": "selective"}, 1),
    ({"train_iters": None, "train_samples": 1000, "lr_warmup_fraction": 0.1}, 1),
    ({"lr_warmup_iters": 99}, 1),
    ({"valid_fraction": 0.1, "eval_interval": 10}, 1),
    ({"load": "x", "finetune": True, "save": "y", "save_interval": 5}, 1),
    ({"optimizer": "sgd", "sgd_momentum": 0.5}, 1),
]

# Changes, world size, and what the message must say: rule, values, way out.
REFUSED = [
    ({"tensor_model_parallel_size": 2}, 3, ("world size (3)", "multiple of tensor (2)", "= 2; start")),
    ({"pipeline_model_parallel_size": 4}, 2, ("world size (2)", "pipeline (4)")),
    ({"tensor_model_parallel_size": 8}, 8, ("num_attention_heads (4)", "multiple of", "(8); choose")),
    (
        {"num_attention_heads": 12, "num_query_groups": 3, "kv_channels": 8, "tensor_model_parallel_size": 2},
        2,
        ("num_query_groups (3)", "multiple or a divisor", "(2); choose"),
    ),
    ({"ffn_hidden_size": 130, "tensor_model_parallel_size": 4}, 4, ("ffn_hidden_size (130)", "(4); choose")),
    ({"sequence_parallel": True}, 1, ("sequence_parallel", "is 1; turn it off")),
    ({"pipeline_model_parallel_size": 3}, 3, ("num_layers (4)", "pipeline_model_parallel_size (3); choose")),
    (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
        2,
        ("num_layers (4)", "(2) x virtual chunks (4)"),
    ),
    ({"virtual_pipeline_model_parallel_size": 2}, 1, ("virtual_pipeline", "(1) >= 2; leave it out")),
    ({"context_parallel_size": 2, "seq_length": 101}, 2, ("seq_length (101)", "multiple of 4", "try 104")),
    ({"hidden_size": 66}, 1, ("hidden_size (66)", "num_attention_heads (4)", "kv_channels")),
    ({"num_query_groups": 3}, 1, ("num_attention_heads (4)", "num_query_groups (3); choose")),
    ({"attention_dropout": 0.1}, 1, ("attention_dropout must be 0, it is 0.1", "remove it")),
    ({"hidden_dropout": 0.1}, 1, ("hidden_dropout must be 0",)),
    ({"max_position_embeddings": 64}, 1, ("max_position_embeddings (64)", "seq_length (128); raise")),
    ({"transformer_impl": "transformer_engine", "device": "cpu"}, 1, ("needs CUDA", "use local or auto")),
    ({"fp8_format": "e4m3", "bf16": True}, 1, ("fp8_recipe is not; choose tensorwise",)),
    ({"fp8_format": "e4m3", "fp8_recipe": "tensorwise"}, 1, ("fp8_format needs bf16",)),
    (
        {"fp8_format": "e4m3", "fp8_recipe": "tensorwise", "bf16": True, "transformer_impl": "local"},
        1,
        ("needs Transformer Engine", "is 'local'; use"),
    ),
    ({"fp8_recipe": "mxfp8"}, 1, ("fp8_recipe (mxfp8)", "fp8_format is not; add")),
    ({"recompute_granularity": "full"}, 1, ("needs recompute_method", "needs recompute_num_layers")),
    ({"recompute_method": "block"}, 1, ("recompute_method acts only", "which is none; remove")),
    ({"recompute_granularity": "selective", "recompute_num_layers": 1}, 1, ("which is selective; remove",)),
    ({"objective": "mpo", "label_smoothing": 0.1}, 1, ("'mpo' does not use option 'label_smoothing'", "Remove")),
    ({"label_smoothing": 0.5}, 1, ("label_smoothing must be in [0, 0.5)", "0.5")),
    ({"reference": "none", "reference_logprobs": None}, 1, ("'all_pairs' compares", "is 'none'; use cached")),
    ({"objective": "sft", "reference_logprobs": None}, 1, ("'sft' reads no reference", "set it to none")),
    ({"reference_logprobs": None}, 1, ("reference_logprobs", "give its path")),
    (
        {"objective": "simpo_pairs", "reference": "none", "reference_logprobs": None},
        1,
        ("'simpo_pairs'", "set score_average to true"),
    ),
    (
        {"objective": "sft", "reference": "none", "reference_logprobs": None, "nll_coeff": 0.0},
        1,
        ("'sft' is the NLL alone", "set nll_coeff to 1"),
    ),
    ({"micro_batch_size": None}, 1, ("exactly one of micro_batch_size (not given)",)),
    (
        {"max_tokens_per_microbatch": 99, "micro_batch_size": None, "seq_length": 100},
        1,
        ("max_tokens_per_microbatch (99)", "seq_length (100)"),
    ),
    (
        {"sequence_parallel": True, "tensor_model_parallel_size": 2, "seq_length": 101},
        2,
        ("seq_length (101)", "try 102"),
    ),
    ({"data_weights": (1.0, 2.0)}, 1, ("data_weights has 2", "data_path 1")),
    ({"data_path": ("0.3", "a")}, 1, ("'0.3'", "data_weights")),
    ({"max_tokens_per_microbatch": 512}, 1, ("exactly one of micro_batch_size (2)", "(512)")),
    ({"train_samples": 10}, 1, ("exactly one of train_iters (100) and train_samples (10)",)),
    ({"train_iters": None}, 1, ("exactly one of train_iters (not given)",)),
    ({"train_iters": None, "train_samples": 7}, 1, ("train_samples (7)", "global_batch_size (8)")),
    ({"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}, 1, ("exclude each other; remove one",)),
    ({"lr_warmup_iters": 100}, 1, ("warm-up (100 iterations)", "the run (100); try lr_warmup_iters 10")),
    ({"lr_warmup_iters": 60, "lr_decay_iters": 50}, 1, ("warm-up (60", "the decay (50)")),
    ({"lr_warmup_fraction": 1.0}, 1, ("warm-up (100",)),
    ({"min_lr": 1e-3}, 1, ("min_lr (0.001) must be <= lr (0.0001); lower it",)),
    ({"optimizer": "sgd", "use_distributed_optimizer": True}, 1, ("runs Adam", "use adam, or turn it off")),
    ({"data_path": ()}, 1, ("data_path must name at least one",)),
    (
        {"valid_data_path": ("v",), "valid_fraction": 0.1, "eval_interval": 5},
        1,
        ("valid_data_path and valid_fraction (0.1) exclude",),
    ),
    ({"valid_fraction": 0.1}, 1, ("eval_interval is not; set",)),
    ({"eval_interval": 10}, 1, ("eval_interval (10) needs valid_data_path or valid_fraction",)),
    ({"eval_iters": 5}, 1, ("eval_iters (5) would act on nothing: eval_interval is not set",)),
    (
        {"tokenizer_type": "HuggingFaceTokenizer"},
        1,
        ("tokenizer_type (HuggingFaceTokenizer) would act on nothing: tokenizer_model is not set",),
    ),
    ({"save_interval": 10}, 1, ("save_interval (10) needs save",)),
    ({"finetune": True}, 1, ("finetune acts on load", "or remove finetune")),
    ({"no_load_optim": True}, 1, ("no_load_optim acts on load",)),
    ({"exit_on_missing_checkpoint": True}, 1, ("exit_on_missing_checkpoint acts on load",)),
    ({"rotary_base": 500000}, 1, ("rotary_base (500000) would act on nothing", "not rope; remove it")),
    ({"rope_scaling_factor": 2.0}, 1, ("rope_scaling_factor (2.0) would act on nothing", "no rope_scaling_type")),
    (
        {"position_embedding_type": "rope", "rope_scaling_type": "linear", "rope_scaling_beta_slow": 2.0},
        1,
        ("rope_scaling_beta_slow (2.0) would act on nothing", "not yarn"),
    ),
    (
        {"position_embedding_type": "rope", "rope_scaling_type": "llama3", "rope_scaling_low_freq_factor": 4.0},
        1,
        ("rope_scaling_low_freq_factor (4) must be < rope_scaling_high_freq_factor (4)",),
    ),
    (
        {"position_embedding_type": "rope", "rope_scaling_type": "yarn", "rotary_percent": 0.5},
        1,
        ("'yarn' is built for rotary_percent 1, it is 0.5",),
    ),
    (
        {"position_embedding_type": "rope", "rotary_base_local": 500},
        1,
        ("rotary_base_local (500) would act on nothing", "no window_size"),
    ),
    ({"rope_scaling_type": "yarn"}, 1, ("rope_scaling_type (yarn) would act on nothing", "not rope")),
    (
        {"qk_layernorm_across_heads": True, "normalization": "RMSNorm"},
        1,
        ("would act on nothing: qk_layernorm is off",),
    ),
    ({"qk_layernorm": True, "qk_layernorm_across_heads": True}, 1, ("needs normalization RMSNorm, it is LayerNorm",)),
    ({"gated_linear_unit": True, "swiglu": True}, 1, ("gated_linear_unit (True) would act on nothing",)),
    ({"window_attn_skip_freq": (2,)}, 1, ("window_attn_skip_freq ((2,)) would act on nothing", "no window_size")),
    ({"window_size": (3,)}, 1, ("window_size (3) must be", "give W - 1 and 0")),
    ({"window_size": (3, 1)}, 1, ("window_size (3 1)", "to the right, 0")),
    ({"window_size": (3, 0), "window_attn_skip_freq": (1,)}, 1, ("window_attn_skip_freq (1) must be >= 2",)),
    ({"window_size": (3, 0), "window_attn_skip_freq": (1, 0, 1)}, 1, ("(1 0 1) must be one number, or num_layers",)),
    ({"activation": "relu", "swiglu": True}, 1, ("activation (relu) would act on nothing: swiglu",)),
    ({"adam_beta2": 0.9, "optimizer": "sgd"}, 1, ("adam_beta2 (0.9) would act on nothing",)),
    ({"sgd_momentum": 0.5}, 1, ("sgd_momentum (0.5) would act on nothing",)),
    ({"min_lr": 1e-5, "lr_decay_style": "constant"}, 1, ("min_lr (1e-05) would act on nothing",)),
    ({"nll_coeff": 0.0, "one_sided_nll": True}, 1, ("one_sided_nll (True) would act on nothing",)),
    ({"objective": "sft", "reference": "none", "reference_logprobs": None, "beta": 2.0}, 1, ("beta (2.0) would",)),
    (
        {"objective": "simpo_pairs", "reference": "none", "score_average": True},
        1,
        ("reference_logprobs (reference) would act on nothing",),
    ),
    ({"objective": "nca", "score_drift_threshold": 1.0}, 1, ("score_drift_threshold (1.0) would act on nothing",)),
    # Types and ranges hold for a configuration made in Python too.
    ({"num_layers": 0}, 1, ("'num_layers' in 'model' must be >= 1; it is 0",)),
    ({"lr": "fast"}, 1, ("'lr' in 'optimizer' must be a finite number",)),
    ({"objective": "all_pair"}, 1, ("did you mean 'all_pairs'?",)),
    ({"valid_fraction": 1.0}, 1, ("'valid_fraction' in 'data' must be < 1; it is 1.0",)),
]


def name_of(case) -> str:
    return "-".join(map(str, case[0])) or "unchanged"


@pytest.mark.parametrize(("changes", "world_size"), ACCEPTED, ids=map(name_of, ACCEPTED))
def test_sound_configurations_pass(changes, world_size):
    validate(example(**changes), world_size)


@pytest.mark.acts("ModelConfig.attention_dropout", "ModelConfig.hidden_dropout", refused=True)
@pytest.mark.parametrize(("changes", "world_size", "fragments"), REFUSED, ids=map(name_of, REFUSED))
def test_contradictions_are_refused(changes, world_size, fragments):
    with pytest.raises(ConfigError) as refusal:
        validate(example(**changes), world_size)
    assert re.search("(?s)" + ".*".join(map(re.escape, fragments)), str(refusal.value)), str(refusal.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match="2 problems") as refusal:
        validate(example(hidden_dropout=0.5, save_interval=3), 1)
    assert len(str(refusal.value).splitlines()) == 3


def test_derived_lengths():
    config = example(train_iters=None, train_samples=103, lr_warmup_fraction=0.25)
    assert train_iters(config) == 12, "whole global batches of 8"
    assert lr_decay_iters(config) == 12
    assert lr_warmup_iters(config) == 3
    assert lr_decay_iters(example(lr_decay_iters=50)) == 50
    layout = example(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert data_parallel_size(layout, 12) == 3
