"""One pass over a token store or over record files: statistics, findings in the texts, warnings."""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_groupdpo.data.counts import Counts, Reason, counts_as_json
from megatron_groupdpo.data.files.reader import count_records, expand_inputs, read_records
from megatron_groupdpo.data.inspect.stats import NUM_EXAMPLES, GroupBlock, Statistics
from megatron_groupdpo.data.inspect.texts import GroupFindings, TextCheck
from megatron_groupdpo.data.inspect.warnings import RULES, Finding, Seen, warnings_of
from megatron_groupdpo.data.schemas import SchemaOptions, choose_schema
from megatron_groupdpo.data.text.tokenizer import Tokenizer
from megatron_groupdpo.errors import DataError
from megatron_groupdpo.types import GroupRecord, Text

if TYPE_CHECKING:  # opening a store imports Megatron, which takes seconds and records do not need
    from megatron_groupdpo.data.store.reader import TokenStore

FULL_PASS_BELOW = 100_000
"""Groups up to which every text is looked at unless the caller sets a limit; above, as many are sampled."""
_GROUPS_PER_BLOCK = 1 << 16
_RECORDS_PER_BLOCK = 1024
_DETECTION_RECORDS = 16

OnProgress = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What an inspection says."""

    name: str
    """The data, in words."""
    unit: str
    """Of lengths: ``tokens`` or ``characters``."""
    stats: Statistics
    findings: list[Finding]
    notes: list[str]
    """What was sampled or left out."""
    end_tokens: dict[str, int] = field(default_factory=dict)
    """Last tokens of the responses whose texts were looked at."""
    preprocessing: Counts | None = None
    """What preprocessing read, kept, dropped and changed; None for records."""

    def as_json(self) -> dict[str, Any]:
        """Plain values, without NaN."""
        return {
            "data": self.name,
            "length_unit": self.unit,
            "statistics": self.stats.as_json(),
            "end_tokens": self.end_tokens,
            "preprocessing": None if self.preprocessing is None else counts_as_json(self.preprocessing),
            "warnings": [finding.as_json() for finding in self.findings],
            "notes": self.notes,
        }


class _Tally:
    """Findings of the groups looked at. Prompts are kept as 8-byte hashes."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        self.end_tokens: Counter[int] = Counter()
        self.num_groups = self.num_responses = 0
        self.unread: Counter[str] = Counter()
        """Groups by unknown field with text."""
        self._examples: dict[str, list[str]] = {}
        self._prompt_keys = array("Q")

    def add(self, name: str, num_responses: int, group: GroupFindings) -> None:
        self.num_groups += 1
        self.num_responses += num_responses
        self._prompt_keys.append(group.prompt_key)
        self.end_tokens += group.end_tokens
        for code, number in group.findings.items():
            assert code in RULES, code
            self.hits[code] += number
            kept = self._examples.setdefault(code, [])
            if len(kept) < NUM_EXAMPLES:
                kept.append(name)

    def seen(self, name_of: Callable[[int], str], place: str) -> Seen:
        """``name_of`` names the n-th group added."""
        _, first, inverse = np.unique(np.asarray(self._prompt_keys), return_index=True, return_inverse=True)
        repeats = np.flatnonzero(first[inverse] != np.arange(len(inverse)))
        self.hits["duplicate-prompts"] = len(repeats)
        self._examples["duplicate-prompts"] = [name_of(int(i)) for i in repeats[:NUM_EXAMPLES]]
        return Seen(
            hits=self.hits,
            num_groups=self.num_groups,
            num_responses=self.num_responses,
            examples=self._examples,
            place=place,
        )


def num_looked_at(total: int, limit: int | None) -> int:
    """Groups of ``total`` whose texts a limit lets through; None: 100,000; 0: all."""
    most = FULL_PASS_BELOW if limit is None else limit
    return min(total, most) if most else total


