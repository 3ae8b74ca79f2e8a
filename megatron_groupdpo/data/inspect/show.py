"""A group as a person wants to read it: prompt, responses, and which tokens are trained on."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_groupdpo.data.inspect.inspection import num_characters
from megatron_groupdpo.data.text.tokenizer import Tokenizer
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import NEGATIVE, POSITIVE, GroupRecord, GroupSample, Text

if TYPE_CHECKING:  # opening a store imports Megatron, which takes seconds and records do not need
    from megatron_groupdpo.data.store.reader import TokenStore

TRAINED, CONTEXT = "┃ ", "· "
"""Marks before each line: the model is trained on it, or only reads it."""
_SIDES = {POSITIVE: "POSITIVE", NEGATIVE: "NEGATIVE"}
_COLOURS = {"POSITIVE": "\x1b[1;32m", "NEGATIVE": "\x1b[1;31m", "context": "\x1b[2m", "head": "\x1b[1m"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """How to write."""

    width: int = 100
    """Columns; lines are wrapped to them."""
    colour: bool = False
    tokens: bool = False
    """Write each token with its id instead of running text."""


def show_sample(sample: GroupSample, where: str, tokenizer: Tokenizer, screen: Screen) -> str:
    """A store's group as text for a terminal."""
    sizes = [len(tokens) for tokens in sample.response_tokens]
    lines = [_head(f"group {sample.group_id}", where, sample.labels_K.tolist(), screen)]
    lines.append(_paint(f"prompt: {len(sample.prompt_tokens):,} tokens", "head", screen))
    lines += _run(sample.prompt_tokens, False, tokenizer, screen)
    values = sample.values_K.tolist()
    for k, (tokens, mask) in enumerate(zip(sample.response_tokens, sample.response_masks)):
        trained = sizes[k] if mask is None else int(mask.sum())
        length = f"{sizes[k]:,} tokens, " + ("all" if trained == sizes[k] else f"{trained:,}") + " trained on"
        lines += ["", _response_head(k, int(sample.labels_K[k]), values[k], length, screen)]
        for start, stop, is_trained in _runs(mask, sizes[k]):
            lines += _run(tokens[start:stop], is_trained, tokenizer, screen)
    return "\n".join(lines)


def show_record(record: GroupRecord, screen: Screen) -> str:
    """A record's group as text for a terminal; lengths in characters."""
    labels = [response.label or 0 for response in record.responses]
    lines = [_head("group", record.where, labels, screen)]
    lines.append(_paint(f"prompt: {num_characters(record.prompt):,} characters", "head", screen))
    lines += _turns(record.prompt, CONTEXT, screen)
    for k, response in enumerate(record.responses):
        value = math.nan if response.value is None else response.value
        length = f"{num_characters(response.text):,} characters"
        lines += ["", _response_head(k, labels[k], value, length, screen)]
        lines += _turns(response.text, "  ", screen)
    return "\n".join(lines)


FILTERS: dict[str, str] = {
    "one-sided": "without a positive or without a negative",
    "equal-values": "whose responses all have one value",
    "contradicting": "with a negative of a higher value than a positive",
    "masked": "with tokens that are not trained on inside a response",
    "no-end": "with a response that does not end with an end token",
}
"""What ``--only`` may ask of a group of a store; the first three of a record too."""


def keeps(
    name: str, labels: Sequence[int], values: Sequence[float], sample: GroupSample | None, ends: frozenset[int]
) -> bool:
    """Whether a group passes the filter ``name``; ``ends`` are the ids an answer may end with."""
    positives = [value for label, value in zip(labels, values) if label == POSITIVE]
    negatives = [value for label, value in zip(labels, values) if label == NEGATIVE]
    if name == "one-sided":
        return 0 not in labels and not (positives and negatives)
    if name == "equal-values":
        return len(values) > 1 and min(values) == max(values)
    if name == "contradicting":
        return bool(positives and negatives) and max(negatives) > min(positives)
    assert sample is not None
    if name == "masked":
        return any(mask is not None for mask in sample.response_masks)
    assert name == "no-end"
    return any(int(tokens[-1]) not in ends for tokens in sample.response_tokens)


def choose_rows(
    store: TokenStore,
    *,
    indices: Sequence[int] | None,
    where: str | None,
    seed: int | None,
    only: str | None,
    ends: frozenset[int],
) -> Iterator[int]:
    """Rows of a store to show: those named, or all that pass ``only``, in order or shuffled by ``seed``.

    Raises:
        DataError: a row or place that the store does not have.
    """
    if indices is not None:
        for index in indices:
            if not 0 <= index < len(store):
                raise DataError(f"--index must be from 0 to {len(store) - 1} in {store.path}, got {index}")
        yield from indices
        return
    if where is not None:
        yield _row_at(store, where)
        return
    for row in range(len(store)) if seed is None else _shuffled(len(store), seed):
        if only is not None:
            sample = store[row]
            if not keeps(only, sample.labels_K.tolist(), sample.values_K.tolist(), sample, ends):
                continue
        yield row


def _row_at(store: TokenStore, where: str) -> int:
    file, _, line = where.rpartition(":")
    sources = [source["path"] for source in store.meta["sources"]]
    matching = [i for i, path in enumerate(sources) if path == file or path.endswith(f"/{file}")]
    if line.isdigit() and matching:
        rows = np.flatnonzero((store.source_rows_G == int(line)) & np.isin(store.source_ids_G, matching))
        if len(rows):
            return int(rows[0])
    raise DataError(
        f"--where {where}: no group of {store.path} came from there (dropped, or no FILE:LINE of its sources: "
        f"{', '.join(sources[:3])}{', ...' if len(sources) > 3 else ''})"
    )


