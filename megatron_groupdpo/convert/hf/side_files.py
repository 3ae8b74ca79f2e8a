"""generation_config.json and tokenizer_config.json beside a model: a mistyped field is refused.

Neither changes what is trained, and ``transformers`` ignores names it does not know; but a mistyped one means something
that would then not happen when text is generated or read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_groupdpo.errors import ConfigError

_OLD_GENERATION = ("_commit_hash", "return_legacy_cache")
"""Fields that transformers 4 wrote."""
_TOKENIZER = (
    "tokenizer_class", "auto_map", "chat_template", "chat_control_tokens", "response_schema", "model_max_length",
    "max_length", "padding_side", "truncation_side", "truncation_strategy", "padding", "pad_to_multiple_of", "stride",
    "pad_token_type_id", "model_input_names", "added_tokens_decoder", "additional_special_tokens",
    "extra_special_tokens", "model_specific_special_tokens", "split_special_tokens", "clean_up_tokenization_spaces",
    "add_bos_token", "add_eos_token", "add_prefix_space", "add_dummy_prefix_space", "trim_offsets", "errors", "legacy",
    "use_default_system_prompt", "spaces_between_special_tokens", "sp_model_kwargs", "do_lower_case", "from_slow",
    "use_fast", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file", "backend",
    "is_local", "local_files_only", "processor_class", "image_token", "boi_token", "eoi_token", "extra_ids",
    *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
    *(f"{name}_token_id" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
)  # fmt: skip
_NEAR = 0.85
"""How alike two names are of which one is the other, mistyped."""


def check_generation_config(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a field that is a mistyped one of ``transformers``'.

    Raises:
        ConfigError: both names.
    """
    from transformers import GenerationConfig

    _refuse_mistyped(config, {*vars(GenerationConfig()), *_OLD_GENERATION}, file)


def check_tokenizer_config(config: Mapping[str, Any], file: Path) -> None:
    """The same of tokenizer_config.json."""
    _refuse_mistyped(config, _TOKENIZER, file)


def _refuse_mistyped(config: Mapping[str, Any], known: Iterable[str], file: Path) -> None:
    names = sorted(known)
    for name in config.keys() - set(names):
        if close := difflib.get_close_matches(name.casefold(), names, n=1, cutoff=_NEAR):
            raise ConfigError(f"{file}: {name} is not a field that transformers reads; did you mean {close[0]!r}?")