def inspect_store(
    store: TokenStore,
    tokenizer: Tokenizer | None,
    *,
    limit: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda num_groups: None,
) -> Inspection:
    """Statistics of every group; the tokens of at most ``limit`` groups, drawn evenly by ``seed``, are looked at.

    Args:
        store: an open token store.
        tokenizer: the store's own; None leaves the texts out.
        limit: None: 100,000; 0: all.
        seed: of the draw.
        on_progress: hears the number of groups looked at since the last call.
    """
    stats, tally, notes = Statistics(), _Tally(), []
    for block in _store_blocks(store):
        stats.add(block)
    rows = _sample(len(store), num_looked_at(len(store), limit), seed)
    place = ""
    if tokenizer is None:
        rows = rows[:0]
    elif len(rows) < len(store):
        place = " of the sample"
        notes.append(
            f"texts: {len(rows):,} of {len(store):,} groups were looked at, drawn evenly; repeated prompts are more "
            "than the sample shows. --limit 0 looks at all"
        )
    if tokenizer is not None:
        made = store.meta["options"].get("tokenize", {})
        check = TextCheck(tokenizer, has_tails=bool(made.get("train_on_turn_tail")))
        for row in rows.tolist():
            sample = store[row]
            tally.add(str(row), len(sample.response_tokens), check.sample(sample))
            on_progress(1)
    counts: Counts = Counter({Reason(*reason): count for *reason, count in store.meta["counts"]})
    seen = tally.seen(lambda i: str(rows[i]), place)
    return Inspection(
        name=f"token store {store.path}",
        unit="tokens",
        stats=stats,
        findings=warnings_of(stats, seen, counts),
        notes=notes,
        end_tokens=_names(tally.end_tokens, tokenizer),
        preprocessing=counts,
    )


@dataclass(slots=True)
class Records:
    """Record files as groups, in the order of the input.

    Raises:
        DataError: no such file, no schema fits, or broken JSON. A record that breaks its schema's rules is counted.
    """

    inputs: Sequence[str]
    schema: str = "auto"
    options: SchemaOptions = field(default_factory=SchemaOptions)
    bad: list[str] = field(default_factory=list)
    """Messages of the first bad records."""
    num_bad: int = 0
    schemas: dict[str, str] = field(default_factory=dict)
    """Schema of each source begun."""
    is_cut: bool = False
    """Whether a source had more records than were asked for."""

    def count(self) -> int | None:
        """Records in all sources; None where only reading them would tell."""
        sizes = [count_records(source) for source in expand_inputs(self.inputs)]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def read(self, limit: int | None = None) -> Iterator[GroupRecord]:
        """The groups; at most ``limit`` records of each source."""
        for source in expand_inputs(self.inputs):
            records = read_records(source)
            first = list(itertools.islice(records, _DETECTION_RECORDS))
            schema = choose_schema(self.schema, first)
            schema.check(self.options, source)
            self.schemas[source] = schema.name
            for number, (raw, where) in enumerate(itertools.chain(first, records)):
                if limit is not None and number >= limit:
                    self.is_cut = True
                    break
                try:
                    record = schema.parse(raw, where, self.options)
                except DataError as error:
                    self.num_bad += 1
                    if len(self.bad) < NUM_EXAMPLES:
                        self.bad.append(str(error))
                    continue
                yield record


