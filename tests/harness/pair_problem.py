"""One small preference problem that this package and TRL's ``DPOTrainer`` are both given, made from names and seeds.

Two models of different families with a reference each, a tokenizer whose tokens are words, and pairs of texts; TRL is
not needed here. ``benchmarks/trl_parity.py`` runs TRL on it and writes ``tests/golden/trl_dpo.json``, with which
``test_trl_golden.py`` compares the package.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layout_case import VOCAB_SIZE

BETA = 0.3
NLL_COEFF = 0.7
LABEL_SMOOTHING = 0.2
NUM_PAIRS = 6
SEQ_LENGTH = 32
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"

MODELS = ("llama", "gpt2")


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Texts; the responses start with a space, so that no word crosses the border to the prompt."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One loss, in TRL's words and in ours."""

    name: str
    trl: tuple[tuple[float, Mapping[str, Any]], ...]
    """TRL's runs: a factor and arguments of DPOConfig. Loss and gradient are the sum of the runs' times the factors."""
    ours: Mapping[str, Any]
    """Loss options that differ from :data:`LOSS`."""
    pairs_per_batch: int = NUM_PAIRS
    """TRL's batch; the rest of the step's pairs is accumulated."""
    same: tuple[str, ...] = ()
    """Objectives that must give the same numbers at one positive and one negative."""
    models: tuple[str, ...] = MODELS
    note: str = "equal"
    """What the numbers say about the two."""

    def losses(self) -> list[dict[str, Any]]:
        """Loss options of every objective that must give the numbers."""
        return [dict(self.ours), *({**self.ours, "objective": objective} for objective in self.same)]


LOSS: dict[str, Any] = {
    "objective": "dpo",
    "beta": BETA,
    "score_average": False,
    "nll_coeff": 0.0,
    "nll_average": "response",
    "one_sided_nll": False,
}


def _variant(name: str, loss_type: list[str], ours: Mapping[str, Any], **fields: Any) -> Variant:
    trl: dict[str, Any] = {"loss_type": loss_type}
    if len(loss_type) > 1:
        trl["loss_weights"] = [1.0, NLL_COEFF]
    if loss_type == ["aot"]:
        trl["label_smoothing"] = LABEL_SMOOTHING
    return Variant(name=name, trl=((1.0, trl),), ours=ours, **fields)


MEAN = {"score_average": True}
SMOOTHED = {"hyperparameters": {"label_smoothing": LABEL_SMOOTHING}}
BATCH_NLL = {"nll_coeff": NLL_COEFF, "nll_average": "batch-tokens"}

VARIANTS: tuple[Variant, ...] = (
    _variant("sum", ["sigmoid"], {}, same=("all_pairs", "mpo", "softmax", "margin", "plackett_luce")),
    _variant("mean", ["sigmoid_norm"], MEAN, same=("all_pairs", "mpo", "softmax", "margin", "plackett_luce")),
    _variant("sum + sft", ["sigmoid", "sft"], BATCH_NLL),
    _variant("mean + sft", ["sigmoid_norm", "sft"], MEAN | BATCH_NLL),
    _variant(
        "sum + sft, one pair a batch",
        ["sigmoid", "sft"],
        {"nll_coeff": NLL_COEFF, "nll_average": "response"},
        pairs_per_batch=1,
        models=("llama",),
        note="TRL's sft term depends on its batch: with one pair it is nll_average response",
    ),
    _variant(
        "ipo",
        ["ipo"],
        MEAN | {"objective": "ipo_pairs", "hyperparameters": {"beta": BETA}},
        models=("llama",),
        note="equal; TRL's ipo averages over tokens",
    ),
    # aot sorts the pairs of a batch, which is nothing to do with one, and smooths labels as conservative DPO does.
    _variant(
        "label smoothing, aot with one pair a batch",
        ["aot"],
        SMOOTHED,
        pairs_per_batch=1,
        models=("llama",),
        note="equal; aot smooths as conservative DPO does",
    ),
    # robust is the unbiased estimate: L_robust = L_0 - (L_smoothed - L_0) / (1 - 2e), L_0 the plain loss.
    Variant(
        name="label smoothing, from sigmoid and robust",
        trl=(
            (2 - 2 * LABEL_SMOOTHING, {"loss_type": ["sigmoid"]}),
            (-(1 - 2 * LABEL_SMOOTHING), {"loss_type": ["robust"], "label_smoothing": LABEL_SMOOTHING}),
        ),
        ours=SMOOTHED,
        models=("llama",),
        note="not equal to robust: L_robust = L_0 - (L_smoothed - L_0) / (1 - 2e), checked",
    ),
    _variant("bco_pair", ["bco_pair"], {"objective": "group_bce"}, models=("llama",)),
    # q = softmax(values / value_temperature) is (1, 0) to the last bit.
    _variant(
        "nca_pair",
        ["nca_pair"],
        {"objective": "nca", "hyperparameters": {"value_temperature": 1e-3}},
        models=("llama",),
    ),
)


