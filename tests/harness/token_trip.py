"""The files of the package that a response passes, from its record to the gradient, seen while they run.

A function *has* the response while an argument or a local variable of it is the response's text, holds its token ids
in their order, or is a tensor computed from them; a file is *on the way* when a function of it gives such a thing
back. What is computed from the ids is known of memory: every operation on marked memory marks its results, first
hidden states, then log-probabilities, scores and gradients.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import tiny_run
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_groupdpo import errors

PACKAGE = str(Path(errors.__file__).parent)
TEXT = "zebra 4711 quagga"
"""No other text holds it, and its ids are those of no other."""
NUM_GROUPS = 3
LAST = ("step/train_step.py", "accumulate_gradient")
"""When this has returned, the gradient is there."""
_DEPTH = 5
"""A list of batches of microbatches of tensors."""


class Trip(TorchDispatchMode):
    """Follows the response of the token ids given from ``with Trip(ids)`` to the gradient."""

    def __init__(self, ids: Iterable[int]) -> None:
        super().__init__()
        self._ids = np.array(list(ids))
        self.having: dict[str, None] = {}
        """Files that had it, in the order in which they first did."""
        self.giving: set[str] = set()
        """Those that gave it back."""
        self._marked: dict[int, Any] = {}  # storages, kept alive: no other tensor gets their place

    def __enter__(self) -> Any:
        entered = super().__enter__()
        sys.setprofile(self._event)
        return entered

    def __exit__(self, *problem: Any) -> None:
        sys.setprofile(None)
        super().__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(self._is_marked(tensor) for tensor in _tensors((args, kwargs or {}))):
            for tensor in _tensors(result):
                self._mark(tensor)
        return result

    def _event(self, frame: FrameType, event: str, returned: Any) -> None:
        path = frame.f_code.co_filename
        if event not in ("call", "return") or not path.startswith(PACKAGE):
            return
        name, function = path[len(PACKAGE) + 1 :], frame.f_code.co_name
        sys.setprofile(None)  # what looks is not looked at
        if name not in self.giving:
            gives = event == "return" and function != "<genexpr>" and self._has(returned)
            if gives or any(self._has(value) for key, value in frame.f_locals.items() if key != "self"):
                self.having.setdefault(name)
            if gives:
                self.giving.add(name)
        if event == "call" or (name, function) != LAST:
            sys.setprofile(self._event)

    def _has(self, value: Any, depth: int = 0) -> bool:
        if isinstance(value, str):
            return TEXT in value
        if isinstance(value, bytes):
            return TEXT.encode() in value
        if isinstance(value, torch.Tensor):
            if not self._is_marked(value) and not value.is_floating_point() and self._holds(value.numpy()):
                self._mark(value)
            return self._is_marked(value)
        if isinstance(value, np.ndarray):
            return self._holds(value)
        if depth == _DEPTH:
            return False
        if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
            return self._holds(np.array(value))
        return any(self._has(part, depth + 1) for part in _parts(value))

    def _holds(self, numbers: np.ndarray) -> bool:
        if numbers.dtype.kind not in "iu" or numbers.size < len(self._ids):
            return False
        windows = np.lib.stride_tricks.sliding_window_view(numbers.reshape(-1), len(self._ids))
        return bool((windows == self._ids).all(axis=1).any())

    def _is_marked(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._marked

    def _mark(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._marked[storage._cdata] = storage


def _parts(value: Any) -> Iterator[Any]:
    """What a container holds; other objects are places at rest, such as a store, and do not carry anything on."""
    if isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, Mapping):
        yield from value.values()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name, None) for field in dataclasses.fields(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in _parts(value):
            yield from _tensors(part)


def _write_groups(path: Path) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for i in range(NUM_GROUPS):
            right = {"text": TEXT if i == 0 else f"{i} + {i}", "label": 1}
            wrong = [{"text": f"maybe {3 * i + k}", "label": -1} for k in range(2)]
            stream.write(json.dumps({"prompt": f"What is {i} plus {2 * i}?", "responses": [right, *wrong]}) + "\n")


def follow(folder: Path) -> tuple[list[str], list[str]]:
    """On one rank: preprocess records and train. The files on the way, in order, and those that only had a look."""
    from megatron_groupdpo.config import load_config, validate
    from megatron_groupdpo.data.preprocess.pipeline import preprocess
    from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
    from megatron_groupdpo.data.store.reader import TokenStore
    from megatron_groupdpo.data.text.tokenize import TokenizeOptions
    from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.run.build import build_run
    from megatron_groupdpo.run.loop import train

    groups, tokenizer, store, reference = (folder / name for name in ("groups.jsonl", "tok.model", "store", "ref"))
    _write_groups(groups)
    tiny_run.train_tokenizer(tokenizer)
    options = TokenizerOptions(kind="SentencePieceTokenizer", model=str(tokenizer))
    # Where the schema is found out, every schema has a look.
    prepared = PreprocessOptions(tokenizer=options, tokenize=TokenizeOptions(seq_length=64), schema="canonical")
    preprocess([str(groups)], folder / "before", prepared)
    ids = TokenStore.open(folder / "before")[0].response_tokens[0][:-1]  # without the end token, which comes late
    trip = Trip(ids.tolist())
    with trip:
        preprocess([str(groups)], store, prepared)
    tiny_run.write_reference(store, reference)
    config_file = tiny_run.write_config(
        folder / "run.yaml",
        store,
        reference,
        training={"global_batch_size": NUM_GROUPS, "train_iters": 1},
        optimizer={"lr_warmup_iters": 0},
    )
    config = load_config(["--config", str(config_file)])
    ranks = initialize(config.parallel, seed=config.training.seed)
    try:
        validate(config, 1)
        run = build_run(config, ranks)
        with trip:
            train(run)
    finally:
        shut_down()
    return [name for name in trip.having if name in trip.giving], [n for n in trip.having if n not in trip.giving]


if __name__ == "__main__":
    import os
    import tempfile

    from rank_pool import free_port, torchrun_environment

    os.environ.update(torchrun_environment(0, 1, free_port()))
    way, others = follow(Path(tempfile.mkdtemp()))
    print(*[f"{number}. {name}" for number, name in enumerate(way, 1)], sep="\n")
    print("only look:", *others, sep="\n- ")
