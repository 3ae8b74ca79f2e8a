"""One record to one prepared group: parse, partition, tokenize.

This is what worker processes run, so it stays clear of the store and of Megatron, which take seconds to import.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.counts import CountedError, Counts
from megatron_groupdpo.data.files.reader import Raw, parse_raw
from megatron_groupdpo.data.preprocess.partition import (
    Partition,
    cap_sides,
    distinct_responses,
    is_one_sided,
    partition_group,
)
from megatron_groupdpo.data.schemas import Schema, SchemaOptions, schema_named
from megatron_groupdpo.data.store.writer import GroupBlock, PreparedGroup, pack_groups
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenize import GroupTokenizer, TokenizedGroup, TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import Tokenizer, TokenizerOptions
from megatron_groupdpo.errors import ConfigError, DataError, StopError
from megatron_groupdpo.processes import follow_parent
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
    """``drop`` counts a record that cannot be used and goes on; broken JSON always stops: the file may be cut short."""

    def __post_init__(self) -> None:
        if self.on_bad_record not in ("error", "drop"):
            raise ConfigError(f"--on-bad-record must be one of error, drop, got {self.on_bad_record!r}")
        if self.schema != "auto":
            schema_named(self.schema)


class GroupPreparer:
    """One record to one prepared group. Holds the tokenizer; each worker process has its own."""

    def __init__(self, options: PreprocessOptions, tokenizer: Tokenizer | None = None) -> None:
        self._options = options
        self._tokenizer = GroupTokenizer(tokenizer or load_tokenizer(options.tokenizer), options.tokenize)

    def prepare(self, raw: Raw, where: str, schema: Schema, counts: Counts) -> PreparedGroup | None:
        """The group, or None where it is dropped; ``counts`` says why (but for the responses that go with a group).

        Raises:
            DataError: the record breaks a rule whose policy is to stop.
        """
        counts[why.GROUPS_READ] += 1
        try:
            record = schema.parse(parse_raw(raw, where), where, self._options.schema_options)
            counts[why.RESPONSES_READ] += len(record.responses)
            for name in record.unread:
                counts[why.unread_field(name)] += 1
            return self._prepare(record, schema, counts)
        except DataError as error:
            if self._options.on_bad_record == "error" or isinstance(error, StopError):
                raise
            counts[error.reason if isinstance(error, CountedError) else why.BAD_RECORD] += 1
            return None

    def _prepare(self, record: GroupRecord, schema: Schema, counts: Counts) -> PreparedGroup | None:
        partition = self._options.partition
        if schema.single_answers:
            partition = replace(partition, one_sided="keep")
        if partition.duplicates == "drop":
            distinct = distinct_responses(record.responses, partition)
            counts[why.DUPLICATE] += distinct.num_copies
            counts[why.CONTRADICTORY] += distinct.num_contradictory
            if len(distinct.responses) < len(record.responses):
                record = replace(record, responses=distinct.responses)
        sides = partition_group(record, partition)
        counts[why.TIED] += sides.num_ties
        counts[why.TIES_BROKEN] += sides.num_ties_broken
        counts[why.MIDDLE] += sides.num_middle
        counts[why.NOT_DRAWN] += sides.num_not_drawn
        sides, num_capped = cap_sides(record.responses, sides, partition)
        counts[why.CAPPED] += num_capped
        if not _sides_suffice(sides.labels, partition, record.where):
            counts[why.TIED_OUT if sides.num_ties else why.ONE_SIDED] += 1
            return None
        kept = replace(record, responses=tuple(record.responses[i] for i in sides.kept))
        tokenized = self._tokenizer.tokenize(kept, counts)
        if tokenized is None:
            return None
        labels = [sides.labels[response.index] for response in tokenized.responses]
        if partition.duplicates == "drop":
            tokenized, labels = _distinct_tokens(tokenized, labels, counts)
        if not _sides_suffice(labels, partition, record.where):
            counts[why.BECAME_ONE_SIDED] += 1
            return None
        counts[why.GROUPS_KEPT] += 1
        counts[why.AS_CHAT if self._tokenizer.is_chat(record) else why.AS_TEXT] += 1
        counts[why.KEPT_ONE_SIDED] += is_one_sided(labels)
        counts[why.RESPONSES_KEPT] += len(labels)
        counts[why.PROMPT_TOKENS] += len(tokenized.prompt_tokens)
        counts[why.RESPONSE_TOKENS] += sum(len(response.tokens) for response in tokenized.responses)
        return _prepared(kept, tokenized, labels)


def _distinct_tokens(group: TokenizedGroup, labels: list[int], counts: Counts) -> tuple[TokenizedGroup, list[int]]:
    """The responses whose tokens differ: of equal ones the first stays, and none where they are on both sides.

    Texts that differ may be the same tokens: a template trims, a tokenizer normalizes, ``truncate-response`` cuts.
    """
    same: dict[tuple[bytes, bytes], list[int]] = {}
    for i, response in enumerate(group.responses):
        mask = b"" if response.mask is None else response.mask.tobytes()
        same.setdefault((response.tokens.tobytes(), mask), []).append(i)
    kept = []
    for places in same.values():
        if len({labels[i] for i in places}) > 1:
            counts[why.SAME_TOKENS_AS_OTHER_SIDE] += len(places)
        else:
            counts[why.SAME_TOKENS] += len(places) - 1
            kept.append(places[0])
    if len(kept) == len(labels):
        return group, labels
    return replace(group, responses=tuple(group.responses[i] for i in kept)), [labels[i] for i in kept]


def _sides_suffice(labels: Iterable[int], partition: Partition, where: str) -> bool:
    """Whether the group stays; DataError where the policy is to stop."""
    labels = list(labels)
    if not is_one_sided(labels):
        return True
    if partition.one_sided == "error":
        raise StopError(
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


class Chunk(NamedTuple):
    """Consecutive records of one source, as they travel to a worker process."""

    source: str
    schema: str
    """Its name."""
    rows: list[int]
    raws: list[Raw]


class Prepared(NamedTuple):
    """What became of a chunk."""

    block: GroupBlock | None
    """The groups that stay, in order; None where none does."""
    counts: Counts


def prepare_chunk(preparer: GroupPreparer, chunk: Chunk) -> Prepared:
    """Parse and prepare every record of a chunk."""
    counts = Counts()
    schema = schema_named(chunk.schema)
    prepared = []
    for row, raw in zip(chunk.rows, chunk.raws):
        where = f"{chunk.source}:{row}"
        group = preparer.prepare(raw, where, schema, counts)
        if group is not None:
            prepared.append(group)
    counts[why.GROUP_DROPPED] = counts[why.RESPONSES_READ] - counts[why.RESPONSES_KEPT] - _num_dropped(counts)
    return Prepared(pack_groups(prepared) if prepared else None, counts)


def _num_dropped(counts: Counts) -> int:
    """Responses dropped on their own account."""
    return sum(n for reason, n in counts.items() if (reason.unit, reason.outcome) == ("responses", "dropped"))


_worker_preparer: GroupPreparer | None = None


def start_worker(options: PreprocessOptions) -> None:
    """Load the tokenizer once per worker process, and end with the parent, however that ends."""
    global _worker_preparer
    follow_parent()
    _worker_preparer = GroupPreparer(options)


def work(chunk: Chunk) -> Prepared:
    """:func:`prepare_chunk` in a worker process."""
    assert _worker_preparer is not None
    return prepare_chunk(_worker_preparer, chunk)
