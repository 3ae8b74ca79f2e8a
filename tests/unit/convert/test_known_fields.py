"""A field of a model's files is read, known to change nothing, or refused with the nearest name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_examples import CONFIGS

from megatron_groupdpo.convert.families import FAMILIES, Family, family_of_config
from megatron_groupdpo.convert.families.base import HARMLESS, HEADER, NEUTRAL, check_wrapper_fields
from megatron_groupdpo.convert.hf import tokenizers
from megatron_groupdpo.convert.hf.model import model_of_config, open_hf_model
from megatron_groupdpo.convert.importing import ImportOptions, kept_of, prepare_import
from megatron_groupdpo.errors import ConfigError

OLD_COMMON = [
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "is_decoder", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "pad_token_id", "prefix", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k",
    "top_p", "torchscript", "typical_p", "use_bfloat16", "torch_dtype", "dtype", "_name_or_path",
    "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "transformers_version", "use_cache",
    "_attn_implementation", "_attn_implementation_autoset",
]  # fmt: skip
"""What ``to_dict`` of transformers 4.57.6 has in every family, and what older ones wrote beside it."""
OLD = {
    "mixtral": ["rope_theta", "num_local_experts"],
    "qwen3_moe": ["rope_theta", "rope_scaling", "num_experts"],
    "gemma3_text": ["rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"],
    "llama": ["rope_theta", "rope_scaling", "pretraining_tp"],
    "gpt2": ["n_ctx", "summary_type", "reorder_and_upcast_attn"],
}
EXAMPLES = {CONFIGS[name]().model_type: name for name in reversed(CONFIGS)}
PLAIN = [family.model_type for family in FAMILIES]


def known(family: Family) -> set[str]:
    return {*HEADER, *family.reads, *NEUTRAL, *HARMLESS, *family.harmless}


def config_of(model_type: str) -> dict[str, Any]:
    return json.loads(CONFIGS[EXAMPLES[model_type]]().to_json_string(use_diff=False))


@pytest.mark.parametrize("family", FAMILIES, ids=PLAIN)
def test_all_that_transformers_writes_is_known(family: Family):
    """By 5, in full, and by 4; a field that a later version adds is to be looked at here first."""
    written = config_of(family.model_type)
    old = {*OLD_COMMON, *OLD.get(family.model_type, ())}
    assert not (written.keys() | old) - known(family)
    neutral = {name: None for name in old - written.keys() if name not in ("num_experts", "num_local_experts")}
    assert model_of_config(family, written) == model_of_config(family, neutral | written)
    assert not family.harmless.keys() & {*family.reads, *HEADER}, "read, so not harmless"
    assert family.to_hf(model_of_config(family, written)).keys() <= known(family)
    assert all(reason.strip() for reason in {**HARMLESS, **family.harmless}.values())


@pytest.mark.parametrize(
    ("field", "value", "near"),
    [
        ("hiden_size", 64, "hidden_size"),
        ("vocabsize", 5, "vocab_size"),
        ("tie_word_embedding", True, "tie_word_embeddings"),
        ("rope_tetha", 5.0, "rope_theta"),
        ("rms_norm_epsilon", 0.5, "rms_norm_eps"),
        ("logits_scaling", 8.0, None),
        ("embedding_multiplier", 12.0, None),
        ("residual_multiplier", 0.2, None),
        ("attention_multiplier", 0.1, None),
        ("num_nextn_predict_layers", 1, None),
    ],
)
def test_an_unknown_field_is_refused_in_every_family(field: str, value: Any, near: str | None):
    for family in FAMILIES:
        config = config_of(family.model_type)
        if near in known(family) or near is None:
            hint = f"did you mean '{near}'" if near else ""
            with pytest.raises(ConfigError, match=f"{field} is {value!r}, a field that a {family.model_type}.*{hint}"):
                model_of_config(family, {**config, field: value})
        assert model_of_config(family, {**config, field: None}) == model_of_config(family, config), "it says nothing"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_encoder_decoder", True), ("add_cross_attention", True), ("pruned_heads", {"0": [1]}),
        ("final_logit_softcapping", 30.0), ("partial_rotary_factor", 0.5),
    ],
)  # fmt: skip
def test_a_field_that_would_change_the_model_is_refused_in_every_family(field: str, value: Any):
    for family in FAMILIES:
        with pytest.raises(ConfigError, match=field):
            model_of_config(family, {**config_of(family.model_type), field: value})


def test_a_wrappers_own_fields_are_looked_at_too():
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": {}}
    images = {"vision_config": {}, "boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3}
    family = family_of_config(config)
    check_wrapper_fields(family, {**config, **images, "mm_tokens_per_image": 256, "transformers_version": "4.50.0"})
    with pytest.raises(ConfigError, match=r"logits_scaling is 8.0, a field that a Gemma3ForConditionalGeneration"):
        check_wrapper_fields(family, {**config, "logits_scaling": 8.0})


def test_mistyped_generation_and_tokenizer_fields_are_refused(own_copy: Callable[[str], Path], tmp_path: Path):
    folder = own_copy("llama-tied")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 2, "return_legacy_cache": True, "chat_format": "chatml"}))
    kept_of(open_hf_model(folder))
    file.write_text(json.dumps({"eos_token_ids": [2, 3]}))
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_ids is not .*'eos_token_id'"):
        prepare_import(folder, tmp_path / "out", ImportOptions())
    file.unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_tokens": True}))
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: add_bos_tokens is not .*'add_bos_token'"):
        tokenizers.of_folder(folder)
