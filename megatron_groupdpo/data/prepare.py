"""One record to one prepared group: parse, partition, tokenize.

This is what worker processes run, so it stays clear of the store and of Megatron, which take seconds to import.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.counts import Counts
from megatron_groupdpo.data.files import RawRecord
from megatron_groupdpo.data.partition import Partition, is_one_sided, partition_group
from megatron_groupdpo.data.schemas import Schema, SchemaOptions, schema_named
from megatron_groupdpo.data.tokenize import GroupTokenizer, TokenizedGroup, TokenizeOptions
from megatron_groupdpo.data.tokenizer import Tokenizer, TokenizerOptions, load_tokenizer
from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.types import POSITIVE, GroupRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessOptions:
    """What decides the contents of a store, the input aside."""

    tokenizer: TokenizerOptions
    tokenize: TokenizeOptions
    partition: Partition = field(default_factory=Partition)
    schema: str = "auto"
    """Name of a record schema, or ``auto``: detected for each source from its first records."""
    schema_options: SchemaOptions = field(default_factory=SchemaOptions)
    on_bad_record: Literal["error", "drop"] = "error"
    """``drop`` counts a record that breaks its schema's rules and goes on; broken JSON always stops."""

    def __post_init__(self) -> None:
        if self.on_bad_record not in ("error", "drop"):
            raise ConfigError(f"--on-bad-record must be one of error, drop, got {self.on_bad_record!r}")
        if self.schema != "auto":
            schema_named(self.schema)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedGroup:
    """A tokenized, partitioned group on its way into a store. K responses; see ``GroupSample`` for the arrays."""

    prompt_tokens: np.ndarray
    """[P] int32."""
    response_tokens: tuple[np.ndarray, ...]
    """K arrays [L_k] int32."""
    response_masks: tuple[np.ndarray | None, ...]
    """K arrays [L_k] bool, or None: all True."""
    labels: tuple[int, ...]
    """+1 or -1."""
    values: tuple[float, ...]
    """NaN where the data give none."""
    ref_logps: tuple[float, ...]
    """Summed reference log-probabilities; NaN where the data give none or the text was truncated."""
    source_row: int
    """Line or row in the source, from 1."""


class GroupPreparer:
    """One record to one prepared group. Holds the tokenizer; each worker process has its own."""

    def __init__(self, options: PreprocessOptions, tokenizer: Tokenizer | None = None) -> None:
        self._options = options
        self._tokenizer = GroupTokenizer(tokenizer or load_tokenizer(options.tokenizer), options.tokenize)

    def prepare(self, raw: RawRecord, where: str, schema: Schema, counts: Counts) -> PreparedGroup | None:
        """The group, or None where it is dropped; ``counts`` says why.

        Raises:
            DataError: the record breaks a rule whose policy is to stop.
        """
        counts[why.GROUPS_READ] += 1
        try:
            record = schema.parse(raw, where, self._options.schema_options)
        except DataError:
            if self._options.on_bad_record == "error":
                raise
            counts[why.BAD_RECORD] += 1
            return None
        counts[why.RESPONSES_READ] += len(record.responses)
        num_removed_before = _num_removed(counts)
        group = self._prepare(record, schema, counts)
        num_kept = len(group.labels) if group else 0
        num_removed = _num_removed(counts) - num_removed_before
        counts[why.GROUP_DROPPED] += len(record.responses) - num_removed - num_kept
        return group

    def _prepare(self, record: GroupRecord, schema: Schema, counts: Counts) -> PreparedGroup | None:
        partition = self._options.partition
        if schema.single_answers:
            partition = replace(partition, one_sided="keep")
        sides = partition_group(record.responses, partition, record.where)
        counts[why.TIED] += sides.num_ties
        counts[why.MIDDLE] += sides.num_middle
        if not _sides_suffice(sides.labels, partition, record.where):
            counts[why.ONE_SIDED] += 1
            return None
        kept = replace(record, responses=tuple(record.responses[i] for i in sides.kept))
        tokenized = self._tokenizer.tokenize(kept, counts)
        if tokenized is None:
            return None
        labels = [sides.labels[response.index] for response in tokenized.responses]
        if not _sides_suffice(labels, partition, record.where):
            counts[why.BECAME_ONE_SIDED] += 1
            return None
        counts[why.GROUPS_KEPT] += 1
        counts[why.KEPT_ONE_SIDED] += is_one_sided(labels)
        counts[why.RESPONSES_KEPT] += len(labels)
        counts[why.PROMPT_TOKENS] += len(tokenized.prompt_tokens)
        counts[why.RESPONSE_TOKENS] += sum(len(response.tokens) for response in tokenized.responses)
        return _prepared(kept, tokenized, labels)


def _num_removed(counts: Counts) -> int:
    """Responses dropped on their own account so far."""
    return sum(
        count
        for reason, count in counts.items()
        if (reason.unit, reason.outcome) == ("responses", "dropped") and reason != why.GROUP_DROPPED
    )


def _sides_suffice(labels: Iterable[int], partition: Partition, where: str) -> bool:
    """Whether the group stays; DataError where the policy is to stop."""
    labels = list(labels)
    if not is_one_sided(labels):
        return True
    if partition.one_sided == "error":
        raise DataError(
            f"{where}: a group needs positives and negatives, got {labels.count(POSITIVE)} and "
            f"{len(labels) - labels.count(POSITIVE)}; choose --one-sided drop or keep, or another --partition"
        )
    return partition.one_sided == "keep" and POSITIVE in labels


def _prepared(record: GroupRecord, tokenized: TokenizedGroup, labels: list[int]) -> PreparedGroup:
    responses = [record.responses[response.index] for response in tokenized.responses]
    is_whole = [tokenized.is_prompt_whole and response.is_whole for response in tokenized.responses]
    return PreparedGroup(
        prompt_tokens=tokenized.prompt_tokens,
        response_tokens=tuple(response.tokens for response in tokenized.responses),
        response_masks=tuple(response.mask for response in tokenized.responses),
        labels=tuple(labels),
        values=tuple(math.nan if response.value is None else response.value for response in responses),
        ref_logps=tuple(
            response.ref_logp if whole and response.ref_logp is not None else math.nan
            for response, whole in zip(responses, is_whole)
        ),
        source_row=int(record.where.rpartition(":")[2]),
    )


# Worker processes

Chunk = list[tuple[RawRecord, str]]
Prepared = tuple[list[PreparedGroup], Counts]


def prepare_chunk(preparer: GroupPreparer, schema: Schema, chunk: Chunk) -> Prepared:
    """The groups that stay, in order, and the counts."""
    counts = Counts()
    prepared = [preparer.prepare(raw, where, schema, counts) for raw, where in chunk]
    return [group for group in prepared if group is not None], counts


_worker_preparer: GroupPreparer | None = None


def start_worker(options: PreprocessOptions) -> None:
    """Load the tokenizer once per worker process."""
    global _worker_preparer
    _worker_preparer = GroupPreparer(options)


def work(schema_name: str, chunk: Chunk) -> Prepared:
    """:func:`prepare_chunk` in a worker process. The schema travels by name."""
    assert _worker_preparer is not None
    return prepare_chunk(_worker_preparer, schema_named(schema_name), chunk)
