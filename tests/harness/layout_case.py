"""What a parity test varies, as plain values that travel to the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB_SIZE = 61
SEQ_LENGTH = 24

_SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
    "vocab_size": VOCAB_SIZE,  # not a multiple of 8: the vocabulary is padded, and differently under TP
    "make_vocab_size_divisible_by": 8,
    "max_position_embeddings": 32,
}
_LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "num_query_groups": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES | _LLAMA,
    "llama-untied": _SIZES | _LLAMA | {"untie_embeddings_and_output_weights": True},
    "mixture": _SIZES
    | _LLAMA
    | {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "moe_layer_freq": (1, 0, 0, 1),  # one layer of each kind in both stages of a pipeline of two
        "moe_router_pre_softmax": True,
    },
    "gpt": _SIZES | {"activation": "gelu", "position_embedding_type": "learned_absolute"},
}
"""Keyword arguments of the model configuration."""
DENSE = tuple(name for name in MODELS if name != "mixture")


@dataclass(frozen=True, kw_only=True)
class LayoutCase:
    """One run of the package: a model, a layout, a loss. Unset options keep the package's defaults."""

    num_ranks: int = 1
    model: str = "llama"
    parallel: Mapping[str, Any] = field(default_factory=dict)
    precision: Mapping[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 2
    max_tokens_per_microbatch: int | None = None
    """Packed, instead of ``micro_batch_size`` padded responses."""
    coupled: bool = False
    """One graph a group instead of the two passes."""
    loss: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the loss options that differ from :data:`LOSS`."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the optimizer options; without them no update is made."""
    num_steps: int = 1
    num_groups: int = 6

    @property
    def loss_options(self) -> dict[str, Any]:
        """All keyword arguments of the loss options."""
        options = LOSS | dict(self.loss)
        if options["objective"] == "ipo_pairs":  # its loss is in log-ratios, and the scores are beta times those
            options["hyperparameters"] = {"beta": options["beta"]}
        if options["objective"] == "simpo_pairs":
            options["score_average"] = True
        return options

    @property
    def reference_free(self) -> bool:
        """Whether scores are log-probabilities, not log-ratios."""
        return self.loss_options["objective"] == "simpo_pairs"


LOSS: dict[str, Any] = {
    "objective": "all_pairs",
    "beta": 0.5,
    "score_average": False,
    "nll_coeff": 0.3,
    "nll_average": "response",
    "one_sided_nll": False,
}
