"""Writes ``fields.jsonl``: for every field that a test is marked for, the patch that undoes it, and that test.

A field is undone by freezing it: whoever reads it gets one value, its default where it has one. The patch is a
decorator over the class, so that it also holds on ranks and in worker processes. Run it when a mark or a class changed.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))
from test_options import PATCHES, configuration_fields, marks, without_a_patch  # noqa: E402

FROZEN_AT: dict[str, str] = {
    "DataConfig.seq_length": "64",
    "IpoPairsHyperparameters.beta": "1.0",
    "LossOptions.beta": "0.1",
    "LossOptions.nll_average": "'response'",
    "LossOptions.nll_coeff": "1.0",
    "LossOptions.objective": "'all_pairs'",
    "LossOptions.one_sided_nll": "False",
    "LossOptions.score_average": "False",
    "ModelConfig.hidden_size": "32",
    "ModelConfig.num_attention_heads": "3",
    "ModelConfig.num_layers": "3",
    "ModelConfig.vocab_size": "100",
    "ObjectiveConfig.reference_logprobs": "None",
    "OptimizerConfig.lr": "1e-3",
    "PlanOptions.data_parallel_size": "2",
    "SamplingOptions.max_new_tokens": "5",
    "TokenizeOptions.seq_length": "64",
    "TokenizerOptions.kind": "'SentencePieceTokenizer'",
    "TokenizerOptions.model": "'absent'",
    "TrainingConfig.global_batch_size": "3",
    "TrainingConfig.micro_batch_size": "3",
}
"""Values, as source, for fields without a default, or whose tests use it."""
_HF = "tests/unit/convert/test_conversion.py::test_log_probs_of_every_token_equal_those_of_transformers"
_FAMILIES = {
    "llama-tied": "num_layers hidden_size num_attention_heads ffn_hidden_size num_query_groups kv_channels "
    "position_embedding_type rotary_base normalization norm_epsilon swiglu add_bias_linear vocab_size",
    "llama-untied": "untie_embeddings_and_output_weights",
    "llama-linear": "rope_scaling_type rope_scaling_factor",
    "llama3-scaled": "rope_scaling_original_length rope_scaling_low_freq_factor rope_scaling_high_freq_factor",
    "qwen2-tied": "add_qkv_bias",
    "qwen3": "qk_layernorm rope_scaling_beta_fast rope_scaling_beta_slow rope_scaling_attention_factor",
    "qwen3-windows": "window_attn_skip_freq",
    "mistral": "window_size",
    "olmo2": "norm_position qk_layernorm_across_heads",
    "gemma3": "rotary_base_local apply_layernorm_1p gated_linear_unit softmax_scale scale_embeddings",
    "mixtral": "num_moe_experts",
    "qwen3-moe": "moe_ffn_hidden_size moe_router_topk moe_layer_freq",
    "olmoe": "moe_router_pre_softmax",
    "gpt2": "max_position_embeddings",
    "gpt2-untied-relu": "activation",
}
SEEN_BY: dict[str, str] = {
    f"ModelConfig.{field}": f"{_HF}[{name}]" for name, fields in _FAMILIES.items() for field in fields.split()
}
"""Of several marked tests or cases, the one to run; otherwise the first test by name."""


def patches() -> Iterator[dict[str, str]]:
    """One for each marked field."""
    known = {name: class_name for class_name, names in configuration_fields().items() for name in names}
    marked = marks()
    for field in sorted(marked.keys() - without_a_patch()):
        path, line, value = place_of(known[field], field.split(".")[1])
        yield {
            "field": field,
            "file": str(path.relative_to(ROOT)),
            "old": line,
            "new": f"@{frozen(field.split('.')[1], FROZEN_AT.get(field, value))}\n{line}",
            "what": f"{field} is always {FROZEN_AT.get(field, value)}",
            "test": SEEN_BY.get(field, min(marked[field])),
        }


def place_of(class_name: str, field: str) -> tuple[Path, str, str]:
    """File, the decorator and the head of the class as written, and the field's default as source."""
    for path in sorted((ROOT / "megatron_groupdpo").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name == class_name and node.decorator_list:
                first = node.decorator_list[0].lineno
                head = "\n".join(text.splitlines()[first - 1 : node.lineno])
                return path, head, default_of(node, field)
    raise AssertionError(f"no class {class_name}")


def default_of(node: ast.ClassDef, field: str) -> str:
    """As source; of ``field(default=...)`` what it holds, of a factory what it makes."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == field:
            match item.value:
                case ast.Call(func=ast.Name(id="field"), keywords=keywords):
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
                    return given.get("default") or f"{given['default_factory']}()"
                case ast.Call(func=ast.Name(id="hyperparameter")) | None:
                    return "None"
                case value:
                    return ast.unparse(value)
    raise AssertionError(f"no field {field}")


def frozen(field: str, value: str) -> str:
    """A decorator, as an expression, that gives every instance ``value`` whatever it was made with."""
    descriptor = (
        f'type("Frozen", (), {{"__get__": lambda s, o, c=None: s if o is None else {value}, '
        f'"__set__": lambda s, o, v: None}})()'
    )
    return f'(lambda cls: setattr(cls, "{field}", {descriptor}) or cls)'


if __name__ == "__main__":
    PATCHES.write_text("".join(json.dumps(patch) + "\n" for patch in patches()), encoding="utf-8")
    print(f"{PATCHES}: {len(PATCHES.read_text().splitlines())} patches")