def inspect_records(
    records: Records,
    tokenizer: Tokenizer | None = None,
    *,
    limit: int | None = None,
    on_progress: OnProgress = lambda num_groups: None,
) -> Inspection:
    """Statistics and findings of record files, lengths in characters.

    Args:
        records: where from; must not have been read yet.
        tokenizer: whose control tokens to look for in texts; None: those in wide use.
        limit: None: all where the files have fewer than 100,000 records, else that many, the first of each source;
            0: all.
        on_progress: hears the number of groups done since the last call.

    Raises:
        DataError: see :class:`Records`; or every record is bad.
    """
    total, share = records.count(), None
    if limit != 0 and (total is None or total > num_looked_at(total, limit)):
        share = max(1, (limit or FULL_PASS_BELOW) // len(expand_inputs(records.inputs)))
    stats, tally, check = Statistics(), _Tally(), TextCheck(tokenizer)
    places = _Places()
    for chunk in itertools.batched(records.read(share), _RECORDS_PER_BLOCK):
        stats.add(_record_block(chunk))
        for record in chunk:
            tally.add(record.where, len(record.responses), check.record(record))
            tally.unread.update(record.unread)
            places.add(record.where)
        on_progress(len(chunk))
    if not tally.num_groups:
        raise DataError(f"no record could be read as a group: {records.bad[0]}")
    notes = [f"{source}: schema {name}" for source, name in records.schemas.items()]
    if records.is_cut:
        notes.append(f"the first {share:,} records of each source were looked at; --limit 0 looks at all")
    seen = tally.seen(places.name, "")
    seen.hits["bad-records"] = records.num_bad
    seen.examples["bad-records"] = records.bad
    seen = _with_unread(seen, tally.unread)
    findings = warnings_of(stats, seen, None)
    return Inspection(name=", ".join(records.inputs), unit="characters", stats=stats, findings=findings, notes=notes)


def _with_unread(seen: Seen, unread: Counter[str]) -> Seen:
    """``seen`` with the groups that have text in unknown fields, the fields being the examples."""
    if unread:
        seen.hits["unread-fields"] = max(unread.values())
        seen.examples["unread-fields"] = [f"{name} ({count:,})" for name, count in unread.most_common(NUM_EXAMPLES)]
    return seen


class _Places:
    """``file:line`` of every record read, in 8 bytes each."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._starts: list[int] = []
        self._rows = array("q")

    def add(self, where: str) -> None:
        file, _, row = where.rpartition(":")
        if self._files[-1:] != [file]:
            self._files.append(file)
            self._starts.append(len(self._rows))
        self._rows.append(int(row))

    def name(self, index: int) -> str:
        return f"{self._files[bisect.bisect_right(self._starts, index) - 1]}:{self._rows[index]}"


def _store_blocks(store: TokenStore) -> Iterator[GroupBlock]:
    for start in range(0, len(store), _GROUPS_PER_BLOCK):
        stop = min(start + _GROUPS_PER_BLOCK, len(store))
        bounds = np.asarray(store.first_response_G1[start : stop + 1])
        rows = slice(int(bounds[0]), int(bounds[-1]))
        yield GroupBlock(
            names=range(start, stop),
            sizes_G=np.diff(bounds),
            prompt_lengths_G=store.prompt_lengths_G[start:stop].astype(np.int64),
            lengths_R=store.response_lengths_R[rows].astype(np.int64),
            labels_R=np.asarray(store.labels_R[rows]),
            values_R=store.values_R[rows].astype(np.float64),
        )


def _record_block(records: Sequence[GroupRecord]) -> GroupBlock:
    responses = [response for record in records for response in record.responses]
    values = [np.nan if response.value is None else response.value for response in responses]
    return GroupBlock(
        names=tuple(record.where for record in records),
        sizes_G=np.array([len(record.responses) for record in records], dtype=np.int64),
        prompt_lengths_G=np.array([num_characters(record.prompt) for record in records], dtype=np.int64),
        lengths_R=np.array([num_characters(response.text) for response in responses], dtype=np.int64),
        labels_R=np.array([response.label or 0 for response in responses], dtype=np.int8),
        values_R=np.array(values, dtype=np.float64),
    )


def num_characters(text: Text) -> int:
    """Of plain text, or of all messages' contents."""
    return len(text) if isinstance(text, str) else sum(len(message.content) for message in text)


def _sample(num: int, most: int, seed: int) -> np.ndarray:
    """At most ``most`` of ``num`` rows, rising: one drawn from each of as many equal stretches."""
    if num <= most:
        return np.arange(num)
    draws = np.random.default_rng(seed).random(most)
    return ((np.arange(most) + draws) * (num / most)).astype(np.int64)


def _names(ids: Counter[int], tokenizer: Tokenizer | None) -> dict[str, int]:
    """The most frequent ids by the name the tokenizer gives them, or by number."""
    if tokenizer is None:
        return {}
    common = ids.most_common(NUM_EXAMPLES)
    names = {i: tokenizer.decode([i]).strip() for i, _ in common}
    return {f"{i} {names[i]}".strip() + (" (eos)" if i == tokenizer.eos_id else ""): count for i, count in common}