def problem_settings() -> dict[str, Any]:
    """What the numbers depend on beside weights and tokens."""
    variants = [{"name": v.name, "trl": v.trl, "pairs_per_batch": v.pairs_per_batch} for v in VARIANTS]
    return json.loads(json.dumps({"beta": BETA, "variants": variants}))  # as a file gives it back


def make_pairs() -> list[PreferencePair]:
    """Prompts of 1 to 9 words, responses of 1 to 12, all ragged."""
    draw = np.random.default_rng(11)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{token}" for token in draw.integers(3, VOCAB_SIZE, size=draw.integers(low, high + 1)))

    return [
        PreferencePair(prompt=words(1, 9), chosen=" " + words(1, 12), rejected=" " + words(1, 12))
        for _ in range(NUM_PAIRS)
    ]


def write_texts(path: Path) -> None:
    """The pairs in this package's form; the rejected response comes first in every other record."""
    with path.open("w", encoding="utf-8") as stream:
        for index, pair in enumerate(make_pairs()):
            responses = [
                {"text": pair.chosen, "label": 1, "score": 1.0},
                {"text": pair.rejected, "label": -1, "score": 0.0},
            ]
            record = {"prompt": pair.prompt, "responses": responses[:: -1 if index % 2 else 1]}
            stream.write(json.dumps(record) + "\n")


def write_tokenizer(folder: Path) -> None:
    """A Hugging Face tokenizer with one token per word, and no merges to go wrong."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {PAD: 0, EOS: 1, UNKNOWN: 2} | {f"w{token}": token for token in range(3, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN
    ).save_pretrained(str(folder))


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


_CONFIGS: dict[str, Callable[[], Any]] = {"llama": _llama, "gpt2": _gpt2}


def write_model(folder: Path, model: str, *, reference: bool) -> None:
    """A Hugging Face folder in fp32; the reference is the policy with every weight moved a little."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(_CONFIGS[model](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            weight = _uniform(name, parameter.shape, 1.0 if "embed" in name or "wte" in name else 0.3)
            if reference:
                weight = weight + _uniform(f"reference {name}", parameter.shape, 0.05)
            if parameter.dim() == 1 and name.endswith("weight"):
                weight = weight + 1.0
            parameter.copy_(torch.from_numpy(weight.astype(np.float32)))
    made.save_pretrained(str(folder))


def _uniform(name: str, shape: Sequence[int], width: float) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).uniform(-width, width, size=tuple(shape))


@dataclass(frozen=True, kw_only=True)
class ProblemFiles:
    """Everything on disk."""

    root: Path
    store: Path
    tokenizer: Path

    def model(self, model: str, *, reference: bool) -> Path:
        """The Hugging Face folder of a model."""
        return self.root / (f"{model}-reference" if reference else model)


def write_problem(root: Path) -> ProblemFiles:
    """Models, tokenizer, texts, and the token store that the package makes of the texts."""
    from megatron_groupdpo.data.preprocess.pipeline import preprocess
    from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
    from megatron_groupdpo.data.text.tokenize import TokenizeOptions
    from megatron_groupdpo.data.text.tokenizer import TokenizerOptions

    files = ProblemFiles(root=root, store=root / "store", tokenizer=root / "tokenizer")
    for model in MODELS:
        for reference in (False, True):
            write_model(files.model(model, reference=reference), model, reference=reference)
    write_tokenizer(files.tokenizer)
    write_texts(root / "pairs.jsonl")
    options = PreprocessOptions(
        tokenizer=TokenizerOptions(kind="HuggingFaceTokenizer", model=str(files.tokenizer)),
        tokenize=TokenizeOptions(seq_length=SEQ_LENGTH),
    )
    preprocess([str(root / "pairs.jsonl")], files.store, options)
    return files


def token_rows(store: Path) -> list[dict[str, list[int]]]:
    """The store's pairs, named as TRL names them after tokenization."""
    from megatron_groupdpo.data.store.reader import TokenStore

    rows = []
    opened = TokenStore.open(store)
    for group in (opened[index] for index in range(len(opened))):
        chosen, rejected = (int(np.flatnonzero(group.labels_K == label)[0]) for label in (1, -1))
        rows.append(
            {
                "prompt_ids": group.prompt_tokens.tolist(),
                "chosen_ids": group.response_tokens[chosen].tolist(),
                "rejected_ids": group.response_tokens[rejected].tolist(),
            }
        )
    return rows


def checksums(files: ProblemFiles) -> dict[str, str]:
    """SHA-256 of the weights and of the tokens: what tells a changed generator from a wrong result."""
    from safetensors.torch import load_file

    sums = {"tokens": hashlib.sha256(json.dumps(token_rows(files.store)).encode()).hexdigest()}
    for model in MODELS:
        for reference in (False, True):
            folder = files.model(model, reference=reference)
            digest = hashlib.sha256()
            for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
                digest.update(name.encode() + tensor.numpy().astype("<f4").tobytes())
            sums[folder.name] = digest.hexdigest()
    return sums