def _shuffled(num: int, seed: int) -> Iterator[int]:
    """All of 0..num-1 in a random order, without a list of them: a walk with a step that shares no factor with num."""
    rng = np.random.default_rng(seed)
    start, step = int(rng.integers(num)), int(rng.integers(1, num + 1))
    while math.gcd(step, num) != 1:
        step = step % num + 1
    return ((start + i * step) % num for i in range(num))


def choose_records(
    records: Iterable[GroupRecord],
    *,
    indices: Sequence[int] | None,
    where: str | None,
    seed: int | None,
    only: str | None,
    count: int,
) -> list[GroupRecord]:
    """Records to show, by a pass over them: those named, the first that pass ``only``, or ``count`` drawn by ``seed``.

    Raises:
        DataError: an index or place that is not there.
    """
    if indices is not None:
        wanted = dict.fromkeys(indices)
        found = dict(pair for pair in zip(range(max(indices) + 1), records) if pair[0] in wanted)
        if missing := [index for index in indices if index not in found]:
            raise DataError(
                f"--index {missing[0]}: the input has no such group; groups count from 0, bad ones left out"
            )
        return [found[index] for index in indices]
    if where is not None:
        for record in records:
            if record.where == where:
                return [record]
        raise DataError(f"--where {where}: no group of the input is from there; give FILE as in the input, then :LINE")
    passing = (record for record in records if only is None or _record_keeps(only, record))
    if seed is None:
        return list(itertools.islice(passing, count))
    return _reservoir(passing, count, seed)


def _record_keeps(name: str, record: GroupRecord) -> bool:
    values = [math.nan if response.value is None else response.value for response in record.responses]
    return keeps(name, [response.label or 0 for response in record.responses], values, None, frozenset())


def _reservoir(records: Iterable[GroupRecord], count: int, seed: int) -> list[GroupRecord]:
    """``count`` of a stream of unknown length, each as likely as any other."""
    rng, kept = np.random.default_rng(seed), []
    for number, record in enumerate(records):
        if number < count:
            kept.append(record)
        elif (place := int(rng.integers(number + 1))) < count:
            kept[place] = record
    return kept


def _head(name: str, where: str, labels: Sequence[int], screen: Screen) -> str:
    sides = ""
    if 0 not in labels:
        sides = f": {labels.count(POSITIVE)} positive, {labels.count(NEGATIVE)} negative"
    return _paint(f"{name} ({where}), {len(labels)} responses{sides}", "head", screen)


def _response_head(k: int, label: int, value: float, length: str, screen: Screen) -> str:
    side = _SIDES.get(label, "no label")
    value_text = "no value" if math.isnan(value) else f"value {value:.6g}"
    return f"response {k}  {_paint(side, side, screen)}  {value_text}  {length}"


def _runs(mask: np.ndarray | None, length: int) -> Iterator[tuple[int, int, bool]]:
    """``(start, stop, trained)`` of each stretch of equal mask."""
    position = 0
    for is_trained, run in itertools.groupby([True] * length if mask is None else mask.tolist()):
        stop = position + len(list(run))
        yield position, stop, is_trained
        position = stop


def _run(tokens: np.ndarray, is_trained: bool, tokenizer: Tokenizer, screen: Screen) -> list[str]:
    mark = TRAINED if is_trained else CONTEXT
    if screen.tokens:
        text = "  ".join(f"{i}:{tokenizer.decode([i])!r}" for i in tokens.tolist())
    else:
        text = _decode(tokens.tolist(), tokenizer)
    return _wrap(text, mark, screen)


def _decode(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text in which control tokens show even where the tokenizer decodes them to nothing."""
    silent = {i for i in tokenizer.special_ids.intersection(ids) if not tokenizer.decode([i])}
    names = {tokenizer.bos_id: "[begin]", tokenizer.eos_id: "[end]", tokenizer.pad_id: "[pad]"}
    parts = []
    for is_silent, run in itertools.groupby(ids, silent.__contains__):
        if is_silent:
            parts += [names.get(i, f"[token {i}]") for i in run]
        else:
            parts.append(tokenizer.decode(list(run)))
    return "".join(parts)


def _turns(text: Text, mark: str, screen: Screen) -> list[str]:
    if isinstance(text, str):
        return _wrap(text, mark, screen)
    lines = []
    for message in text:
        lines += [f"{mark}[{message.role}]", *_wrap(message.content, mark, screen)]
    return lines


def _wrap(text: str, mark: str, screen: Screen) -> list[str]:
    width = max(20, screen.width - len(mark))
    lines = []
    for line in _printable(text).removesuffix("\n").split("\n"):
        lines += textwrap.wrap(line, width, replace_whitespace=False) or [""]
    painter: Callable[[str], str] = (lambda line: _paint(line, "context", screen)) if mark == CONTEXT else str
    return [painter((mark + line).rstrip()) for line in lines]


def _printable(text: str) -> str:
    """Control characters, which could drive the terminal, as escapes."""
    return "".join(c if c in "\n" or c.isprintable() or c == "\u200d" else ascii(c)[1:-1] for c in text)


def _paint(text: str, name: str, screen: Screen) -> str:
    return f"{_COLOURS[name]}{text}\x1b[0m" if screen.colour and name in _COLOURS else text
