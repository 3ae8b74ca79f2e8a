"""TRL's DPOTrainer at N = 2, and the package on pairs of the same lengths and a model of the same shape.

Both have the reference's log-probabilities at hand and random weights. TRL is used as its examples use it: bf16
weights, torch's AdamW on them; the package keeps float32 master weights, gradients and moments, so it holds more per
parameter. Neither recomputes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_context import Context
from gpu_step import PROMPT_SHARE, Setting, attempt, benches, clear, model_of

from megatron_groupdpo.run.loop import peak_memory_bytes

PAIRS = 8


def measure_trl(context: Context) -> Iterator[dict[str, Any]]:
    """A point for TRL, two for the package: two passes, and one graph, which is what TRL does."""
    length, pairs = context.pick(2048, 32), context.pick(PAIRS, 2)
    given = {"shape": "1b", "precision": "bf16", "group_size": 2, "length": length}
    yield attempt({"what": "TRL"} | given, lambda: _trl(context, length, pairs))
    clear()
    with benches({"": Setting(shape="1b")}, context) as built:
        for _, bench, refused in built:
            if bench is None:
                yield {"what": "package"} | given | refused
                continue
            for mode in ("decoupled", "coupled"):
                work = _ours(bench, mode, length, pairs)
                yield attempt({"what": f"package, {mode}"} | given, work)


def _ours(bench: Any, mode: Any, length: int, pairs: int) -> Any:
    return lambda: bench.measure(mode, length=length, group_size=2, num_groups=pairs)


def _trl(context: Context, length: int, pairs: int) -> dict[str, Any]:
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        """Time of every step, the device waited for."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def _now(self) -> None:
            if torch.cuda.is_available() and context.device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not self.times:
                self._now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self._now()

    warm_ups, steps = context.pick((2, 4), (1, 1))
    model, num_words = _model(context)
    tokenizer = _tokenizer(num_words)
    clock = Clock()
    on_cpu = context.device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=str(Path(folder)),
            beta=0.1,
            max_length=length,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=pairs,
            max_steps=warm_ups + steps,
            learning_rate=1e-6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=on_cpu,
            bf16=not on_cpu,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            logging_steps=1000,
        )
        trainer = DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=_pairs(length, pairs * (warm_ups + steps), num_words),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        rows = [len(list(row["prompt_ids"])) + len(list(row["chosen_ids"])) for row in trainer.train_dataset]
        if torch.cuda.is_available() and not on_cpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = float(np.median(np.diff(clock.times)[warm_ups:]))
    tokens = 2 * pairs * max(rows)
    return {
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "longest_row": max(rows),
        "num_responses": 2 * pairs,
        "peak_bytes": peak_memory_bytes(torch.device(context.device)),
    }


def _model(context: Context) -> tuple[Any, int]:
    """The package's 1B shape as a transformers model, and its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = model_of(Setting(shape="1b"), context)
    assert shape.vocab_size is not None
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=not shape.untie_embeddings_and_output_weights,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(1)
    with torch.device(context.device):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16 if context.device == "cuda" else torch.float32), shape.vocab_size


def _tokenizer(num_words: int) -> Any:
    """A word a token: lengths in words are lengths in tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, num_words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )


def _pairs(length: int, count: int, num_words: int) -> Any:
    from datasets import Dataset

    draw = np.random.default_rng(0)
    prompt = max(2, length // PROMPT_SHARE)

    def text(num: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(3, num_words, size=num))

    # The end token is TRL's to add.
    rest = length - prompt - 1
    return Dataset.from_list(
        [{"prompt": text(prompt), "chosen": " " + text(rest), "rejected": " " + text(rest)} for _ in range(count)]
    )
